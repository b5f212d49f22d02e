"""Power-function averages of weights over training: their profiles, and combinations of them (Karras et al. 2024,
"Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix C).

The average of exponent gamma after t images is the integral of p(tau) theta(tau) over [0, t], with the profile
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). Its relative width is the standard deviation of p divided by t. Averages
of a few widths that were stored at several moments span those of other widths and moments, up to a small residual.

What is here are pure functions in float64; t counts images since the start of the average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from stylegan_pg.config.schema import NARROWEST, WIDEST
from stylegan_pg.errors import UsageError

FEW_STEPS = 4096  # up to which inner products are sums over steps
SAME = 1e-9  # relative difference up to which two exponents or moments are the same


class Profile(NamedTuple):
    """The profile of an average: its exponent, and its moment in images (above 0)."""

    gamma: float
    t: float


class Combination(NamedTuple):
    """How stored averages are combined.

    weights: one for each stored average; their sum is 1.
    residual: the L2 norm of the difference between the wanted profile and the combination of the stored ones, divided
        by that of the wanted profile; 0 for a perfect fit.
    """

    weights: np.ndarray
    residual: float


def width_of(gamma: float) -> float:
    """The relative width of an exponent, sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (equation 3 of the paper)."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(width: float) -> float:
    """The exponent of a relative width: the largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.

    Raises:
        UsageError: the width is not within [NARROWEST, WIDEST], where this root exists and is above 0.
    """
    if not NARROWEST <= width <= WIDEST:
        raise UsageError(f"width {width:g} is not possible: give a relative width from {NARROWEST} to {WIDEST}")
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    gamma = float(max(root.real for root in roots if abs(root.imag) <= 1e-6 * abs(root)))
    for _ in range(3):  # Newton's method removes what rounding has left
        value = (gamma + 2) ** 2 * (gamma + 3) - (gamma + 1) * width**-2
        gamma -= value / (2 * (gamma + 2) * (gamma + 3) + (gamma + 2) ** 2 - width**-2)
    return gamma


def step_weight(gamma: float, batch: int, t: int) -> float:
    """The weight 1 - beta of the newest weights in the update at t images, the step's `batch` included.

    beta = (1 - batch / t)^(gamma + 1) makes the average the integral of the profile over weights that stay the same
    within each step, without an error of discretisation. The first step, at t = batch, has weight 1.
    """
    return 1.0 if batch >= t else -math.expm1((gamma + 1) * math.log1p(-batch / t))


def inner(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """The inner products [len(a), len(b)] of profiles, the integral of their product over all images:

    (g_a + 1) (g_b + 1) min(t_a, t_b)^(g_a + g_b + 1) / ((g_a + g_b + 1) t_a^(g_a + 1) t_b^(g_b + 1))

    (appendix C.3), arranged such that no power overflows.
    """
    (ga, ta), (gb, tb) = np.array(a, dtype=np.float64).T[:, :, None], np.array(b, dtype=np.float64).T[:, None, :]
    first = np.minimum(ta, tb)
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (first / ta) ** ga * (first / tb) ** gb / np.maximum(ta, tb)


def step_inner(a: Sequence[Profile], b: Sequence[Profile], batch: float) -> np.ndarray:
    """The same [len(a), len(b)] of profiles whose values are replaced by their means over each step of `batch` images,
    within which weights do not change. In short runs this differs from `inner`, and it is what counts."""

    def masses(profiles: Sequence[Profile]) -> np.ndarray:
        gamma, t = np.array(profiles, dtype=np.float64).T[:, :, None]
        return np.diff(np.minimum(edges / t, 1.0) ** (gamma + 1))

    edges = batch * np.arange(math.ceil(max(p.t for p in (*a, *b)) / batch - 1e-6) + 1)
    return masses(a) @ masses(b).T / batch


def combine(stored: Sequence[Profile], wanted: Profile, batch: int = 0) -> Combination:
    """The combination of stored averages whose profile comes nearest to the wanted one (least squares).

    With the matrix A of inner products of the stored profiles and the vector b of theirs with the wanted one, the
    weights x minimise x A x - 2 b x. Other than in the paper, their sum is held at 1, by a Lagrange multiplier. Without
    it the sum is only near 1, and everything that hardly moves during training (most of each weight, and constant
    buffers) would be scaled by it; in small runs, this was most of the error. A stored average that has the wanted
    profile is taken as it is.

    Args:
        batch: images of a step, where this is known: if there are few steps, inner products are those of step_inner.

    Raises:
        ValueError: nothing is stored.
    """
    if not stored:
        raise ValueError("there are no stored averages")
    for i, profile in enumerate(stored):
        if all(abs(x - y) <= SAME * abs(y) for x, y in zip(profile, wanted, strict=True)):
            return Combination(np.eye(len(stored))[i], 0.0)
    scaled = [Profile(p.gamma, p.t / wanted.t) for p in stored]  # so that all numbers are of order 1
    target = [Profile(wanted.gamma, 1.0)]
    few = batch > 0 and max(p.t for p in (*stored, wanted)) <= FEW_STEPS * batch
    product = partial(step_inner, batch=batch / wanted.t) if few else inner
    A, b, square = product(scaled, scaled), product(scaled, target)[:, 0], float(product(target, target)[0, 0])
    n = len(stored)
    system = np.zeros([n + 1, n + 1])
    system[:n, :n] = A + 1e-14 * square * np.eye(n)  # where several averages are nearly the same
    system[n, :n] = system[:n, n] = 1
    x = np.linalg.lstsq(system, np.append(b, 1), rcond=None)[0][:n]
    x /= x.sum()
    return Combination(x, math.sqrt(max(square - 2 * b @ x + x @ A @ x, 0) / square))
