"""Geometric augmentation compared with NumPy, SciPy and torchvision."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from augmenting import fixed, made, pictures, smooth
from torchvision.transforms import functional as vision

from stylegan_pg.augment import geometry


def numpy_blit(x: np.ndarray, flip: int, turns: int, shift: tuple[int, int]) -> np.ndarray:
    """Flip, rotate and shift an image [C, H, W]; pixels from outside are reflected."""
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


def test_quarter_turn_of_a_non_square_image_is_about_its_centre():
    x = pictures(1, 1, 4, 8)
    y = made().apply(x, fixed("b", turns=1))
    assert torch.equal(y[..., 2:6], torch.rot90(x[..., 2:6], 1, [2, 3]))
    # If the centres of rows and columns differ by half a pixel, the result is interpolated.
    x = smooth(1, 32, 33)
    y = made().apply(x, fixed("b", turns=1))
    back = [[0, 1, -0.5], [-1, 0, 31.5]]
    wanted = scipy.ndimage.affine_transform(x[0, 0].numpy(), back, order=5, mode="mirror")
    assert np.abs(y[0, 0].numpy() - wanted)[4:-4, 4:-4].max() < 0.02


def scipy_geometry(x: np.ndarray, scale=1.0, pre=0.0, stretch=1.0, post=0.0, move=(0.0, 0.0)) -> np.ndarray:
    """Transform an image [H, W]. Coordinates are rows and columns, the maps go from input to output, and angles are
    counter-clockwise on the screen."""

    def turn(a):  # a matrix for (row, column); it moves a point on the right to the top
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
def test_geometry_equals_scipy(case, size):
    values = GEOMETRY[case]
    x = smooth(2, *size)
    y = made().apply(x, fixed("g", **{NAMES.get(k, k): v for k, v in values.items()}))
    for channel in range(2):
        plane, got = x[0, channel].numpy(), y[0, channel].numpy()
        error = np.abs(got - scipy_geometry(plane, **values))
        # At the edges of the reflected image, interpolations differ.
        assert np.quantile(error, 0.9) < 0.02
        assert error.mean() < 0.01
        # An error of half a pixel or of a sign would give a much larger difference.
        wrong = {k: inverted(k, v) for k, v in values.items()}
        moved = {**values, "move": tuple(m + 0.5 for m in values.get("move", (0, 0)))}
        for other in (wrong, moved):
            assert np.abs(got - scipy_geometry(plane, **other)).mean() > 0.05


def test_geometry_equals_torchvision():
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
    other = numpy_blit(other[None], 1, 1, (3, 0))[0]  # in the opposite order
    assert np.abs(y[0, 0].numpy() - other).mean() > 0.05


def test_resampling_by_identity_and_flip_preserves_the_image():
    """ada.apply would skip the filters in these cases, so geometry.resample is called directly."""
    x = smooth(1, 32, 32, torch.float64)
    same = geometry.resample(x, torch.eye(3, dtype=torch.float64)[None])
    # The filter is orthonormal, so nothing is lost except at the edges.
    assert torch.allclose(same[..., 6:-6, 6:-6], x[..., 6:-6, 6:-6], atol=1e-9)
    assert (same - x).abs().max() < 0.06  # reflection reverses the filter, which is not exactly symmetric
    flip = geometry.inverse({k: v.double() for k, v in fixed("b", flip=1).items()}, (32, 32))
    error = (geometry.resample(x, flip) - x.flip(3)).abs()
    assert error[..., 6:-6, 6:-6].max() < 4e-3  # a shift by 0.4 pixels would give 0.1
    assert error.max() < 0.06


def test_sym6_is_the_least_asymmetric_orthonormal_filter():
    taps = np.array(geometry.SYM6)
    for lag in range(6):
        assert np.dot(taps[2 * lag :], taps[: len(taps) - 2 * lag]) == pytest.approx(float(lag == 0), abs=1e-10)
    k = np.arange(12)
    for moment in range(6):
        assert np.dot(taps * (-1.0) ** k, k**moment) / max(1, 11.0**moment) == pytest.approx(0, abs=1e-8)

    # All orthonormal filters with six vanishing moments follow from the roots of Daubechies' polynomial, by one choice
    # from each pair or group of four roots. SYM6 must be the one with the most linear phase.
    y_roots = np.roots([math.comb(5 + j, j) for j in range(5, -1, -1)])
    z_roots = [min(np.roots([1, 4 * y - 2, 1]), key=abs) for y in y_roots]

    def phase_error(h):
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
        best = min(best, phase_error(h / h.sum()))
    assert phase_error(taps / taps.sum()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (5, 9)])
def test_mirror_and_fold_equal_numpys_reflection(shape):
    x = pictures(1, 2, *shape)
    for pad in (0, 1, 3, 21):
        wanted = np.pad(x.numpy(), [(0, 0), (0, 0), (pad, pad), (pad, pad)], mode="reflect")
        assert np.array_equal(geometry.mirror(x, pad).numpy(), wanted)
        y, x_ = (torch.arange(-pad, n + pad).float() for n in shape)
        y, x_ = geometry.fold(y, shape[0]).long(), geometry.fold(x_, shape[1]).long()
        assert np.array_equal(x[:, :, y[:, None], x_[None]].numpy(), wanted)


def test_reflection_is_the_same_in_deterministic_mode():
    """In deterministic mode reflection is implemented by indexing, because GPUs have no deterministic gradient of
    padding."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    plain = geometry.mirror(x, 9)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(geometry.mirror(x, 9), plain)
    finally:
        torch.use_deterministic_algorithms(False)


def test_both_bilinear_samplers_agree():
    x = pictures(2, 3, 8, 10, torch.float64).requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    u, v = (torch.rand([2, 5, 6], generator=g, dtype=torch.float64) * (n - 1) for n in (10, 8))
    u[0, 0, 0], v[0, 0, 0] = 9, 7  # the last pixel in both directions
    results = [f(x, u, v) for f in (geometry.bilinear, geometry.gathered)]
    assert torch.allclose(results[0], results[1], atol=1e-12)
    plane = scipy.ndimage.map_coordinates(x[1, 2].detach().numpy(), [v[1].numpy(), u[1].numpy()], order=1)
    assert np.allclose(results[0][1, 2].detach().numpy(), plane, atol=1e-12)
    dy = torch.randn(results[0].shape, generator=g, dtype=torch.float64)
    first, second = (torch.autograd.grad(r, x, dy)[0] for r in results)
    assert torch.allclose(first, second, atol=1e-12)
