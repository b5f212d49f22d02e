"""D's scores as probabilities in the statistics of objectives that have them."""

from __future__ import annotations

import pytest
import torch
from test_engine_steps import entered, stepped

from stylegan_pg.config import ObjectiveName
from stylegan_pg.losses import per_image
from stylegan_pg.systems.gan import GAN
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

NAMES = ("prob_real", "prob_fake")


@pytest.mark.parametrize("objective", [name.value for name in ObjectiveName])
def test_which_objectives_have_probabilities(tiny_data, objective):
    engine = entered(tiny_data, f"loss.objective={objective}", "train.dtype=float64")
    ((stats, _),) = stepped(engine, 1)
    assert [name in stats for name in NAMES] == [objective in ("logistic", "saturating")] * 2


def test_probabilities_are_means_of_sigmoids(tiny_data, monkeypatch):
    """Of the whole batch, and not the sigmoid of the mean score."""
    engine = entered(tiny_data, "train.dtype=float64", "train.micro_batch=4", "optim.d_lr=0.05", "loss.pl_weight=0")
    seen: list[list[torch.Tensor]] = []
    compare = GAN.compare

    def kept(self, x, real, fake, images):
        seen.append([per_image(lambda s: s, scores).detach() for scores in (real, fake)])
        return compare(self, x, real, fake, images)

    monkeypatch.setattr(GAN, "compare", kept)
    for stats, _ in stepped(engine, 3):
        real, fake = (torch.cat(scores) for scores in zip(*seen, strict=True))
        seen.clear()
        assert len(real) == len(fake) == 8
        for name, scores in zip(NAMES, (real, fake), strict=True):
            total, count = stats[name]
            assert count == 8
            assert total / count == pytest.approx(float((1 / (1 + torch.exp(-scores))).mean()), rel=1e-12)
        assert stats["prob_real"][0] != stats["prob_fake"][0]


class OwnLoss(GAN):
    """A system whose D minimises something else, and that says nothing of probabilities."""

    def discriminator_loss(self, x, due):
        images = self.generate(x, self.latents(x, "d"), "d")[0].detach()
        loss = per_image(self.objective.d, self.score(x, "d-real", x.real), self.score(x, "d-fake", images))
        return {"loss": loss, "loss_d": loss}


def test_another_main_loss_has_no_probabilities_that_nobody_computed(tiny_data):
    config = entered(tiny_data).state.config
    known = entered(tiny_data).state
    state = TrainState(config, known.index, known.parallel, OwnLoss(config))
    state.enter(known.current)
    ((stats, _),) = stepped(Engine(state), 1)
    assert not {*NAMES} & stats.keys()
    assert stats["loss_d"][1] == 8
