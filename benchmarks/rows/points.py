"""Rows of points in the plane: eight Gaussians on a ring, twenty-five on a grid."""

from __future__ import annotations

from pathlib import Path

import torch

from rows import line
from rows.trial import Check, Measured, Row, samples, scatter, trained
from stylegan_pg.data.datasets.points import MIXTURES
from stylegan_pg.metrics.coverage import mode_coverage
from stylegan_pg.training.trainer import Trainer

SAMPLES = 2500
LEAST_SHARE = 0.01  # of the samples that a mode must get to count
DISTANCE = 8.0
RING = [Check("modes", 8), Check("near", 0.5)]


def coverage(trainer: Trainer, mixture: str, seed: int) -> Measured:
    """The number of modes with at least a hundredth of the samples each, and the share of samples near any mode."""
    centres, deviation = MIXTURES[mixture]
    points = samples(trainer, SAMPLES, seed).flatten(1)
    found = mode_coverage(points, torch.from_numpy(centres), deviation, LEAST_SHARE)
    values = {"modes": found["modes"], "near": found["high_quality"]}
    return Measured(values, picture=scatter(points, torch.from_numpy(centres).float()))


def gan(seed: int, folder: Path, off: bool) -> Measured:
    """The original GAN on the ring; and the gradients of both losses of G for points at a distance of 8 from the real
    ones, which D tells apart: that of the minimax game vanishes. Off: D is not trained."""
    given = ["optim.d_lr=1e-12"] if off else []
    ring = coverage(trained("systems/gan", [f"seed={seed}", *given], folder / "run"), "ring", seed)
    real, fake = line.normal(0.0, 0.5), line.normal(DISTANCE, 0.5)
    D = line.critic(real, fake, line.Training("logistic", lr=1e-3, steps=1 if off else 400), seed)
    at = torch.full([1], DISTANCE)
    pulls = {name: line.pull(D, at, name) for name in ("logistic", "saturating")}
    values = {**ring.values, "gradient": pulls["logistic"], "minimax": pulls["saturating"]}
    return Measured(values, picture=ring.picture)


def loss_sensitive(seed: int, folder: Path, off: bool) -> Measured:
    """Loss-Sensitive GAN on the ring. Off: no margins."""
    given = ["system.margin=0"] if off else []
    return coverage(trained("systems/loss_sensitive", [f"seed={seed}", *given], folder / "run"), "ring", seed)


GRADIENTS = [Check("gradient", 0.5), Check("minimax", 0.01, at_most=True)]
ROWS = [
    Row("gan", gan, [*RING, *GRADIENTS], off="D is not trained"),
    Row("loss_sensitive", loss_sensitive, RING, off="no margins"),
]
