"""The networks of every kind: growing is seamless, nothing is unused, shapes and conditions, derivatives, precision."""

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from nets import CLASSES, KINDS, WITH_MAPPING, close, differ, discriminator, generator, labels, normal

from stylegan_pg.config import ModelConfig
from stylegan_pg.config.schedule import deal
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import terms
from stylegan_pg.networks import NETWORKS, NetworkShape, copy_same_names, to_channels_last
from stylegan_pg.networks.layers import Conv2d, SynthesisLayer
from stylegan_pg.networks.public_names import from_public, to_public
from stylegan_pg.ops import downsample2d, upsample2d

# --- growth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [4, 8])
@torch.no_grad()
def test_the_generator_grows_without_a_jump(low, kind):
    old = generator(low, kind=kind)
    fading = generator(2 * low, 1, kind=kind, fade=True)
    fresh = copy_same_names(fading, old)
    assert fresh
    assert all(name.startswith(f"synthesis.b{2 * low}.") for name in fresh)

    z, ws = normal(3, 8), normal(3, fading.num_ws, fading.w_dim, seed=1)
    filter_ = old.synthesis.filter
    at_start = fading.synthesis(ws, alpha=0.0)
    assert torch.equal(at_start, upsample2d(old.synthesis(ws[:, : old.num_ws]), filter_))
    assert torch.equal(fading(z, alpha=0.0), upsample2d(old(z), filter_))

    stable = generator(2 * low, 2, kind=kind)
    assert copy_same_names(stable, fading) == []
    at_end = fading.synthesis(ws, alpha=1.0)
    assert torch.equal(at_end, stable.synthesis(ws))
    close(stable.synthesis(ws, alpha=0.3), at_end)  # alpha means nothing outside a fade
    differ(at_start, at_end)
    close(fading.synthesis(ws, alpha=0.25), 0.75 * at_start + 0.25 * at_end)


@pytest.mark.parametrize("c_dim", [0, CLASSES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [4, 8])
@torch.no_grad()
def test_the_discriminator_grows_without_a_jump(low, kind, c_dim):
    kwargs = {"kind": kind, "c_dim": c_dim}
    old = discriminator(low, **kwargs)
    fading = discriminator(2 * low, 1, fade=True, **kwargs)
    assert all(name.startswith(f"b{2 * low}.") for name in copy_same_names(fading, old))

    x, c = normal(4, 3, 2 * low, 2 * low), labels(4) if c_dim else None
    at_start = fading(x, c, alpha=0.0)
    assert torch.equal(at_start, old(downsample2d(x, old.filter), c))

    stable = discriminator(2 * low, 2, **kwargs)
    assert copy_same_names(stable, fading) == []
    at_end = fading(x, c, alpha=1.0)
    assert torch.equal(at_end, stable(x, c))
    close(stable(x, c, alpha=0.3), at_end)
    differ(at_start, at_end)
    for alpha in (0.001, 0.999):  # and continuous in between
        nearest = at_start if alpha < 0.5 else at_end
        assert float((fading(x, c, alpha=alpha) - nearest).abs().max()) < 0.1 * float((at_start - at_end).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fade", "c_dim"), [(False, 0), (True, 0), (True, CLASSES)])
@pytest.mark.parametrize("resolution", [8, 16])
def test_every_parameter_is_used(resolution, kind, fade, c_dim):
    G = generator(resolution, kind=kind, fade=fade, c_dim=c_dim)
    D = discriminator(resolution, kind=kind, fade=fade, c_dim=c_dim)
    c = labels(4) if c_dim else None
    image = G(normal(4, 8), c, alpha=0.4, noise="random", generator=torch.Generator().manual_seed(0))
    D(image, c, alpha=0.4).square().sum().backward()
    for net in (G, D):
        for name, p in net.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


def test_what_has_no_public_form():
    for kind in ("stylegan", "progan"):
        for net in (generator(8, kind=kind), discriminator(8, kind=kind)):
            with pytest.raises(UsageError, match=f"not {kind}"):
                to_public(net)
    for net in (generator(8, base=(4, 6)), discriminator(8, base=(4, 6))):
        with pytest.raises(UsageError, match="square"):
            to_public(net)
    for net in (generator(8, fade=True), discriminator(8, fade=True)):
        with pytest.raises(UsageError, match="fade"):
            to_public(net)
    for net in (generator(8), discriminator(8)):
        ours, back = net.state_dict(), from_public(to_public(net))
        assert ours.keys() == back.keys()
        assert all(torch.equal(ours[name], back[name]) for name in ours)


# --- shapes and conditions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3, 4])
@torch.no_grad()
def test_image_channels(channels, kind):
    for fade in (False, True):
        kwargs = {"kind": kind, "img_channels": channels, "fade": fade}
        image = generator(16, **kwargs)(normal(2, 8), alpha=0.5)
        assert image.shape == (2, channels, 16, 16)
        assert discriminator(16, **kwargs)(image, alpha=0.5).shape == (2, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [(4, 6), (3, 5), (1, 1)])
def test_base_grids(base, kind):
    for resolution, fade in ((4, False), (16, False), (16, True)):
        G = generator(resolution, kind=kind, base=base, fade=fade)
        D = discriminator(resolution, kind=kind, base=base, fade=fade)
        size = (base[0] * resolution // 4, base[1] * resolution // 4)
        assert G.img_size == D.img_size == size
        for noise in ("const", "random"):
            image = G(normal(2, 8), alpha=0.5, noise=noise)
            assert image.shape == (2, 3, *size)
        scores = D(image, alpha=0.5)
        assert scores.shape == (2, 1)
        (gradient,) = torch.autograd.grad(scores.sum(), image)
        assert gradient.isfinite().all()
        assert (gradient != 0).all()  # no pixel is cut off
        stored = {name: t for name, t in G.state_dict().items() if name.endswith("noise_const")}
        for name, t in stored.items():
            r = int(name.split(".")[1][1:])
            assert t.shape == (base[0] * r // 4, base[1] * r // 4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_growing_a_non_square_grid(kind):
    old, fading = (generator(r, kind=kind, base=(4, 6), fade=r > 4) for r in (4, 8))
    assert all(name.startswith("synthesis.b8.") for name in copy_same_names(fading, old))
    close(fading(z := normal(2, 8), alpha=0.0), upsample2d(old(z), old.synthesis.filter))
    old, fading = (discriminator(r, kind=kind, base=(4, 6), fade=r > 4) for r in (4, 8))
    copy_same_names(fading, old)
    x = normal(2, 3, 8, 12)
    close(fading(x, alpha=0.0), old(downsample2d(x, old.filter)))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_conditions_are_needed_and_count(kind):
    G, D = generator(8, kind=kind, c_dim=CLASSES), discriminator(8, kind=kind, c_dim=CLASSES)
    z, x = normal(4, 8), normal(4, 3, 8, 8)
    for call in (lambda: G(z), lambda: D(x)):
        with pytest.raises(ValueError, match="conditional"):
            call()
    differ(G(z, labels(4)), G(z, labels(4).roll(1, 0)))
    differ(D(x, labels(4)), D(x, labels(4).roll(1, 0)))
    assert generator(8, kind=kind)(z).shape == (4, 3, 8, 8)
    assert discriminator(8, kind=kind)(x).shape == (4, 1)


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"mlp"}))
def test_arguments_follow_from_the_configuration_and_are_plain(name):
    model = ModelConfig(name=name, base=[4, 6], z_dim=8, w_dim=8, channel_base=64, low_precision="bf16")
    shape, pair = NetworkShape(8, 16, True, 1, 2, 3), NETWORKS[name]
    g_kwargs, d_kwargs = (json.loads(json.dumps(f(model, shape))) for f in (pair.g_kwargs, pair.d_kwargs))
    assert g_kwargs == pair.g_kwargs(model, shape)
    G: Any = pair.G(**g_kwargs)
    D: Any = pair.D(**d_kwargs)
    assert (G.img_size, G.img_channels, G.c_dim, G.z_dim) == ((8, 12), 1, 2, 8)
    assert G(torch.randn(3, 8), torch.eye(2)[[0, 1, 0]]).shape == (3, 1, 8, 12)
    assert (D.img_size, D.img_channels, D.c_dim, D.b4.mbstd_group) == ((8, 12), 1, 2, 3)
    with pytest.raises(TypeError, match="surprise"):
        pair.G(**g_kwargs, surprise=1)


@pytest.mark.parametrize("taps", [[1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1], [1, 5, 10, 10, 5, 1]])
@torch.no_grad()
def test_filters_of_any_length_keep_the_sizes(taps):
    for kind in KINDS.keys() - {"progan"}:
        kwargs: dict[str, Any] = {"kind": kind, "fade": True, "resample_filter": taps}
        image = generator(16, **kwargs)(normal(2, 8), alpha=0.5)
        assert image.shape[2:] == (16, 16)
        assert discriminator(16, **kwargs)(image, alpha=0.5).shape == (2, 1)
    layer = SynthesisLayer(3, 5, 10, (10, 10), up=2, resample_filter=taps).double()
    assert layer(normal(1, 3, 5, 5), normal(1, 10)).shape == (1, 5, 10, 10)
    for kernel, h in itertools.product((1, 3), (4, 6)):
        x = normal(1, 3, h, h)
        assert Conv2d(3, 2, kernel, up=2, resample_filter=taps).double()(x).shape == (1, 2, 2 * h, 2 * h)
        assert Conv2d(3, 2, kernel, down=2, resample_filter=taps).double()(x).shape == (1, 2, h // 2, h // 2)


# --- styles and noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_truncation(kind):
    G, z = generator(64, kind=kind), normal(3, 8)
    mean = G.mapping.w_avg
    assert mean.shape == (G.w_dim,)
    assert float(mean.abs().min()) > 0
    mean_image = G.synthesis(mean.expand(1, G.num_ws, -1))
    close(G(z, psi=0, cutoff=G.num_ws), mean_image.expand(3, -1, -1, -1))
    w = G.mapping(z)
    own = {"stylegan": 8, "progan": 1}.get(kind) or int(G.num_ws)
    for cutoff in (None, 0, 3, G.num_ws):
        ws = G.styles(z, psi=0.6, cutoff=cutoff)
        layers = own if cutoff is None else cutoff
        for i in range(G.num_ws):
            close(ws[:, i], mean + 0.6 * (w - mean) if i < layers else w)
    close(G.styles(z), w[:, None].expand(-1, G.num_ws, -1))
    close(G(z, psi=0.6, cutoff=3), G.synthesis(G.styles(z, psi=0.6, cutoff=3)))
    assert G.num_ws == (1 if kind == "progan" else 10)


@torch.no_grad()
def test_progan_has_no_noise():
    G, z = generator(8, kind="progan"), normal(2, 8)
    assert torch.equal(G(z, noise="random"), G(z, noise="none"))


@pytest.mark.parametrize("kind", WITH_MAPPING)
@torch.no_grad()
def test_noise_modes(kind):
    G, z = generator(8, kind=kind), normal(1, 8).expand(2, -1)
    fixed, without = G(z), G(z, noise="none")
    assert torch.equal(G(z), fixed)
    close(fixed[0], fixed[1])
    differ(fixed, without)
    silent = generator(8, 1, kind=kind, use_noise=False)
    assert copy_same_names(silent, G) == []
    close(silent(z), without)

    def random(seed: int) -> torch.Tensor:
        return G(z, noise="random", generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(random(1), random(1))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is taken from the global stream
    differ(random(1), random(2))
    differ(random(1)[:1], random(1)[1:])  # every image has its own


# --- minibatches


@pytest.mark.parametrize(("batch", "parts"), [(12, 3), (16, 2), (20, 3), (8, 5)])
@torch.no_grad()
def test_logits_of_dealt_shares_are_those_of_the_batch(batch, parts):
    D, x = discriminator(8), normal(batch, 3, 8, 8)
    whole, together = D(x), torch.full([batch, 1], math.nan, dtype=torch.float64)
    for share in deal(batch, 4, parts):
        if share:
            together[share] = D(x[share])
    close(together, whole)
    assert float((D(x[:4]) - whole[:4]).abs().max()) > 1e-6  # a contiguous slice has other groups


# --- derivatives ------------------------------------------------------------------------------------------------------


def penalty(kind: str, term: str, layout: torch.memory_format) -> tuple[Any, Any]:
    """A network and a function that gives the penalty's value."""
    if term == "path_length":
        G = generator(8, kind=kind)
        if layout == torch.channels_last:
            to_channels_last(G)
        y = normal(2, 3, 8, 8, seed=1) / 8
        ws = normal(2, G.num_ws, G.w_dim, seed=2).requires_grad_(True)
        return G, lambda: (terms.path_lengths(G.synthesis(ws), ws, y) - 0.1).square().sum()
    D = discriminator(8, kind=kind, fade=True)
    x = normal(4, 3, 8, 8).contiguous(memory_format=layout).requires_grad_(True)
    if term == "r1":
        return D, lambda: terms.r1(D(x, alpha=0.3), x).sum()

    def gradient_penalty() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(D(x, alpha=0.3).sum(), x, create_graph=True)
        return (gradient.square().sum(dim=[1, 2, 3]).sqrt() - 1).square().sum()

    return D, gradient_penalty


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("term", ["r1", "gradient_penalty", "path_length"])
@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_derivatives_of_penalties(kind, term, layout):
    """By finite differences along a direction of all parameters."""
    net, value = penalty(kind, term, layout)
    parameters = list(net.parameters())
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]
    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    step = 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
        values.append(float(value().detach()))
    assert slope != 0
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-5 * abs(slope)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
@torch.no_grad()
def test_export_of_the_inference_graph(kind):
    G, z = generator(8, kind=kind).float().eval(), normal(3, 8).float()
    program = torch.export.export(G, (z,), {"psi": 0.7})
    close(program.module()(z, psi=0.7), G(z, psi=0.7), 1e-6)


# --- precision and layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_bfloat16_in_the_highest_resolutions(kind):
    low = {"kind": kind, "low_precision": "bf16", "low_precision_at": [8, 16]}
    G, D = generator(16, kind=kind).float(), discriminator(16, kind=kind).float()
    half_G, half_D = generator(16, 1, **low).float(), discriminator(16, 1, **low).float()
    copy_same_names(half_G, G)
    copy_same_names(half_D, D)
    assert {p.dtype for p in [*half_G.parameters(), *half_D.parameters()]} == {torch.float32}
    z = normal(4, 8).float()
    with torch.no_grad():
        image, half_image = G(z), half_G(z)
        assert half_image.dtype == torch.float32
        assert 0 < float((half_image - image).std() / image.std()) < 0.05
        logits, half_logits = D(image), half_D(image)
        assert half_logits.dtype == torch.float32
        assert 0 < float((half_logits - logits).abs().max() / logits.abs().max()) < 0.1
    half_D(half_G(z)).sum().backward()
    for p in [*half_G.parameters(), *half_D.parameters()]:
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("term", ["r1", "gradient_penalty", "path_length"])
@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_second_derivatives_in_bfloat16(kind, term):
    """A term's value and the direction of its gradient are those of single precision, about; of weights that take as
    much rounding well, as not all do."""
    build = generator if term == "path_length" else discriminator
    whole = build(16, 2, kind=kind).float()
    half = build(16, 1, kind=kind, low_precision="bf16", low_precision_at=[8, 16]).float()
    copy_same_names(half, whole)
    x, noise, u = normal(4, 3, 16, 16).float(), normal(4, 3, 16, 16, seed=1).float(), torch.linspace(0, 1, 4)

    def taken(net: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if term == "path_length":
            inputs = terms.GInputs(net.synthesis, net.styles(normal(4, 8, seed=2).float()), noise)
        else:
            inputs = terms.DInputs(lambda images, c: net(images), x, None, noise, None, u)
        loss = terms.TERMS[term].compute(inputs)["loss"]
        parameters = list(net.parameters())
        gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, materialize_grads=True)
        assert {g.dtype for g in gradients} == {torch.float32}
        return loss.detach(), torch.cat([g.flatten() for g in gradients])

    (loss, gradient), (half_loss, half_gradient) = taken(whole), taken(half)
    assert not torch.equal(loss, half_loss)
    assert float((half_loss - loss).abs().max()) < 0.1 * float(loss.max())
    # Where rounding changes the sign before a leaky ReLU, a second derivative jumps.
    assert float(torch.cosine_similarity(half_gradient, gradient, dim=0)) > 0.85
    assert 0.85 < float(half_gradient.norm() / gradient.norm()) < 1.15


@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
def test_low_precision_blocks_are_those_from_the_given_resolution(kind):
    seen: dict[str, torch.dtype] = {}
    low = {"kind": kind, "low_precision": "bf16", "low_precision_at": [16]}
    G, D = generator(16, **low).float(), discriminator(16, **low).float()
    for player, blocks in (("G", G.synthesis), ("D", D)):
        for r in (4, 8, 16):
            name = f"{player}.b{r}"
            block = getattr(blocks, f"b{r}")
            block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    D(G(normal(4, 8).float()))
    assert [name for name, dtype in seen.items() if dtype == torch.bfloat16] == ["G.b16", "D.b16"]
    low |= {"low_precision": "fp16", "low_precision_at": [8, 16, 32]}
    for net in (generator(16, **low), discriminator(16, **low)):  # does not run on CPUs, but can be built there
        assert {p.dtype for p in net.parameters()} == {torch.float64}
        assert sorted(n for n, m in net.named_modules() if getattr(m, "dtype", None) == torch.float16) == sorted(
            n for n, _ in net.named_modules() if n.split(".")[-1] in ("b8", "b16")
        )


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_channels_last_gives_the_same(kind):
    G = generator(16, kind=kind, fade=True).float()
    D = discriminator(16, kind=kind, fade=True).float()
    other_G: Any = to_channels_last(copy.deepcopy(G))
    other_D: Any = to_channels_last(copy.deepcopy(D))
    layouts = []
    for block in (other_G.synthesis.b16, other_D.b8):
        block.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    z = normal(4, 8).float()
    image = G(z, alpha=0.5)
    close(other_G(z, alpha=0.5), image, 1e-5)
    close(other_D(image.contiguous(memory_format=torch.channels_last), alpha=0.5), D(image, alpha=0.5), 1e-5)
    assert layouts == [True, True]
