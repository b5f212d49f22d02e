"""Denoising diffusion GAN: schedule, posterior, networks and steps against the original implementation and the closed
form; pictures that follow from z alone; what is refused."""

import itertools
import json
import math
import re
from typing import Any

import exporting
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.errors import UsageError
from stylegan_pg.export.command import export
from stylegan_pg.losses import squared_norms
from stylegan_pg.networks import NetworkShape, denoising_mlp, ncsnpp
from stylegan_pg.networks.diffusion import Diffusion, diffused, posterior, time_embedding
from stylegan_pg.planning.cost import cost_of
from stylegan_pg.rng import generator
from stylegan_pg.systems.base import Context, Numbers, Step
from stylegan_pg.systems.catalogue import system_of
from stylegan_pg.systems.ddgan import DDGAN
from stylegan_pg.systems.draws import Draws

# --- the original implementation --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(parity_dir):
    path = parity_dir.parent / "parity-systems" / "ddgan_16.safetensors"
    if not path.is_file():
        pytest.skip("no reference numbers: ../shared/parity-systems does not exist beside this checkout")
    with safe_open(path, "pt") as file:
        meta = {k: json.loads(v) for k, v in file.metadata().items()}
        return meta, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def in_public_order(net: ncsnpp.Denoiser) -> list[torch.nn.Module]:
    """The layers of G in the order in which the original numbers them."""
    found = [*net.time, net.first]
    for stage, pyramid in zip(net.down, [*net.pyramid, None], strict=True):
        found += [*stage, *([pyramid] if pyramid else [])]
    return [*found, *net.middle, *(part for stage in net.up for part in stage), net.norm, net.last]


PARTS = {
    ncsnpp.Block: {
        "norm0.style": "GroupNorm_0.style", "conv0": "Conv_0", "time": "Dense_0", "norm1.style": "GroupNorm_1.style",
        "conv1": "Conv_1", "skip": "Conv_2",
    },
    ncsnpp.Attention: {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"},
    ncsnpp.Halved: {"conv": "Conv2d_0"},
}  # fmt: skip


def public_names(net: Any) -> dict[str, str]:
    """{our name of a parameter: the original's}."""
    names = {}
    own = {id(p): name for name, p in net.named_parameters()}
    if isinstance(net, ncsnpp.Denoiser):
        for i, part in enumerate(in_public_order(net)):
            for name, p in part.named_parameters():
                layer, _, kind = name.rpartition(".")
                public = PARTS[type(part)][layer] + "." if layer else ""
                kind = {"weight": "W", "bias": "b"}[kind] if "NIN" in public else kind
                names[own[id(p)]] = f"all_modules.{i}.{public}{kind}"
        names |= {f"mapping.{i}.{k}": f"z_transform.{2 * i + 1}.{k}" for i in range(9) for k in ("weight", "bias")}
    else:
        parts = {"first": "start_conv", "final": "final_conv", "last": "end_linear", "time.0": "t_embed.main.0",
                 "time.1": "t_embed.main.2"}  # fmt: skip
        for i in range(len(net.blocks)):
            inner = {"conv0": "conv1.0", "conv1": "conv2.0", "time": "dense_t1", "skip": "skip.0"}
            parts |= {f"blocks.{i}.{mine}": f"conv{i + 1}.{theirs}" for mine, theirs in inner.items()}
        names = {f"{mine}.{k}": f"{theirs}.{k}" for mine, theirs in parts.items() for k in ("weight", "bias")}
    return {name: names[name] for name in own.values()}


def fitting(public: str, t: torch.Tensor) -> torch.Tensor:
    """The original's 1x1 layers of the attention are matrices [in, out]."""
    return t.t()[:, :, None, None] if public.endswith(".W") else t


@pytest.fixture(scope="module")
def nets(reference):
    meta, t = reference
    G = ncsnpp.Generator(
        resolution=meta["resolution"], img_channels=meta["channels"], z_dim=meta["latent_size"],
        steps=meta["time_steps"], beta_min=meta["beta_min"], beta_max=meta["beta_max"],
        width=meta["generator_base_channels"], multipliers=meta["channel_multipliers"],
        blocks_each=meta["res_blocks_per_level"], attention_at=meta["attention_resolutions"],
        w_dim=meta["latent_embedding_size"], mapping_layers=meta["extra_mapping_layers"],
    )  # fmt: skip
    D = ncsnpp.Discriminator(
        resolution=meta["resolution"], img_channels=meta["channels"], width=meta["discriminator_base_channels"],
        stages=meta["discriminator"], time_dim=meta["time_embedding_size"],
    )  # fmt: skip
    for net, side in ((G.denoiser, "G."), (D, "D.")):
        names = public_names(net)
        net.load_state_dict({mine: fitting(public, t[side + public]) for mine, public in names.items()})
        assert {side + public for public in names.values()} == {name for name in t if name.startswith(side)}
    return G, D


def close(actual, expected, tolerance=5e-5):
    error = float((actual.detach() - expected.reshape(actual.shape)).abs().max()) / float(expected.abs().max())
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


def compare_gradients(loss, net, t, prefix):
    names = public_names(net)
    expected = {mine: fitting(public, t[prefix + public]) for mine, public in names.items()}
    whole = max(float(v.abs().max()) for v in expected.values())
    found = torch.autograd.grad(loss, list(net.parameters()))
    for (name, _), gradient in zip(net.named_parameters(), found, strict=True):
        error = float((gradient - expected[name]).abs().max()) / max(float(expected[name].abs().max()), whole / 100)
        assert error <= 5e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_schedule(reference, steps):
    _, t = reference
    diffusion = Diffusion(steps)
    forward, back = diffusion.forward.float(), diffusion.posterior.float()
    close(diffusion.betas.float(), t[f"out.T{steps}.betas"])
    for column, name, rows in (
        (0, "a_s_cum", slice(None, -1)),
        (1, "sigmas_cum", slice(None, -1)),
        (2, "a_s", slice(1, None)),
        (3, "sigmas", slice(1, None)),
    ):
        close(forward[:, column], t[f"out.T{steps}.{name}"][rows])
    close(back[:, 0], t[f"out.T{steps}.posterior_mean_coef1"])
    close(back[:, 1], t[f"out.T{steps}.posterior_mean_coef2"])
    close(back[:, 2].square(), t[f"out.T{steps}.posterior_variance"])


def step_of(G, t, side):
    """(t, x_t, x_{t+1}, guess, sampled x_t) of the step that is stored for a side."""
    at = t[f"in.t_{side}"]
    rows, back = G.diffusion.forward[at].float(), G.diffusion.posterior[at].float()
    xt, x_next = diffused(t["in.real"], t[f"in.noise_x_t_{side}"], t[f"in.noise_x_t_plus_1_{side}"], rows)
    guess = G.denoiser(x_next, at, t[f"in.z_{side}"])
    return at, xt, x_next, guess, posterior(guess, x_next, t[f"in.noise_posterior_{side}"], back)


def test_a_step_of_the_discriminator(reference, nets):
    meta, t = reference
    G, D = nets
    with torch.no_grad():
        at, xt, x_next, guess, fake = step_of(G, t, "d")
    close(xt, t["out.x_t_d"])
    close(x_next, t["out.x_t_plus_1_d"])
    close(guess, t["out.x_0_predicted_d"])
    close(fake, t["out.x_t_sampled_d"])
    xt.requires_grad_(True)
    real, fake = D(xt, at, x_next), D(fake, at, x_next)
    close(real, t["out.logits_real_d"])
    close(fake, t["out.logits_fake_d"])
    plain = F.softplus(-real).mean() + F.softplus(fake).mean()
    close(plain, t["out.loss_d_without_r1"])
    penalty = meta["r1_gamma"] / 2 * squared_norms([real], [xt])[0].mean()
    close(penalty, t["out.loss_d_r1_weighted"])
    close(plain + penalty, t["out.loss_d"])
    compare_gradients(plain + penalty, D, t, "grad_loss_d.")


def test_a_step_of_the_generator(reference, nets):
    _, t = reference
    G, D = nets
    at, _, x_next, guess, fake = step_of(G, t, "g")
    close(guess, t["out.x_0_predicted_g"])
    logits = D(fake, at, x_next)
    close(logits, t["out.logits_fake_g"])
    loss = F.softplus(-logits).mean()
    close(loss, t["out.loss_g"])
    compare_gradients(loss, G.denoiser, t, "grad_loss_g.")


def test_the_reverse_chain(reference, nets):
    _, t = reference
    G, _ = nets
    latents = t["in.chain_z"].transpose(0, 1).flatten(1)
    noises = torch.cat([t["in.chain_x_T"][None], t["in.chain_noise"][:-1]]).transpose(0, 1).flatten(1)
    z = torch.cat([latents, noises], dim=1)
    assert z.shape[1] == G.z_dim
    with torch.no_grad():
        close(G(z), t["out.chain_x_0"])


# --- diffusion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_the_posterior_is_that_of_the_joint_distribution(steps):
    """x_{t+1}, given x_t and x_0, is Gaussian: the mean and variance of x_t given both follow from the precisions."""
    diffusion = Diffusion(steps)
    betas = diffusion.betas[1:]
    kept = (1 - betas).cumprod(0)
    x0, x_next = 0.7, -1.3
    for t in range(steps):
        of_x0, of_next, of_noise = diffusion.posterior[t].tolist()
        if t == 0:
            assert (of_x0, of_next, of_noise) == (pytest.approx(1, abs=1e-12), 0, 0)
            continue
        prior_mean, prior_variance = math.sqrt(kept[t - 1]) * x0, float(1 - kept[t - 1])
        slope, variance = math.sqrt(1 - betas[t]), float(betas[t])
        precision = 1 / prior_variance + slope**2 / variance
        mean = (prior_mean / prior_variance + slope * x_next / variance) / precision
        assert of_x0 * x0 + of_next * x_next == pytest.approx(mean, rel=1e-10)
        assert of_noise**2 == pytest.approx(1 / precision, rel=1e-10)


def test_diffused_points_have_the_variances_of_the_schedule():
    """x_t has mean a_t x_0 and variance 1 - a_t^2, x_{t+1} those of the next t, and almost nothing of x_0 is left."""
    diffusion = Diffusion(4)
    g = torch.Generator().manual_seed(0)
    n, x0 = 200_000, 3.0
    whole = torch.cat([diffusion.forward[:, 0], (diffusion.forward[-1, 0] * diffusion.forward[-1, 2])[None]])
    assert float(whole[-1]) < 0.01
    for t in range(4):
        a, b = torch.randn([2, n, 1, 1, 1], generator=g, dtype=torch.float64)
        rows = diffusion.forward[t].expand(n, -1)
        for found, kept in zip(diffused(torch.full([n, 1, 1, 1], x0).double(), a, b, rows), whole[t:], strict=False):
            assert float(found.mean()) == pytest.approx(float(kept) * x0, abs=0.02)
            assert float(found.var()) == pytest.approx(1 - float(kept) ** 2, abs=0.02)
    with pytest.raises(ValueError, match="0 steps"):
        Diffusion(0)


def test_time_embedding():
    found = time_embedding(torch.tensor([0, 3]), 7, torch.float64)
    frequencies = [1.0, 10000**-0.5, 1e-4]
    expected = [[math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies] + [0] for t in (0, 3)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


# --- generators -------------------------------------------------------------------------------------------------------


def small(resolution=8, **kwargs):
    form = {"width": 4, "multipliers": [1, 2], "blocks_each": 1, "attention_at": [4], "w_dim": 6, "mapping_layers": 1}
    return ncsnpp.Generator(resolution=resolution, z_dim=3, **{**form, **kwargs})


def disturbed(net):
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return net


@pytest.mark.parametrize(
    ("G", "shape"),
    [
        (lambda: small(steps=3), (3, 8, 8)),
        (lambda: small(steps=1, base=(4, 6), img_channels=1, multipliers=[1]), (1, 8, 12)),
        (lambda: denoising_mlp.Generator(resolution=4, z_dim=3, width=8, hidden=2), (2, 1, 1)),
    ],
)
def test_pictures_follow_from_z_alone(G, shape):
    """Whatever the batch; and every number of z counts."""
    G = disturbed(G()).double()
    z = torch.randn(5, G.z_dim, dtype=torch.float64, requires_grad=True)
    images = G(z)
    assert images.shape == (5, *shape)
    torch.testing.assert_close(torch.cat([G(z[:2]), G(z[2:])]), images, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(images.square().sum(), z)
    assert (gradient.abs().sum(dim=0) > 0).all()
    assert G.z_dim == G.steps * (3 + math.prod(shape))


def test_forms_that_are_not_possible():
    with pytest.raises(ValueError, match="pictures of 8x8 cannot be halved 4 times"):
        small(multipliers=[1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="take small"):
        ncsnpp.Discriminator(resolution=32, width=2, stages="large")
    for name, value in {
        "steps": 0,
        "beta_max": -1.0,
        "multipliers": [0],
        "blocks_each": 0,
        "attention_at": [3],
    }.items():
        with pytest.raises(ValueError, match=f"^{name} is"):
            small(**{name: value})
    D = ncsnpp.Discriminator(resolution=64, width=2, stages="large", time_dim=4)
    assert D(torch.randn(4, 3, 64, 64), torch.arange(4), torch.randn(4, 3, 64, 64)).shape == (4, 1)


# --- the system -------------------------------------------------------------------------------------------------------

POINTS = ["run=runs/x", "train.batch=8", "model.channel_max=8", "model.mapping_layers=2"]


def built(*overrides):
    torch.manual_seed(0)
    system = DDGAN(load_config("systems/ddgan", [*POINTS, *overrides]))
    system.build(NetworkShape(4, 4, False, 2, 0, 1), None)
    for net in (system.G, system.D):
        disturbed(net).double()
    return system


def context(system, number=0):
    dtype, device, batch = torch.float64, torch.device("cpu"), 8
    draws = Draws(device, dtype)
    draws.begin("kind", 0, number * batch)
    real = torch.randn(batch, 2, 1, 1, dtype=dtype, generator=torch.Generator().manual_seed(3))
    step = Step(0, number * batch, number, batch, 1.0, 4, 0, device, dtype, system.net, range(batch), real, draws,
                lambda step, purpose, *key: generator(step.seed, purpose, step.nimg, *key), Numbers())  # fmt: skip
    return Context(step, range(batch), list(range(batch)), 0, batch, lambda name, t: None)


def test_losses_and_gradients_are_those_of_the_formulas():
    system = built("loss.r1_gamma=0.3", "loss.r1_every=5")
    x = context(system)
    (r1,) = system.due("D", 0, x.step)
    found = system.discriminator_loss(x, [r1])
    drawn = x.step.draws.values[("denoising", "d")]
    noise, next_noise, last = x.step.draws.values[("noises", "d")]
    losses, penalties = [], []
    times = [0.001 + 0.999 * k / 4 for k in range(5)]
    kept = [math.exp(-(s**2) * (20 - 0.1) / 2 - 0.1 * s) for s in times]
    beta = [0.0, *(1 - b / a for a, b in itertools.pairwise(kept))]

    def product(k):
        return math.prod(1 - b for b in beta[1 : k + 1])

    for i in range(8):  # each point by itself, with the schedule written out
        t = int(drawn["t"][i])
        xt = math.sqrt(product(t)) * x.real[i] + math.sqrt(1 - product(t)) * noise[i]
        x_next = math.sqrt(1 - beta[t + 1]) * xt + math.sqrt(beta[t + 1]) * next_noise[i]
        at = torch.tensor([t])
        guess = system.G.denoiser(x_next[None], at, drawn["z"][i][None])[0]
        mean = math.sqrt(product(t)) * beta[t + 1] / (1 - product(t + 1)) * guess
        mean = mean + math.sqrt(1 - beta[t + 1]) * (1 - product(t)) / (1 - product(t + 1)) * x_next
        fake = mean + math.sqrt(beta[t + 1] * (1 - product(t)) / (1 - product(t + 1))) * last[i]
        xt = xt.detach().requires_grad_(True)
        real_score = system.D(xt[None], at, x_next[None])
        fake_score = system.D(fake[None].detach(), at, x_next[None])
        (gradient,) = torch.autograd.grad(real_score.sum(), xt, create_graph=True)
        losses.append(-torch.log(torch.sigmoid(real_score)) - torch.log(1 - torch.sigmoid(fake_score)))
        penalties.append(gradient.square().sum())
    loss, penalty = torch.cat(losses)[:, 0], torch.stack(penalties)
    torch.testing.assert_close(found["loss_d"], loss, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found["r1_penalty"], penalty, rtol=1e-8, atol=1e-10)
    weights = list(system.D.parameters())
    ours = torch.autograd.grad(found["loss"].mean(), weights)
    theirs = torch.autograd.grad((loss + 0.3 / 2 * penalty).mean(), weights)  # not multiplied by 5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_the_generator_s_loss_reaches_it_through_the_posterior():
    system = built()
    x = context(system)
    found = system.generator_loss(x, "")
    step = system.denoising(x, "g")
    score = system.D(step.fake, step.t, step.x_next)
    torch.testing.assert_close(found["loss"], torch.log1p(torch.exp(-score))[:, 0], rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in system.D.parameters())
    gradients = torch.autograd.grad(found["loss"].mean(), list(system.G.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)
    other = x.step.draws.values
    system.discriminator_loss(x, [])
    assert not torch.equal(other[("denoising", "g")]["z"], other[("denoising", "d")]["z"])


def test_updates_train_d_first_and_have_r1_within_its_main_loss():
    system = built("loss.r1_every=3", "optim.d_steps=2")
    names = []
    for number in range(6):
        step = context(system, number).step
        names.append([(u.trains, u.name, u.losses[0].twice, u.losses[0].factor * 8) for u in system.updates(step)])
    d, d_r1, g = (("D", "main loss", False, 1), ("D", "main loss + r1", True, 1), ("G", "main loss", False, 1))
    assert names == [[d_r1, g], [d], [d, g], [d_r1], [d, g], [d]]
    assert system.optimizer_steps("D") == []


def test_noises_of_large_pictures_are_drawn_for_each(monkeypatch):
    system = built()
    x = context(system)
    monkeypatch.setattr("stylegan_pg.systems.ddgan.MOST_DRAWN", 1)
    whole = system.noises(x, "d", 3)
    part = Context(x.step, x.share, [2, 3], 1, 8, x.add)
    for a, b in zip(whole, system.noises(part, "d", 3), strict=True):
        assert torch.equal(a[2:4], b)
    assert len({float(t.sum()) for t in whole}) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.objective=relativistic"], "take loss.objective=logistic"),
        (["loss.terms=[{name: r2}]"], "the term r2 is not possible with system.name=ddgan"),
        (["loss.pl_weight=2"], "the term path_length is not possible"),
        (["model=mlp"], "take model.name=ddgan for pictures, or model.name=ddgan_mlp for points"),
    ],
)
def test_what_it_cannot_do_is_refused(overrides, message):
    given = [o for o in POINTS if overrides != ["model=mlp"] or "mapping" not in o]
    with pytest.raises(UsageError, match=re.escape(message)):
        system_of(load_config("systems/ddgan", [*given, *overrides])).build(NetworkShape(4, 4, False, 2, 0, 1), None)
    with pytest.raises(UsageError, match=r"data\.conditional=false"):
        system_of(load_config("systems/ddgan", POINTS)).build(NetworkShape(4, 4, False, 2, 3, 1), None)


def test_a_plan_counts_one_pass_of_the_denoiser():
    """And not the whole chain, whose length is the number of steps."""

    def flops(*overrides):
        config = load_config("systems/ddgan-digits", ["run=runs/x", "loss.r1_gamma=0", *overrides])
        return cost_of(config, phases(config)[0], 1, 0)

    one, eight = flops("model.steps=1"), flops("model.steps=8")
    assert one.flops_per_image == eight.flops_per_image > 0
    assert one.g_parameters == eight.g_parameters


def test_published_settings_for_celebahq_are_possible():
    given = ["run=runs/x", "resolution=256", "model.steps=2", "model.width=64", "model.multipliers=[1,1,2,2,4,4]"]
    given += ["model.d_stages=large", "optim.g_lr.from=0.0002", "optim.d_lr.from=0.0001", "loss.r1_gamma=2"]
    config = load_config("systems/ddgan-cifar10", [*given, "loss.r1_every=10", "train.batch=32", "ema.kimg=22.2"])
    with torch.device("meta"):
        system = system_of(config)
        system.build(NetworkShape(256, 256, False, 3, 0, 4), None)
        t = torch.zeros([4], dtype=torch.long)
        x = system.G.denoiser(torch.zeros(4, 3, 256, 256), t, torch.zeros(4, 100))
        assert system.D(x, t, x).shape == (4, 1)
    assert system.G.z_dim == 2 * (100 + 3 * 256 * 256)


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_a_snapshot_is_exported_with_its_whole_chain(tmp_path, to):
    if to == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    form = {"multipliers": [1, 2], "blocks": 1, "attention_at": [4], "steps": 2}
    path = exporting.snapshot(tmp_path / "g.safetensors", "ddgan", 8, channels=1, **form)
    out = tmp_path / {"torch": "g.pt2", "onnx": "g.onnx"}[to]
    lines = list(export(path, to, out))  # which runs the file and compares its pictures with the generator's
    assert any("inputs z" in line for line in lines)
    G = load_snapshot(path)
    assert G.z_dim == 2 * (8 + 64)
    if to == "torch":
        z = torch.randn(3, G.z_dim)
        torch.testing.assert_close(torch.export.load(out).module()(z=z), G(z), rtol=1e-4, atol=1e-5)
