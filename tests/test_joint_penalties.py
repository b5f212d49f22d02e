"""R1 and R2 of every step, which are computed in D's main pass, compared with passes of their own."""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
from plain_pairs import pair_of

from stylegan_pg import GAN
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.losses import terms
from stylegan_pg.networks import to_channels_last
from stylegan_pg.systems.one_pair import OnePair
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

TINY = {
    "resolution": 16,
    "growth.start": "null",
    "model.z_dim": 8,
    "model.w_dim": 8,
    "model.mapping_layers": 2,
    "model.channel_base": 64,
    "train.batch": 8,
    "train.total_kimg": 1,
    "train.dtype": "float64",
    "loss.pl_weight": 0,
    "loss.r1_gamma": 3,
    "loss.r1_every": 1,
}
BOTH = ["loss.terms=[{name: r2, weight: 2}]"]


def engine_of(data: Any, overrides: list[str], pair: str = "") -> Engine:
    (name,) = [text.split("=")[1] for text in overrides if text.startswith("model.name=")] or ["stylegan2"]
    given = [f"{key}={value}" for key, value in harness.own_keys(TINY, name).items()]
    if pair:
        given = [text for text in given if not text.startswith("model.") or "z_dim" in text] + ["resolution=8"]
    config = load_config(None, [*given, f"data.url={data}", "run=unused", *overrides])
    state = TrainState(config, load_dataset(config), Devices(config), GAN(config, pair_of(pair) if pair else None))
    state.enter(phases(config)[0])
    return Engine(state)


def gradients(engine: Engine) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """D's gradients in the first step, which G's step precedes, its statistics, and the names of the losses."""
    found: dict[str, torch.Tensor] = {}
    names: list[str] = []
    made = engine.optimizer_step

    def kept(update: Any, *rest: Any) -> Any:
        optimizer = engine.state.optimizers[update.trains]
        if update.trains == "D":
            names.extend(loss.name for loss in update.losses)
            found.update({name: p.grad.clone() for name, p in optimizer.named.items() if p.grad is not None})
        return made(update, *rest)

    engine.optimizer_step = kept  # type: ignore[method-assign]
    state, p = engine.state, engine.state.current
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    batch = next(iter(batches(state.table, state.index.order(seed=0), start=0, end=p.end, batch=p.batch, **how)))
    outcome = engine.step(batch)
    assert not outcome.faults
    return found, outcome.stats, names


def apart(monkeypatch: Any) -> None:
    """Take the penalties from passes of their own, as lazy ones."""
    for name in ("r1", "r2"):
        monkeypatch.setitem(terms.TERMS, name, terms.TERMS[name]._replace(at=""))


def assert_equal(data: Any, monkeypatch: Any, overrides: list[str], pair: str = "", names: int = 1) -> None:
    ours, stats, of_ours = gradients(engine_of(data, overrides, pair))
    with monkeypatch.context() as patch:
        apart(patch)
        theirs, expected, of_theirs = gradients(engine_of(data, overrides, pair))
    computed = [sorted(" + ".join(losses).split(" + ")) for losses in (of_ours, of_theirs)]
    assert computed[0] == computed[1]
    assert len(of_ours) == names
    assert len(of_theirs) > names
    assert ours.keys() == theirs.keys()
    largest = max(float(g.abs().max()) for g in theirs.values())
    for name, g in theirs.items():
        assert float((ours[name] - g).abs().max()) <= 1e-12 * largest, name
    for name, (total, count) in expected.items():
        assert stats[name] == (pytest.approx(total, rel=1e-10), count), name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        BOTH,
        ["loss.r1_gamma=0", *BOTH],
        ["loss.objective=relativistic", *BOTH],
        ["loss.objective=relativistic", "data.conditional=true", *BOTH],
        ["data.conditional=true", "train.micro_batch=4", *BOTH],
        ["loss.terms=[{name: r2, weight: 2}, {name: drift}, {name: gradient_penalty}]"],
        ["loss.objective=hinge", "loss.terms=[{name: r2, weight: 2}, {name: dragan}]"],
        ["model.name=progan", *BOTH],
        ["model.name=stylegan", "train.channels_last=false", *BOTH],
        ["model.name=r3gan", "loss.objective=relativistic", *BOTH],
        ["train.freeze_d=0", "optim.g_steps=2", *BOTH],
    ],
    ids=" ".join,
)
def test_gradients_are_those_of_passes_of_their_own(tiny_data, monkeypatch, overrides):
    names = 1 + ("gradient_penalty" in str(overrides)) + ("dragan" in str(overrides))
    assert_equal(tiny_data, monkeypatch, overrides, names=names)


@pytest.mark.parametrize("kind", ["plain", "patches"])
def test_plain_pairs(tiny_data, monkeypatch, kind):
    """Also where D returns several scores for an image."""
    assert_equal(tiny_data, monkeypatch, BOTH, kind)


def test_with_the_same_augmentation(tiny_data, monkeypatch):
    """The gradient goes through the augmentation to the images, which are augmented as for the objective."""
    augmented = OnePair.augmented

    def alike(self: OnePair, x: Any, purpose: str, images: torch.Tensor) -> torch.Tensor:
        return augmented(self, x, {"r1": "d-real", "r2": "d-fake"}.get(purpose, purpose), images)

    monkeypatch.setattr(OnePair, "augmented", alike)
    augment = "augment={mode: fixed, p: 0.6, pipeline: bgco, multipliers: {hue: 0.5}}"
    assert_equal(tiny_data, monkeypatch, [augment, *BOTH])


def test_lazy_penalties_keep_their_own_steps(tiny_data):
    engine = engine_of(tiny_data, ["loss.r1_every=2", "loss.terms=[{name: r2, every: 1}]"])
    state = engine.state
    system: Any = state.system
    _, stats, names = gradients(engine)
    assert names == ["main loss + r2", "r1"]
    assert {"r1_penalty", "r2_penalty"} <= stats.keys()
    assert system.joint(system.terms) == [t for t in system.terms if t.name == "r2"]


class OtherLoss(GAN):
    """A system with a main loss of its own, which knows of no terms."""

    def discriminator_loss(self, x: Any, due: Any) -> Any:
        latents = self.latents(x, "d")
        images = self.generate(x, latents, "d")[0].detach()
        real, fake = self.score(x, "d-real", x.real), self.score(x, "d-fake", images)
        loss = self.objective.d(real, fake)[:, 0]
        return {"loss": loss, "loss_d": loss, "score_real": loss, "score_fake": loss, "sign_real": loss}


def test_systems_with_another_main_loss_keep_the_penalty(tiny_data):
    engine = engine_of(tiny_data, [])
    config = engine.state.config
    state = TrainState(config, load_dataset(config), Devices(config), OtherLoss(config))
    state.enter(phases(config)[0])
    _, stats, names = gradients(Engine(state))
    assert names == ["main loss", "r1"]
    assert stats["r1_penalty"][0] > 0


def test_d_runs_once_for_the_objective_and_the_penalties(tiny_data, monkeypatch):
    """Twice, where real and generated images are scored apart."""

    def passes(*overrides: str) -> int:
        engine = engine_of(tiny_data, ["model.name=r3gan", *overrides])
        to_channels_last(engine.state.D)
        seen: list[int] = []
        engine.state.D.register_forward_hook(lambda *_: seen.append(1))
        gradients(engine)
        return len(seen)

    of_g = 1
    assert passes(*BOTH) == of_g + 1
    assert passes() == of_g + 2
    assert passes("loss.objective=relativistic", *BOTH) == 2 * of_g + 2
    apart(monkeypatch)
    assert passes(*BOTH) == of_g + 3
