"""The operations compared with numpy and scipy: values in every layout and precision, and first and second
derivatives."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d, correlate2d
from torch.autograd import gradcheck, gradgradcheck

from stylegan_pg.ops import bias_act, downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

FACTORS = [1, 2, 3, (2, 1), (1, 3)]
PADDINGS = [0, 2, (1, 2), (3, 1, 0, 2), (-1, 2, 1, -2), -1]
TAPS = [[1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1], [1, 5, 10, 10, 5, 1]]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return float64 values from a standard normal distribution."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def four(padding) -> tuple[int, int, int, int]:
    """Return the padding as left, right, top, bottom."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    return padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])


def reference(x: np.ndarray, f: np.ndarray, up, down, padding, flip: bool, gain: float) -> np.ndarray:
    """Compute upfirdn2d from its definition, image by image: [N, C, H, W] -> [N, C, H', W']."""
    (ux, uy), (dx, dy) = ((k, k) if isinstance(k, int) else k for k in (up, down))
    left, right, top, bottom = four(padding)
    n, c, h, w = x.shape
    spread = np.zeros([n, c, h * uy, w * ux])
    spread[:, :, ::uy, ::ux] = x
    spread = np.pad(spread, [(0, 0), (0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))])
    h, w = spread.shape[2:]
    spread = spread[:, :, max(-top, 0) : h - max(-bottom, 0), max(-left, 0) : w - max(-right, 0)]
    operation = correlate2d if flip else convolve2d
    images = [operation(image, f, mode="valid") for image in spread.reshape(n * c, *spread.shape[2:])]
    return gain * np.stack(images).reshape(n, c, *images[0].shape)[:, :, ::dy, ::dx]


def agree(x: torch.Tensor, f: torch.Tensor, tolerance: float = 1e-12, **how) -> None:
    expected = reference(
        x.double().numpy(),
        f.double().numpy(),
        how.get("up", 1),
        how.get("down", 1),
        how.get("padding", 0),
        how.get("flip_filter", False),
        how.get("gain", 1.0),
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        y = upfirdn2d(x.contiguous(memory_format=layout), f, **how)
        assert y.dtype == x.dtype
        assert y.shape == expected.shape
        np.testing.assert_allclose(y.double().numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- upfirdn2d --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("down", FACTORS)
@pytest.mark.parametrize("up", FACTORS)
def test_upfirdn2d_agrees_with_its_definition(up, down, padding):
    x, f = numbers(2, 3, 7, 6), numbers(3, 4, seed=1).float()  # without any symmetry
    for flip in (False, True):
        agree(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=0.5)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (9, 7)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (5, 2), (4, 4)])
def test_upfirdn2d_of_small_and_odd_sizes(size, shape):
    x, f = numbers(1, 2, *size), numbers(*shape, seed=1).float()
    for padding in (4, (4, 3, 3, 5)):
        agree(x, f, up=2, padding=padding)
        agree(x, f, up=(3, 2), down=(2, 3), padding=padding, flip_filter=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_upfirdn2d_in_lower_precision(dtype, tolerance):
    x, f = numbers(2, 3, 8, 8).to(dtype), setup_filter([1, 3, 3, 1])
    for how in ({"up": 2, "padding": (2, 1, 2, 1), "gain": 4.0}, {"down": 2, "padding": 1}, {"padding": (2, 1, 2, 1)}):
        agree(x, f, tolerance, **how)


@pytest.mark.parametrize(
    "how",
    [
        {"padding": 1},
        {"padding": (2, 1, 2, 1), "gain": 4.0},
        {"up": 2, "padding": (2, 1, 2, 1)},
        {"up": 2, "padding": 2, "flip_filter": True},
        {"down": 2, "padding": 1},
        {"down": 2, "padding": (0, 1, 2, 1), "flip_filter": True},
        {"up": (2, 3), "down": (3, 2), "padding": (3, 1, 2, 4)},
        {"up": 3, "padding": (-1, 2, 3, -2)},
        {"down": (1, 3), "padding": -1},
    ],
)
def test_first_and_second_derivatives_of_upfirdn2d(how):
    x, f = numbers(1, 2, 4, 5).requires_grad_(True), numbers(2, 3, seed=1).float()
    assert gradcheck(lambda t: upfirdn2d(t, f, **how), [x])
    # Derivatives of the square: a linear operation has no second derivative.
    assert gradgradcheck(lambda t: upfirdn2d(t, f, **how).square(), [x], fast_mode=True)


# --- what is made of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", TAPS)
def test_resampling_keeps_the_brightness_and_sets_the_size(taps):
    f = setup_filter(taps)
    assert f.dtype == torch.float32
    assert float(f.sum()) == pytest.approx(1)
    for h, w in ((20, 20), (21, 19)):
        x = torch.full([1, 2, h, w], 3.0)
        for y, size in (
            (filter2d(x, f), (h, w)),
            (upsample2d(x, f), (2 * h, 2 * w)),
            (downsample2d(x, f), (h // 2, w // 2)),
        ):
            assert y.shape[2:] == size
            torch.testing.assert_close(y[:, :, 4:-4, 4:-4], torch.full_like(y[:, :, 4:-4, 4:-4], 3.0))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 5, 10, 10, 5, 1]])
def test_resampling_does_not_shift_images(taps):
    # Pixel i covers [i, i + 1]. A ramp must remain the same ramp, sampled at the centres of the new pixels.
    f = setup_filter(taps)
    x = (torch.arange(24) + 0.5).expand(1, 1, 24, 24)
    for image in (x, x.transpose(2, 3)):
        axis = 3 if image is x else 2
        for y, pixel in ((upsample2d(image, f), 0.5), (downsample2d(image, f), 2.0)):
            centres = (torch.arange(y.shape[axis]) + 0.5) * pixel
            inner = y.movedim(axis, 3)[0, 0, 4:-4, 4:-4]
            expected = centres[4:-4].expand_as(inner)
            if (
                pixel == 0.5 and len(taps) == 2
            ):  # the box filter repeats pixels, with an error of a quarter of an input pixel
                assert (inner - expected).abs().max() == pytest.approx(0.25)
            else:
                torch.testing.assert_close(inner, expected)


def test_gain_and_padding_of_the_resamplers():
    f, x = setup_filter([1, 3, 3, 1], gain=2.0), numbers(1, 1, 8, 8)
    assert float(f.sum()) == pytest.approx(2)
    for function in (filter2d, upsample2d, downsample2d):
        torch.testing.assert_close(function(x, f, gain=3.0), 3 * function(x, f))
    assert filter2d(x, f, padding=2).shape[2:] == (12, 12)
    assert upsample2d(x, f, padding=2).shape[2:] == (20, 20)
    assert downsample2d(x, f, padding=2).shape[2:] == (6, 6)
    torch.testing.assert_close(filter2d(x, f, padding=2)[:, :, 2:-2, 2:-2], filter2d(x, f))


# --- bias_act ---------------------------------------------------------------------------------------------------------

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
# name -> (function, gain, whether all its derivatives are continuous)
ACTIVATIONS = {
    "linear": (lambda x: x, 1, True),
    "relu": (lambda x: np.maximum(x, 0), math.sqrt(2), False),
    "lrelu": (lambda x: np.maximum(x, 0.2 * x), math.sqrt(2), False),
    "tanh": (np.tanh, 1, True),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), 1, True),
    "elu": (lambda x: np.where(x > 0, x, np.exp(x) - 1), 1, False),
    "selu": (lambda x: SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * (np.exp(x) - 1)), 1, False),
    "softplus": (lambda x: np.log1p(np.exp(x)), 1, True),
    "swish": (lambda x: x / (1 + np.exp(-x)), math.sqrt(2), True),
}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_agrees_with_its_definition(act):
    function, default_gain, _ = ACTIVATIONS[act]
    x = 2 * numbers(3, 4, 5, 6)
    for dim in (0, 1, 3):
        b = numbers(x.shape[dim], seed=1)
        shape = [-1 if i == dim else 1 for i in range(4)]
        biased = function(x.numpy() + b.numpy().reshape(shape))
        for gain in (None, 0.5):
            expected = biased * (default_gain if gain is None else gain)
            np.testing.assert_allclose(bias_act(x, b, act=act, gain=gain, dim=dim), expected, atol=1e-12)
            clamped = bias_act(x, b, act=act, gain=gain, clamp=0.3, dim=dim)
            np.testing.assert_allclose(clamped, expected.clip(-0.3, 0.3), atol=1e-12)
    np.testing.assert_allclose(bias_act(x, act=act), default_gain * function(x.numpy()), atol=1e-12)


def test_bias_act_defaults_and_precision():
    x, b = numbers(4, 3), numbers(3, seed=1)
    np.testing.assert_allclose(bias_act(x, b), x.numpy() + b.numpy())
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 3e-2)):
        low = x.to(dtype)
        y = bias_act(low, b.float(), act="lrelu")
        assert y.dtype == dtype
        np.testing.assert_allclose(y.double(), bias_act(x, b, act="lrelu"), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_first_and_second_derivatives_of_bias_act(act):
    x = numbers(2, 3, 4)
    if not ACTIVATIONS[act][2]:
        x = x.sign() * (x.abs() + 0.3)  # the bias below is too small to reach the kink at 0
    b = 0.1 * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    inputs = [x.requires_grad_(True), b.requires_grad_(True)]

    def unclamped(x, b):
        return bias_act(x, b, act=act, gain=1.3)

    assert gradcheck(unclamped, inputs)
    assert gradgradcheck(lambda x, b: unclamped(x, b).square(), inputs)
    magnitudes = unclamped(x, b).detach().abs().flatten().sort().values
    middle = len(magnitudes) // 2 + int(magnitudes[len(magnitudes) // 2 :].diff().argmax())
    clamp = float(magnitudes[middle : middle + 2].mean())  # in the widest gap, away from every value
    assert 0 < float((magnitudes > clamp).sum()) < len(magnitudes)
    assert gradcheck(lambda x, b: bias_act(x, b, act=act, gain=1.3, clamp=clamp), inputs)
    assert gradgradcheck(lambda x, b: bias_act(x, b, act=act, gain=1.3, clamp=clamp).square(), inputs)
