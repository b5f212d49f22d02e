"""The networks: growing is seamless, nothing is unused, and what the layers compute, by independent references."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import convolve2d

from stylegan_pg.errors import UsageError
from stylegan_pg.networks import copy_same_names, to_channels_last
from stylegan_pg.networks.layers import Conv2d, SynthesisLayer, ToRGB, minibatch_stddev
from stylegan_pg.networks.public_names import from_public, to_public
from stylegan_pg.networks.stylegan2 import Discriminator, Generator
from stylegan_pg.ops import downsample2d, upsample2d
from stylegan_pg.schedule import deal

ARCHITECTURES = ["skip", "resnet", "orig"]
CLASSES = 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(make: Callable[[], torch.nn.Module], seed: int = 0) -> Any:
    """In float64, with every parameter and buffer away from its initial value: no noise strength or bias is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().double()
        for tensor in net.state_dict().values():
            tensor += 0.3 * torch.randn_like(tensor)
    return net


def generator(resolution: int, seed: int = 0, **kwargs) -> Generator:
    small = {"z_dim": 8, "w_dim": 10, "mapping_layers": 2, "channel_base": 64, "channel_max": 12}
    return shaken(lambda: Generator(**{"resolution": resolution, **small, **kwargs}), seed)


def discriminator(resolution: int, seed: int = 0, **kwargs) -> Discriminator:
    small = {"mapping_layers": 2, "channel_base": 64, "channel_max": 12}
    return shaken(lambda: Discriminator(**{"resolution": resolution, **small, **kwargs}), seed)


def labels(n: int) -> torch.Tensor:
    return F.one_hot(torch.arange(n) % CLASSES, CLASSES).double()


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


def differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float((a - b).abs().max()) > 1e-3 * float(b.abs().max())


# --- growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("low", [4, 8])
@torch.no_grad()
def test_the_generator_grows_without_a_jump(low, architecture):
    old = generator(low, architecture=architecture)
    fading = generator(2 * low, 1, architecture=architecture, fade=True)
    fresh = copy_same_names(fading, old)
    assert fresh
    assert all(name.startswith(f"synthesis.b{2 * low}.") for name in fresh)

    z, ws = normal(3, 8), normal(3, fading.num_ws, 10, seed=1)
    filter_ = old.synthesis.filter
    at_start = fading.synthesis(ws, alpha=0.0)
    close(at_start, upsample2d(old.synthesis(ws[:, :-2]), filter_))
    close(fading(z, alpha=0.0), upsample2d(old(z), filter_))

    stable = generator(2 * low, 2, architecture=architecture)
    assert copy_same_names(stable, fading) == []
    at_end = fading.synthesis(ws, alpha=1.0)
    close(at_end, stable.synthesis(ws))
    close(stable.synthesis(ws, alpha=0.3), at_end)  # alpha means nothing outside a fade
    differ(at_start, at_end)
    close(fading.synthesis(ws, alpha=0.25), 0.75 * at_start + 0.25 * at_end)


@pytest.mark.parametrize("c_dim", [0, CLASSES])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("low", [4, 8])
@torch.no_grad()
def test_the_discriminator_grows_without_a_jump(low, architecture, c_dim):
    kwargs = {"architecture": architecture, "c_dim": c_dim}
    old = discriminator(low, **kwargs)
    fading = discriminator(2 * low, 1, fade=True, **kwargs)
    assert all(name.startswith(f"b{2 * low}.") for name in copy_same_names(fading, old))

    x, c = normal(4, 3, 2 * low, 2 * low), labels(4) if c_dim else None
    at_start = fading(x, c, alpha=0.0)
    close(at_start, old(downsample2d(x, old.filter), c))

    stable = discriminator(2 * low, 2, **kwargs)
    assert copy_same_names(stable, fading) == []
    at_end = fading(x, c, alpha=1.0)
    close(at_end, stable(x, c))
    close(stable(x, c, alpha=0.3), at_end)
    differ(at_start, at_end)
    for alpha in (0.001, 0.999):  # and continuous in between
        nearest = at_start if alpha < 0.5 else at_end
        assert float((fading(x, c, alpha=alpha) - nearest).abs().max()) < 0.1 * float((at_start - at_end).abs().max())


@pytest.mark.parametrize(
    ("g_architecture", "d_architecture", "fade", "c_dim"),
    [(*pair, fade, 0) for pair in zip(ARCHITECTURES, ARCHITECTURES, strict=True) for fade in (True, False)]
    + [("skip", "resnet", True, CLASSES)],
)
@pytest.mark.parametrize("resolution", [8, 16])
def test_every_parameter_is_used(resolution, g_architecture, d_architecture, fade, c_dim):
    G = generator(resolution, architecture=g_architecture, fade=fade, c_dim=c_dim)
    D = discriminator(resolution, architecture=d_architecture, fade=fade, c_dim=c_dim)
    c = labels(4) if c_dim else None
    image = G(normal(4, 8), c, alpha=0.4, noise="random", generator=torch.Generator().manual_seed(0))
    D(image, c, alpha=0.4).square().sum().backward()
    for net in (G, D):
        for name, p in net.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


def test_a_fading_network_has_no_public_form():
    for net in (generator(8, fade=True), discriminator(8, fade=True)):
        with pytest.raises(UsageError, match="fade"):
            to_public(net)
    for net in (generator(8), discriminator(8)):
        ours, back = net.state_dict(), from_public(to_public(net))
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[name], back[name]) for name in ours)


# --- shapes and conditions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
@torch.no_grad()
def test_image_channels(channels):
    for architecture, fade in itertools.product(ARCHITECTURES, (False, True)):
        kwargs = {"architecture": architecture, "img_channels": channels, "fade": fade}
        image = generator(16, **kwargs)(normal(2, 8), alpha=0.5)
        assert image.shape == (2, channels, 16, 16)
        assert discriminator(16, **kwargs)(image, alpha=0.5).shape == (2, 1)


@torch.no_grad()
def test_conditions_are_needed_and_count():
    G, D = generator(8, c_dim=CLASSES), discriminator(8, c_dim=CLASSES)
    z, x = normal(4, 8), normal(4, 3, 8, 8)
    for call in (lambda: G(z), lambda: D(x)):
        with pytest.raises(ValueError, match="conditional"):
            call()
    differ(G(z, labels(4)), G(z, labels(4).roll(1, 0)))
    differ(D(x, labels(4)), D(x, labels(4).roll(1, 0)))
    assert generator(8)(z).shape == (4, 3, 8, 8)
    assert discriminator(8)(x).shape == (4, 1)


@pytest.mark.parametrize("taps", [[1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1], [1, 5, 10, 10, 5, 1]])
@torch.no_grad()
def test_filters_of_any_length_keep_the_sizes(taps):
    for architecture in ARCHITECTURES:
        kwargs = {"architecture": architecture, "fade": True, "resample_filter": taps}
        image = generator(16, **kwargs)(normal(2, 8), alpha=0.5)
        assert image.shape[2:] == (16, 16)
        assert discriminator(16, **kwargs)(image, alpha=0.5).shape == (2, 1)
    layer = SynthesisLayer(3, 5, 10, (10, 10), up=2, resample_filter=taps).double()
    assert layer(normal(1, 3, 5, 5), normal(1, 10)).shape == (1, 5, 10, 10)
    for kernel, h in itertools.product((1, 3), (4, 6)):
        x = normal(1, 3, h, h)
        assert Conv2d(3, 2, kernel, up=2, resample_filter=taps).double()(x).shape == (1, 2, 2 * h, 2 * h)
        assert Conv2d(3, 2, kernel, down=2, resample_filter=taps).double()(x).shape == (1, 2, h // 2, h // 2)


# --- styles and noise -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_truncation():
    G, z = generator(16), normal(3, 8)
    mean = G.mapping.w_avg
    assert float(mean.abs().min()) > 0
    mean_image = G.synthesis(mean.expand(1, G.num_ws, -1))
    close(G(z, psi=0), mean_image.expand(3, -1, -1, -1))
    w = G.mapping(z)
    for cutoff in (None, 0, 3, G.num_ws):
        ws = G.styles(z, psi=0.6, cutoff=cutoff)
        layers = G.num_ws if cutoff is None else cutoff
        for i in range(G.num_ws):
            close(ws[:, i], mean + 0.6 * (w - mean) if i < layers else w)
    close(G.styles(z), w[:, None].expand(-1, G.num_ws, -1))
    close(G(z, psi=0.6, cutoff=3), G.synthesis(G.styles(z, psi=0.6, cutoff=3)))


@torch.no_grad()
def test_noise_modes():
    G, z = generator(8), normal(1, 8).expand(2, -1)
    fixed, without = G(z), G(z, noise="none")
    assert torch.equal(G(z), fixed)
    close(fixed[0], fixed[1])
    differ(fixed, without)
    silent = generator(8, 1, use_noise=False)
    assert copy_same_names(silent, G) == []
    close(silent(z), without)

    def random(seed: int) -> torch.Tensor:
        return G(z, noise="random", generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(random(1), random(1))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is taken from the global stream
    differ(random(1), random(2))
    differ(random(1)[:1], random(1)[1:])  # every image has its own


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


# --- layers against references ----------------------------------------------------------------------------------------


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
def test_modulated_convolution_is_a_grouped_one_with_weights_per_sample():
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
    """Zeros put in, true convolution with the kernel, then the filter; output pixel 2j, 2j + 1 lie within pixel j."""
    n, i, o, size = 2, 3, 4, 5
    layer = shaken(lambda: SynthesisLayer(i, o, 10, (2 * size, 2 * size), up=2, resample_filter=taps))
    x, w = normal(n, i, size, size), normal(n, 10, seed=1)
    weights = modulated_weights(layer, w, 1.0, True).numpy()
    spread = np.zeros([n, i, 2 * size, 2 * size])
    spread[:, :, ::2, ::2] = x
    f = 4 * np.outer(taps, taps) / np.sum(taps) ** 2
    start = len(taps) // 2  # of 2 * size pixels within the full result, kernel and filter being centred
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


@pytest.mark.parametrize(("batch", "parts"), [(12, 3), (16, 2), (20, 3), (8, 5)])
@torch.no_grad()
def test_logits_of_dealt_shares_are_those_of_the_batch(batch, parts):
    D, x = discriminator(8), normal(batch, 3, 8, 8)
    whole, together = D(x), torch.full([batch, 1], math.nan, dtype=torch.float64)
    for share in deal(batch, 4, parts):
        if share:
            together[share] = D(x[share])
    close(together, whole)
    assert float((D(x[:4]) - whole[:4]).abs().max()) > 1e-6  # a contiguous slice has other groups


# --- precision and layout ---------------------------------------------------------------------------------------------


def test_bfloat16_in_the_highest_resolutions():
    low = {"low_precision": "bf16", "low_precision_at": [8, 16]}
    G, D = generator(16).float(), discriminator(16).float()
    half_G, half_D = generator(16, 1, **low).float(), discriminator(16, 1, **low).float()
    copy_same_names(half_G, G)
    copy_same_names(half_D, D)
    assert {p.dtype for p in [*half_G.parameters(), *half_D.parameters()]} == {torch.float32}
    z = normal(4, 8).float()
    with torch.no_grad():
        image, half_image = G(z), half_G(z)
        assert half_image.dtype == torch.float32
        assert 0 < float((half_image - image).std() / image.std()) < 0.05
        logits, half_logits = D(image), half_D(image)
        assert half_logits.dtype == torch.float32
        assert 0 < float((half_logits - logits).abs().max() / logits.abs().max()) < 0.1
    half_D(half_G(z)).sum().backward()
    for p in [*half_G.parameters(), *half_D.parameters()]:
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def test_low_precision_blocks_are_those_from_the_given_resolution():
    seen: dict[str, torch.dtype] = {}
    for net in (
        generator(16, low_precision="bf16", low_precision_at=[16]).float(),
        discriminator(16, low_precision="bf16", low_precision_at=[16]).float(),
    ):
        blocks = net.synthesis if isinstance(net, Generator) else net
        for r in (4, 8, 16):
            name = f"{type(net).__name__}.b{r}"
            block = getattr(blocks, f"b{r}")
            block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
        net(normal(4, 8).float() if isinstance(net, Generator) else normal(4, 3, 16, 16).float())
    assert [name for name, dtype in seen.items() if dtype == torch.bfloat16] == ["Generator.b16", "Discriminator.b16"]
    for make in (Generator, Discriminator):  # half precision does not run on CPUs, but can be built there
        net = make(resolution=16, channel_base=64, low_precision="fp16", low_precision_at=[8, 16, 32])
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert sorted(n for n, m in net.named_modules() if getattr(m, "dtype", None) == torch.float16) == sorted(
            n for n, _ in net.named_modules() if n.split(".")[-1] in ("b8", "b16")
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_channels_last_gives_the_same(architecture):
    G = generator(16, architecture=architecture, fade=True).float()
    D = discriminator(16, architecture=architecture, fade=True).float()
    other_G: Any = to_channels_last(copy.deepcopy(G))
    other_D: Any = to_channels_last(copy.deepcopy(D))
    layouts = []
    for block in (other_G.synthesis.b16, other_D.b8):
        block.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    z = normal(4, 8).float()
    image = G(z, alpha=0.5)
    close(other_G(z, alpha=0.5), image, 1e-5)
    close(other_D(image.contiguous(memory_format=torch.channels_last), alpha=0.5), D(image, alpha=0.5), 1e-5)
    assert layouts == [True, True]
