"""Networks of every kind: shapes, conditions, styles and noise."""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from nets import CLASSES, KINDS, WITH_MAPPING, close, differ, discriminator, generator, labels, normal

from stylegan_pg.config import MODELS
from stylegan_pg.config.schedule import deal
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NETWORKS, NetworkShape, copy_same_names
from stylegan_pg.networks.layers import Conv2d
from stylegan_pg.networks.modulation import SynthesisLayer
from stylegan_pg.networks.public_names import from_public, to_public


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
        assert (gradient != 0).all()  # every pixel has an influence
        stored = {name: t for name, t in G.state_dict().items() if name.endswith("noise_const")}
        for name, t in stored.items():
            r = int(name.split(".")[1][1:])
            assert t.shape == (base[0] * r // 4, base[1] * r // 4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_labels_are_required_and_have_an_effect(kind):
    G, D = generator(8, kind=kind, c_dim=CLASSES), discriminator(8, kind=kind, c_dim=CLASSES)
    z, x = normal(4, 8), normal(4, 3, 8, 8)
    for call in (lambda: G(z), lambda: D(x)):
        with pytest.raises(ValueError, match="conditional"):
            call()
    differ(G(z, labels(4)), G(z, labels(4).roll(1, 0)))
    differ(D(x, labels(4)), D(x, labels(4).roll(1, 0)))
    assert generator(8, kind=kind)(z).shape == (4, 3, 8, 8)
    assert discriminator(8, kind=kind)(x).shape == (4, 1)


OF_OTHER_SYSTEMS = {"mlp", "codes", "chars", "began", "ddgan", "ddgan_mlp", "srresnet"}  # which have tests of their own


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - OF_OTHER_SYSTEMS))
def test_arguments_from_the_configuration_are_json(name):
    model = MODELS[name](base=[4, 6], z_dim=8, channel_base=64, low_precision="bf16")  # type: ignore[call-arg]  # of growing ones
    shape, pair = NetworkShape(8, 16, True, 1, 2, 3), NETWORKS[name]
    g_kwargs, d_kwargs = (json.loads(json.dumps(f(model, shape))) for f in (pair.g_kwargs, pair.d_kwargs))
    assert g_kwargs == pair.g_kwargs(model, shape)
    G: Any = pair.G(**g_kwargs)
    D: Any = pair.D(**d_kwargs)
    assert (G.img_size, G.img_channels, G.c_dim, G.z_dim) == ((8, 12), 1, 2, 8)
    assert G(torch.randn(3, 8), torch.eye(2)[[0, 1, 0]]).shape == (3, 1, 8, 12)
    assert (D.img_size, D.img_channels, D.c_dim) == ((8, 12), 1, 2)
    if name not in ("r3gan", "dcgan"):  # which have no minibatch stddev
        assert D.b4.mbstd_group == 3
    with pytest.raises(TypeError, match="surprise"):
        pair.G(**g_kwargs, surprise=1)


@pytest.mark.parametrize("taps", [[1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1], [1, 5, 10, 10, 5, 1]])
@torch.no_grad()
def test_resample_filters_of_any_length_preserve_sizes(taps):
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
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    differ(random(1), random(2))
    differ(random(1)[:1], random(1)[1:])  # every image has its own noise


@pytest.mark.parametrize(("batch", "parts"), [(12, 3), (16, 2), (20, 3), (8, 5)])
@torch.no_grad()
def test_logits_do_not_depend_on_the_division_of_the_batch(batch, parts):
    D, x = discriminator(8), normal(batch, 3, 8, 8)
    whole, together = D(x), torch.full([batch, 1], math.nan, dtype=torch.float64)
    for share in deal(batch, 4, parts):
        if share:
            together[share] = D(x[share])
    close(together, whole)
    assert float((D(x[:4]) - whole[:4]).abs().max()) > 1e-6  # a contiguous slice has different groups


def test_networks_without_a_public_checkpoint_format():
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
