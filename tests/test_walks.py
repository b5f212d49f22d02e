"""Paths through keyframes: easing curves, splines, filtered noise and great circles."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from stylegan_pg.editing import walks
from stylegan_pg.errors import UsageError


def test_positions_of_open_and_closed_paths():
    assert walks.positions(5, 3, False).tolist() == [0, 0.5, 1, 1.5, 2]
    assert walks.positions(6, 3, True).tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert walks.positions(1, 3, False).tolist() == [0]
    whole = walks.positions(1000, 7, True)
    parts = [walks.positions(1000, 7, True, i, min(i + 77, 1000)) for i in range(0, 1000, 77)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.max() < 7
    assert walks.positions(1000, 7, False)[-1] == 6


@pytest.mark.parametrize("easing", walks.EASINGS)
def test_easing_curves(easing):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    eased = walks.EASINGS[easing](t)
    torch.testing.assert_close(eased + eased.flip(0), torch.ones_like(t))  # the way back is the same
    assert eased[0] == 0
    assert eased[-1] == pytest.approx(1, abs=1e-15)
    assert (eased.diff() > 0).all()
    slope = eased.diff()[0] / 0.01
    assert slope == pytest.approx(1) if easing == "linear" else slope < 0.05


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("keys", [2, 3, 4, 9])
def test_cubic_paths_are_cubic_splines(keys, loop):
    values = np.random.default_rng(keys).normal(size=[keys, 5])
    at = walks.positions(50, keys, loop)
    ours = walks.weights(at, keys, walks.CUBIC, loop) @ torch.from_numpy(values)
    if loop:
        reference = CubicSpline(np.arange(keys + 1), np.concatenate([values, values[:1]]), bc_type="periodic")
    else:
        reference = CubicSpline(np.arange(keys), values, bc_type="natural")
    np.testing.assert_allclose(ours.numpy(), reference(at.numpy()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("way", walks.WAYS)
@pytest.mark.parametrize("keys", [1, 2, 5])
def test_paths_go_through_their_keyframes(way, keys, loop):
    at = torch.arange(keys, dtype=torch.float64)
    torch.testing.assert_close(walks.weights(at, keys, way, loop), torch.eye(keys, dtype=torch.float64))
    there = walks.positions(37, keys, loop)
    torch.testing.assert_close(walks.weights(there, keys, way, loop).sum(1), torch.ones(37, dtype=torch.float64))
    latents = torch.randn(keys, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(walks.on_sphere(latents, at, way, loop), latents.double())


@pytest.mark.parametrize("way", walks.WAYS)
def test_closed_paths_end_beside_their_beginning(way):
    keys = torch.randn(5, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path = walks.weights(walks.positions(200, 5, True), 5, way, True) @ keys
    steps = (path - path.roll(-1, 0)).norm(dim=1)
    assert steps[-1] <= steps.max()
    assert steps.max() < 4 * steps.mean()  # no jump


def test_great_circles_have_even_speed_and_lengths_in_between():
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 0, 1.0])
    path = walks.on_sphere(torch.stack([a, b]), walks.positions(11, 2, False), "linear", False)
    angle = torch.arange(11, dtype=torch.float64) * torch.pi / 20
    length = torch.linspace(3, 1, 11, dtype=torch.float64)
    expected = torch.stack([length * angle.cos(), torch.zeros(11, dtype=torch.float64), length * angle.sin()], 1)
    torch.testing.assert_close(path, expected)
    smooth = walks.on_sphere(torch.randn(4, 50), walks.positions(400, 4, True), "cubic", True)
    steps = (smooth - smooth.roll(-1, 0)).norm(dim=1)
    assert steps.max() < 5 * steps.mean()


def test_filtered_noise_has_the_distribution_of_latents_and_is_smooth():
    at = walks.positions(300, 6, True)
    weights = walks.filtered_weights(at, 6)
    torch.testing.assert_close(weights.square().sum(1), torch.ones(300, dtype=torch.float64))
    path = weights @ torch.randn(6, 4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert path.var(dim=1).sub(1).abs().max() < 0.1
    speed = (path - path.roll(-1, 0)).norm(dim=1)
    assert speed.max() < 1.5 * speed.min()  # also from the last frame to the first
    torch.testing.assert_close(walks.filtered_weights(at + 6, 6), weights)  # periodic


def test_a_frame_does_not_depend_on_the_frames_beside_it():
    at = walks.positions(100, 5, True)
    for way in walks.WAYS:
        whole = walks.weights(at, 5, way, True)
        for i in (0, 41, 99):
            assert torch.equal(walks.weights(at[i : i + 1], 5, way, True)[0], whole[i])


def test_what_is_not_possible():
    with pytest.raises(UsageError, match="easing 'bouncy' is not possible: linear, "):
        walks.check_keys("bouncy", 3)
    with pytest.raises(UsageError, match="at most 2000"):
        walks.check_keys("cubic", 2001)
    with pytest.raises(UsageError, match="10001 keyframes are more than 10000"):
        walks.check_keys("linear", 10_001)
    walks.check_keys("linear", 10_000)
