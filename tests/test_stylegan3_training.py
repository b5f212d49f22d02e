"""Training StyleGAN3: the same on any number of ranks and micro-batches, exact resume, both engines, steady steps."""

import os
import random
from typing import Any

import harness
import pytest
import steady
import torch
from test_engines import deepspeed  # noqa: F401 - a fixture

from stylegan_pg import load_snapshot
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.networks.stylegan3 import HALF_LIFE
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

TINY = {
    "model__name": "stylegan3",
    "growth__start": "null",
    "train__total_kimg": 0.048,
    "loss__pl_weight": 0,
    "resolution": 8,
}


def engine_of(data, *overrides: str) -> Engine:
    given = ["run=unused", "resolution=8", "train.total_kimg=1", "train.batch=8", "model=stylegan3", "model.z_dim=8"]
    given += ["model.w_dim=8", "model.mapping_layers=2", "model.channel_base=64", "model.channel_max=8", *overrides]
    config = load_config(None, [f"data.url={data}", "loss.r1_every=2", "loss.pl_every=2", *given])
    state = TrainState(config, load_index(str(data)), Devices(config))
    state.enter(phases(config)[0])
    return Engine(state)


def trained(engine: Engine, steps: int) -> dict[str, torch.Tensor]:
    state, p = engine.state, engine.state.current
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    data = batches(state.table, state.index.order(seed=0), start=0, end=p.end, batch=p.batch, **how)
    for _, batch in zip(range(steps), data, strict=False):
        assert not engine.step(batch).faults
    return {name: t.clone() for name, t in state.tensors().items()}


def magnitudes(tensors: dict[str, torch.Tensor], part: str = "G") -> torch.Tensor:
    found = [t for name, t in tensors.items() if name.startswith(f"{part}/") and name.endswith("magnitude_ema")]
    assert len(found) == 15
    return torch.stack(found)


@pytest.mark.parametrize("extra", [[], ["model.equivariance=rotation", "data.conditional=true", "optim.d_steps=2"]])
def test_micro_batches_change_nothing(tiny_data, extra):
    # A pass that used the mean squares of its own images would differ by 1e-4.
    double = ["train.dtype=float64", "optim.g_steps=2", *extra]
    whole = trained(engine_of(tiny_data, *double), 3)
    parts = trained(engine_of(tiny_data, *double, "train.micro_batch=4"), 3)
    assert harness.largest_difference(whole, parts) < 1e-9


@pytest.mark.parametrize("batch", [8, 16])
def test_mean_squares_are_followed_once_per_step_of_d(tiny_data, batch, monkeypatch):
    """With inputs of mean square 0, k steps leave 0.5^(k batch / 20,000) of them."""
    monkeypatch.setattr("stylegan_pg.networks.stylegan3._mean_square", lambda x: torch.zeros([]).double())
    engine = engine_of(tiny_data, "train.dtype=float64", f"train.batch={batch}", "optim.g_steps=2", "loss.pl_weight=2")
    tensors = trained(engine, 3)
    expected = torch.full([15], 0.5 ** (3 * batch / HALF_LIFE), dtype=torch.float64)
    torch.testing.assert_close(magnitudes(tensors), expected, rtol=1e-12, atol=0)
    assert torch.equal(magnitudes(tensors, "G_ema"), magnitudes(tensors))


@pytest.mark.parametrize(
    "overrides", [[], ["model.equivariance=rotation", "loss.pl_weight=0", "loss.style_mixing=0.9", "augment.mode=none"]]
)
def test_steps_of_a_kind_are_alike(tiny_data, monkeypatch, overrides):
    steps = steady.empty()
    monkeypatch.setattr(Engine, "start", steady.recorded(steps))
    trained(engine_of(tiny_data, *overrides), 6)
    assert steady.problems(steps) == []


@pytest.mark.distributed
def test_a_killed_run_continues_bit_for_bit(tiny_data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    how = {**TINY, "checkpoint__every_kimg": 0.008, "metrics__every_kimg": 0.024, "metrics__names": "[eqt_int16]"}
    harness.finish(harness.start(harness.arguments(whole, tiny_data, **how)))
    args = harness.arguments(killed, tiny_data, **how)
    assert harness.kill_until_done(args, killed, random.Random(3), most=2) > 0
    harness.assert_same_run(whole, killed)
    G = load_snapshot(next((whole / "snapshots").glob("*.safetensors")))
    assert G(torch.randn(2, G.z_dim)).shape == (2, 3, 8, 8)


@pytest.mark.distributed
def test_two_ranks_compute_the_same_as_one(tiny_data, tmp_path):
    how = {**TINY, "train__dtype": "float64", "train__check_ranks_every": 1, "loss__pl_weight": 2}
    for ranks in (0, 2):
        harness.finish(harness.start(harness.arguments(tmp_path / f"run{ranks}", tiny_data, **how), ranks=ranks))
    one, two = (harness.newest(tmp_path / f"run{ranks}")[0] for ranks in (0, 2))
    assert float((magnitudes(one) - 1).abs().min()) > 0
    assert harness.largest_difference(one, two) < 1e-9


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.usefixtures("deepspeed")
def test_engines_agree(tiny_data, tmp_path):
    """The first step's gradients agree to rounding; Adam with beta1 = 0 turns rounding into changes of sign later."""
    found = {}
    for engine in ("accelerate", "deepspeed"):
        run = tmp_path / engine
        how = {**TINY, "train__engine": engine, "train__total_kimg": 0.008, "optim__beta1": 0.9, "optim__eps": 0.1}
        harness.finish(
            harness.start(harness.arguments(run, tiny_data, **how), ranks=2, env=os.environ | {"OMP_NUM_THREADS": "1"})
        )
        found[engine] = harness.newest(run)[0]
    torch.testing.assert_close(magnitudes(found["deepspeed"]), magnitudes(found["accelerate"]), rtol=1e-6, atol=0)
    assert harness.largest_difference(found["accelerate"], found["deepspeed"], "G/") < 1e-5
