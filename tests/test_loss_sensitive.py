"""Loss-Sensitive GAN: its cost against the formula, in numbers and within a training step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_engine_steps import entered, stepped
from torch.autograd import gradcheck

from stylegan_pg.config import SYSTEMS, LossSensitiveConfig
from stylegan_pg.systems.loss_sensitive import LossSensitiveGAN, distances, margin_cost
from stylegan_pg.training.engine import Engine

GIVEN = [
    "system.name=loss_sensitive",
    "train.dtype=float64",
    "model.noise=false",
    "loss.pl_weight=0",
    "loss.r1_gamma=0",
]
MICRO = ["train.micro_batch=4"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_the_cost_against_its_formula(slope):
    real, fake = drawn(6, 3, 2, 2, seed=1), drawn(6, 3, 2, 2, seed=2)
    x, y = drawn(6, 1, seed=3).requires_grad_(True), drawn(6, 1, seed=4).requires_grad_(True)
    margins = 0.7 * distances(real, fake)
    ours = margin_cost(x, y, margins=margins, slope=slope)
    expected, slopes = [], []
    for i in range(6):
        delta = 0.7 * np.abs(real[i].numpy() - fake[i].numpy()).sum() / 12
        a = delta + y[i, 0].item() - x[i, 0].item()  # L = -D: delta + L(x) - L(G(z))
        expected.append(a if a > 0 else slope * a)
        slopes.append(1.0 if a > 0 else slope)
    np.testing.assert_allclose(ours.detach().numpy()[:, 0], expected, rtol=1e-12)
    ours.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    np.testing.assert_allclose(y.grad[:, 0].numpy(), slopes, rtol=1e-12)
    np.testing.assert_allclose(x.grad[:, 0].numpy(), [-s for s in slopes], rtol=1e-12)
    assert len({*slopes}) > 1 or slope == 1  # both cases were met
    assert gradcheck(lambda a, b: margin_cost(a, b, margins=margins, slope=slope), (x, y))


def test_scores_of_patches_have_the_margin_of_their_image():
    scores = torch.zeros(2, 1, 3, 3)
    cost = margin_cost(scores, scores, margins=torch.tensor([1.0, 2.0]), slope=0.0)
    assert cost.shape == scores.shape
    assert cost[0].unique().tolist() == [1]
    assert cost[1].unique().tolist() == [2]


def test_distances_have_no_gradient():
    real, fake = drawn(2, 3, 2, 2), drawn(2, 3, 2, 2, seed=1).requires_grad_(True)
    assert not distances(real, fake).requires_grad


def engine_of(data, *overrides: str) -> Engine:
    return entered(data, *GIVEN, *overrides)


def test_it_is_the_system_of_its_name(tiny_data):
    engine = engine_of(tiny_data, "system.margin=0.5")
    assert SYSTEMS["loss_sensitive"] is LossSensitiveConfig
    assert isinstance(engine.state.system, LossSensitiveGAN)
    assert engine.state.system.own.margin == 0.5


def test_pairs_of_a_step(tiny_data):
    """Before any step the scores differ by much less than the margins: the loss is the mean margin and a difference of
    scores, and reports say the same with micro-batches."""
    stats = [next(iter(stepped(engine_of(tiny_data, "system.margin=10", *more), 1)))[0] for more in ([], MICRO)]
    for found in stats:
        means = {name: total / count for name, (total, count) in found.items()}
        assert means["loss_d"] - (means["score_fake"] - means["score_real"]) > 1  # a mean margin
        assert "prob_real" not in means
    assert stats[0]["loss_d"][0] == pytest.approx(stats[1]["loss_d"][0], rel=1e-9)
    without = next(iter(stepped(engine_of(tiny_data, "system.margin=0", "system.slope=1"), 1)))[0]
    difference = (without["score_fake"][0] - without["score_real"][0]) / 8
    assert without["loss_d"][0] / 8 == pytest.approx(difference, rel=1e-9)  # WGAN's


def test_a_slope_of_1_trains_as_wgan(tiny_data):
    """The margin does not depend on the weights, so that the gradients are WGAN's."""
    ours = engine_of(tiny_data, "system.slope=1")
    wgan = entered(tiny_data, *GIVEN[1:], "loss.objective=wgan")
    for engine in (ours, wgan):
        list(stepped(engine, 2))
    one, two = ours.state.tensors(), wgan.state.tensors()
    assert all(torch.allclose(t, two[name], rtol=1e-9, atol=1e-12) for name, t in one.items())
    other = engine_of(tiny_data, "system.margin=0")  # slope 0: pairs in the right order do not count
    list(stepped(other, 2))
    assert not all(torch.allclose(t, two[name]) for name, t in other.state.tensors().items())
