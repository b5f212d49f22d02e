"""The system can: ambiguity losses against their formulas, the losses of both sides, and what the data must have."""

import math
from typing import Any

import pytest
import torch
from configuring import refused
from systems import engine_for, gradients, losses_of, same
from test_systems import dataset

from stylegan_pg.errors import UsageError
from stylegan_pg.losses.removal import AMBIGUITIES, inspection
from stylegan_pg.networks import style_head
from stylegan_pg.systems.can import entropy

STYLES = 3  # classes of the dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("can"), 32, 3)


def small(data, *overrides: str) -> list[str]:
    return [f"data.url={data}", "train.batch=8", "model.mbstd_group=8", "model.channel_max=8", *overrides]


def logits(scale: float = 2.0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    return (scale * torch.randn(6, 5, generator=dice, dtype=torch.float64)).requires_grad_(True)


def naive(name: str, x: torch.Tensor) -> torch.Tensor:
    """The formulas as the papers write them, one style after another."""
    p = x.exp() / x.exp().sum(dim=1, keepdim=True)
    k = x.shape[1]
    terms = [p[:, i].log() / k for i in range(k)]
    if name == "binary":
        terms += [(1 - 1 / k) * (1 - p[:, i]).log() for i in range(k)]
    return -torch.stack(terms).sum(dim=0)


@pytest.mark.parametrize("name", AMBIGUITIES)
def test_ambiguities_are_the_formulas(name):
    a, b = logits(), logits()
    ours, theirs = AMBIGUITIES[name](a), naive(name, b)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    same(torch.autograd.grad(ours.sum(), a), torch.autograd.grad(theirs.sum(), b), 1e-12)


@pytest.mark.parametrize("name", AMBIGUITIES)
def test_ambiguities_are_least_where_nothing_is_known(name):
    flat = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    least = AMBIGUITIES[name](flat)
    assert (AMBIGUITIES[name](logits()) > least).all()
    assert float(torch.autograd.grad(least.sum(), flat)[0].abs().max()) < 1e-15
    certain = torch.tensor([[200.0, 0, 0, 0, 0]], dtype=torch.float64)  # where 1 - p is 0 in float64
    assert AMBIGUITIES[name](certain).isfinite().all()
    assert float(entropy(flat.detach())) == pytest.approx(math.log(5), rel=1e-12)
    assert float(entropy(certain)) < 1e-9


def test_the_gradient_of_the_categorical_one_is_the_difference_from_uniform():
    x = logits()
    (gradient,) = torch.autograd.grad(AMBIGUITIES["categorical"](x).sum(), x)
    torch.testing.assert_close(gradient, torch.softmax(x.detach(), dim=1) - 1 / 5, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ambiguity", AMBIGUITIES)
def test_losses_of_both_sides_are_those_of_the_paper(ambiguity, data):
    """Non-saturating in G, as the project's objective `logistic` is."""
    given = ["system.style_weight=0.7", "system.ambiguity_weight=1.3", f"system.ambiguity={ambiguity}"]
    engine = engine_for("systems/can", *small(data, *given))
    x, losses = losses_of(engine)
    system: Any = engine.state.system
    classes = x.field("class")
    ours = losses["D main loss"].values(x)["loss"]
    z = system.latents(x, "d").z
    real, fake = x.D(x.real), x.D(x.G(z).detach())
    style = torch.stack([-torch.log(row.softmax(0)[k]) for row, k in zip(real.styles, classes, strict=True)])
    adversarial = (1 + (-real.scores).exp()).log() + (1 + fake.scores.exp()).log()
    theirs = adversarial[:, 0] + 0.7 * style
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    same(gradients(ours, x.D), gradients(theirs, x.D))
    ours = losses["G main loss"].values(x)["loss"]
    judged = x.D(x.G(system.latents(x, "g").z))
    theirs = (1 + (-judged.scores).exp()).log()[:, 0] + 1.3 * naive(ambiguity, judged.styles)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    same(gradients(ours, x.G), gradients(theirs, x.G))


def test_the_head_leaves_the_names_of_dcgan_as_they_are(data):
    D = engine_for("systems/can", *small(data)).state.D
    assert isinstance(D, style_head.Discriminator)
    assert D.style[-1].out_features == STYLES
    assert {name.split(".")[0] for name, _ in D.named_parameters()} == {"main", "style"}
    judged = D(torch.zeros(8, 3, 32, 32, dtype=torch.float64))
    assert (judged.scores.shape, judged.styles.shape) == ((8, 1), (8, STYLES))


def test_generated_pictures_have_no_say_in_the_style_loss():
    """D learns styles of real pictures only."""
    one_hot = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(
        inspection(one_hot * 4, one_hot), torch.full([3], math.log1p(2 * math.exp(-4)), dtype=torch.float64)
    )


def test_what_the_data_must_have(tmp_path, data):
    import numpy as np
    from PIL import Image

    from stylegan_pg import pack

    (tmp_path / "bare").mkdir()
    for i in range(4):
        Image.fromarray(np.full([32, 32, 3], i, np.uint8)).save(tmp_path / "bare" / f"{i}.png")
    pack(tmp_path / "bare", tmp_path / "packed", resolution=32, progress=False)
    with pytest.raises(UsageError, match=r"system\.name=can reads the styles .* pack it with --labels") as error:
        engine_for("systems/can", *small(tmp_path / "packed"))
    assert "\n" not in str(error.value)
    assert "take model.name=dcgan" in refused("system.name=can", "model.name=mlp")
