"""R3GAN's networks: what they compute, how they grow, where they are used, and what their configuration may say."""

from __future__ import annotations

import itertools
import math
from typing import Any

import harness
import pytest
import torch
from configuring import config_of, refused
from nets import CLASSES, close, differ, labels, normal, shaken
from snapshots import NAMES, command, pixels, saved

from stylegan_pg import load_snapshot
from stylegan_pg.config import MODELS, R3GANConfig, r3gan_stages
from stylegan_pg.config.schedule import phases
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import between, latents
from stylegan_pg.losses import terms
from stylegan_pg.metrics.registry import parse
from stylegan_pg.networks import NETWORKS, NetworkShape, copy_same_names, to_channels_last
from stylegan_pg.networks.public_names import from_public, to_public
from stylegan_pg.networks.r3gan import Discriminator, Generator
from stylegan_pg.ops import downsample2d, upsample2d
from stylegan_pg.planning.cost import cost_of
from stylegan_pg.training import autotune

PAIR = NETWORKS["r3gan"]
MODEL: dict[str, Any] = {"z_dim": 8, "channels_at": {4: 12, 8: 8, 16: 8, 32: 4}, "group_width": 4, "blocks_at": {8: 1}}


def pair(resolution: int, seed: int = 0, *, model: Any = None, fade: bool = False, channels: int = 3, c_dim: int = 0):
    """A generator and a discriminator in float64, none of whose parameters is zero."""
    config = R3GANConfig(**(MODEL | (model or {})))
    shape = NetworkShape(resolution, 32, fade, channels, c_dim, 1)
    G: Any = shaken(lambda: PAIR.G(**PAIR.g_kwargs(config, shape)), seed)
    D: Any = shaken(lambda: PAIR.D(**PAIR.d_kwargs(config, shape)), seed + 1)
    return G, D


# --- what the networks compute ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [(4, 4), (4, 6), (3, 5), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_and_channels(base, channels):
    for resolution, fade in ((4, False), (16, False), (16, True)):
        G, D = pair(resolution, model={"base": list(base)}, fade=fade, channels=channels)
        size = (base[0] * resolution // 4, base[1] * resolution // 4)
        assert G.img_size == D.img_size == size
        assert G.b4.first.basis.shape == (12, *base)
        assert D.b4.basis.shape == (12, 1, *base)
        image = G(normal(2, 8), alpha=0.5)
        assert image.shape == (2, channels, *size)
        scores = D(image, alpha=0.5)
        assert scores.shape == (2, 1)
        (gradient,) = torch.autograd.grad(scores.sum(), image)
        assert (gradient != 0).all()  # every pixel has an influence


@torch.no_grad()
def test_conditions_are_required_and_have_an_effect():
    G, D = pair(8, c_dim=CLASSES, model={"g_embedding": 5, "d_embedding": 7})
    assert (G.embed.weight.shape, D.embed.weight.shape) == ((5, CLASSES), (7, CLASSES))
    assert G.b4.first.linear.weight.shape == (12, 8 + 5)
    z, x = normal(4, 8), normal(4, 3, 8, 8)
    for call in (lambda: G(z), lambda: D(x)):
        with pytest.raises(ValueError, match="conditional"):
            call()
    differ(G(z, labels(4)), G(z, labels(4).roll(1, 0)))
    differ(D(x, labels(4)), D(x, labels(4).roll(1, 0)))
    assert pair(8, c_dim=CLASSES)[1].embed.weight.shape[0] == 12  # as many as D's channels at 4x4


@pytest.mark.parametrize("c_dim", [0, CLASSES])
@torch.no_grad()
def test_images_do_not_meet(c_dim):
    _, D = pair(16, c_dim=c_dim)
    x, c = normal(6, 3, 16, 16), [labels(6)] if c_dim else []
    close(torch.cat([D(x[i : i + 1], *(t[i : i + 1] for t in c)) for i in range(6)]), D(x, *c))
    close(D(torch.cat([x, x]), *(torch.cat([t, t]) for t in c), batches=2), D(x, *c).repeat(2, 1))


def test_the_initial_weights_have_the_published_deviations():
    torch.manual_seed(0)
    form = {"resolution": 8, "widths": [64, 48], "groups": [4, 6], "blocks": [3, 2], "c_dim": 40}
    G, D = Generator(**form, embedding=30), Discriminator(**form, embedding=100)
    he = math.sqrt(2 / 1.04) * 5 ** (-1 / 4)  # of five blocks
    expected = {
        "conv0.weight": lambda t: he / math.sqrt(t.shape[1]),
        "conv1.weight": lambda t: he / math.sqrt(9 * t.shape[1]),
        "conv2.weight": lambda t: 0,
        "bias": lambda t: 0,
        "first.basis": lambda t: 1,
        "b4.basis": lambda t: 1 / 4,
        "linear.weight": lambda t: 1 / math.sqrt(t.shape[1]),
        "transition.weight": lambda t: 1 / math.sqrt(t.shape[1]),
        "rgb.weight": lambda t: 1 / math.sqrt(t.shape[1]),
        "embed.weight": lambda t: 1 / math.sqrt(40),
    }
    for net in (G, D):
        for name, t in net.named_parameters():
            (deviation,) = [f(t) for ending, f in expected.items() if name.endswith(ending)]
            deviation /= 10 if net is D and name.startswith("embed") else 1
            assert float(t.detach().square().mean().sqrt()) == pytest.approx(deviation, rel=5 / math.sqrt(t.numel())), (
                name
            )


def test_every_parameter_is_used():
    for fade, c_dim in itertools.product((False, True), (0, CLASSES)):
        G, D = pair(16, fade=fade, c_dim=c_dim)
        c = [labels(4)] if c_dim else []
        D(G(normal(4, 8), *c, alpha=0.4), *c, alpha=0.4).square().sum().backward()
        for name, p in itertools.chain(G.named_parameters(), D.named_parameters()):
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_derivatives_of_penalties(layout):
    """The derivative is compared with finite differences along a random direction of all parameters."""
    _, D = pair(8, fade=True, model={"base": [4, 6]})
    x = normal(3, 3, 8, 12).contiguous(memory_format=layout).requires_grad_(True)
    parameters = list(D.parameters())
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]
    gradients = torch.autograd.grad(terms.r1(D(x, alpha=0.3), x).sum(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert slope != 0
    values, step = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
        values.append(float(terms.r1(D(x, alpha=0.3), x).sum().detach()))
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-5 * abs(slope)


@torch.no_grad()
def test_memory_layouts():
    for resolution in (4, 16):
        G, D = pair(resolution)
        image = G(normal(2, 8))
        scores = D(image)
        other = to_channels_last(G)(normal(2, 8))
        assert other.is_contiguous(memory_format=torch.channels_last)
        close(other, image)
        close(to_channels_last(D)(other), scores)


@pytest.mark.parametrize("low", ["bf16", "fp16"])
def test_low_precision_of_the_highest_resolutions(low):
    half = {"low_precision": low, "low_precision_resolutions": 2}
    (G, D), (half_G, half_D) = (tuple(net.float() for net in pair(32, i, model=m)) for i, m in enumerate(({}, half)))
    copy_same_names(half_G, G)
    copy_same_names(half_D, D)
    seen = {}
    for net, r in itertools.product((half_G, half_D), (4, 8, 16, 32)):
        block = getattr(net, f"b{r}")
        block.register_forward_hook(lambda _, __, out, side=net, r=r: seen.update({(side, r): out.dtype}))
    image = half_G(normal(4, 8).float())
    scores = half_D(image)
    assert (image.dtype, scores.dtype) == (torch.float32, torch.float32)
    assert {key[1] for key, dtype in seen.items() if dtype.itemsize == 2} == {16, 32}
    expected = G(normal(4, 8).float())
    assert 0 < float(((image - expected).std() / expected.std()).detach()) < 0.05
    x = image.detach().requires_grad_(True)
    scores = half_D(x)
    (scores.sum() + terms.r1(scores, x).sum()).backward()
    for name, p in half_D.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


def test_a_limit_of_activations():
    """It changes nothing while no activation reaches it."""
    x = normal(2, 8)
    free, wide, narrow = (pair(8, model={"conv_clamp": limit})[0] for limit in (None, 1e6, 0.1))
    assert torch.equal(free(x), wide(x))
    differ(narrow(x), free(x))


# --- growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [4, 8])
@pytest.mark.parametrize("base", [(4, 4), (4, 6)])
@torch.no_grad()
def test_the_networks_grow_without_a_jump(low, base):
    model = {"base": list(base)}
    (old_G, old_D), (G, D), (stable_G, stable_D) = (
        pair(r, i, model=model, fade=fade)
        for i, (r, fade) in enumerate(((low, False), (2 * low, True), (2 * low, False)))
    )
    for fading, old, stable in ((G, old_G, stable_G), (D, old_D, stable_D)):
        fresh = copy_same_names(fading, old)
        assert fresh
        assert all(name.startswith(f"b{2 * low}.") for name in fresh)
        assert copy_same_names(stable, fading) == []
    z, x = normal(3, 8), normal(3, 3, base[0] * low // 2, base[1] * low // 2)
    assert torch.equal(G(z, alpha=0.0), upsample2d(old_G(z), old_G.filter))
    assert torch.equal(G(z, alpha=1.0), stable_G(z))
    close(G(z, alpha=0.25), 0.75 * G(z, alpha=0.0) + 0.25 * G(z, alpha=1.0))
    assert torch.equal(D(x, alpha=0.0), old_D(downsample2d(x, old_D.filter)))
    assert torch.equal(D(x, alpha=1.0), stable_D(x))
    differ(D(x, alpha=0.0), D(x, alpha=1.0))


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "keys", "channels", "groups"),
    [
        (256, {"channel_base": 24576, "channel_max": 768}, [768] * 4 + [384, 192, 96], [96] * 4 + [48, 24, 12]),
        (64, {"channel_base": 24576, "channel_max": 768}, [768] * 4 + [384], [96] * 4 + [48]),
        (32, {"channel_base": 24576, "channel_max": 768}, [768] * 4, [96] * 4),
        (64, {"channel_base": 98304, "channel_max": 1536, "group_width": 32}, [1536] * 5, [96] * 5),
        (16, {"channels_at": {8: 6}, "groups_at": {8: 3, 16: 1}, "channel_max": 40}, [40, 6, 40], [5, 3, 1]),
        (8, {"channel_max": 4}, [4, 4], [1, 1]),
    ],
)
def test_stages(resolution, keys, channels, groups):
    stages = r3gan_stages(R3GANConfig(**keys), resolution)
    assert list(stages) == [4 << i for i in range(len(channels))]
    assert [s.channels for s in stages.values()] == channels
    assert [s.groups for s in stages.values()] == groups
    assert {s.blocks for s in stages.values()} == {2}


NOT_STYLED = ("model=r3gan", "loss.pl_weight=0", "resolution=32")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.channels_at={8: 25}"],
            "model.group_width=16 at resolution 8: the 50 channels there (25 tim",
        ),
        (["model.groups_at={16: 7}"], "model.groups_at={16: 7} at resolution 16: the 1024 channels there"),
        (["model.channel_base=16"], "model.channel_base=16 leaves no channels at resolution 32: give"),
        (["model.channels_at={7: 20}"], "model.channels_at={7: 20} is not possible"),
        (["model.channels_at={8: 0}"], "it must be above 0"),
        (["model.blocks=0"], "model.blocks=0 is not possible"),
        (["model.mbstd_channels=1"], "it must be 0: R3GAN has no minibatch stddev"),
        (["loss.pl_weight=2"], "loss.pl_weight=2 is not possible with model.name=r3gan: its generator has no ws"),
        (["model.noise=false"], "model.noise is no key of model.name=r3gan"),
        (
            ["augment={mode: fixed, p: 1, multipliers: {cutout: 1}}"],
            "augment.pipeline=bgc lacks o, which cutout",
        ),
        (["augment={mode: fixed, p: 1, multipliers: {hues: 1}}"], "the operations are b: flip, turns, shift; g: scale"),
        (["augment={mode: fixed, p: 1, multipliers: {hue: -1}}"], "a table from operations to numbers of 0 or more"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(overrides, message):
    assert message in refused(*NOT_STYLED, *overrides)


def test_channels_of_omitted_resolutions_follow_the_general_rule():
    config = config_of(*NOT_STYLED, "model.channels_at={32: 8}", "model.channel_max=24", "model.channel_base=16")
    assert isinstance(config.model, R3GANConfig)
    assert [s.channels for s in r3gan_stages(config.model, 32).values()] == [4, 2, 1, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [8]}, "widths has 1 entries, where 2 resolutions need one each"),
        ({"groups": [3, 1]}, "2 times 8 channels do not divide into 3 groups"),
        ({"blocks": [0, 1]}, "blocks is"),
        ({"expansion": 0}, "expansion is 0"),
        ({"widths": [8, 1 << 20]}, "widths is"),
        ({"groups": "1, 1"}, "groups is"),
    ],
)
def test_networks_check_their_arguments(changes, message):
    arguments = {"resolution": 8, "widths": [8, 8], "groups": [1, 1], "blocks": [1, 1]} | changes
    for net in PAIR[:2]:
        with pytest.raises(ValueError, match=message):
            net(**arguments)


# --- where they are used ----------------------------------------------------------------------------------------------


def test_public_names_there_and_back():
    for c_dim in (0, CLASSES):
        for net in pair(32, c_dim=c_dim):
            public = to_public(net)
            assert all(name.startswith("Model.") for name in public)
            ours, back = net.state_dict(), from_public(public)
            assert ours.keys() == back.keys()
            assert all(torch.equal(ours[name], back[name]) for name in ours)
    for net in pair(8, fade=True):
        with pytest.raises(UsageError, match="fade"):
            to_public(net)
    with pytest.raises(UsageError, match="square"):
        to_public(pair(8, model={"base": [4, 6]})[0])


SMALL: dict[str, Any] = {"channel_max": 8, "channel_base": 64, "group_width": 4}


@torch.no_grad()
def test_snapshots(tmp_path):
    G, path = saved(tmp_path / "G.safetensors", name="r3gan", c_dim=3, base=[4, 6], **SMALL)
    loaded = load_snapshot(path)
    z, c = latents([0, 1], 8), torch.eye(3)[:2]
    assert torch.equal(loaded(z, c), G(z, c))
    assert torch.equal(loaded(z, c=["cat", "dog"]), G(z, c))
    assert torch.equal(loaded(z=z, c=[0, 1], psi=1.0, noise="const"), G(z, c))
    with pytest.raises(UsageError, match="this generator takes latents"):
        loaded(z[:, :3], c)
    with pytest.raises(UsageError, match="no ws"):
        loaded(z, c, psi=0.7)
    with pytest.raises(UsageError, match="needs a generator with a latent space w"):
        parse("ppl2_wend").check_generator(loaded)
    fading, path = saved(tmp_path / "fade.safetensors", {"alpha": 0.25}, name="r3gan", fade=True, **SMALL)
    assert torch.equal(load_snapshot(path)(z), fading(z, alpha=0.25))


def test_samples(tmp_path, capsys, monkeypatch):
    """By default without truncation, which there is no w for; and interpolated in z."""
    _, path = saved(tmp_path / "G.safetensors", name="r3gan", **SMALL)

    def run(*words: str) -> tuple[int, str, str]:
        return command(capsys, monkeypatch, "sample", path, "--out", tmp_path / "out", *words)

    assert run("--seeds", "0,1")[0] == 0
    assert run("--seeds", "0,1", "--interpolate", "4")[0] == 0
    strip = pixels(tmp_path / "out" / "interpolation.png")
    assert strip.shape == (16, 5 * 16, 3)
    assert (strip[:, :16] == pixels(tmp_path / "out" / "seed000000.png")).all()
    assert (strip[:, -16:] == pixels(tmp_path / "out" / "seed000001.png")).all()
    for words, message in ((("--psi", "0.7"), "no ws"), (("--cutoff", "2"), "has no ws to truncate")):
        code, _, errors = run(*words)
        assert code == 2
        assert message in errors
    conditional = saved(tmp_path / "C.safetensors", name="r3gan", c_dim=3, **SMALL)[1]
    code, _, errors = command(
        capsys, monkeypatch, "sample", conditional, "--class-grid", "--seeds", "0-1", "--out", tmp_path / "classes"
    )
    assert code == 0, errors
    assert (tmp_path / "classes" / "classes.png").is_file()
    words = ["--labels", ",".join(NAMES[:2]), "--seeds", "0,1", "--interpolate", "2", "--out", str(tmp_path / "strip")]
    assert command(capsys, monkeypatch, "sample", conditional, *words)[0] == 0


def test_latents_between_two_have_lengths_between_theirs():
    a, b = normal(2, 64).unbind()
    t = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None]
    found = between(a, 3 * b, t)
    close(found[0], a)
    close(found[-1], 3 * b)
    close(found.norm(dim=1), torch.lerp(a.norm(), 3 * b.norm(), t[:, 0]))
    close(between(a, 2 * a, t), torch.lerp(a, 2 * a, t), 1e-6)  # in one direction


def test_a_real_measurement_of_layouts_and_precisions():
    config = config_of(*NOT_STYLED, "model.low_precision=auto", "model.channel_max=32", "train.channels_last=null")
    chosen, why = autotune.resolve(config, torch.device("cpu"), None)
    assert chosen.train.channels_last in (True, False)
    assert "layout n" in why
    assert set(chosen.model.low_precision_at or []) <= {8, 16, 32}


def test_a_generator_that_becomes_conditional_computes_the_same(tmp_path):
    from stylegan_pg.training.transfer import adopt

    old, new = pair(8)[0], pair(8, 1, c_dim=CLASSES)[0]
    assert adopt(new, old.state_dict()) == ["embed.weight"]
    close(new(normal(2, 8), labels(2)), old(normal(2, 8)))


def planned(*overrides: str) -> Any:
    given = ["train.batch=8", "loss.objective=relativistic", "model.channel_max=32", "model.channel_base=512"]
    config = config_of(*NOT_STYLED, *given, *overrides)
    return cost_of(config, phases(config)[0], 3, 0)


def test_plans():
    """Penalties of every step cost less than in passes of their own, and groups fewer FLOPs than whole convolutions."""
    plain = planned("loss.r1_gamma=0")
    r2 = "loss.terms=[{name: r2, every: %d}]"
    joint, lazy = planned("loss.r1_every=1", r2 % 1), planned("loss.r1_every=2", r2 % 2)
    assert plain.flops_per_image < joint.flops_per_image
    extra = joint.flops_per_image - plain.flops_per_image
    assert extra < 2 * (lazy.flops_per_image - plain.flops_per_image)
    assert joint.launches < lazy.launches * 1.5
    assert joint.bytes_per_image > plain.bytes_per_image
    assert (
        planned("model.group_width=4").flops_per_image
        < planned("model.groups_at={4: 1, 8: 1, 16: 1, 32: 1}").flops_per_image
    )
    config = config_of(*NOT_STYLED, "model.channel_max=32", "model.channel_base=512")
    shape = NetworkShape(32, 32, False, 3, 0, 1)
    numbers = sum(p.numel() for p in PAIR.G(**PAIR.g_kwargs(config.model, shape)).parameters())
    assert planned().g_parameters == numbers


def test_keys_of_the_family_are_its_own():
    assert harness.own_keys({"model.w_dim": 1, "model.group_width": 2}, "r3gan") == {"model.group_width": 2}
    assert MODELS["r3gan"] is R3GANConfig
