"""Unusual training steps: unequal numbers of steps of G and D, clipped or frozen weights, values that are not
finite."""

import shlex

import harness
import pytest
import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.losses import terms
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

TINY = "resolution=8 train.total_kimg=1 model.z_dim=8 model.w_dim=8 model.mapping_layers=2 model.channel_base=64"


def entered(data, *overrides):
    given = [f"data.url={data}", "run=unused", "train.batch=8", "loss.r1_every=2", "loss.r1_gamma=1", *overrides]
    (name,) = [text.split("=")[1] for text in overrides if text.startswith("model.name=")] or ["stylegan2"]
    tiny = harness.own_keys({key: value for key, _, value in (text.partition("=") for text in TINY.split())}, name)
    config = load_config(None, [*(f"{key}={value}" for key, value in tiny.items()), *given])
    state = TrainState(config, load_index(str(data)), Devices(config))
    state.enter(phases(config)[0])
    return Engine(state)


def stepped(engine, count):
    """Return the statistics of `count` steps, and which of the two networks has changed after each."""
    state, p = engine.state, engine.state.current
    how = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    data = batches(state.table, state.index.order(seed=0), start=state.nimg, end=p.end, batch=p.batch, **how)
    for _, batch in zip(range(count), data, strict=False):
        before = {k: t.clone() for k, t in state.tensors().items()}
        stats = engine.step(batch).stats
        after = state.tensors()
        moved = {k for k, t in after.items() if k[:2] in ("G/", "D/") and not torch.equal(t, before[k])}
        yield stats, moved


def sides_of(moved):
    return "".join(sorted({name[0] for name in moved}))


@pytest.mark.parametrize(
    ("d_steps", "g_steps", "expected", "g_counts"),
    [(1, 1, ["DG"] * 4, [8] * 4), (3, 1, ["DG", "D", "D", "DG"], [8, 0, 0, 8]), (1, 2, ["DG"] * 4, [16] * 4)],
)
def test_unequal_steps_of_both_sides(tiny_data, d_steps, g_steps, expected, g_counts):
    engine = entered(tiny_data, f"optim.d_steps={d_steps}", f"optim.g_steps={g_steps}")
    seen = list(stepped(engine, 4))
    assert [sides_of(moved) for _, moved in seen] == expected
    assert [stats.get("loss_g", (0, 0))[1] for stats, _ in seen] == g_counts
    assert [stats["loss_d"][1] for stats, _ in seen] == [8] * 4
    assert engine.state.nimg == 32  # nimg counts the images shown to D


def test_lazy_terms_count_the_steps_of_their_side(tiny_data):
    engine = entered(tiny_data, "optim.d_steps=2", "loss.pl_every=2", "loss.pl_weight=1")
    seen = list(stepped(engine, 6))
    assert [i for i, (stats, _) in enumerate(seen) if "pl_length" in stats] == [0, 4]  # G is updated at 0, 2 and 4
    assert [i for i, (stats, _) in enumerate(seen) if "r1_penalty" in stats] == [0, 2, 4]


def test_clipped_weights(tiny_data):
    engine = entered(tiny_data, "loss.d_clip=0.01", "loss.r1_gamma=0")
    list(stepped(engine, 1))
    assert max(float(p.detach().abs().max()) for p in engine.state.D.parameters()) == pytest.approx(0.01)
    assert max(float(p.detach().abs().max()) for p in engine.state.G.parameters()) > 0.1


@pytest.mark.parametrize("count", [1, 5])
def test_frozen_resolutions_of_d(tiny_data, count):
    engine = entered(tiny_data, "resolution=16", "init=some", f"train.freeze_d={count}")
    moved = set().union(*(moved for _, moved in stepped(engine, 2)))
    frozen = {f"D/b{r}" for r in (16, 8)[:count]}  # the last block, b4, is never frozen
    for name in (k for k in engine.state.tensors() if k.startswith("D/")):
        assert (name in moved) == (name.split(".")[0] not in frozen), name


def test_terms_without_weight_are_omitted(tiny_data):
    none, zero = entered(tiny_data, "loss.r1_gamma=0"), entered(tiny_data, "loss.r1_gamma_at={8: 0}", "loss.r1_every=1")
    for engine in (none, zero):
        assert not any("r1_penalty" in stats for stats, _ in stepped(engine, 2))
    a, b = none.state.tensors(), zero.state.tensors()
    assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("name", ["progan", "mlp"])
def test_path_length_without_a_mapping_to_learn(tiny_data, name):
    engine = entered(tiny_data, f"model.name={name}", "train.micro_batch=4", "loss.pl_every=2")
    seen = list(stepped(engine, 3))
    assert ["pl_length" in stats for stats, _ in seen] == [True, False, True]
    assert [sides_of(moved) for _, moved in seen] == ["DG"] * 3
    assert engine.state.statistics()["pl_mean"] > 0


@pytest.mark.parametrize("extra", ["loss.objective=relativistic", "loss.terms=[{name: gradient_penalty}]"])
def test_paired_images_have_the_same_class(tiny_data, monkeypatch, extra):
    """The generated image that is paired or mixed with a real image has the label of the real image."""
    engine = entered(tiny_data, "data.conditional=true", "loss.pl_weight=0", extra)
    asked, given = [], []
    whole = engine.state.G.mapping.forward
    monkeypatch.setattr(engine.state.G.mapping, "forward", lambda z, c: asked.append(c) or whole(z, c))
    begin = engine.begin
    monkeypatch.setattr(engine, "begin", lambda batch: given.append(begin(batch)) or given[-1])
    list(stepped(engine, 1))
    d_labels, g_labels = (c.chunk(2)[0] for c in (asked[-1], asked[0]))  # of both latents of style mixing
    assert torch.equal(d_labels, given[0].condition)
    assert torch.equal(g_labels, given[0].condition) == ("relativistic" in extra)


def spoilt(monkeypatch, name, at):
    """Make the value of a term not finite at one nimg."""
    whole = terms.TERMS[name]

    def compute(x, **how):
        values = whole.compute(x, **how)
        return {k: v * float("inf") if at() else v for k, v in values.items()}

    monkeypatch.setitem(terms.TERMS, name, whole._replace(compute=compute))


@pytest.mark.parametrize(("every", "what"), [(1, "main loss + r1"), (2, "r1")])
def test_a_term_that_is_not_finite_is_skipped_and_named(tiny_data, monkeypatch, every, what):
    engine = entered(tiny_data, f"loss.r1_every={every}", "loss.pl_weight=0")
    spoilt(monkeypatch, "r1", lambda: engine.state.nimg == 16)
    found = []
    for stats, moved in stepped(engine, 4):
        assert all(t.isfinite().all() for t in engine.state.tensors().values())
        found.append((sides_of(moved), "r1_penalty" in stats, engine.outcome.faults))
    good, bad = found[0], found[2]
    assert good[0] == "DG"
    assert not good[2]
    assert bad[:2] == ("G" if every == 1 else "DG", False)
    assert bad[2] == [f"D, {what}: the loss is not finite", "not finite: r1_penalty"]
    assert not found[3][2]


def test_a_gradient_that_is_not_finite_names_its_layer(tiny_data):
    engine = entered(tiny_data)
    engine.state.G.synthesis.b8.conv1.weight.register_hook(lambda g: g * float("nan") if engine.state.nimg == 8 else g)
    found = [(sides_of(moved), engine.outcome.faults) for _, moved in stepped(engine, 3)]
    assert [players for players, _ in found] == ["DG", "D", "DG"]
    assert found[1][1] == ["G, main loss: the gradient of synthesis.b8.conv1.weight is not finite"]


def test_loss_scale(tiny_data):
    """A power of two changes no bit. An overflow halves it, skips the step, and is not an error."""
    plain, scaled = entered(tiny_data), entered(tiny_data, "train.loss_scale=1024")
    for engine in (plain, scaled):
        list(stepped(engine, 2))
    a, b = plain.state.tensors(), scaled.state.tensors()
    assert all(torch.equal(t, b[name]) for name, t in a.items())
    scaled.state.D.b4.out.weight.register_hook(lambda g: g * float("inf") if scaled.state.nimg == 16 else g)
    found = [
        (sides_of(moved), scaled.outcome.faults, scaled.state.running.loss_scale) for _, moved in stepped(scaled, 2)
    ]
    assert found == [("G", [], 512), ("DG", [], 512)]


def test_a_loss_that_is_not_finite_is_not_an_overflow(tiny_data, monkeypatch):
    engine = entered(tiny_data, "train.loss_scale=1024", "loss.pl_weight=0")
    spoilt(monkeypatch, "r1", lambda: engine.state.nimg == 0)
    list(stepped(engine, 1))
    assert engine.outcome.faults == ["D, r1: the loss is not finite", "not finite: r1_penalty"]
    assert engine.state.running.loss_scale == 1024
    assert not engine.outcome.began_bad  # G and D had been updated


@pytest.mark.distributed
@pytest.mark.parametrize(("at", "every"), [(32, 10), (32, 0.008), (40, 0.008)])
def test_a_diverging_run_stops_at_the_last_good_checkpoint(tiny_data, tmp_path, at, every):
    """At a high learning rate, either a term of the first step is not finite (R1 is due at 32, where a phase begins),
    or only the next step is not finite, and a checkpoint is between them."""
    run = tmp_path / "run"
    often = {"train__total_kimg": at / 1000, "checkpoint__every_kimg": 0.008}
    harness.finish(harness.start(harness.arguments(run, tiny_data, **often)))
    kept = {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()}
    changes = {"train__max_skipped": 2, "train__total_kimg": 0.08, "checkpoint__every_kimg": every}
    args = harness.arguments(run, tiny_data, **changes, optim__d_lr=1e30)
    told = harness.finish(harness.start(args), expected=1)
    assert "Traceback" not in told
    assert "(2 of at most 2)" in told
    assert "more than train.max_skipped=2 steps were left out" in told
    good = checkpoint.path_for(run / "checkpoints", at)
    assert f"The last good checkpoint is {good} " in told
    assert "optim.d_lr" in told.splitlines()[-1]
    assert checkpoint.found(run / "checkpoints")[0] == good
    assert good.read_bytes() == kept[good.name]
    bad = [p.name for p in (run / "checkpoints").glob("*.bad")]
    assert bad == (["000000000048.safetensors.bad"] if at == 40 else [])
    printed = shlex.split(told.rpartition("again with one or more of these: ")[2].splitlines()[0].replace("; or ", " "))
    assert printed == ["loss.r1_gamma=2", "optim.g_lr=0.001", "optim.d_lr=5e+29"]
    told = harness.finish(harness.start([*args, *printed, "optim.d_lr=0.002"]))
    assert "loss.r1_gamma was 1.0, is now 2.0" in told
    tensors, state = harness.newest(run)
    assert state["nimg"] == 80
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.distributed
def test_a_new_probability_and_loss_scale_apply_on_resume(tiny_data, tmp_path):
    run, more = tmp_path / "run", {"augment__p": 0.5, "train__loss_scale": 4}
    for kimg, changes, scale, p in ((0.016, {}, 1, 0), (0.024, more, 4, 0.5)):
        how = {"augment__mode": "ada", "output__grid_kimg": 0, "train__total_kimg": kimg} | changes
        harness.finish(harness.start(harness.arguments(run, tiny_data, **how)))
        state = harness.newest(run)[1]
        assert (state["training"]["loss_scale"], state["system"]["augment_p"]) == (scale, pytest.approx(p, abs=1e-3))


@pytest.mark.distributed
def test_a_state_that_may_have_diverged_does_not_replace_a_good_checkpoint(tiny_data, tmp_path):
    run = tmp_path / "run"
    harness.finish(harness.start(harness.arguments(run, tiny_data, train__total_kimg=0.032)))
    kept = {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()}
    changes = {"optim__d_lr": 1e30, "train__total_kimg": 0.064, "checkpoint__keep": 1}
    told = harness.finish(harness.start(harness.arguments(run, tiny_data, **changes)))
    assert "no checkpoint of this state" in told
    assert {p.name: p.read_bytes() for p in (run / "checkpoints").iterdir()} == kept
