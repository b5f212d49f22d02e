"""What the rows of benchmarks/systems.py have in common: how a system is trained, and what a row returns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.rng import generator
from stylegan_pg.systems.base import System
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"  # where the demo's data are, too
QUIET = [
    "train.device=cpu",
    "train.threads=1",
    "data.workers=0",
    "output.grid_kimg=0",
    "output.snapshot_kimg=0",
    "output.trackers=[]",
    "output.tick_kimg=1000",
    "metrics.every_kimg=0",
    "checkpoint.every_kimg=100000",
]


class Check(NamedTuple):
    """A number that a row must reach: at least `asked`, or with `at_most` no more than it."""

    name: str
    asked: float
    at_most: bool = False

    def ratio(self, value: float) -> float:
        """At least 1 if the check is passed."""
        if self.at_most:
            return self.asked / max(value, 1e-9)
        return value / self.asked


@dataclass
class Measured:
    """What one trial gave: the values of the row's checks by name, further numbers, and a picture of its samples."""

    values: Mapping[str, float]
    further: Mapping[str, Any] = field(default_factory=dict)
    picture: np.ndarray | None = None  # uint8 [H, W, 3]


@dataclass(frozen=True)
class Row:
    """A system on trial.

    measure: measure(seed, folder, off) -> Measured; a function of a module, so that other processes find it. `folder`
        is empty and for its use. With `off`, the idea of the system is switched off, which must fail its checks.
    off: what that means, in words; "" if nothing can be switched off.
    seeds: number of trials, of whose values the medians count.
    """

    name: str
    measure: Callable[[int, Path, bool], Measured]
    checks: Sequence[Check]
    off: str = ""
    seeds: int = 3


def trained(config: str | None, overrides: Sequence[str], run: Path, *, system: System | None = None) -> Trainer:
    """Train a shipped configuration (or none) with changes to its end, in this process -> its closed trainer.

    Args:
        config: such as "systems/infogan". overrides: `key=value`. run: the folder of the run.
        system: in place of the configuration's.
    """
    given = [f"run={run}", *QUIET, *overrides]
    configuration = load_config(config, given)
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
        trainer = Trainer(configuration, load_dataset(configuration), Devices(configuration), system)
        with contextlib.closing(trainer):
            trainer.train()
            trainer.checkpoints.finish()
    return trainer


@torch.no_grad()
def samples(trainer: Trainer, count: int, seed: int, c: torch.Tensor | None = None, batch: int = 250) -> torch.Tensor:
    """Images [count, C, H, W] of the trained G_ema, for latents of a seed and conditions c [count, c_dim]."""
    G = trainer.state.G_ema
    z = torch.randn([count, G.z_dim], generator=generator(seed, "samples of a row"))
    given = [z] if c is None else [z, c]
    return torch.cat([G(*(t[i : i + batch] for t in given)) for i in range(0, count, batch)])


def sheet(images: torch.Tensor, columns: int = 16, side: int = 32) -> np.ndarray:
    """Images [n, C, H, W] in [-1, 1] as one picture, uint8 [H, W, 3], each `side` pixels wide."""
    images = images[: len(images) // columns * columns].float().clamp(-1, 1)
    images = torch.nn.functional.interpolate(images[:, :3].expand(-1, 3, -1, -1), size=(side, side), mode="nearest")
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    return ((rows + 1) * 127.5).round().byte().numpy()


def scatter(points: torch.Tensor, centres: torch.Tensor, limit: float = 1.4, side: int = 128) -> np.ndarray:
    """Points [n, 2] as a picture with the centres of the modes in red, uint8 [side, side, 3]."""
    picture = np.full([side, side, 3], 255, np.uint8)
    for values, colour in ((points, (40, 90, 180)), (centres, (210, 40, 40))):
        places = ((values.clamp(-limit, limit) + limit) / (2 * limit) * (side - 1)).round().long().numpy()
        picture[side - 1 - places[:, 1], places[:, 0]] = colour
    return picture
