"""Training with numbers that follow curves: what each step is given, exact resume, and any number of ranks."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from test_engines import ZERO
from test_engines import deepspeed as deepspeed  # a fixture
from test_steady_steps import TINY

from stylegan_pg.augment import ada
from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.optim import ema
from stylegan_pg.optim.optimizer_step import NetworkOptimizer
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

# Everything changes all along, and something begins or ends within each phase.
CURVES: dict[str, object] = {
    "optim__g_lr": "[{from: 1e-4, to: 3e-3, kimg: 0.02}, {from: 3e-3, to: 1e-3, kimg: 0.1, start: 0.05}]",
    "optim__d_lr": "{from: 2e-3, to: 1e-3, kimg: 0.09, shape: cosine}",
    "optim__beta2": "{from: 0.9, to: 0.99, kimg: 0.08, shape: cosine}",
    "loss__r1_gamma": "{from: 2, to: 0.5, kimg: 0.07, shape: cosine}",
    "loss__pl_weight": "{from: 0, to: 2, kimg: 0.06}",
    "loss__terms": "[{name: r2, weight: {from: 1, to: 0, kimg: 0.05}, every: 3}]",
    "loss__blur_sigma": "{from: 2, to: 0, kimg: 0.06}",
    "ema__kimg": "{from: 0, to: 0.5, kimg: 0.09}",
    "augment": "{mode: fixed, pipeline: bc, p: {from: 0, to: 0.8, kimg: 0.07}}",
}


def stepped(data: Path, count: int, *overrides: str, phase: int = 0) -> TrainState:
    """The state after some steps of a phase."""
    config = load_config(
        None, [*(f"{key}={value}" for key, value in TINY.items()), f"data.url={data}", "run=unused", *overrides]
    )
    state, p = TrainState(config, load_dataset(config), Devices(config)), phases(config)[phase]
    state.enter(p)
    state.nimg = p.start
    engine, order = Engine(state), state.index.order(seed=0)
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    for _, batch in zip(
        range(count), batches(state.table, order, start=p.start, end=p.end, batch=8, **how), strict=False
    ):
        assert not engine.step(batch).faults
    return state


def test_what_each_step_is_given(tiny_data, monkeypatch):
    """Adam's numbers with the exponents of lazy terms, the decay of G_ema, and the probability of augmentation."""
    given: dict[str, list[Any]] = {"adam": [], "ema": [], "p": []}
    step, update, draw = NetworkOptimizer.step, ema.update, ada.draw

    def watched(self: NetworkOptimizer, reports: torch.Tensor) -> Any:
        (group,) = self.optimizer.param_groups
        given["adam"].append((group["lr"].item(), *group["betas"]))
        return step(self, reports)

    monkeypatch.setattr(NetworkOptimizer, "step", watched)
    monkeypatch.setattr(ema, "update", lambda a, b, share: given["ema"].append(1 - share.item()) or update(a, b, share))
    monkeypatch.setattr(
        ada, "draw", lambda pipeline, count, p, *rest: given["p"].append(p) or draw(pipeline, count, p, *rest)
    )
    curves = [
        "optim.g_lr={from: 0.001, to: 0.003, kimg: 0.064}",
        "optim.d_lr={from: 0.002, to: 0.001, kimg: 0.032}",
        "optim.beta1=0.5",
        "optim.beta2={from: 0.9, to: 0.98, kimg: 0.064}",
        "ema.kimg={from: 0, to: 1, kimg: 0.064}",
        "augment={mode: fixed, pipeline: b, p: {from: 0, to: 1, kimg: 0.064}}",
    ]
    stepped(tiny_data, 6, *curves, "loss.r1_every=4")
    expected, p = [], []
    for i in range(6):
        t = 8 * i / 64
        for lr, k in ((0.001 + 0.002 * t, 2), (0.002 - 0.001 * min(2 * t, 1), 4)):
            ratio = k / (k + 1)
            adam = (lr * ratio, 0.5**ratio, (0.9 + 0.08 * t) ** ratio)
            expected += [pytest.approx(adam, rel=1e-12)] * (2 if i % k == 0 else 1)
        p.append(t)
    assert given["adam"] == expected
    assert given["ema"] == pytest.approx([0.5 ** (8 / max(1000 * value, 1e-8)) for value in p], abs=1e-7)
    # Draws of a step are made for its own nimg, also those that are prepared while the step before computes.
    assert sorted(set(given["p"])) == pytest.approx([*p, 48 / 64])


def test_a_curve_weighs_a_term_like_a_constant(tiny_data):
    """With beta1 = 0 the first moments are the gradients of the last step."""
    for name, curve, constant in (
        ("loss.r1_gamma={} loss.r1_every=1", "{from: 3, to: 5, kimg: 1, start: 5}", "3"),
        ("loss.r1_gamma={}", "{from: 4, to: 0, kimg: 1}", "4"),
        ("loss.terms=[{{name: drift, weight: {}}}]", "{from: 2, to: 5, kimg: 1}", "2"),
        ("loss.pl_weight={}", "[{from: 2, to: 3, kimg: 1}, {from: 9, to: 1, kimg: 1}]", "2"),
    ):
        off = [key for key in ("loss.r1_gamma=0", "loss.pl_weight=0") if key.split("=")[0] not in name]
        tensors = []
        for value in (curve, constant):
            given = [name.format(value)] if "terms" in name else name.format(value.replace(" ", "")).split()
            tensors.append(stepped(tiny_data, 1, *off, *given).tensors())
        for part in ("opt_G/exp_avg/", "opt_D/exp_avg/"):
            assert harness.largest_difference(tensors[0], tensors[1], part) < 1e-5, name


def trained(folder: Path, data: Path, ranks: int = 0, **changes: object) -> Path:
    run = folder / "run"
    folder.mkdir(exist_ok=True)
    args = harness.arguments(run, data, **(harness.COMPARABLE | CURVES | changes))
    harness.finish(harness.start(args, ranks=ranks))
    return run


@pytest.fixture(scope="module")
def straight(tiny_data, tmp_path_factory) -> Path:
    """A run without interruption, over growth and a fade, whose 12 checkpoints are kept."""
    return trained(tmp_path_factory.mktemp("straight"), tiny_data)


@pytest.mark.distributed
@pytest.mark.parametrize("kept", [1, 5, 7])
def test_resume_is_exact(straight, tiny_data, tmp_path, kept):
    run = shutil.copytree(straight, tmp_path / "run")
    paths = list(reversed(checkpoint.found(run / "checkpoints")))
    assert len(paths) == 12
    for path in paths[kept:]:
        path.unlink()
    trained(tmp_path, tiny_data)
    harness.assert_same_run(straight, run)
    assert harness.newest(run)[1]["nimg"] == 96
    lines = harness.stats(run)
    assert len({line["lr_g"] for line in lines}) > 6
    assert lines[6]["lr_g"] == pytest.approx(3e-3)
    assert [line["augment_p"] for line in lines] == pytest.approx([min(0.8 * 8 * i / 70, 0.8) for i in range(12)])


@pytest.mark.distributed
def test_the_number_of_ranks_does_not_matter(tiny_data, tmp_path):
    """Two ranks and one process with the same micro-batches: bit for bit at every checkpoint."""
    two = trained(tmp_path / "two", tiny_data, 2)
    one = trained(tmp_path / "one", tiny_data, 0, train__micro_batch=4)
    for a, b in itertools.zip_longest(*(checkpoint.found(run / "checkpoints") for run in (one, two))):
        (tensors, state), (others, other) = checkpoint.read(a), checkpoint.read(b)
        assert [name for name, t in tensors.items() if not torch.equal(t, others[name])] == [], a.name
        assert state["system"] == other["system"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_takes_the_same_numbers(tiny_data, tmp_path, deepspeed, straight, stage):
    """Results agree with those of plain sums as far as without curves (tests/test_engines.py)."""
    run = trained(tmp_path / "zero", tiny_data, 2, **ZERO | {"train__zero_stage": stage})
    plain, ours = (
        [checkpoint.read(path)[0] for path in reversed(checkpoint.found(r / "checkpoints"))] for r in (straight, run)
    )
    # Biases begin at 0, so that their relative difference shows rates and decays that were not taken.
    assert max(harness.largest_difference(a, b) for a, b in zip(plain[:4], ours[:4], strict=True)) < 1e-4


@pytest.mark.distributed
def test_another_curve_on_resume_is_reported(straight, tiny_data, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    for path in checkpoint.found(run / "checkpoints")[:6]:
        path.unlink()
    args = harness.arguments(run, tiny_data, **(harness.COMPARABLE | CURVES | {"ema__kimg": 3}))
    told = harness.finish(harness.start(args))
    assert "ema.kimg was [{'from': 0.0, 'to': 0.5, 'kimg': 0.09" in told
    assert "is now 3.0" in told
    assert told.count(" is now ") == 1
