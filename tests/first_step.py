"""The first step of a small run in float64: what its losses give, without moving weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import Batch, batches
from stylegan_pg.systems.base import Context, Step, System
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

SMALL = [
    "run=unused",
    "resolution=8",
    "model.channel_max=8",
    "model.mbstd_group=8",
    "train.batch=8",
    "train.total_kimg=1",
    "train.dtype=float64",
    "train.device=cpu",
]


def engine_of(config: str | None, data: Path | str, *overrides: str, system: System | None = None) -> Engine:
    """The engine of a shipped configuration on a dataset, in its first phase."""
    configuration = load_config(config, [*SMALL, f"data.url={data}", *overrides])
    state = TrainState(configuration, load_dataset(configuration), Devices(configuration), system)
    state.enter(phases(configuration)[0])
    return Engine(state)


def batches_of(engine: Engine, count: int) -> list[Batch]:
    """The first batches of a run."""
    state, p = engine.state, engine.state.current
    how = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    data = batches(state.table, state.index.order(seed=0), start=0, end=p.end, batch=p.batch, **how)
    return [batch for _, batch in zip(range(count), data, strict=False)]


class FirstStep:
    """The first step of an engine, whose updates are looked at one by one."""

    def __init__(self, engine: Engine):
        self.engine, self.state = engine, engine.state
        self.system: Any = engine.state.system
        engine.short = False
        self.step: Step = engine.begin(batches_of(engine, 1)[0])
        self.updates = engine.updates(self.step)

    def gradients(self, side: str) -> dict[str, torch.Tensor]:
        """The gradients of the first update of a side."""
        update = next(update for update in self.updates if update.trains == side)
        self.state.train_only(update.trains)
        self.engine.all_passes(update, self.step)
        self.state.buffers.restore()
        net = self.state.system.net[side]
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    def context(self) -> Context:
        """The whole batch as one micro-batch."""
        places = list(range(self.step.batch))
        return Context(self.step, self.step.share, places, 0, self.step.batch, lambda *_: None)

    def expected(self, side: str, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradients of a loss [n] by the names of a side's parameters; those that it does not depend on are left
        out."""
        self.state.train_only(None)
        named = dict(self.state.system.net[side].named_parameters())
        found = torch.autograd.grad(loss.mean(), list(named.values()), allow_unused=True)
        return {name: g for name, g in zip(named, found, strict=True) if g is not None}


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    """Compare gradients by the largest one of the network."""
    assert expected
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    for name, g in expected.items():
        error = float((found[name] - g).abs().max())
        assert error <= tolerance * scale, f"{name}: {error / scale:.2e}"
    assert all(float(found[name].abs().max()) == 0 for name in found.keys() - expected.keys())


def parameters(net: Any) -> int:
    return sum(p.numel() for p in net.parameters())
