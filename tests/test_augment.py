"""Augmentation: every operation against numpy, scipy and torchvision; what is drawn, how often and how far; nothing at
p = 0; derivatives; the controller."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from torchvision.transforms import functional as vision

from stylegan_pg import augment
from stylegan_pg.augment import ada, colour, diffaugment, geometry
from stylegan_pg.config import AugmentConfig, Config, DataConfig, loading
from stylegan_pg.errors import UsageError
from stylegan_pg.rng import generator

ALL = "bgcfno"


def made(**keys: Any) -> augment.Augment:
    result = augment.make(AugmentConfig(**{"mode": "fixed", "pipeline": ALL, **keys}))
    assert result
    return result


def pictures(n: int, c: int, h: int, w: int, dtype=torch.float32) -> torch.Tensor:
    """Noise: any change shows."""
    return torch.rand([n, c, h, w], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2 - 1


def smooth(c: int, h: int, w: int, dtype=torch.float32) -> torch.Tensor:
    """[1, c, h, w] of a few waves, so that how one interpolates hardly matters, and where one does, does."""
    y, x = np.mgrid[:h, :w]
    waves = [np.sin(0.31 * x + 0.17 * y + i) + np.cos(0.26 * y - 0.11 * x + 2 * i) for i in range(c)]
    return torch.tensor(np.stack(waves)[None] / 2).to(dtype)


def off(pipeline: str, n: int, size: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    """The parameters that change nothing."""
    return ada.draw(pipeline, n, 0.0, torch.Generator(), size)


def fixed(pipeline: str, n: int = 1, **values: Any) -> dict[str, torch.Tensor]:
    params = off(pipeline, n)
    for name, value in values.items():
        params[name] = torch.as_tensor(value).expand(params[name].shape).to(params[name].dtype)
    return params


# --- nothing where nothing is on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nothing_changes_at_p_zero_and_form_stays_at_p_one(channels, layout, dtype):
    images = pictures(3, channels, 12, 8, dtype).contiguous(memory_format=layout)
    a = made()
    same = a.apply(images, a.draw(3, 0.0, torch.Generator(), (12, 8)))
    assert torch.equal(same, images)
    other = a.apply(images, a.draw(3, 1.0, torch.Generator(), (12, 8)))
    assert not torch.equal(other, images)
    for result in (same, other):
        assert (result.shape, result.dtype, result.stride()) == (images.shape, images.dtype, images.stride())
    assert other.isfinite().all()


def test_images_that_nothing_happens_to_are_left_alone_in_mixed_batches():
    images, count = pictures(64, 3, 8, 8), 0
    a = made(pipeline="bgc")
    params = a.draw(64, 0.15, generator(0, "x"), (8, 8))
    result, neutral = a.apply(images, params), off("bgc", 1)
    for i in range(64):
        alone = augment.pick(params, [i])
        if untouched := all(torch.equal(alone[k], neutral[k]) for k in alone):
            assert torch.equal(result[i], images[i])
        else:
            assert not torch.equal(result[i], images[i])
        count += untouched
    assert 3 < count < 50


def test_no_augmentation_is_none():
    assert augment.make(AugmentConfig()) is None


# --- blit and geometry ------------------------------------------------------------------------------------------------


def numpy_blit(x: np.ndarray, flip: int, turns: int, shift: tuple[int, int]) -> np.ndarray:
    """On [C, H, W]; what comes in is what reflection shows there."""
    x = np.rot90(x[:, :, ::-1] if flip else x, turns, axes=(1, 2))
    margin, (h, w), (dx, dy) = 3, x.shape[1:], shift
    x = np.pad(x, [(0, 0), (margin, margin), (margin, margin)], mode="reflect")
    return x[:, margin - dy : margin - dy + h, margin - dx : margin - dx + w]


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("shift", [(0, 0), (2, -1), (-3, 3)])
def test_blitting_copies_pixels(flip, turns, shift):
    for size in [(8, 8), (7, 7)] + ([(6, 10)] if turns % 2 == 0 else []):
        x = pictures(1, 3, *size)
        y = made().apply(x, fixed("b", flip=flip, turns=turns, shift=shift))
        assert np.array_equal(y[0].numpy(), numpy_blit(x[0].numpy(), flip, turns, shift))


def test_quarter_turn_of_an_oblong_is_about_its_centre():
    x = pictures(1, 1, 4, 8)
    y = made().apply(x, fixed("b", turns=1))
    assert torch.equal(y[..., 2:6], torch.rot90(x[..., 2:6], 1, [2, 3]))
    # With half a pixel between the centres of rows and columns there is something to interpolate.
    x = smooth(1, 32, 33)
    y = made().apply(x, fixed("b", turns=1))
    back = [[0, 1, -0.5], [-1, 0, 31.5]]
    wanted = scipy.ndimage.affine_transform(x[0, 0].numpy(), back, order=5, mode="mirror")
    assert np.abs(y[0, 0].numpy() - wanted)[4:-4, 4:-4].max() < 0.02


def scipy_geometry(x: np.ndarray, scale=1.0, pre=0.0, stretch=1.0, post=0.0, move=(0.0, 0.0)) -> np.ndarray:
    """On [H, W], in rows and columns, forwards; angles counter-clockwise on the screen."""

    def turn(a):  # of (row, column): counter-clockwise takes what is on the right to the top
        return np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])

    forward = turn(post) @ np.diag([1 / stretch, stretch]) @ turn(pre) @ np.diag([scale, scale])
    back, centre = np.linalg.inv(forward), (np.array(x.shape) - 1) / 2
    offset = centre - back @ (centre + np.array(move[::-1]))
    return scipy.ndimage.affine_transform(x, np.column_stack([back, offset]), order=5, mode="mirror")


GEOMETRY: dict[str, dict[str, Any]] = {
    "scale up": {"scale": 1.3},
    "scale down": {"scale": 0.8},
    "rotation": {"pre": 0.5},
    "more rotation": {"post": -2.2},
    "stretch": {"stretch": 1.25},
    "move": {"move": (2.3, -1.6)},
    "far": {"move": (75.25, 0.0)},
    "all": {"scale": 0.9, "pre": 0.4, "stretch": 1.2, "post": -1.0, "move": (3.5, 2.25)},
}
NAMES = {"pre": "pre_rotation", "post": "post_rotation"}


def inverted(name: str, value: Any) -> Any:
    return tuple(-v for v in value) if name == "move" else -value if name in NAMES else 1 / value


@pytest.mark.parametrize("case", GEOMETRY)
@pytest.mark.parametrize("size", [(48, 48), (32, 56)])
def test_geometry_is_scipys(case, size):
    values = GEOMETRY[case]
    x = smooth(2, *size)
    y = made().apply(x, fixed("g", **{NAMES.get(k, k): v for k, v in values.items()}))
    for channel in range(2):
        plane, got = x[0, channel].numpy(), y[0, channel].numpy()
        error = np.abs(got - scipy_geometry(plane, **values))
        # Where the plane was mirrored there is a crease, which nobody interpolates alike.
        assert np.quantile(error, 0.9) < 0.02
        assert error.mean() < 0.01
        # What half a pixel, or another sign, would make:
        wrong = {k: inverted(k, v) for k, v in values.items()}
        moved = {**values, "move": tuple(m + 0.5 for m in values.get("move", (0, 0)))}
        for other in (wrong, moved):
            assert np.abs(got - scipy_geometry(plane, **other)).mean() > 0.05


def test_geometry_is_torchvisions():
    x = smooth(3, 64, 64, torch.float64)
    y = made().apply(x, fixed("g", pre_rotation=math.radians(30), scale=1.25, move=(4, -6)))
    wanted = vision.affine(
        x, angle=-30, translate=[4, -6], scale=1.25, shear=[0.0], interpolation=vision.InterpolationMode.BILINEAR
    )
    inside = (slice(None), slice(None), slice(16, 48), slice(16, 48))
    assert (y - wanted)[inside].abs().max() < 0.02


def test_operations_are_composed_in_the_published_order():
    x = smooth(1, 40, 40)
    y = made().apply(x, {**fixed("b", flip=1, turns=1, shift=(3, 0)), **fixed("g", stretch=1.3, post_rotation=0.7)})
    blitted = numpy_blit(x[0].numpy(), 1, 1, (3, 0))[0]
    error = np.abs(y[0, 0].numpy() - scipy_geometry(blitted, stretch=1.3, post=0.7))
    assert np.quantile(error, 0.9) < 0.02
    other = scipy_geometry(x[0, 0].numpy(), stretch=1.3, post=0.7)
    other = numpy_blit(other[None], 1, 1, (3, 0))[0]  # the other way round
    assert np.abs(y[0, 0].numpy() - other).mean() > 0.05


def test_resampling_of_whole_pixels_and_of_flips_hardly_moves_or_blurs():
    """Through the filters on purpose, which ada.apply would leave out."""
    x = smooth(1, 32, 32, torch.float64)
    same = geometry.resample(x, torch.eye(3, dtype=torch.float64)[None])
    assert torch.allclose(same[..., 6:-6, 6:-6], x[..., 6:-6, 6:-6], atol=1e-9)  # orthonormal: nothing is lost
    assert (same - x).abs().max() < 0.06  # a fold turns the filter around, which is not quite symmetric
    flip = geometry.inverse({k: v.double() for k, v in fixed("b", flip=1).items()}, (32, 32))
    error = (geometry.resample(x, flip) - x.flip(3)).abs()
    assert error[..., 6:-6, 6:-6].max() < 4e-3  # 0.4 pixels would be 0.1
    assert error.max() < 0.06


def test_sym6_is_the_least_asymmetric_orthonormal_filter_with_six_vanishing_moments():
    taps = np.array(geometry.SYM6)
    for lag in range(6):
        assert np.dot(taps[2 * lag :], taps[: len(taps) - 2 * lag]) == pytest.approx(float(lag == 0), abs=1e-10)
    k = np.arange(12)
    for moment in range(6):
        assert np.dot(taps * (-1.0) ** k, k**moment) / max(1, 11.0**moment) == pytest.approx(0, abs=1e-8)

    # All filters of the kind, from the roots of Daubechies' polynomial: one choice of each pair or foursome.
    y_roots = np.roots([math.comb(5 + j, j) for j in range(5, -1, -1)])
    z_roots = [min(np.roots([1, 4 * y - 2, 1]), key=abs) for y in y_roots]

    def crookedness(h):
        w = np.linspace(0.01, 0.5 * np.pi, 200)
        phase = np.unwrap(np.angle(np.exp(-1j * np.outer(w, k)) @ h))
        slope = np.dot(phase, w) / np.dot(w, w)
        return np.abs(phase - slope * w).max()

    best = math.inf
    real, upper = [z for z in z_roots if abs(z.imag) < 1e-9], [z for z in z_roots if z.imag > 1e-9]
    for choice in range(2 ** (len(real) + len(upper))):
        chosen = []
        for i, z in enumerate([*real, *upper]):
            z = 1 / z if choice >> i & 1 else z
            chosen += [z] if i < len(real) else [z, np.conj(z)]
        h = np.real(np.poly([-1] * 6 + chosen))
        best = min(best, crookedness(h / h.sum()))
    assert crookedness(taps / taps.sum()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (5, 9)])
def test_mirror_and_fold_are_numpys_reflection(shape):
    x = pictures(1, 2, *shape)
    for pad in (0, 1, 3, 21):
        wanted = np.pad(x.numpy(), [(0, 0), (0, 0), (pad, pad), (pad, pad)], mode="reflect")
        assert np.array_equal(geometry.mirror(x, pad).numpy(), wanted)
        y, x_ = (torch.arange(-pad, n + pad).float() for n in shape)
        y, x_ = geometry.fold(y, shape[0]).long(), geometry.fold(x_, shape[1]).long()
        assert np.array_equal(x[:, :, y[:, None], x_[None]].numpy(), wanted)


# --- colour -----------------------------------------------------------------------------------------------------------


def numpy_colour(pixel: np.ndarray, brightness=0.0, contrast=1.0, luma_flip=0, hue=0.0, saturation=1.0) -> np.ndarray:
    """One RGB colour through homogeneous 4x4 matrices, as in the paper's pseudocode."""
    v = np.array([1, 1, 1, 0]) / np.sqrt(3)
    m = np.eye(4)
    m[:3, 3] = brightness
    m = np.diag([contrast, contrast, contrast, 1]) @ m
    m = (np.eye(4) - 2 * np.outer(v, v) * luma_flip) @ m
    axis, turned = v[:3], np.eye(4)
    for i in range(3):  # Rodrigues, basis vector by basis vector
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
def test_colours_are_numpys(case):
    x = pictures(2, 4, 3, 5)
    y = made().apply(x, fixed("c", 2, **COLOUR[case]))
    wanted = np.apply_along_axis(numpy_colour, 1, x[:, :3].double().numpy(), **COLOUR[case])
    assert np.allclose(y[:, :3].numpy(), wanted, atol=1e-6)
    assert torch.equal(y[:, 3], x[:, 3])  # alpha
    rgb = made().apply(x[:, :3], fixed("c", 2, **COLOUR[case]))
    assert torch.allclose(rgb, y[:, :3], atol=1e-6)


@pytest.mark.parametrize("case", COLOUR)
def test_grey_pictures_are_coloured_as_grey_pixels_of_rgb(case):
    x = pictures(2, 1, 3, 5)
    y = made().apply(x, fixed("c", 2, **COLOUR[case]))
    of_rgb = made().apply(x.expand(-1, 3, -1, -1).contiguous(), fixed("c", 2, **COLOUR[case]))
    assert torch.allclose(y.expand(-1, 3, -1, -1), of_rgb, atol=1e-6)
    with_alpha = torch.cat([x, x], dim=1)
    result = made().apply(with_alpha, fixed("c", 2, **COLOUR[case]))
    assert torch.equal(result, torch.cat([y, x], dim=1))


def test_hue_turns_the_primary_colours_as_torchvision_does():
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2).contiguous()
    for third in (1, 2):
        y = made().apply(red, fixed("c", hue=2 * math.pi * third / 3))
        shift = third / 3 if third == 1 else third / 3 - 1  # torchvision's unit is a full turn, in [-0.5, 0.5]
        assert torch.allclose(y, vision.adjust_hue(red, shift), atol=1e-5)


# --- filters, noise, cutout -------------------------------------------------------------------------------------------


def numpy_bands() -> list[np.ndarray]:
    """Zero-phase filters of the four bands, lowest first, through the Fourier transform of the two wavelet filters."""
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


def test_filters_are_scipys_convolution_with_wavelet_bands():
    taps = numpy_bands()
    assert np.allclose(colour.bands().numpy(), taps, atol=1e-12)
    gains = [1.5, 0.3, 1.2, 0.7]
    x = pictures(2, 4, 16, 24, torch.float64)
    y = made().apply(x, fixed("f", 2, bands=gains))
    whole = sum(g * t for g, t in zip(gains, taps, strict=True))
    wanted = scipy.ndimage.convolve1d(x.numpy(), whole, axis=2, mode="mirror")
    wanted = scipy.ndimage.convolve1d(wanted, whole, axis=3, mode="mirror")
    assert np.allclose(y.numpy(), wanted, atol=1e-6)  # gains are drawn in float32


def test_bands_are_where_they_should_be():
    response = np.abs(np.fft.fft(colour.bands().numpy(), 4096, axis=1))
    assert np.allclose(response.sum(axis=0), 1)
    for i, middle in enumerate([0, 3 / 16, 3 / 8, 1]):
        at = round(middle * 2048)
        assert response[i, at] == response[:, at].max() > 0.6


def test_noise_follows_from_its_seed_and_spares_alpha():
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


# --- what is drawn ----------------------------------------------------------------------------------------------------

N = 20_000
LN2 = math.log(2)
# name -> share of those that are on which have another value than the neutral one, standard deviation when on, of what
LAWS: dict[str, tuple[float, float, Any]] = {
    "flip": (1 / 2, 1 / 2, None),
    "turns": (3 / 4, math.sqrt(15 / 12), None),
    "shift": (1, 0.125 / math.sqrt(3) * 256, None),
    "scale": (1, 0.2 * LN2, torch.log),
    "pre_rotation": (1, math.pi / math.sqrt(3), None),
    "stretch": (1, 0.2 * LN2, torch.log),
    "post_rotation": (1, math.pi / math.sqrt(3), None),
    "move": (1, 0.125 * 256, None),
    "brightness": (1, 0.2, None),
    "contrast": (1, 0.5 * LN2, torch.log),
    "luma_flip": (1 / 2, 1 / 2, None),
    "hue": (1, math.pi / math.sqrt(3), None),
    "saturation": (1, 1.0 * LN2, torch.log),
    "noise": (1, 0.1 * math.sqrt(1 - 2 / math.pi), None),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_parameters_follow_the_published_laws(name, p):
    share, spread, function = LAWS[name]
    params, neutral = ada.draw(ALL, N, p, generator(0, "laws"), (256, 256)), off(ALL, 1)
    value, neutral = params[name].double(), neutral[name].double()
    on = (value != neutral).reshape(N, -1).any(dim=1)
    probability = 1 - math.sqrt(1 - p) if "rotation" in name else p
    assert on.double().mean().item() == pytest.approx(probability * share, abs=0.013)
    if share == 1:  # the others only where all are on: what is off cannot be told from a neutral draw
        value = value[on]
    elif p < 1:
        return
    value = function(value) if function else value
    assert value.std().item() == pytest.approx(spread, rel=0.03)
    if name in ("scale", "stretch", "contrast", "saturation", "hue", "brightness", "move", "shift"):
        assert value.mean().item() == pytest.approx(0, abs=4 * spread / math.sqrt(N * p))


def test_rotations_together_have_probability_p():
    params = ada.draw("g", N, 0.36, generator(0, "r"), (8, 8))
    both = (params["pre_rotation"] != 0) | (params["post_rotation"] != 0)
    assert both.double().mean().item() == pytest.approx(0.36, abs=0.013)


def test_bands_and_cutout_follow_the_published_laws():
    params = ada.draw("fo", N, 0.3, generator(0, "f"), (256, 256))
    on = params["bands"] != 1
    assert on.any(dim=1).double().mean().item() == pytest.approx(1 - 0.7**4, abs=0.013)
    one = params["bands"][(params["bands"][:, 1:3] == params["bands"][:, :1]).all(dim=1) & on.any(dim=1)].double()
    gain = (one[:, 3] / one[:, 0]).log()  # only the highest band: the norm scales all alike, the ratio is lognormal
    assert gain.std().item() == pytest.approx(LN2, rel=0.06)
    power = (one.square() * torch.tensor([10, 1, 1, 1]) / 13).sum(dim=1)
    assert torch.allclose(power, torch.ones_like(power), atol=1e-5)
    assert (params["cutout"][:, 2] > 0).double().mean().item() == pytest.approx(0.3, abs=0.013)
    assert params["cutout"][:, :2].std(dim=0).tolist() == pytest.approx([12**-0.5] * 2, rel=0.03)
    assert set(params["cutout"][:, 2].tolist()) == {0.0, 0.5}


def test_lengths_follow_the_sides():
    params = ada.draw("bg", N, 1.0, generator(0, "s"), (64, 512))
    assert params["shift"].abs().amax(dim=0).tolist() == [64, 8]
    assert params["move"].std(dim=0).tolist() == pytest.approx([64, 8], rel=0.03)


def test_what_is_on_at_a_lower_p_is_on_and_the_same_at_a_higher():
    neutral, previous = off(ALL, 1), off(ALL, 256)
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        g = generator(0, "nested")
        params = ada.draw(ALL, 256, p, g, (8, 8))
        for name, value in params.items():
            if name in ("noise_seed", "bands"):
                continue  # the one is never off, the other a product of four
            before = previous[name]
            stayed = (before == neutral[name]) if name != "cutout" else before[:, 2:].expand(-1, 3) == 0
            assert (stayed | (before == value)).all(), name
        previous = params
        assert torch.rand(1, generator=g) == torch.rand(1, generator=_after(256))


def _after(count: int) -> torch.Generator:
    g = generator(0, "nested")
    ada.draw(ALL, count, 0.7, g, (8, 8))
    return g


@pytest.mark.parametrize("mode", ["fixed", "diffaugment"])
def test_a_batch_dealt_out_gives_the_same_images(mode):
    a = made(mode=mode)
    images = pictures(16, 3, 16, 16, torch.float64)
    params = a.draw(16, 0.4, generator(3, "deal", 512), (16, 16))
    assert all(len(v) == 16 and v.device.type == "cpu" for v in params.values())
    whole = a.apply(images, params)
    for ranks in (2, 4, 16):
        for rank in range(ranks):
            mine = list(range(rank, 16, ranks))
            part = a.apply(images[mine], augment.pick(params, mine))
            assert torch.allclose(part, whole[mine], rtol=0, atol=1e-12)


# --- DiffAugment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_diffaugment_is_numpys(channels):
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


def test_diffaugment_draws_the_published_ranges():
    params = diffaugment.draw("color,translation,cutout", N, generator(0, "d"), (64, 128))
    for name, (low, high) in {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)}.items():
        assert low <= params[name].min() < low + 0.01 * (high - low)
        assert high >= params[name].max() > high - 0.01 * (high - low)
    assert params["shift"].amax(dim=0).tolist() == [16, 8]
    assert params["shift"].amin(dim=0).tolist() == [-16, -8]
    assert set(diffaugment.draw("color", 1, torch.Generator(), (8, 8))) == {"brightness", "saturation", "contrast"}


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "pipeline"), [("fixed", "b"), ("fixed", "g"), ("fixed", "c"), ("fixed", "bgcfno"), ("diffaugment", "b")]
)
def test_twice_differentiable(mode, pipeline):
    a = made(mode=mode, pipeline=pipeline)
    x = pictures(2, 3, 4, 5, torch.float64).requires_grad_(True)
    params = a.draw(2, 0.8, generator(5, "grad"), (4, 5))

    def f(images):  # the square makes a second derivative that is not zero
        return a.apply(images, params).square()

    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)


def test_a_gradient_penalty_reaches_the_weights_through_it():
    """R1 as training has it: with respect to the images before augmentation, then to D's weights."""
    x = pictures(4, 3, 8, 8, torch.float64).requires_grad_(True)
    weight = torch.randn(
        [1, 3, 3, 3], dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True
    )
    a = made(pipeline="bgc")
    params = a.draw(4, 0.8, generator(1, "r1"), (8, 8))

    def penalty(weight):
        scores = torch.nn.functional.conv2d(a.apply(x, params), weight).tanh().sum()
        (gradient,) = torch.autograd.grad(scores, x, create_graph=True)
        return gradient.square().sum()

    assert torch.autograd.gradcheck(penalty, (weight,), fast_mode=True)


def test_both_bilinear_samplers_agree():
    x = pictures(2, 3, 8, 10, torch.float64).requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    u, v = (torch.rand([2, 5, 6], generator=g, dtype=torch.float64) * (n - 1) for n in (10, 8))
    u[0, 0, 0], v[0, 0, 0] = 9, 7  # the very corner
    results = [f(x, u, v) for f in (geometry.bilinear, geometry.gathered)]
    assert torch.allclose(results[0], results[1], atol=1e-12)
    plane = scipy.ndimage.map_coordinates(x[1, 2].detach().numpy(), [v[1].numpy(), u[1].numpy()], order=1)
    assert np.allclose(results[0][1, 2].detach().numpy(), plane, atol=1e-12)
    dy = torch.randn(results[0].shape, generator=g, dtype=torch.float64)
    first, second = (torch.autograd.grad(r, x, dy)[0] for r in results)
    assert torch.allclose(first, second, atol=1e-12)


# --- the controller ---------------------------------------------------------------------------------------------------


def test_the_controller_goes_from_zero_to_one_in_its_kimg_and_no_further():
    p, images = 0.0, 0
    while p < 1:
        p = augment.adjust(p, 0.9, batch=64, interval=4, target=0.6, kimg=500)
        images += 64 * 4
    assert images == pytest.approx(500_000, abs=2 * 256)
    assert augment.adjust(1.0, 1.0, 64, 4, 0.6, 500) == 1
    assert augment.adjust(0.0, -1.0, 64, 4, 0.6, 500) == 0
    assert augment.adjust(0.3, 0.6, 64, 4, 0.6, 500) == 0.3


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("target", [0.2, 0.6])
def test_the_controller_reaches_its_target(start, target):
    """D's signs fall with p: r(p) = 0.95 - 1.2 p, seen through the noise of a finite batch."""
    random, p, seen = np.random.default_rng(0), start, []
    for _ in range(3000):
        signs = random.random(4 * 64) < (1 + 0.95 - 1.2 * p) / 2
        p = augment.adjust(p, float(signs.mean() * 2 - 1), 64, 4, target, 500)
        seen.append(p)
    settled = np.array(seen[-500:])
    assert 0.95 - 1.2 * settled.mean() == pytest.approx(target, abs=0.02)
    assert settled.std() < 0.02


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_know_the_same_names():
    assert loading.AUGMENT_LETTERS == ada.LETTERS
    assert loading.AUGMENT_POLICIES == diffaugment.POLICIES


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "adaptive"),
        ("p", 1.5),
        ("target", -2.0),
        ("target", math.nan),
        ("interval", 0),
        ("kimg", 0.0),
        ("pipeline", "bgx"),
        ("pipeline", "bb"),
        ("pipeline", ""),
        ("policy", "color,colour"),
        ("policy", "color,color"),
    ],
)
def test_impossible_settings_are_refused(key, value):
    config = Config(run="runs/x", data=DataConfig(url="x"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, total_kimg=1.0))
    loading.check(config)
    with pytest.raises(UsageError, match=rf"augment\.{key}"):
        loading.check(dataclasses.replace(config, augment=dataclasses.replace(config.augment, **{key: value})))


def test_reflection_is_the_same_in_deterministic_mode():
    """There it goes by indices, since the gradient of padding is refused on GPUs."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    plain = geometry.mirror(x, 9)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(geometry.mirror(x, 9), plain)
    finally:
        torch.use_deterministic_algorithms(False)
