"""The techniques of Salimans et al. 2016 and the penalty for equal outputs, against formulas that are written here in
another way: loops in NumPy, closed forms, and networks of which everything is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import harness
import numpy as np
import pytest
import steady
import torch
import torch.nn.functional as F
from configuring import config_of, refused
from test_steady_steps import steps_of
from torch import nn
from torch.autograd import gradcheck

from stylegan_pg import load_snapshot, pack
from stylegan_pg.config import MODELS
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import deal, instance_noise, phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import TERMS, Objective, objective_of, techniques
from stylegan_pg.networks import NETWORKS, NetworkShape, Pair
from stylegan_pg.networks.features import Captured
from stylegan_pg.networks.minibatch import MinibatchDiscrimination
from stylegan_pg.networks.virtual_norm import VirtualBatchNorm
from stylegan_pg.rng import generator
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.history import History
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

MLP = ["data.url=points:ring", "model.name=mlp", "model.base=[1,1]", "resolution=4", "loss.pl_weight=0"]
MLP += ["model.z_dim=4", "model.channel_max=8", "model.mapping_layers=2", "train.batch=8", "loss.r1_gamma=0"]
DCGAN = ["model.name=dcgan", "model.z_dim=6", "model.channel_base=32", "model.channel_max=8", "resolution=8"]
DCGAN += ["loss.pl_weight=0", "loss.r1_gamma=0", "train.batch=8", "model.mbstd_group=4"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def engine_of(*overrides: str) -> Engine:
    config = load_config(None, ["run=unused", "train.total_kimg=1", "train.dtype=float64", *overrides])
    state = TrainState(config, load_dataset(config), Devices(config))
    state.enter(phases(config)[0])
    return Engine(state)


def step(engine: Engine, count: int = 1) -> list[Any]:
    """Some steps from the present nimg on."""
    state, p = engine.state, engine.state.current
    how: dict[str, Any] = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    data = batches(state.table, state.index.order(seed=0), start=state.nimg, end=p.end, batch=p.batch, **how)
    found = []
    for _, batch in zip(range(count), data, strict=False):
        found.append((batch, engine.step(batch)))
        assert not found[-1][1].faults
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Random pictures of 8x8 in three classes."""
    from PIL import Image

    folder, dice = tmp_path_factory.mktemp("improved"), np.random.default_rng(1)
    for i in range(24):
        place = folder / "source" / f"class{i % 3}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dice.integers(0, 255, [8, 8, 3], dtype=np.uint8)).save(place)
    pack(folder / "source", folder / "packed", resolution=8, labels="folders", format="png", progress=False)
    return folder / "packed"


# --- feature matching -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("group", [3, 6, 12])
def test_feature_matching_equals_its_formula(norm, group):
    n, groups = 12, 12 // group
    fake, real = drawn(n, 5, 2, seed=1).requires_grad_(True), drawn(n, 5, 2, seed=2)
    values = techniques.feature_matching(fake, real, group, norm)
    f, r = fake.detach().numpy().reshape(n, -1), real.numpy().reshape(n, -1)
    wanted, gradient = np.zeros(n), np.zeros_like(f)
    for i in range(n):
        mine = [j for j in range(n) if j % groups == i % groups]
        apart = np.mean([f[j] for j in mine], axis=0) - np.mean([r[j] for j in mine], axis=0)
        wanted[i] = (apart**2).sum() if norm == "l2" else np.abs(apart).mean()
        gradient[i] = 2 * apart if norm == "l2" else np.sign(apart) / len(apart)
    np.testing.assert_allclose(values.detach().numpy(), wanted, rtol=1e-12)
    (found,) = torch.autograd.grad(values.sum(), fake)
    np.testing.assert_allclose(found.numpy().reshape(n, -1), gradient, rtol=1e-12)


def test_feature_matching_does_not_depend_on_how_a_batch_is_dealt_out():
    fake, real, whole = drawn(12, 5, seed=1), drawn(12, 5, seed=2), torch.zeros(12, dtype=torch.float64)
    for part in deal(12, 3, 2):
        whole[part] = techniques.feature_matching(fake[part], real[part], 3)
    torch.testing.assert_close(whole, techniques.feature_matching(fake, real, 3))
    with pytest.raises(ValueError, match="a batch of 10 does not divide into groups of 3"):
        techniques.feature_matching(fake[:10], real[:10], 3)


def test_what_the_engine_reports_of_feature_matching():
    """Recomputed from the weights before the step, and the latents of the seed."""
    term = "loss.terms=[{name: feature_matching, weight: 2}]"
    engine = engine_of(*MLP, term, "loss.g_weight=0", "model.mbstd_group=4", "model.mbstd_channels=0")
    assert engine.state.current.mbstd_group == 4  # although the networks themselves couple no images
    G, D = engine.state.G, engine.state.D
    with torch.no_grad():
        z = torch.randn([8, 4], generator=generator(0, "g", 0)).double()
        hidden = [D.layers[:-1](t.flatten(1)) for t in (G(z),)]
        before = {name: p.clone() for name, p in G.named_parameters()}
    (batch, outcome), *_ = step(engine)
    with torch.no_grad():
        state = {name: p.clone() for name, p in D.named_parameters()}
    assert outcome.stats["loss_g"][0] == 0
    fresh = engine_of(*MLP, term, "loss.g_weight=0", "model.mbstd_group=4", "model.mbstd_channels=0").state.D
    with torch.no_grad():
        real = fresh.layers[:-1](batch.image.double().flatten(1))
    wanted = techniques.feature_matching(hidden[0], real, 4).sum()
    assert outcome.stats["feature_distance"][0] == pytest.approx(float(wanted), rel=1e-12)
    assert any(not torch.equal(p, before[name]) for name, p in G.named_parameters())  # it is all that G minimises
    assert state.keys() == dict(D.named_parameters()).keys()


OF_OTHERS = {"ddgan": "x, t, x_next", "ddgan_mlp": "the same", "codes": "codes", "chars": "texts"}  # what D judges


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in OF_OTHERS])
def test_every_discriminator_of_images_has_features(name):
    config = MODELS[name](mbstd_channels=0, channel_max=16)
    pair, shape = NETWORKS[name], NetworkShape(4 if name == "mlp" else 8, 8, False, 3, 3, 2)
    D: Any = pair.D(**pair.d_kwargs(config, shape))
    side = 4 if name == "mlp" else 8
    images = drawn(4, 3, side, side).float().requires_grad_(True)
    with Captured(D) as seen:
        D(images, torch.eye(3)[[0, 1, 2, 0]])
    (features,) = seen.features
    assert len(features) == 4
    assert features.flatten(1).shape[1] >= 8
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert gradient.abs().sum(dim=[1, 2, 3]).min() > 0
    D(images, torch.eye(3)[[0, 1, 2, 0]])
    assert len(seen.features) == 1  # only within the block


def test_a_discriminator_without_features_is_refused():
    with pytest.raises(UsageError, match=r"feature_matching is of the features .* \(Linear\) .* score_layer"):
        Captured(nn.Linear(2, 1))


# --- penalty for equal outputs ----------------------------------------------------------------------------------------


def test_diversity_equals_its_formula():
    n, limit = 5, 0.9
    a, b = drawn(n, 2, 3, 3, seed=1).requires_grad_(True), drawn(n, 2, 3, 3, seed=2).requires_grad_(True)
    za, zb = drawn(n, 4, seed=3), drawn(n, 4, seed=4)
    values = TERMS["diversity"].compute([a, b], [za, zb], limit=limit)
    ratio = np.array(
        [np.abs((a - b)[i].detach().numpy()).mean() / np.abs((za - zb)[i].numpy()).mean() for i in range(n)]
    )
    assert (ratio > limit).any()
    assert (ratio < limit).any()
    np.testing.assert_allclose(values["diversity"].detach().numpy(), ratio, rtol=1e-12)
    np.testing.assert_allclose(values["loss"].detach().numpy(), -np.minimum(ratio, limit), rtol=1e-12)
    (gradient,) = torch.autograd.grad(values["loss"].sum(), a)
    size = 18 * np.abs((za - zb).numpy()).mean(axis=1)[:, None, None, None]
    wanted = np.where((ratio < limit)[:, None, None, None], -np.sign((a - b).detach().numpy()) / size, 0)
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-12)


def test_diversity_keeps_a_generator_from_making_one_image():
    """G has no other aim here, and its images spread."""
    rate = ["optim.g_lr=0.01", "loss.g_weight=0"]
    spread = []
    for weight in (1e-9, 1.0):
        engine = engine_of(*MLP, *rate, f"loss.terms=[{{name: diversity, weight: {weight}, limit: 5}}]")
        step(engine, 60)
        with torch.no_grad():
            spread.append(float(engine.state.G(drawn(64, 4)).std(dim=0).mean()))
    assert spread[1] > 3 * spread[0]


# --- historical averaging ---------------------------------------------------------------------------------------------


def test_the_mean_of_all_weights_and_the_gradient_of_the_distance_from_it():
    net = nn.Linear(3, 2).double()
    history, past = History(net), []
    value = TERMS["historical_averaging"].compute
    first = value(list(net.parameters()), history.means, history.known(), 4)["loss"]
    assert torch.equal(first, torch.zeros(4, dtype=torch.float64))  # there is no mean yet
    for i in range(5):
        with torch.no_grad():
            for k, p in enumerate(net.parameters()):
                p.copy_(drawn(*p.shape, seed=10 * i + k))
        past.append([p.detach().numpy().copy() for p in net.parameters()])
        history.update(net)
    means = [sum(each) / 5 for each in zip(*past, strict=True)]
    for mean, wanted in zip(history.means, means, strict=True):
        np.testing.assert_allclose(mean.numpy(), wanted, rtol=1e-12)
    weights = list(net.parameters())
    loss = value(weights, history.means, history.known(), 4)["loss"]
    apart = [p.detach().numpy() - mean for p, mean in zip(weights, means, strict=True)]
    np.testing.assert_allclose(loss.detach().numpy(), [sum((d**2).sum() for d in apart)] * 4, rtol=1e-12)
    for gradient, d in zip(torch.autograd.grad(loss.mean(), weights), apart, strict=True):
        np.testing.assert_allclose(gradient.numpy(), 2 * d, rtol=1e-12)


def test_the_engine_keeps_the_mean_after_each_step_on_both_sides():
    engine = engine_of(*MLP, "loss.terms=[{name: historical_averaging, weight: 0.1}]")
    past: dict[str, list[torch.Tensor]] = {}
    for _ in range(4):
        step(engine)
        for side, net in engine.state.system.net.items():
            for name, p in net.named_parameters():
                past.setdefault(f"history_{side}/mean.{name}", []).append(p.detach().clone())
    tensors = engine.state.tensors()
    for name, values in past.items():
        torch.testing.assert_close(tensors[name], torch.stack(values).mean(dim=0), rtol=1e-12, atol=1e-14)
    assert (tensors["history_G/steps"], tensors["history_D/steps"]) == (4, 4)


class Number(nn.Module):
    """A player with one weight: an image that is x, and a score that is the image times y."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones([]))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if given.ndim == 2:
            return self.weight * torch.ones(len(given), 2, 1, 1, dtype=given.dtype)
        return self.weight * given[:, :1, 0, 0]


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_bilinear_game(weight):
    """min over x, max over y of x y, from (1, 1): each step is compared with the same game played with two numbers."""
    rate = 0.1
    # With a large eps, Adam's steps are those of gradient descent.
    how = ["optim.eps=1e9", f"optim.g_lr={1e9 * rate}", f"optim.d_lr={1e9 * rate}", "train.batch=2"]
    term = [f"loss.terms=[{{name: historical_averaging, weight: {weight}}}]"]
    config = load_config(None, ["run=unused", "train.total_kimg=1", "train.dtype=float64", *MLP, *how, *term])
    system = GAN(config, Pair(Number, Number, lambda *_: {}, lambda *_: {}))
    system.objective = Objective(lambda fake, real=None: fake, lambda real, fake: -fake)
    state = TrainState(config, load_dataset(config), Devices(config), system)
    state.enter(phases(config)[0])
    engine, x, y, past = Engine(state), 1.0, 1.0, []
    for _ in range(150):
        step(engine)
        mean_x, mean_y = (sum(each) / len(past) for each in zip(*past, strict=True)) if past else (x, y)
        x -= rate * (y + 2 * weight * (x - mean_x))
        y -= rate * (-x + 2 * weight * (y - mean_y))
        past.append((x, y))
        assert float(state.G.weight.detach()) == pytest.approx(x, abs=1e-6)
        assert float(state.D.weight.detach()) == pytest.approx(y, abs=1e-6)
    assert (np.hypot(x, y) < 0.3) == (weight > 0)


def test_a_run_that_takes_historical_averaging_up_later():
    """A checkpoint without means is loaded; the mean begins there. One of another form is refused."""
    engine = engine_of(*MLP)
    step(engine, 2)
    tensors = engine.state.tensors()
    later = engine_of(*MLP, "loss.terms=[{name: historical_averaging}]").state
    later.load(tensors)
    assert later.tensors()["history_G/steps"] == 0
    broken = {**tensors, "history_G/steps": torch.zeros([], dtype=torch.float64)}
    with pytest.raises(UsageError, match=r"the checkpoint's history_G lacks mean\.synthesis"):
        later.load(broken)


# --- label smoothing --------------------------------------------------------------------------------------------------


def test_smoothed_losses_equal_the_cross_entropy_with_smooth_targets():
    real, fake = (3 * drawn(9, 1, seed=k).requires_grad_(True) for k in (1, 2))
    for name in ("logistic", "saturating"):
        ours = objective_of(config_of(f"loss.objective={name}", "loss.real_target=0.9").loss).d(real, fake)
        entropy = F.binary_cross_entropy_with_logits
        wanted = entropy(real, torch.full_like(real, 0.9), reduction="none")
        wanted = wanted + entropy(fake, torch.zeros_like(fake), reduction="none")
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(t.sum(), [real, fake]) for t in (ours, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    ours = objective_of(config_of("loss.objective=lsgan", "loss.real_target=0.9").loss).d(real, fake)
    torch.testing.assert_close(ours, (real - 0.9) ** 2 / 2 + fake**2 / 2)


def test_the_best_d_of_discrete_data_with_smooth_targets():
    """x in {0, 1} with probabilities that differ: D*(x) = 0.9 p / (p + q)."""
    p, q = (torch.tensor(pair, dtype=torch.float64) for pair in ([0.5, 0.5], [0.2, 0.8]))
    objective = objective_of(config_of("loss.real_target=0.9").loss)
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(200):  # Newton's steps by the known curvature
        loss = (p * objective.d(scores, torch.full_like(scores, -50)) + q * objective.d(
            torch.full_like(scores, 50), scores
        )).sum()  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, scores)
        with torch.no_grad():
            scores -= gradient
    torch.testing.assert_close(scores.detach().sigmoid(), 0.9 * p / (p + q), rtol=1e-6, atol=1e-6)


def test_targets_are_refused_where_there_are_none():
    for name in ("wgan", "hinge", "relativistic"):
        message = refused(f"loss.objective={name}", "loss.real_target=0.9")
        assert f"loss.real_target=0.9 is not possible: it must be 1 with loss.objective={name}" in message
        assert "logistic, saturating, lsgan" in message
    assert "above 0.5 and at most 1" in refused("loss.real_target=0.5")


# --- minibatch discrimination -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 4, 8])
def test_minibatch_discrimination_equals_its_formula(group):
    n, groups = 8, 8 // group
    layer = MinibatchDiscrimination(5, 3, 2, group).double()
    x = drawn(n, 5).requires_grad_(True)
    m = np.einsum("na,abc->nbc", x.detach().numpy(), layer.weight.detach().numpy().reshape(5, 3, 2))
    wanted = np.zeros([n, 3])
    for i in range(n):
        for j in range(n):
            if i != j and i % groups == j % groups:
                wanted[i] += np.exp(-np.abs(m[i] - m[j]).sum(axis=1))
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=1e-12)
    assert gradcheck(layer, x)
    for part in filter(None, deal(n, group, 2)):
        torch.testing.assert_close(layer(x[part]), layer(x)[part])
    two = torch.cat([x, drawn(n, 5, seed=3)])
    torch.testing.assert_close(layer(two, batches=2), torch.cat([layer(x), layer(two[n:])]))
    if group == 8:
        with pytest.raises(ValueError, match="a batch of 12 does not divide into groups of 8"):
            layer(two[:12])


@pytest.mark.parametrize("name", ["mlp", "dcgan"])
def test_a_discriminator_with_it_sees_equal_images(name):
    """Scores of an image depend on the others of its group, and on no other one."""
    from stylegan_pg.config import MODELS

    how = {"normalization": "none"} if name == "dcgan" else {}
    own: dict[str, Any] = {"minibatch_kernels": 6, **how}
    config, pair = MODELS[name](mbstd_channels=0, channel_max=16, **own), NETWORKS[name]
    side = 4 if name == "mlp" else 8
    D: Any = pair.D(**pair.d_kwargs(config, NetworkShape(side, side, False, 3, 0, 2))).double()
    images = 0.1 * drawn(4, 3, side, side)
    scores = D(images)
    other = images.clone()
    other[2] = images[0]  # the groups are {0, 2} and {1, 3}
    changed = (D(other) - scores).abs().flatten()
    assert changed[0] > 1e-9
    torch.testing.assert_close(D(other)[[1, 3]], scores[[1, 3]])


def test_minibatch_discrimination_needs_groups():
    assert "model.mbstd_group=1 is not possible: it must be 2 or more" in refused(
        *MLP[1:], "model.minibatch_kernels=100", "model.mbstd_group=1"
    )
    assert "minibatch_kernels is no key of model.name=stylegan2; it belongs to dcgan, mlp" in refused(
        "model.minibatch_kernels=100"
    )


def test_images_that_meet_are_dealt_out_together():
    """Also where there is no minibatch stddev: with batch norm, and with minibatch discrimination."""

    def group(*overrides: str) -> int:
        return phases(config_of(*overrides))[0].mbstd_group

    assert group(*DCGAN) == 4
    assert group(*DCGAN, "model.normalization=virtual") == 1
    assert group(*DCGAN, "model.normalization=none") == 1
    assert group(*DCGAN, "model.normalization=none", "model.minibatch_kernels=5") == 4
    assert group(*MLP, "model.mbstd_channels=0") == 1
    assert group(*MLP, "model.mbstd_channels=0", "model.minibatch_kernels=5") == 4
    assert group(*MLP, "model.mbstd_channels=0", "loss.terms=[feature_matching]") == 4


# --- virtual batch norm -----------------------------------------------------------------------------------------------


def virtually(x: torch.Tensor, reference: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The definition: each image is normalised by the values of the reference batch and its own, together."""
    results = []
    for image in x:
        every = torch.cat([reference, image[None]]).transpose(0, 1).flatten(1)  # [C, values of n + 1 images]
        mean = every.mean(dim=1)
        deviation = ((every - mean[:, None]) ** 2).mean(dim=1).add(1e-5).sqrt()
        normal = (image - mean[:, None, None]) / deviation[:, None, None]
        results.append(normal * weight[:, None, None] + bias[:, None, None])
    return torch.stack(results)


def test_virtual_batch_norm_equals_its_definition():
    layer = VirtualBatchNorm(3, 6).double()
    with torch.no_grad():
        layer.weight.copy_(drawn(3, seed=1))
        layer.bias.copy_(drawn(3, seed=2))
    reference, x = (2 + 3 * drawn(6, 3, 4, 5, seed=3)).requires_grad_(True), drawn(4, 3, 4, 5, seed=4)
    x.requires_grad_(True)
    ours = layer(torch.cat([reference, x]))
    wanted = virtually(x, reference, layer.weight, layer.bias)
    torch.testing.assert_close(ours[6:], wanted, rtol=1e-12, atol=1e-12)
    own = nn.functional.batch_norm(reference, None, None, layer.weight, layer.bias, True, 0.0, 1e-5)
    torch.testing.assert_close(ours[:6], own, rtol=1e-12, atol=1e-12)
    aim = drawn(4, 3, 4, 5, seed=5)
    given = [x, reference, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((t * aim).sum(), given) for t in (ours[6:], wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_images_of_a_batch_do_not_meet_in_virtual_batch_norm(pictures):
    state = engine_of(*DCGAN, f"data.url={pictures}", "model.normalization=virtual", "model.references=5").state
    with torch.no_grad():
        for net, x in ((state.G, drawn(6, 6)), (state.D, drawn(6, 3, 8, 8))):
            alone = torch.cat([net(one[None]) for one in x])
            torch.testing.assert_close(net(x), alone, rtol=1e-9, atol=1e-11)


def test_reference_batches_are_fixed_and_part_of_snapshots(pictures, tmp_path):
    """D's are real pictures with their classes, the same in every run of the seed; G's are latents."""
    given = ["model.normalization=virtual", "model.references=5", "data.conditional=true"]
    state = engine_of(*DCGAN, f"data.url={pictures}", *given).state
    table = state.table
    known = torch.from_numpy(np.stack([table.image(i) for i in range(len(table))])).double() / 127.5 - 1
    for picture, c in zip(state.D.reference, state.D.reference_c, strict=True):
        (place,) = torch.nonzero((known - picture).abs().amax(dim=[1, 2, 3]) < 1e-6).flatten().tolist()
        assert c.tolist() == np.eye(3)[table.label[place]].tolist()
    assert torch.equal(state.G.reference_c, state.D.reference_c)
    again = engine_of(*DCGAN, f"data.url={pictures}", *given)
    before = {name: t.clone() for name, t in again.state.tensors().items() if "reference" in name}
    assert len(before) == 6
    step(again, 3)
    after = again.state.tensors()
    for name, t in before.items():
        assert torch.equal(after[name], t), name
        assert torch.equal(state.tensors()[name], t), name
    other = engine_of(*DCGAN, f"data.url={pictures}", *given, "seed=1").state.tensors()
    assert all(not torch.equal(other[name], t) for name, t in before.items() if not name.endswith("_c"))
    run = tmp_path / "run"
    own = [*DCGAN, *given, "train.total_kimg=0.016", f"data.url={pictures}", "data.workers=0", "output.trackers=[]"]
    config = tmp_path / "c.yaml"
    config.write_text(f"run: {run}\n")
    harness.command("train", config, *own, "loss.style_mixing=0", "train.channels_last=false", expected=0)
    (snapshot,) = (run / "snapshots").glob("*.safetensors")
    G = load_snapshot(snapshot)
    assert G.reference.shape == (5, 6)
    newest, _ = harness.newest(run)
    assert torch.equal(newest["G/reference"], G.reference)
    z, c = drawn(3, 6).float(), torch.eye(3)
    with torch.no_grad():
        alone = torch.cat([G(z[i : i + 1], c[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(G(z, c), alone, rtol=1e-4, atol=1e-5)


def test_a_generator_with_virtual_batch_norm_is_exported(pictures, tmp_path):
    run, config = tmp_path / "run", tmp_path / "c.yaml"
    config.write_text(f"run: {run}\n")
    own = [*DCGAN, "model.normalization=virtual", "model.references=5", "train.total_kimg=0.008"]
    own += [f"data.url={pictures}", "data.workers=0", "output.trackers=[]"]
    harness.command("train", config, *own, "loss.style_mixing=0", "train.channels_last=false", expected=0)
    (snapshot,) = (run / "snapshots").glob("*.safetensors")
    harness.command("export", snapshot, "--to", "torch", "--out", tmp_path / "g.pt2", expected=0)
    G, z = load_snapshot(snapshot), drawn(2, 6).float()
    program = torch.export.load(tmp_path / "g.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(z=z), G(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "virtual"])
def test_other_normalisations_of_dcgan(kind):
    from stylegan_pg.config import DCGANConfig

    model = DCGANConfig(z_dim=6, channel_base=64, channel_max=16, normalization=kind, references=4)
    pair, shape = NETWORKS["dcgan"], NetworkShape(16, 16, False, 1, 0, 4)
    G, D = pair.G(**pair.g_kwargs(model, shape)), pair.D(**pair.d_kwargs(model, shape))
    images = G(drawn(3, 6).float())
    assert images.shape == (3, 1, 16, 16)
    assert D(images).shape == (3, 1)
    assert not any(isinstance(part, nn.BatchNorm2d) for net in (G, D) for part in net.modules())
    with pytest.raises(ValueError, match="normalization is 'instance'"):
        pair.G(**{**pair.g_kwargs(model, shape), "normalization": "instance"})


# --- instance noise ---------------------------------------------------------------------------------------------------


def test_what_d_sees_has_noise_of_the_scheduled_deviation(monkeypatch):
    """At every call for each image and purpose by itself; without the noise nothing is changed."""
    engine = engine_of(*MLP, "loss.instance_noise={from: 0.5, to: 0.1, kimg: 0.016}", "loss.r1_every=1")
    system, seen = cast("GAN", engine.state.system), []
    shown = type(system).shown

    def watched(self, x, purpose, images):
        result = shown(self, x, purpose, images)
        seen.append((x.step.nimg, purpose, (result - images).detach()))
        return result

    monkeypatch.setattr(type(system), "shown", watched)
    step(engine, 4)
    for nimg, sigma in ((0, 0.5), (8, 0.3), (16, 0.1), (24, 0.1)):
        mine = {purpose: noise for n, purpose, noise in seen if n == nimg}
        assert set(mine) == {"g", "d-real", "d-fake"}
        for purpose, noise in mine.items():
            rows = [torch.randn([2, 1, 1], generator=generator(0, f"instance-{purpose}", nimg, i)) for i in range(8)]
            torch.testing.assert_close(noise, sigma * torch.stack(rows).double(), rtol=1e-6, atol=1e-7)
    off = engine_of(*MLP).state.system
    x = drawn(8, 2, 1, 1)
    fixed: Any = type("Context", (), {"step": type("Step", (), {"nimg": 0, "resolution": 4})})
    assert off.shown(fixed, "g", x) is x  # type: ignore[attr-defined]  # of OnePair


def test_noise_that_ends_and_values_that_are_not_possible():
    config = config_of("loss.instance_noise={from: 0.2, to: 0, kimg: 1}")
    assert [instance_noise(config, 4, n) for n in (0, 500, 1000, 5000)] == pytest.approx([0.2, 0.1, 0, 0])
    assert "loss.instance_noise=-1" in refused("loss.instance_noise=-1")
    assert "loss.instance_noise=101" in refused("loss.instance_noise=101")


# --- all of them in the engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss.terms=[{name: feature_matching, weight: 0.5}]", "train.micro_batch=4"],
        ["loss.terms=[{name: feature_matching, weight: 1, every: 2}, {name: diversity, every: 2}]"],
        ["loss.terms=[{name: historical_averaging, weight: 0.1}]", "loss.real_target=0.9"],
        ["loss.terms=[{name: historical_averaging, weight: {from: 1, to: 0, kimg: 1}, every: 2}]"],
        ["loss.instance_noise={from: 0.2, to: 0.1, kimg: 1}"],
    ],
    ids=" ".join,
)
def test_steps_of_a_kind_are_alike(tiny_data, monkeypatch, overrides):
    """So that they can be replayed on a GPU; with StyleGAN2, whose D has minibatch stddev."""
    assert steady.problems(steps_of(tiny_data, monkeypatch, *overrides)) == []


@pytest.mark.parametrize("name", ["dcgan", "mlp"])
def test_the_plain_pairs_with_them(name, pictures, monkeypatch):
    own = [*(DCGAN if name == "dcgan" else MLP), "model.minibatch_kernels=4", "growth.start=null"]
    own += ["model.normalization=virtual", "model.references=4"] if name == "dcgan" else []
    own += ["loss.terms=[{name: feature_matching}]", "train.total_kimg=1"]
    data = pictures if name == "dcgan" else "points:ring"
    own = [text for text in own if not text.startswith("data.url")]
    assert steady.problems(steps_of(data, monkeypatch, *own)) == []


@pytest.mark.distributed
def test_historical_averaging_lazy_and_killed(tmp_path):
    """With terms at every second step, a run on two ranks equals one on one rank, and a resumed run an undisturbed
    one, bit for bit."""
    import random

    terms = "[{name: historical_averaging, weight: 0.01, every: 2}, {name: feature_matching}, {name: diversity}]"
    more = {"loss.terms": terms, "model.mbstd_channels": 0, "data.workers": 0, "output.trackers": "[]"}
    more |= {"checkpoint.every_kimg": 0.008, "output.tick_kimg": 0.008, "train.total_kimg": 0.064, "train.threads": 1}
    config = tmp_path / "c.yaml"
    config.write_text("run: x\n")

    def arguments(run: Path, *given: str) -> list[str]:
        return ["train", str(config), f"run={run}", *MLP, *(f"{k}={v}" for k, v in more.items()), *given]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    harness.finish(harness.start(arguments(whole)))
    harness.kill_until_done(arguments(killed), killed, random.Random(1), most=2)
    harness.assert_same_run(whole, killed)
    for ranks in (0, 2):
        given = arguments(tmp_path / f"r{ranks}", "train.dtype=float64")
        harness.finish(harness.start(given, ranks=ranks))
    one, two = (harness.newest(tmp_path / f"r{ranks}")[0] for ranks in (0, 2))
    assert harness.largest_difference(one, two) < 1e-9
    names = {k for row in harness.stats(whole) for k in row}
    assert {"history_distance", "feature_distance", "diversity"} <= names
