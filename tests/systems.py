"""Losses of systems computed outside of a run, for tests that compare them with formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import Batch, batches
from stylegan_pg.systems.base import Context, Loss
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState


def engine_for(name: str, *overrides: str) -> Engine:
    """The engine of a shipped configuration with changes, in float64, at its first step."""
    config = load_config(name, ["run=unused", "train.dtype=float64", "train.threads=1", "data.workers=0", *overrides])
    state = TrainState(config, load_dataset(config), Devices(config))
    state.enter(phases(config)[0])
    return Engine(state)


def first_batch(engine: Engine) -> Batch:
    state, p = engine.state, engine.state.current
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    how["derived"] = state.config.data.derived
    return next(iter(batches(state.table, state.index.order(seed=0), start=0, end=p.end, batch=p.batch, **how)))


def losses_of(engine: Engine) -> tuple[Context, dict[str, Loss]]:
    """The losses of the first step by side and name ("G main loss"), and the context of its whole batch."""
    step = engine.begin(first_batch(engine))
    found = {f"{u.trains} {loss.name}": loss for u in engine.updates(step) for loss in u.losses}
    everything = list(range(step.batch))
    return Context(step, everything, everything, 0, step.batch, lambda *_: None), found


def gradients(loss: torch.Tensor, net: torch.nn.Module) -> list[torch.Tensor]:
    """The gradients of the sum of a loss by a network's parameters, 0 for those that it does not depend on."""
    parameters = [p.requires_grad_(True) for p in net.parameters()]
    found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], within: float = 1e-9) -> None:
    """Assert that tensors are equal up to rounding, and that they are not all 0."""
    assert any(float(t.abs().max()) > 1e-6 for t in a)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=within, atol=within)
