"""Paths through keyframes: easing curves, interpolating splines, filtered noise, and great circles.

A position p is counted in keyframes: at p = i a path is at keyframe i. A closed path through K keyframes has positions
in [0, K), and leads from the last keyframe back to the first; an open one has positions in [0, K - 1]. Everything is
computed in float64, so that a frame's values do not depend on the frames that are computed with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import between

EASINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda t: t,
    "smooth": lambda t: t * t * (3 - 2 * t),
    "smoother": lambda t: t**3 * (10 - t * (15 - 6 * t)),
    "sine": lambda t: 0.5 - 0.5 * torch.cos(math.pi * t),
}
CUBIC = "cubic"
WAYS = (*EASINGS, CUBIC)
MOST_KEYS = 10_000  # keyframes whose styles are in memory
MOST_CUBIC = 2000  # of a spline, whose equations are solved together
WIDTH = 0.7  # standard deviation of the filter of `filtered_weights`, in keyframes
WRAPS = 4  # periods on each side whose tails are added


def positions(frames: int, keys: int, loop: bool, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Positions, float64 [last - first], of the frames with numbers in [first, last) of `frames` evenly spaced ones.

    The first frame shows the first keyframe. The last one of an open path shows the last keyframe. The last one of a
    closed path comes one step before the first keyframe, so that the frames can be repeated.
    """
    numbers = torch.arange(first, frames if last is None else last, dtype=torch.float64)
    if loop:
        return numbers * keys / frames
    return numbers * ((keys - 1) / max(frames - 1, 1))


def check_keys(way: str, keys: int) -> None:
    """Raises UsageError if there is no such way through keyframes, or there are too many of them."""
    if way not in WAYS:
        raise UsageError(f"easing {way!r} is not possible: {', '.join(WAYS)}")
    if keys > MOST_KEYS:
        raise UsageError(f"{keys} keyframes are more than {MOST_KEYS}, whose styles fit into memory: give fewer")
    if way == CUBIC and keys > MOST_CUBIC:
        raise UsageError(f"a cubic path through {keys} keyframes: give at most {MOST_CUBIC}, or another easing")


def weights(at: torch.Tensor, keys: int, way: str, loop: bool) -> torch.Tensor:
    """The weights, float64 [n, keys], of the keyframes at positions [n]; those of a position sum to 1.

    Args:
        at: Positions, float64 [n].
        keys: The number of keyframes.
        way: A name in EASINGS: straight from keyframe to keyframe, with a speed that follows the easing curve. Or
            "cubic": the cubic spline through the keyframes, with continuous second derivatives; it is periodic for a
            closed path, and natural (its second derivative is 0 at the ends) for an open one.
        loop: Whether the path is closed.
    """
    i, j, t = _segments(at, keys, loop)
    n = torch.arange(len(at))
    result = torch.zeros(len(at), keys, dtype=torch.float64)
    if way != CUBIC:
        t = EASINGS[way](t)
    result.index_put_((n, i), 1 - t, accumulate=True)
    result.index_put_((n, j), t, accumulate=True)
    if way == CUBIC and keys > 1:
        bend = _second_derivatives(keys, loop)
        s = 1 - t
        result += (((s**3 - s)[:, None] * bend[i]) + ((t**3 - t)[:, None] * bend[j])) / 6
    return result


def _segments(at: torch.Tensor, keys: int, loop: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The keyframes before and after each position, and the place between them in [0, 1]."""
    if loop:
        i = at.floor().long() % keys
        return i, (i + 1) % keys, at - at.floor()
    i = at.floor().long().clamp(0, max(keys - 2, 0))
    return i, (i + 1).clamp(max=keys - 1), (at - i).clamp(0, 1)


def _second_derivatives(keys: int, loop: bool) -> torch.Tensor:
    """The matrix [keys, keys] from the keyframes' values to the second derivatives of their cubic spline.

    They fulfil M[i-1] + 4 M[i] + M[i+1] = 6 (y[i-1] - 2 y[i] + y[i+1]) for keyframes at equal distances.
    """
    unit = torch.eye(keys, dtype=torch.float64)
    neighbours = unit.roll(1, 0) + unit.roll(-1, 0)
    left, right = 4 * unit + neighbours, 6 * (neighbours - 2 * unit)
    if not loop:
        for end in (0, keys - 1):
            left[end], right[end] = unit[end], 0.0
    return torch.linalg.solve(left, right)


def filtered_weights(at: torch.Tensor, keys: int) -> torch.Tensor:
    """Weights [n, keys] of a closed path through noise that is smoothed by a Gaussian filter, instead of through the
    keyframes themselves. The squares of a position's weights sum to 1, so that a mixture of independent latents has the
    distribution of a latent (the walks in the videos of Karras et al. 2018)."""
    distance = at[:, None] - torch.arange(keys, dtype=torch.float64)
    periods = keys * torch.arange(-WRAPS, WRAPS + 1, dtype=torch.float64)
    result = torch.exp(-0.5 * ((distance[..., None] + periods) / WIDTH).square()).sum(dim=-1)
    return normalised(result)


def normalised(weights: torch.Tensor) -> torch.Tensor:
    """Weights [n, keys], scaled so that the squares of each row sum to 1; see `filtered_weights`."""
    return weights / weights.norm(dim=1, keepdim=True)


def on_sphere(keys: torch.Tensor, at: torch.Tensor, way: str, loop: bool) -> torch.Tensor:
    """Latents, float64 [n, d], at positions [n] of a path through latents keys [K, d] along great circles.

    With the way "cubic", the path follows the directions of the cubic spline. Lengths are those of the straight path
    in both cases.
    """
    keys = keys.double()
    i, j, t = _segments(at, len(keys), loop)
    if way != CUBIC:
        return between(keys[i], keys[j], EASINGS[way](t)[:, None])
    path = weights(at, len(keys), way, loop) @ keys
    lengths = weights(at, len(keys), "linear", loop) @ keys.norm(dim=1, keepdim=True)
    return path / path.norm(dim=1, keepdim=True).clamp(min=1e-12) * lengths
