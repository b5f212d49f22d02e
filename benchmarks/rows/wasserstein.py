"""Rows of the Wasserstein GANs: on the line, where distances are known, and on the ring."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch

from rows import line, points
from rows.line import Training, either, normal, uniform
from rows.trial import Check, Measured, Row, trained
from stylegan_pg.rng import generator

# Real and generated points; the exact W1 is 0.25, 0.5, 1, 1.5 and 2.
PAIRS = [
    (normal(-1.0, 0.1), normal(-0.75, 0.1)),
    (uniform(-1.0, 0.0), uniform(-0.5, 0.5)),
    (normal(-1.0, 0.1), either(normal(-0.5, 0.1), normal(0.5, 0.1))),
    (uniform(-1.0, -0.5), normal(0.75, 0.1)),
    (normal(-1.0, 0.1), normal(1.0, 0.1)),
]
CLIPPED = Training("wgan", lr=5e-5, steps=1500, rmsprop=True, clip=0.01)
UNCLIPPED = Training("logistic", lr=5e-5, steps=1500, rmsprop=True)
GP_WEIGHT, GP_DISTANCE = 1.0, 0.8
PENALISED = Training("wgan", lr=2e-4, steps=2000, penalty=GP_WEIGHT)


def growth(how: Training, seed: int) -> tuple[float, list[float]]:
    """(the least growth of a critic's value from one pair to the next, relative to that of the exact W1, where 1 is
    proportional to it and 0 no growth; the values)."""
    exact = [line.wasserstein(*pair) for pair in PAIRS]
    values = [line.value(line.critic(*pair, how, seed), *pair, how, seed) for pair in PAIRS]
    steps = [(b - a) / max(values[-1], 1e-12) for a, b in itertools.pairwise(values)]
    wanted = [(b - a) / exact[-1] for a, b in itertools.pairwise(exact)]
    return min(a / b for a, b in zip(steps, wanted, strict=True)), values


def wgan(seed: int, folder: Path, off: bool) -> Measured:
    """WGAN with clipped weights. Off: the logistic objective, whose value does not grow with the distance once D tells
    all points apart; and no clipping on the ring."""
    least, values = growth(UNCLIPPED if off else CLIPPED, seed)
    given = ["loss.d_clip=0"] if off else []
    ring = points.coverage(trained("systems/wgan", [f"seed={seed}", *given], folder / "run"), "ring", seed)
    found = {"growth": least, **ring.values}
    return Measured(found, {"critic": [round(value, 5) for value in values]}, ring.picture)


def wgan_gp(seed: int, folder: Path, off: bool) -> Measured:
    """WGAN with gradient penalty. Between two points at the distance W1 the slope of the best critic is
    1 + W1 / (2 lambda). Off: no penalty."""
    real, fake = normal(0.0, 0.01), normal(GP_DISTANCE, 0.01)
    how = dataclasses.replace(PENALISED, penalty=0) if off else PENALISED
    D = line.critic(real, fake, how, seed)
    u = torch.rand(4096, generator=generator(seed, "between"))
    slope = float(line.slopes(D, u * GP_DISTANCE).mean())
    away = abs(slope - (1 + GP_DISTANCE / (2 * GP_WEIGHT)))
    given = ["loss.terms=[]"] if off else []
    ring = points.coverage(trained("systems/wgan-gp", [f"seed={seed}", *given], folder / "run"), "ring", seed)
    return Measured({"away": away, **ring.values}, {"slope": round(slope, 4)}, ring.picture)


ROWS = [
    Row(
        "wgan",
        wgan,
        [Check("growth", 0.5), Check("near", 0.5)],
        off="the logistic objective on the line, no clipping on the ring",
    ),
    Row("wgan-gp", wgan_gp, [Check("away", 0.04, at_most=True), *points.RING], off="no penalty"),
]
