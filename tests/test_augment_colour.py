"""Augmentation of colours, frequency bands, noise and cutout, and DiffAugment, compared with NumPy and SciPy."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from augmenting import fixed, made, pictures
from torchvision.transforms import functional as vision

from stylegan_pg.augment import colour
from stylegan_pg.rng import generator


def numpy_colour(pixel: np.ndarray, brightness=0.0, contrast=1.0, luma_flip=0, hue=0.0, saturation=1.0) -> np.ndarray:
    """Transform one RGB colour with homogeneous 4x4 matrices, as in the paper's pseudocode."""
    v = np.array([1, 1, 1, 0]) / np.sqrt(3)
    m = np.eye(4)
    m[:3, 3] = brightness
    m = np.diag([contrast, contrast, contrast, 1]) @ m
    m = (np.eye(4) - 2 * np.outer(v, v) * luma_flip) @ m
    axis, turned = v[:3], np.eye(4)
    for i in range(3):  # Rodrigues' rotation formula for each basis vector
        e = np.eye(3)[i]
        turned[:3, i] = e * np.cos(hue) + np.cross(axis, e) * np.sin(hue) + axis * (axis @ e) * (1 - np.cos(hue))
    m = turned @ m
    m = (np.outer(v, v) + (np.eye(4) - np.outer(v, v)) * saturation) @ m
    return (m @ [*pixel, 1])[:3]


COLOUR = {
    "brightness": {"brightness": 0.3},
    "contrast": {"contrast": 1.7},
    "luma flip": {"luma_flip": 1},
    "hue": {"hue": 1.1},
    "saturation": {"saturation": 0.4},
    "all": {"brightness": -0.2, "contrast": 0.6, "luma_flip": 1, "hue": -2.0, "saturation": 1.8},
}


@pytest.mark.parametrize("case", COLOUR)
def test_colours_equal_numpy(case):
    x = pictures(2, 4, 3, 5)
    y = made().apply(x, fixed("c", 2, **COLOUR[case]))
    wanted = np.apply_along_axis(numpy_colour, 1, x[:, :3].double().numpy(), **COLOUR[case])
    assert np.allclose(y[:, :3].numpy(), wanted, atol=1e-6)
    assert torch.equal(y[:, 3], x[:, 3])  # alpha is unchanged
    rgb = made().apply(x[:, :3], fixed("c", 2, **COLOUR[case]))
    assert torch.allclose(rgb, y[:, :3], atol=1e-6)


@pytest.mark.parametrize("case", COLOUR)
def test_grey_images_equal_grey_pixels_of_rgb_images(case):
    x = pictures(2, 1, 3, 5)
    y = made().apply(x, fixed("c", 2, **COLOUR[case]))
    of_rgb = made().apply(x.expand(-1, 3, -1, -1).contiguous(), fixed("c", 2, **COLOUR[case]))
    assert torch.allclose(y.expand(-1, 3, -1, -1), of_rgb, atol=1e-6)
    with_alpha = torch.cat([x, x], dim=1)
    result = made().apply(with_alpha, fixed("c", 2, **COLOUR[case]))
    assert torch.equal(result, torch.cat([y, x], dim=1))


def test_hue_equals_torchvision():
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2).contiguous()
    for third in (1, 2):
        y = made().apply(red, fixed("c", hue=2 * math.pi * third / 3))
        shift = third / 3 if third == 1 else third / 3 - 1  # torchvision's unit is a full turn, in [-0.5, 0.5]
        assert torch.allclose(y, vision.adjust_hue(red, shift), atol=1e-5)


def numpy_bands() -> list[np.ndarray]:
    """Zero-phase filters of the four bands, lowest first, computed from the Fourier transforms of the wavelet
    filters."""
    n, root = 256, math.sqrt(3)
    low = np.array([1 - root, 3 - root, 3 + root, 1 + root]) / (4 * math.sqrt(2))
    high = low[::-1] * [1, -1, 1, -1]
    w = 2 * np.pi * np.arange(n) / n

    def power(f, at):
        return np.abs(np.exp(-1j * np.outer(at, range(4))) @ f) ** 2 / 2

    lows = [power(low, w * step) for step in (1, 2, 4)]
    highs = [power(high, w * step) for step in (1, 2, 4)]
    responses = [lows[0] * lows[1] * lows[2], lows[0] * lows[1] * highs[2], lows[0] * highs[1], highs[0]]
    return [np.roll(np.fft.ifft(r).real, 21)[:43] for r in responses]


def test_band_filters_equal_scipys_convolution():
    taps = numpy_bands()
    assert np.allclose(colour.bands().numpy(), taps, atol=1e-12)
    gains = [1.5, 0.3, 1.2, 0.7]
    x = pictures(2, 4, 16, 24, torch.float64)
    y = made().apply(x, fixed("f", 2, bands=gains))
    whole = sum(g * t for g, t in zip(gains, taps, strict=True))
    wanted = scipy.ndimage.convolve1d(x.numpy(), whole, axis=2, mode="mirror")
    wanted = scipy.ndimage.convolve1d(wanted, whole, axis=3, mode="mirror")
    assert np.allclose(y.numpy(), wanted, atol=1e-6)  # gains are float32


def test_bands_have_the_expected_frequencies():
    response = np.abs(np.fft.fft(colour.bands().numpy(), 4096, axis=1))
    assert np.allclose(response.sum(axis=0), 1)
    for i, middle in enumerate([0, 3 / 16, 3 / 8, 1]):
        at = round(middle * 2048)
        assert response[i, at] == response[:, at].max() > 0.6


def test_noise_is_a_function_of_its_seed_and_does_not_change_alpha():
    x = pictures(3, 4, 64, 64)
    params = fixed("n", 3, noise=[0.05, 0.0, 0.2], noise_seed=[7, 8, 9])
    difference = made().apply(x, params) - x
    assert difference[:, :3].std(dim=[1, 2, 3]).tolist() == pytest.approx([0.05, 0, 0.2], rel=0.03)
    assert not difference[1].any()
    assert not difference[:, 3].any()
    assert torch.equal(made().apply(x, params) - x, difference)
    assert not torch.equal(made().apply(x, {**params, "noise_seed": params["noise_seed"] + 1}) - x, difference)
    assert np.abs(np.corrcoef(difference[0, :3].flatten(1).numpy()) - np.eye(3)).max() < 0.06


@pytest.mark.parametrize("size", [(16, 16), (8, 32)])
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.1, 0.8), (1.0, 0.0)])
def test_cutout_is_a_rectangle_of_zeros(size, centre):
    x, (h, w), (cx, cy) = pictures(1, 3, *size), size, centre
    y = made().apply(x, fixed("o", cutout=[cx, cy, 0.5]))
    wanted = x.numpy().copy()
    rows = slice(max(round((cy - 0.25) * h), 0), max(round((cy + 0.25) * h), 0))
    columns = slice(max(round((cx - 0.25) * w), 0), max(round((cx + 0.25) * w), 0))
    wanted[:, :, rows, columns] = 0
    assert np.array_equal(y.numpy(), wanted)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_diffaugment_equals_numpy(channels):
    a = made(mode="diffaugment")
    x = pictures(6, channels, 16, 32)
    params = a.draw(6, 0.0, generator(0, "d"), (16, 32))
    y = a.apply(x, params).numpy()
    for i in range(6):
        p = {k: v[i].double().numpy() for k, v in params.items()}
        k = 1 if channels == 1 else 3
        image = x[i].double().numpy().copy()
        c = image[:k] + p["brightness"]
        if k == 3:
            c = (c - c.mean(axis=0)) * p["saturation"] + c.mean(axis=0)
        image[:k] = (c - c.mean()) * p["contrast"] + c.mean()
        image = scipy.ndimage.shift(image, (0, p["shift"][1], p["shift"][0]), order=0, mode="constant", cval=0)
        for row in range(16):
            for column in range(32):
                cx, cy = (column + 0.5) / 32 - p["cutout"][0], (row + 0.5) / 16 - p["cutout"][1]
                if abs(cx) < 0.25 and abs(cy) < 0.25:
                    image[:, row, column] = 0
        assert np.allclose(y[i], image, atol=1e-5)
