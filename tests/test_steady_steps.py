"""Steps of one kind make the same operations, and the host neither waits for the device nor sends it anything within
them: what CUDA graphs need, proved on a CPU."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import steady
import torch

from stylegan_pg.augment import geometry
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.losses import terms
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

TINY = {
    "model.z_dim": 8,
    "model.w_dim": 8,
    "model.mapping_layers": 2,
    "model.channel_base": 64,
    "resolution": 16,
    "growth.start": 8,
    "growth.stable_kimg": 0.064,
    "growth.fade_kimg": 0.064,
    "train.batch": 8,
    "loss.r1_every": 2,
    "loss.r1_gamma": 1,
    "loss.pl_every": 2,
}
RATES = ["optim.g_lr={from: 1e-4, to: 1e-2, kimg: 1}", "optim.beta2={from: 0.5, to: 0.9, kimg: 1}"]
LAZY = "loss.terms=[{name: %s, weight: 1, every: 2}]"


def steps_of(data, monkeypatch, *overrides: str, phase: int = 0, count: int = 6) -> steady.Steps:
    (name,) = [text.split("=")[1] for text in overrides if text.startswith("model.name=")] or ["stylegan2"]
    given = [f"{key}={value}" for key, value in harness.own_keys(TINY, name).items()]
    config = load_config(None, [*given, f"data.url={data}", "run=unused", *overrides])
    state, steps = TrainState(config, load_dataset(config), Devices(config)), steady.empty()
    p = phases(config)[phase]
    state.enter(p)
    state.nimg = p.start
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "start", steady.recorded(steps))
        trained = Engine(state)
        order = state.index.order(seed=0)
        for _, batch in zip(
            range(count), batches(state.table, order, start=p.start, end=p.end, batch=8, **how), strict=False
        ):
            outcome = trained.step(batch)
            assert not outcome.faults
    return steps


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.name=stylegan", "loss.pl_weight=0"],
        ["model.name=progan", "loss.pl_weight=0"],
        ["model.name=r3gan", "loss.pl_weight=0"],
        ["model.name=r3gan", "loss.pl_weight=0", "loss.objective=relativistic", "loss.r1_every=1", "loss.terms=[r2]"],
        ["data.conditional=true", "loss.r1_every=1", "loss.terms=[{name: r2, weight: 1}]", "train.micro_batch=4"],
        ["data.conditional=true"],
        ["data.conditional=true", "loss.objective=relativistic"],
        ["train.micro_batch=4"],
        ["optim.d_steps=2", "optim.g_steps=2", "loss.d_clip=0.1"],
        *([f"optim.name={name}", "loss.d_clip=0.1", *RATES] for name in ("rmsprop", "sgd")),
        ["system.name=loss_sensitive"],
        ["model.low_precision=bf16", "model.low_precision_at=[8]"],
        ["model.d_architecture=skip", "model.g_architecture=resnet"],
        ["model.d_architecture=orig", "model.g_architecture=orig", "model.noise=false"],
        ["train.channels_last=true"],
        ["train.dtype=float64"],
        ["train.freeze_d=1", "init=other.safetensors", "growth.start=16"],
        *([LAZY % name] for name in ("r2", "gradient_penalty", "dragan")),
        ["loss.terms=[{name: drift, weight: 1}, {name: gradient_penalty, weight: 1}, {name: r2, weight: 1}]"],
        *([f"loss.objective={name}"] for name in ("saturating", "wgan", "lsgan", "hinge")),
        ["loss.r1_gamma={from: 5, to: 1, kimg: 1}", "loss.pl_weight={from: 1, to: 2, kimg: 1}", *RATES],
    ],
    ids=" ".join,
)
def test_steps_of_a_kind_are_alike(tiny_data, monkeypatch, overrides):
    assert steady.problems(steps_of(tiny_data, monkeypatch, *overrides)) == []


@pytest.mark.parametrize(
    "augmentation",
    [
        "ada, pipeline: bgcfno, p: 0.4, interval: 2",
        "fixed, pipeline: bgco, p: 0.4, multipliers: {hue: 0.5, cutout: 2}",
        "diffaugment",
    ],
)
def test_with_augmentation(tiny_data, monkeypatch, augmentation):
    """As it is made on a GPU."""
    monkeypatch.setattr(geometry, "STEADY", True)
    overrides = [f"augment={{mode: {augmentation}}}", "growth.stable_kimg=0.128", "loss.terms=[r2]"]
    assert steady.problems(steps_of(tiny_data, monkeypatch, *overrides, count=12)) == []


@pytest.mark.parametrize("name", ["stylegan2", "stylegan", "progan", "r3gan"])
def test_in_a_fade(tiny_data, monkeypatch, name):
    overrides = [f"model.name={name}", *(["loss.pl_weight=0"] if name != "stylegan2" else [])]
    assert steady.problems(steps_of(tiny_data, monkeypatch, *overrides, phase=1)) == []


def test_points_in_the_plane(monkeypatch):
    mlp = ["model.name=mlp", "model.base=[1,1]", "resolution=4", "growth.start=null", "loss.pl_weight=0"]
    overrides = ["data.url=points:ring", *mlp, "train.total_kimg=1"]
    assert steady.problems(steps_of("points:ring", monkeypatch, *overrides)) == []


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (lambda x: x * x.mean().item(), "the host reads"),
        (lambda x: x * 2 if bool(x.sum() > 0) else x, "the host reads"),
        (lambda x: x + torch.tensor(1.0), "a tensor of the host's numbers"),
        (lambda x: x[[*range(len(x))]], "a tensor of the host's numbers"),
        (lambda x: x + torch.rand(len(x)), "drawn within the step: rand"),
        (lambda x: x + COUNTED.pop() * sum(x.sum() for _ in COUNTED), "other operations"),
    ],
)
def test_a_broken_rule_is_noticed(tiny_data, monkeypatch, broken, found):
    COUNTED[:] = range(1, 40)
    term = terms.TERMS["r1"]

    def compute(x: Any, **how: Any) -> Any:
        return {name: broken(value) if name == "loss" else value for name, value in term.compute(x, **how).items()}

    monkeypatch.setitem(terms.TERMS, "r1", term._replace(compute=compute))
    problems = steady.problems(steps_of(tiny_data, monkeypatch))
    assert problems
    assert all(found in problem for problem in problems)


COUNTED: list[int] = []

SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, TESTS)
import steady
from stylegan_pg import __main__
from stylegan_pg.training.engine import Engine
steps = steady.empty()
Engine.start = steady.recorded(steps)
out = sys.argv.pop(1)
try:
    __main__.main()
except SystemExit as end:
    problems = steady.problems(steps) + [f"exit code {end.code}"] * bool(end.code)
    Path(f"{out}{os.environ['RANK']}").write_text("\\n".join(problems))
    raise
"""


@pytest.mark.distributed
def test_two_ranks(tiny_data, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("TESTS", repr(str(harness.Path(__file__).parent))))
    long = {"growth__stable_kimg": 0.064, "growth__fade_kimg": 0.064, "train__batch": 8, "train__total_kimg": 0.25}
    args = harness.arguments(tmp_path / "run", tiny_data, **long)
    harness.finish(harness.start([str(tmp_path / "found"), *args], ranks=2, script=script), 0)
    assert [(tmp_path / f"found{rank}").read_text() for rank in (0, 1)] == ["", ""]
