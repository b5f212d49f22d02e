"""Steps that are captured and replayed have the same bits as steps whose operations are started one by one. CUDA's
graphs are emulated on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from emulated_graphs import EmulatedGraphs
from plain_pairs import pair_of
from test_steady_steps import TINY

from stylegan_pg.augment import geometry
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.errors import UsageError
from stylegan_pg.optim.optimizer_step import NetworkOptimizer
from stylegan_pg.systems.gan import GAN
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.replay import graphs_of
from stylegan_pg.training.train_state import TrainState

RISING = "{from: 0, to: 50, kimg: 0.04, start: 0.05}"  # above 0 after steps were captured
COUNT = 14  # steps: every part of a step is captured, and replayed several times


def trained(data, graphs: EmulatedGraphs | None, *overrides: str, system: Any = None, phase: int = 0) -> Any:
    """The state after some steps, their statistics, and the engine."""
    (name,) = [text.split("=")[1] for text in overrides if text.startswith("model.name=")] or ["stylegan2"]
    given = [f"{key}={value}" for key, value in harness.own_keys(TINY, name).items()]
    long = ["growth.stable_kimg=0.128", "growth.fade_kimg=0.128"]
    config = load_config(None, [*given, *long, f"data.url={data}", "run=unused", *overrides])
    state = TrainState(config, load_dataset(config), Devices(config), system and system(config))
    p = phases(config)[phase]
    state.enter(p)
    state.nimg = p.start
    engine = Engine(state, graphs)
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    data_ = batches(state.table, state.index.order(seed=0), start=p.start, end=p.end, batch=8, **how)
    stats = [engine.step(batch).stats for _, batch in zip(range(COUNT), data_, strict=False)]
    return (
        {name: t.clone() for name, t in state.tensors().items()},
        [stats, state.running, state.system.state()],
        engine,
    )


def assert_same(data, *overrides: str, **how: Any) -> EmulatedGraphs:
    graphs = EmulatedGraphs()
    plain, plain_numbers, _ = trained(data, None, *overrides, **how)
    ours, numbers, _ = trained(data, graphs, *overrides, **how)
    assert {name for name, t in plain.items() if not torch.equal(t, ours[name])} == set()
    assert numbers == plain_numbers
    return graphs


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.name=stylegan", "loss.pl_weight=0"],
        ["model.name=progan", "loss.pl_weight=0", "loss.terms=[{name: gradient_penalty}, {name: drift}]"],
        ["data.conditional=true", "train.micro_batch=4"],
        ["model.name=r3gan", "loss.pl_weight=0", "loss.r1_every=1", "loss.terms=[r2]", "loss.objective=relativistic"],
        ["loss.terms=[{name: r2, weight: 1, every: 2}]", "loss.objective=relativistic"],
        ["optim.d_steps=2", "loss.d_clip=0.1"],
        ["optim.name=rmsprop", "optim.d_lr={from: 1e-3, to: 1e-2, kimg: 0.1}", "loss.d_clip=0.1"],
        ["optim.name=rmsprop", "optim.beta2={from: 0.5, to: 0.9, kimg: 0.05, start: 0.04}"],
        ["optim.name=sgd", "optim.beta1=0.5", "optim.g_lr={from: 1e-4, to: 1e-3, kimg: 0.1}"],
        ["optim.d_steps=2", "optim.d_warmup_rounds=1", "optim.d_warmup_every=3", "optim.d_warmup_steps=3"],
        ["system.name=loss_sensitive", "system.slope=0.5"],
        ["loss.r1_gamma=0", "loss.pl_weight=0", "loss.terms=[{name: drift, weight: 50, every: 4}]"],
        ["loss.r1_gamma=0", "loss.pl_weight=0", f"loss.terms=[{{name: drift, weight: {RISING}}}]"],
        ["model.low_precision=bf16", "model.low_precision_at=[8]"],
        ["augment={mode: ada, pipeline: bgcfno, p: 0.4, interval: 2}"],
        [
            "loss.r1_gamma={from: 5, to: 0.5, kimg: 0.2}",
            "loss.terms=[{name: drift, weight: {from: 1, to: 2, kimg: 1}}]",
        ],
        ["loss.pl_weight={from: 0, to: 3, kimg: 0.2, shape: cosine}", "ema.kimg={from: 0, to: 1, kimg: 0.1}"],
        ["augment={mode: fixed, pipeline: b, p: {from: 0, to: 1, kimg: 0.112}}"],
        ["loss.blur_sigma=1.5"],
        ["optim.g_lr={from: 1e-4, to: 1e-2, kimg: 0.1}", "optim.d_lr={from: 1e-2, to: 1e-4, kimg: 0.1}"],
        ["optim.beta2={from: 0.5, to: 0.9, kimg: 0.05, start: 0.04}", "optim.d_lr={from: 1e-4, to: 1e-2, kimg: 0.1}"],
        ["train.loss_scale=1024"],
    ],
    ids=" ".join,
)
def test_the_same_bits(tiny_data, monkeypatch, overrides):
    monkeypatch.setattr(geometry, "STEADY", True)
    graphs = assert_same(tiny_data, *overrides)
    assert graphs.captures >= 4  # the passes and the optimizer step of both sides
    assert graphs.replays > 0


NOT_GROWING = ["growth.start=null", "train.total_kimg=0.2", "loss.pl_weight=0", "train.micro_batch=4"]


@pytest.mark.parametrize("kind", ["stylegan3", "batch", "spectral"])
def test_buffers_that_forward_passes_change(tiny_data, kind):
    if kind == "stylegan3":
        graphs = assert_same(tiny_data, "model.name=stylegan3", *NOT_GROWING)
    else:
        graphs = assert_same(tiny_data, "resolution=8", *NOT_GROWING, system=lambda config: GAN(config, pair_of(kind)))
    assert graphs.captures >= 4
    assert graphs.replays > 0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.name=progan", "loss.pl_weight=0", "loss.terms=[{name: gradient_penalty}]"],
        ["model.low_precision=bf16", "model.low_precision_at=[8,16]"],
    ],
    ids=" ".join,
)
def test_the_same_bits_in_a_fade(tiny_data, overrides):
    """Alpha, which changes at every step, is read from the device."""
    graphs = assert_same(tiny_data, *overrides, phase=1)
    assert graphs.captures >= 4
    assert graphs.replays > 0


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        (["loss.blur_sigma={from: 1, to: 2, kimg: 0.03, start: 0.04}"], "steps run as they are while loss.blur_sigma"),
    ],
)
def test_numbers_that_cannot_be_on_the_device(tiny_data, caplog, overrides, note):
    """A curve begins after steps were captured, and what was captured is replayed again behind it."""
    caplog.set_level("INFO")
    graphs = assert_same(tiny_data, "loss.r1_gamma=0", "loss.pl_weight=0", *overrides)
    assert len([message for message in caplog.messages if f"note: train.graphs: {note}" in message]) == 1
    assert graphs.captures >= 3
    assert graphs.replays >= 3


def test_several_steps_of_g(tiny_data):
    graphs = assert_same(tiny_data, "optim.g_steps=2", "loss.r1_gamma=0", "loss.pl_weight=0")
    assert graphs.replays > 0


def test_nothing_runs_in_python_while_steps_are_replayed(tiny_data, monkeypatch):
    calls, whole = [], GAN.discriminator_loss
    monkeypatch.setattr(GAN, "discriminator_loss", lambda *given, **how: calls.append(1) or whole(*given, **how))
    trained(tiny_data, EmulatedGraphs(), "loss.r1_gamma=0", "loss.pl_weight=0")
    assert len(calls) == 4  # three times as it is, and once to capture it


def test_a_step_that_is_not_finite_is_left_out(tiny_data, monkeypatch):
    """The verdict is the device's, also in a replay."""
    graphs, skipped = EmulatedGraphs(), []
    begin = Engine.begin

    def spoilt(self: Engine, batch: Any) -> Any:
        step = begin(self, batch)
        if step.number in (2, 9):
            step.real[0] = float("nan")
        return step

    monkeypatch.setattr(Engine, "begin", spoilt)
    settle = Engine.settle

    def watched(self: Engine, step: Any, *rest: Any) -> None:
        settle(self, step, *rest)
        skipped.extend([step.number] * bool(self.outcome.faults))

    monkeypatch.setattr(Engine, "settle", watched)
    tensors, _, _ = trained(tiny_data, graphs, "loss.r1_gamma=0", "loss.pl_weight=0")
    assert skipped == [2, 9]
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert graphs.replays > 0


def test_a_loss_scale_that_changes(tiny_data, monkeypatch):
    """After an overflow the same captured parts are replayed with half of the scale."""
    exchange, calls, scales = NetworkOptimizer.exchange, [0], list[float]()

    def overflows(self: NetworkOptimizer, *given: Any) -> torch.Tensor:
        sums = exchange(self, *given)
        calls[0] += 1
        if calls[0] == 2 * 9:
            next(p.grad for p in self.named.values() if p.grad is not None).fill_(float("inf"))
        return sums

    def counted(graphs: EmulatedGraphs | None) -> dict[str, torch.Tensor]:
        calls[0] = 0
        tensors, (_, running, _), _ = trained(
            tiny_data, graphs, "train.loss_scale=1024", "loss.r1_gamma=0", "loss.pl_weight=0"
        )
        scales.append(running.loss_scale)
        return tensors

    monkeypatch.setattr(NetworkOptimizer, "exchange", overflows)
    graphs = EmulatedGraphs()
    plain, ours = counted(None), counted(graphs)
    assert {name for name, t in plain.items() if not torch.equal(t, ours[name])} == set()
    assert scales == [512, 512]
    assert graphs.captures == 5  # the passes and steps of both sides, and the average: each once


class Derived(GAN):
    pass


@pytest.mark.parametrize(
    ("overrides", "how", "reason"),
    [
        ([], {"system": Derived}, "the system does not say which numbers its losses contain"),
    ],
)
def test_what_cannot_be_replayed_runs_as_it_is(tiny_data, caplog, overrides, how, reason):
    graphs = assert_same(tiny_data, *overrides, **how)
    assert (graphs.captures, graphs.replays) == (0, 0)
    assert [message for message in caplog.messages if "not replayed" in message] == [
        f"train.graphs: steps of this phase are not replayed: {reason}"
    ]


def test_a_capture_that_fails_is_told_once(tiny_data, monkeypatch, caplog):
    def fails(self: Any, function: Any, streams: Any) -> Any:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain, _, _ = trained(tiny_data, None)
    monkeypatch.setattr(EmulatedGraphs, "capture", fails)
    ours, _, _ = trained(tiny_data, EmulatedGraphs())
    (told,) = [message for message in caplog.messages if "not replayed" in message]
    assert told.endswith("RuntimeError: operation not permitted when stream is capturing")
    assert plain.keys() == ours.keys()


def test_train_graphs_on_needs_a_gpu():
    with pytest.raises(UsageError, match=r"train\.graphs=on needs a CUDA device"):
        graphs_of("on", torch.device("cpu"))
    assert graphs_of("auto", torch.device("cpu")) is None
    assert graphs_of("off", torch.device("cuda")) is None


SCRIPT = """
import sys
sys.path.insert(0, TESTS)
from emulated_graphs import EmulatedGraphs
from stylegan_pg import __main__
from stylegan_pg.training.engine import Engine
begin, graphs = Engine.__init__, EmulatedGraphs()
Engine.__init__ = lambda self, state, _=None: begin(self, state, graphs)
try:
    __main__.main()
finally:
    print(f"replays: {graphs.replays}")
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "given"),
    [(0, {}), (2, {}), (2, {"model__name": "stylegan3", "growth__start": "null", "loss__pl_weight": 0})],
)
def test_a_whole_run(tiny_data, tmp_path, ranks, given):
    """Growth, checkpoints, and on two ranks sums between the parts."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))))
    long = {
        "growth__stable_kimg": 0.064,
        "growth__fade_kimg": 0.032,
        "train__batch": 8,
        "train__total_kimg": 0.25,
        **given,
    }
    plain = harness.arguments(tmp_path / "plain", tiny_data, **long)
    harness.finish(harness.start(plain, ranks=ranks))
    args = harness.arguments(tmp_path / "replayed", tiny_data, **long)
    output = harness.finish(harness.start(args, ranks=ranks, script=script))
    assert int(output.rpartition("replays: ")[2].split()[0]) > 20
    harness.assert_same_run(tmp_path / "plain", tmp_path / "replayed")


@pytest.mark.distributed
def test_a_rank_without_images(tiny_data, tmp_path):
    """A batch of one minibatch-stddev group: the second rank only takes part in the sums."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))))
    short = {"growth__start": 16, "train__batch": 4, "train__total_kimg": 0.08, "model__mbstd_group": 4}
    for name, how in (("plain", None), ("replayed", script)):
        args = harness.arguments(tmp_path / name, tiny_data, **short)
        output = harness.finish(harness.start(args, ranks=2, **({"script": how} if how else {})))
    assert int(output.rpartition("replays: ")[2].split()[0]) > 10
    harness.assert_same_run(tmp_path / "plain", tmp_path / "replayed")


def test_gradients_survive_a_capture_that_fails_late(tiny_data, monkeypatch):
    plain, _, _ = trained(tiny_data, None, "model.noise=false")

    def fails(self: Any, function: Any, streams: Any) -> Any:
        function()  # clears the gradients
        raise RuntimeError("out of memory")

    apply = NetworkOptimizer._apply
    monkeypatch.setattr(EmulatedGraphs, "capture", fails)
    calls: list[float] = []

    def watched(self: NetworkOptimizer, held: torch.Tensor) -> None:
        calls.append(sum(float(p.grad.abs().sum()) for p in self.named.values() if p.grad is not None))
        apply(self, held)

    monkeypatch.setattr(NetworkOptimizer, "_apply", watched)
    trained(tiny_data, EmulatedGraphs(), "model.noise=false")
    assert min(calls) > 0
    assert plain
