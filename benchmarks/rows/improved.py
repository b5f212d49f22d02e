"""The techniques of Salimans et al. 2016, each on a problem that shows what it does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rows.points import coverage
from rows.trial import Check, Measured, Row, trained
from stylegan_pg.config.loading import load_config
from stylegan_pg.losses import Objective
from stylegan_pg.networks import Pair
from stylegan_pg.systems.gan import GAN

GRID = "systems/improved-grid"
TINY = [
    "resolution=4",
    "data.url=points:ring",
    "model.name=mlp",
    "model.base=[1,1]",
    "model.mbstd_channels=0",
    "model.z_dim=2",
    "loss.r1_gamma=0",
    "loss.pl_weight=0",
    "loss.style_mixing=0",
    "train.channels_last=false",
    "ema.kimg=0.001",
]
PLAIN = ["model.minibatch_kernels=0", "loss.terms=[]"]
TECHNIQUES = {  # each alone
    "plain": [],
    "feature matching": ["loss.terms=[{name: feature_matching, weight: 1}]", "loss.g_weight=0.1"],
    "minibatch discrimination": ["model.minibatch_kernels=16"],
    "historical averaging": ["loss.terms=[{name: historical_averaging, weight: 0.001}]"],
    "label smoothing": ["loss.real_target=0.9"],
    "instance noise": ["loss.instance_noise={from: 0.2, to: 0, kimg: 150}"],
    "diversity": ["loss.terms=[{name: diversity, weight: 1}]"],
}


def no_arguments(*_: Any) -> dict[str, Any]:
    return {}


class Constant(nn.Module):
    """Images that are one number x, whatever the latents are."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.ones([]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.x * torch.ones(len(z), 2, 1, 1, dtype=z.dtype)


class Factor(nn.Module):
    """Scores that are the number of an image times y."""

    def __init__(self):
        super().__init__()
        self.y = nn.Parameter(torch.ones([]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.y * images[:, :1, 0, 0]


def radius(seed: int, folder: Path, weight: float) -> float:
    """Where the bilinear game min over x, max over y of x y, started at (1, 1), ends: the distance from its equilibrium
    (0, 0), around which gradient descent runs in circles. `weight` is that of historical averaging."""
    terms = f"loss.terms=[{{name: historical_averaging, weight: {weight}}}]" if weight else "loss.terms=[]"
    # With a large eps, Adam's steps are those of plain gradient descent with the rate 0.1.
    descent = ["optim.eps=1000", "optim.g_lr=100", "optim.d_lr=100", "optim.beta2=0.99"]
    given = [f"run={folder}", *TINY, f"seed={seed}", terms, *descent, "train.batch=2", "train.total_kimg=2"]
    system = GAN(load_config(None, given), Pair(Constant, Factor, no_arguments, no_arguments))
    system.objective = Objective(lambda fake, real=None: fake, lambda real, fake: -fake)
    trainer = trained(None, given[1:], folder, system=system)
    return math.hypot(float(trainer.state.G.x.detach()), float(trainer.state.D.y.detach()))


HALF = (math.sin(math.pi / 8), math.cos(math.pi / 8))  # across this direction, the ring has four modes on each side


class Coin(nn.Module):
    """Points on one side or the other, each with probability 1/2, with a parameter that does nothing."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros([]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        side = z[:, :1].sign() + 0 * self.nothing
        return (side * torch.tensor(HALF, dtype=z.dtype))[:, :, None, None]


class Table(nn.Module):
    """A score for each side."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = images[:, :, 0, 0] @ torch.tensor(HALF, dtype=images.dtype) > 0
        return self.scores[side.long()][:, None] + 0 * images[:, :1, 0, 0]


def optimal(seed: int, folder: Path, target: float) -> float:
    """The mean probability of being real that a trained D gives to x in {0, 1}, which real and generated data have with
    the same probability."""
    rates = ["optim.g_lr=1e-9", "optim.d_lr={from: 0.05, to: 0.0005, kimg: 60}", "optim.beta1=0.5"]
    given = [f"run={folder}", *TINY, f"seed={seed}", f"loss.real_target={target}", *rates, "train.batch=128"]
    given += ["train.total_kimg=60"]
    system = GAN(load_config(None, given), Pair(Coin, Table, no_arguments, no_arguments))
    trainer = trained(None, given[1:], folder, system=system)
    return float(trainer.state.D.scores.detach().sigmoid().mean())


def on_grid(seed: int, folder: Path, *given: str) -> Measured:
    return coverage(trained(GRID, [f"seed={seed}", *PLAIN, *given], folder), "grid25", seed)


def improved(seed: int, folder: Path, off: bool) -> Measured:
    """Historical averaging, label smoothing and minibatch discrimination, each on its problem; of the last one the
    modes for each one that the plain pair covers, of which at least one is counted. Off: without them."""
    grid = {
        name: on_grid(seed, folder / name.replace(" ", "-"), *given)
        for name, given in TECHNIQUES.items()
        if not off or name == "plain"
    }
    with_it = grid["plain" if off else "minibatch discrimination"]
    values = {
        "radius": radius(seed, folder / "bilinear", 0.0 if off else 0.25),
        "distance from 0.45": abs(optimal(seed, folder / "discrete", 1.0 if off else 0.9) - 0.45),
        "modes for one of plain": with_it.values["modes"] / max(grid["plain"].values["modes"], 1),
    }
    table = {name: [int(m.values["modes"]), round(m.values["near"], 3)] for name, m in grid.items()}
    return Measured(values, {"modes of 25, near": table}, with_it.picture)


ROWS = [
    Row(
        "improved",
        improved,
        [
            Check("radius", 0.3, at_most=True),
            Check("distance from 0.45", 0.015, at_most=True),
            Check("modes for one of plain", 1.5),
        ],
        off="no historical averaging, no label smoothing, no minibatch discrimination",
    )
]
