"""Layers compared with independent references."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import CLASSES, close, generator, labels, normal, shaken
from scipy.signal import convolve2d

from stylegan_pg.networks import layers
from stylegan_pg.networks.layers import minibatch_stddev
from stylegan_pg.networks.modulation import SynthesisLayer, ToRGB


@torch.no_grad()
def test_latents_and_labels_are_normalised():
    G = generator(8, c_dim=CLASSES)
    close(G.mapping(5 * normal(3, 8), labels(3)), G.mapping(normal(3, 8), labels(3)), 1e-6)
    w = G.mapping(z := normal(3, 8), c := labels(3))
    x = z / z.square().mean(dim=1, keepdim=True).sqrt()
    e = c @ G.mapping.embed.weight.t() / math.sqrt(CLASSES) + G.mapping.embed.bias
    x = torch.cat([x, e / e.square().mean(dim=1, keepdim=True).sqrt()], dim=1)
    for i in range(2):
        fc = getattr(G.mapping, f"fc{i}")
        x = x @ fc.weight.t() * 0.01 / math.sqrt(x.shape[1]) + 0.01 * fc.bias
        x = math.sqrt(2) * torch.where(x > 0, x, 0.2 * x)
    close(w, x, 1e-6)


def modulated_weights(layer, w: torch.Tensor, gain: float, demodulate: bool) -> torch.Tensor:
    """The per-sample weights [N, O, I, k, k] of Karras et al. 2020, equations 1 and 3."""
    s = w @ layer.affine.weight.t() / math.sqrt(w.shape[1]) + layer.affine.bias
    weights = layer.weight[None] * gain * s[:, None, :, None, None]
    if demodulate:
        weights = weights / (weights.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).sqrt()
    return weights


def epilogue(x: torch.Tensor, bias: torch.Tensor, clamp: float) -> torch.Tensor:
    x = x + bias[:, None, None]
    return (math.sqrt(2) * torch.where(x > 0, x, 0.2 * x)).clamp(-clamp, clamp)


@torch.no_grad()
def test_modulated_convolution_equals_a_grouped_convolution():
    n, i, o, size = 4, 6, 5, 7
    layer = shaken(lambda: SynthesisLayer(i, o, 10, (size, size), clamp=1.5))
    rgb = shaken(lambda: ToRGB(i, 3, 10, clamp=1.5))
    x, w = normal(n, i, size, size), normal(n, 10, seed=1)

    def grouped(weights: torch.Tensor) -> torch.Tensor:
        flat = weights.reshape(-1, i, *weights.shape[3:])
        y = F.conv2d(x.reshape(1, n * i, size, size), flat, padding=flat.shape[-1] // 2, groups=n)
        return y.reshape(n, -1, size, size)

    plain = grouped(modulated_weights(layer, w, 1.0, True))
    close(layer(x, w, noise="none"), epilogue(plain, layer.bias, 1.5))
    close(layer(x, w), epilogue(plain + layer.noise_const * layer.noise_strength, layer.bias, 1.5))
    close(layer(x, w, noise="none", gain=0.5), 0.5 * layer(x, w, noise="none"))
    plain = grouped(modulated_weights(rgb, w, 1 / math.sqrt(i), False))
    close(rgb(x, w), (plain + rgb.bias[:, None, None]).clamp(-1.5, 1.5))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 5, 10, 10, 5, 1]])
@torch.no_grad()
def test_up_sampling_layers(taps):
    """They insert zeros, convolve with the kernel, and apply the filter. The output pixels 2j and 2j + 1 lie within
    pixel j."""
    n, i, o, size = 2, 3, 4, 5
    layer = shaken(lambda: SynthesisLayer(i, o, 10, (2 * size, 2 * size), up=2, resample_filter=taps))
    x, w = normal(n, i, size, size), normal(n, 10, seed=1)
    weights = modulated_weights(layer, w, 1.0, True).numpy()
    spread = np.zeros([n, i, 2 * size, 2 * size])
    spread[:, :, ::2, ::2] = x
    f = 4 * np.outer(taps, taps) / np.sum(taps) ** 2
    start = (
        len(taps) // 2
    )  # the position of the 2 * size pixels within the full result, because kernel and filter are centred
    expected = np.zeros([n, o, 2 * size, 2 * size])
    for a, b, c in itertools.product(range(n), range(o), range(i)):
        full = convolve2d(convolve2d(spread[a, c], weights[a, b, c]), f)
        expected[a, b] += full[start : start + 2 * size, start : start + 2 * size]
    close(layer(x, w, noise="none"), epilogue(torch.from_numpy(expected), layer.bias, 1e9), 1e-6)


@pytest.mark.parametrize(("n", "group", "channels"), [(8, 4, 1), (12, 3, 2), (4, 4, 1), (5, 1, 3)])
def test_minibatch_stddev(n, group, channels):
    x = normal(n, 6, 4, 4)
    y = minibatch_stddev(x, group, channels).numpy()
    assert y.shape == (n, 6 + channels, 4, 4)
    np.testing.assert_array_equal(y[:, :6], x)
    for first in range(n // group):
        members = list(range(first, n, n // group))
        deviation = np.sqrt(x.numpy()[members].var(axis=0) + 1e-8)
        for k in range(channels):
            width = 6 // channels
            np.testing.assert_allclose(y[members, 6 + k], deviation[k * width : (k + 1) * width].mean())
    with pytest.raises(ValueError, match="does not divide"):
        minibatch_stddev(normal(7, 6, 4, 4), 2)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("k", [1, 3])
def test_bf16_on_cpus_without_bf16_instructions(monkeypatch, up, down, k):
    """Convolutions are computed in float32 and rounded. Values and both derivatives are accurate to the precision of
    bfloat16, and float32 networks are not affected."""
    dice = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=dice) for shape in ([2, 6, 9, 8], [5, 6, k, k]))
    f = layers.low_pass([1, 3, 3, 1])

    def everything(dtype: torch.dtype) -> list[torch.Tensor]:
        a, b = (t.detach().to(dtype).requires_grad_(True) for t in (x, weight))
        y = layers.resampling_conv2d(a, b, f, up=up, down=down)
        assert y.dtype == dtype
        first = torch.autograd.grad(y.square().sum(), [a, b], create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].square().sum(), [a, b])]

    results = {}
    for has in (True, False):
        monkeypatch.setattr(layers, "MULTIPLIES_BF16", has)
        results[has] = everything(torch.bfloat16)
    exact = everything(torch.float32)
    for with_, without, wanted in zip(results[True], results[False], exact, strict=True):
        assert without.dtype == torch.bfloat16
        for value in (with_, without):
            assert (value.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
