"""InfoGAN: codes in latents, the bound against distributions of torch, gradients of both sides, and bad input."""

import math
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from configuring import refused
from first_step import FirstStep, agree, batches_of, engine_of
from PIL import Image
from torch.distributions import Categorical, Normal

from stylegan_pg import load_snapshot
from stylegan_pg.checkpoint.snapshot import save_snapshot
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import latents
from stylegan_pg.inference.latent_files import save_latents
from stylegan_pg.inference.traversal import traversal
from stylegan_pg.networks import NETWORKS
from stylegan_pg.networks.latent_law import Codes, LatentLaw
from stylegan_pg.systems.infogan import SLOPE, WIDTH, Estimate, Recognition, categorical_bound, continuous_bound


def infogan(data, *overrides):
    return engine_of("systems/infogan", data, "model.z_dim=6", *overrides)


def estimate_and_codes(learned: bool) -> tuple[Any, Codes]:
    torch.manual_seed(0)
    logits = [torch.randn(5, k).double().requires_grad_(True) for k in (4, 3)]
    mean, s = (torch.randn(5, 2).double().requires_grad_(True) for _ in range(2))
    codes = Codes([torch.tensor([0, 3, 1, 2, 2]), torch.tensor([2, 0, 0, 1, 1])], torch.rand(5, 2).double() * 2 - 1)
    return Estimate(logits, mean, s if learned else None), codes


@pytest.mark.parametrize("learned", [False, True])
def test_the_bound_is_log_likelihood_and_entropy(learned):
    estimate, codes = estimate_and_codes(learned)
    ours = categorical_bound(estimate, codes) + continuous_bound(estimate, codes)
    deviation = (estimate.log_variance / 2).exp() if learned else torch.ones(5, 2).double()
    likelihood = Normal(estimate.mean, deviation).log_prob(codes.continuous).sum(dim=1)
    for logits, code in zip(estimate.categories, codes.categories, strict=True):
        likelihood = likelihood + Categorical(logits=logits).log_prob(code)
    expected = likelihood + math.log(4) + math.log(3) + 2 * math.log(2)
    torch.testing.assert_close(ours, expected)
    inputs = [*estimate.categories, estimate.mean, *([estimate.log_variance] if learned else [])]
    for a, b in zip(*(torch.autograd.grad(each.sum(), inputs) for each in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_bound_is_at_most_the_information():
    """ln K for a certain and right estimate, 0 for one that says nothing."""
    codes = Codes([torch.arange(10)], torch.zeros(10, 0))
    certain = Estimate([50.0 * torch.eye(10)], torch.zeros(10, 0), None)
    torch.testing.assert_close(categorical_bound(certain, codes), torch.full([10], math.log(10)))
    silent = Estimate([torch.zeros(10, 10)], torch.zeros(10, 0), None)
    torch.testing.assert_close(categorical_bound(silent, codes), torch.zeros(10), atol=1e-6, rtol=0)
    assert not continuous_bound(certain, codes).any()


def test_codes_of_latents():
    """What G is given, and what Q is asked for, are the same; each category is as likely as the others."""
    torch.manual_seed(1)
    law, z = LatentLaw(12, "uniform", [4, 3], 2), torch.randn(4000, 12)
    codes, given = law.codes(z), law(z)
    assert torch.equal(given[:, 3:7], F.one_hot(codes.categories[0], 4).float())
    assert torch.equal(given[:, 7:10], F.one_hot(codes.categories[1], 3).float())
    assert torch.equal(given[:, 10:], codes.continuous)
    assert (given[:, :3].abs() < 1).all()
    shares = torch.bincount(codes.categories[0]) / 4000
    assert ((shares - 0.25).abs() < 0.03).all()
    assert abs(float(codes.continuous.var()) - 1 / 3) < 0.02


def test_latents_with_given_codes():
    torch.manual_seed(2)
    law, z = LatentLaw(12, "normal", [4, 3], 2), torch.randn(50, 12)
    kept = z.clone()
    wanted = torch.linspace(-0.9, 0.9, 50)
    changed = law.with_codes(z, {1: torch.arange(50) % 3}, {0: wanted, 1: 0.5})
    codes, before = law.codes(changed), law.codes(z)
    assert torch.equal(codes.categories[1], torch.arange(50) % 3)
    assert torch.equal(codes.categories[0], before.categories[0])
    torch.testing.assert_close(codes.continuous[:, 0], wanted)
    torch.testing.assert_close(codes.continuous[:, 1], torch.full([50], 0.5))
    assert torch.equal(changed[:, :7], z[:, :7])
    assert torch.equal(changed[:, 7:10].sort(dim=1).values, z[:, 7:10].sort(dim=1).values)  # as typical as before
    assert torch.equal(z, kept)
    several: list[dict[str, Any]] = [{"categories": {2: 0}}, {"categories": {0: 4}}]
    several += [{"continuous": {2: 0.0}}, {"continuous": {0: 1.0}}]
    for wrong in several:
        with pytest.raises(ValueError, match="code"):
            law.with_codes(z, **wrong)


def test_a_traversal_is_rendered_by_sample(tmp_path):
    """A row for each category, a column for each value of a continuous code; through the file and the command."""
    torch.manual_seed(3)
    kwargs = {"resolution": 8, "channel_max": 8, "z_dim": 8, "categories": [3], "continuous": 2}
    G: Any = NETWORKS["dcgan"].G(**kwargs).eval()
    snapshot = tmp_path / "G.safetensors"
    save_snapshot(snapshot, G, {"network": "dcgan", "kwargs": kwargs, "alpha": 1.0, "nimg": 1})
    loaded = load_snapshot(snapshot)
    found = traversal(loaded, seed=5, continuous=1, columns=4)
    assert found.z is not None
    codes = loaded.law.codes(found.z)
    assert codes.categories[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    torch.testing.assert_close(codes.continuous[:, 1], torch.linspace(-0.95, 0.95, 4).repeat(3))
    assert (codes.continuous[:, 0] == codes.continuous[0, 0]).all()
    assert torch.equal(found.z[0, :3], latents([5], 8)[0, :3])
    save_latents(tmp_path / "codes.safetensors", found)
    given = ["--ws", tmp_path / "codes.safetensors", "--grid", "--columns", 4, "--out", tmp_path / "out"]
    harness.command("sample", snapshot, *given, expected=0)
    (picture,) = (tmp_path / "out").glob("*.png")
    assert Image.open(picture).size == (32, 24)
    for wrong in ({"category": 1}, {"continuous": 2}):
        with pytest.raises(UsageError, match="there is no"):
            traversal(loaded, **wrong)
    with pytest.raises(UsageError, match=r"has no codes: those of a run with system\.name=infogan"):
        traversal(NETWORKS["dcgan"].G(resolution=8, channel_max=8))


@pytest.mark.parametrize("variance", ["fixed", "learned"])
def test_the_gradients_of_both_sides(tiny_data, variance):
    overrides = ["system.categories=[3,2]", "system.continuous=2", f"system.variance={variance}", "system.weight=0.5"]
    first = FirstStep(infogan(tiny_data, *overrides))
    system, x = first.system, first.context()
    assert system.G.z_dim == 6 + 3 + 2 + 2

    def judged(images):
        """The score, and what Q estimates, from D's parts."""
        D, Q = system.D, system.D.Q
        out = D(images)
        hidden = out[:, 1:]
        assert hidden.shape[1] == WIDTH
        mean, var = hidden.mean(dim=0), hidden.var(dim=0, correction=0)
        normed = (hidden - mean) / (var + Q.norm.eps).sqrt() * Q.norm.weight + Q.norm.bias
        active = torch.where(normed > 0, normed, SLOPE * normed)
        return out[:, 0], active @ Q.out.weight.t() + Q.out.bias

    def likelihood(numbers, z):
        first_code, second = z[:, 6:9].argmax(dim=1), z[:, 9:11].argmax(dim=1)
        continuous = torch.erf(z[:, 11:] / math.sqrt(2))
        deviation = (numbers[:, 7:] / 2).exp() if variance == "learned" else torch.ones_like(continuous)
        return (
            Categorical(logits=numbers[:, :3]).log_prob(first_code)
            + Categorical(logits=numbers[:, 3:5]).log_prob(second)
            + Normal(numbers[:, 5:7], deviation).log_prob(continuous).sum(dim=1)
        )

    latents = system.latents(x, "g")
    score, numbers = judged(system.G(latents.z))
    agree(first.gradients("G"), first.expected("G", F.softplus(-score) - 0.5 * likelihood(numbers, latents.z)))

    latents = system.latents(x, "d")
    with torch.no_grad():
        fake = system.G(latents.z)
    real, _ = judged(x.real)
    score, numbers = judged(fake)
    loss = F.softplus(-real) + F.softplus(score) - 0.5 * likelihood(numbers, latents.z)
    agree(first.gradients("D"), first.expected("D", loss))


def test_learned_variances_have_a_floor():
    Q = Recognition([], 1, learned=True).eval()
    torch.nn.init.constant_(Q.out.bias, -100.0)
    estimate = Q(torch.zeros(2, WIDTH))
    assert estimate.log_variance is not None
    assert float(estimate.log_variance.detach().min()) == pytest.approx(math.log(1e-4))
    assert continuous_bound(estimate, Codes([], torch.full([2, 1], 0.3))).isfinite().all()


def test_a_category_becomes_visible(tiny_data):
    """In some steps of a tiny run the bound rises from about 0."""
    engine = infogan(tiny_data, "system.categories=[2]", "system.continuous=0", "train.dtype=float32")
    stats = [engine.step(batch).stats for batch in batches_of(engine, 60)]
    bounds = [total / count for total, count in (each["code_bound"] for each in stats)]
    assert sum(bounds[:3]) / 3 < 0.2
    assert sum(bounds[-5:]) / 5 > 0.5  # of ln 2 = 0.69


def test_groups_of_batch_norm_with_networks_that_need_none():
    given = ["run=x", "data.url=x", "model.normalization=none", "model.mbstd_group=16"]
    assert phases(load_config("systems/infogan", given))[0].mbstd_group == 16  # those of Q


def test_it_trains_points():
    """With multi-layer perceptrons, whose discriminator is a list of dense layers."""
    given = ["model=mlp", "model.base=[1,1]", "model.mapping_layers=2", "resolution=4", "system.categories=[8]"]
    engine = engine_of("systems/infogan", "points:ring", "model.z_dim=2", *given)
    assert engine.state.G.law.categories == [8]
    for batch in batches_of(engine, 2):
        assert not engine.step(batch).faults


def test_bad_keys(tiny_data):
    with pytest.raises(UsageError, match=r"model\.name=stylegan2 takes no codes; give model\.name=dcgan or mlp"):
        infogan(tiny_data, "model.name=stylegan2")
    with pytest.raises(UsageError, match=r"leave no code: give one"):
        infogan(tiny_data, "system.categories=[]", "system.continuous=0")
    assert "system.categories" in refused("system.name=infogan", "system.categories=[1]")
    assert "system.variance" in refused("system.name=infogan", "system.variance=free")
    assert "it belongs to infogan" in refused("system.continuous=3")


def test_its_steps_may_be_replayed(tiny_data):
    """The losses contain no numbers that change; a class derived from it has to say so itself."""
    first = FirstStep(infogan(tiny_data))
    assert first.system.constants(first.step) is not None
    derived: Any = type("Derived", (type(first.system),), {})
    first.system.__class__ = derived
    assert first.system.constants(first.step) is None
