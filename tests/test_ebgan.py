"""EBGAN: the losses with margin and the pulling-away term, and that they do not depend on how a batch is dealt out."""

from typing import Any, cast

import pytest
import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import UsageError
from stylegan_pg.losses.energies import ebgan_d, energy_g, pulling_away
from stylegan_pg.networks import NetworkShape
from stylegan_pg.systems.autoencoders import EBGAN
from stylegan_pg.systems.catalogue import system_of

SMALL = ["run=runs/x", "model.width=4", "resolution=16"]


def published_term(codes):
    """Equation 7 as it is written: the mean over all pairs i, j with i != j."""
    n, total = len(codes), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total = total + (codes[i] @ codes[j] / (codes[i].norm() * codes[j].norm())) ** 2
    return total / (n * (n - 1))


def test_losses_and_gradients_in_float64():
    real, fake = (torch.rand(6, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    margin = float(fake.detach().median()) + 1e-3  # on both sides of which there are energies
    loss = ebgan_d(real, fake, margin).sum()
    expected = sum(
        r + max(0.0, margin - f) for r, f in zip(real.flatten().tolist(), fake.flatten().tolist(), strict=True)
    )
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    of_real, of_fake = torch.autograd.grad(loss, [real, fake])
    assert torch.equal(of_real, torch.ones_like(real))
    assert torch.equal(of_fake, torch.where(fake < margin, -1.0, 0.0).double())
    assert {-1.0, 0.0} == set(of_fake.flatten().tolist())
    assert torch.equal(torch.autograd.grad(energy_g(fake).sum(), fake)[0], torch.ones_like(fake))


@pytest.mark.parametrize(("n", "group"), [(8, 8), (12, 4), (6, 2)])
def test_pulling_away_is_the_published_term_of_each_group(n, group):
    codes = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    found = pulling_away(codes, group)
    assert found.shape == (n,)
    step = n // group
    expected = sum(published_term(codes[m::step]) for m in range(step)) / step
    torch.testing.assert_close(found.mean(), expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, codes, retain_graph=True)[0] for value in (found.mean(), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_pulling_away_knows_equal_opposite_and_orthogonal_codes():
    a, b = torch.eye(2, dtype=torch.float64)
    assert pulling_away(torch.stack([a, 3 * a]), 2).tolist() == [1, 1]
    assert pulling_away(torch.stack([a, -a]), 2).tolist() == [1, 1]
    assert pulling_away(torch.stack([a, b]), 2).tolist() == [0, 0]
    assert pulling_away(torch.stack([a, 0 * a]), 2).tolist() == [0, 0]
    for n, group in ((5, 2), (4, 1)):
        with pytest.raises(ValueError, match="groups of 2 codes or more"):
            pulling_away(torch.zeros(n, 2), group)


def test_the_generator_minimises_the_term_of_its_group():
    config = load_config("systems/ebgan", [*SMALL, "system.pulling=0.5", "train.batch=8", "model.mbstd_group=4"])
    system = EBGAN(config)
    system.build(NetworkShape(16, 16, False, 1, 0, 4), None)
    fake, nothing = system.D(torch.randn(8, 1, 16, 16)), cast(Any, None)  # the term is one of codes alone
    heads = system.generator_heads(nothing, nothing, fake)
    term = (published_term(fake.code[::2]) + published_term(fake.code[1::2])) / 2
    torch.testing.assert_close(heads["loss"].mean(), 0.5 * term)
    assert "pulling_away" in system.g_reports
    d = system.objective.d(torch.tensor([0.3]), torch.tensor([0.05]))
    assert float(d) == pytest.approx(0.3 + 0.15)


def test_a_group_of_one_and_other_discriminators_are_refused():
    one = load_config("systems/ebgan", [*SMALL, "model.mbstd_group=1"])
    with pytest.raises(UsageError, match=r"model.mbstd_group=train.batch, or system.pulling=0$"):
        system_of(one).build(NetworkShape(16, 16, False, 1, 0, 1), None)
    without = load_config("systems/ebgan", [*SMALL, "model.mbstd_group=1", "system.pulling=0"])
    system_of(without).build(NetworkShape(16, 16, False, 1, 0, 1), None)
    other = load_config("systems/ebgan", ["run=runs/x", "resolution=16", "model=dcgan"])
    with pytest.raises(UsageError, match=r"take model\.name=began"):
        system_of(other).build(NetworkShape(16, 16, False, 1, 0, 4), None)


@pytest.mark.parametrize("name", ["began", "ebgan"])
def test_an_objective_is_refused(name):
    config = load_config(f"systems/{name}", [*SMALL, "loss.objective=hinge"])
    with pytest.raises(UsageError, match=f"loss.objective=hinge has no effect with system.name={name}"):
        system_of(config)


def test_keys_of_other_systems_are_refused():
    with pytest.raises(UsageError, match=r"system\.gamma is no key of system\.name=ebgan; it belongs to began"):
        load_config("systems/ebgan", [*SMALL, "system.gamma=0.3"])
    with pytest.raises(UsageError, match=r"system\.margin=0"):
        load_config("systems/ebgan", [*SMALL, "system.margin=0"])
