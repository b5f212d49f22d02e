"""StyleGAN3's generator: agreement with the published networks and with a plain definition, filters, sizes, and what
all generators can do."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from configuring import config_of, refused
from nets import CLASSES, close, differ, labels, normal, shaken
from safetensors import safe_open
from scipy import signal, special

from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import StyleGAN3Config
from stylegan_pg.config.schedule import phases
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import terms
from stylegan_pg.networks import NETWORKS, NetworkShape, declares, to_channels_last
from stylegan_pg.networks.filters import low_pass_taps, radial_low_pass_taps, resampling, signals
from stylegan_pg.networks.public_names import from_public, to_public
from stylegan_pg.networks.stylegan3 import HALF_LIFE, Generator
from stylegan_pg.planning.cost import cost_of

KINDS = {"T": {"kernel": 3, "radial": False}, "R": {"kernel": 1, "radial": True}}
LAYERS = 14


def generator(resolution: int = 16, seed: int = 0, *, kind: str = "T", **kwargs: Any) -> Any:
    """A small generator in float64 with random parameters, and running mean squares around 1."""
    given = {"resolution": resolution, "z_dim": 8, "w_dim": 10, "channel_base": 64, "channel_max": 6, "conv_clamp": 256}
    G: Any = shaken(lambda: Generator(**{**given, **KINDS[kind], **kwargs}), seed)
    for layer in G.synthesis.layers:
        layer.magnitude_ema.copy_(layer.magnitude_ema.abs() + 0.5)
    G.synthesis.input.transform.copy_(torch.eye(3))
    return G


# --- the published networks -------------------------------------------------------------------------------------------


class Case:
    def __init__(self, path, kind):
        with safe_open(path, "pt") as file:
            meta = {k: json.loads(v) for k, v in file.metadata().items()}
            self.t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        assert meta.get("conv_kernel", 3) == KINDS[kind]["kernel"]
        assert meta.get("use_radial_filters", False) == KINDS[kind]["radial"]
        names = ("resolution", "channel_base", "channel_max", "z_dim", "w_dim", "mapping_layers", "c_dim")
        how = {"layers": meta["num_layers"], "critical": meta["num_critical"], "conv_clamp": 256.0, **KINDS[kind]}
        self.G: Any = Generator(**{name: meta[name] for name in names}, **how)
        self.public = {k.removeprefix("G."): v for k, v in self.t.items() if k.startswith("G.")}
        self.G.load_state_dict(from_public(self.public))


@pytest.fixture(params=KINDS)
def case(request, parity_dir):
    return Case(parity_dir / f"stylegan3_{request.param.lower()}_32.safetensors", request.param)


@torch.no_grad()
def test_images_are_those_of_the_published_networks(case):
    close(case.G.styles(case.t["in.z"]), case.t["out.ws"], 1e-5)
    close(case.G(case.t["in.z"]), case.t["out.image"], 1e-5)
    # A published network normalises styles over its batch; alone, an image is the same, within rounding.
    close(case.G(case.t["in.z"][1:2]), case.t["out.image"][1:2], 1e-5)


def test_names_and_filters_are_those_of_the_published_networks(case):
    public = to_public(case.G)
    assert public.keys() == case.public.keys()
    for name, tensor in public.items():
        assert tensor.shape == case.public[name].shape
        if name.endswith("_filter"):
            close(tensor, case.public[name], 2e-7)
        else:
            assert torch.equal(tensor, case.public[name]), name


# --- a plain definition -----------------------------------------------------------------------------------------------


def plain_filter(x, f, up, down, padding):
    """Insert zeros, pad, convolve with the outer product of f or with f, and take every `down`-th pixel."""
    n, c, h, w = x.shape
    spread = x.new_zeros([n, c, h * up, w * up])
    spread[:, :, ::up, ::up] = x
    f = torch.ones([1], dtype=x.dtype) if f is None else f.to(x.dtype)
    f = torch.outer(f, f) if f.ndim == 1 else f
    left, right, top, bottom = padding
    spread = F.pad(spread, [left, right, top, bottom])
    y = F.conv2d(spread, (f * up**2).flip([0, 1]).expand(c, 1, *f.shape), groups=c)
    return y[:, :, ::down, ::down]


def plain_image(G: Any, ws: torch.Tensor) -> torch.Tensor:
    """The published arithmetic: weights of each image, styles normalised over the batch."""
    put = G.synthesis.input
    t = ws[:, 0] @ put.affine.weight.t() / math.sqrt(ws.shape[2]) + put.affine.bias
    t = t / t[:, :2].norm(dim=1, keepdim=True)
    x = []
    for cos, sin, shift_x, shift_y in t:
        turn = torch.eye(3, dtype=t.dtype)
        turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = cos, -sin, sin, cos
        shift = torch.eye(3, dtype=t.dtype)
        shift[0, 2], shift[1, 2] = -shift_x, -shift_y
        m = turn @ shift @ put.transform
        phases = put.phases + put.freqs @ m[:2, 2]
        freqs = put.freqs @ m[:2, :2]
        strength = (1 - (freqs.norm(dim=1) - put.bandwidth) / (put.rate / 2 - put.bandwidth)).clamp(0, 1)
        theta = torch.tensor([[[put.size[1] / (2 * put.rate), 0, 0], [0, put.size[0] / (2 * put.rate), 0]]])
        grid = F.affine_grid(theta.to(t.dtype), [1, 1, *put.size], align_corners=False)[0]
        waves = (2 * math.pi * (grid @ freqs.t() + phases)).sin() * strength
        x.append((waves @ put.weight.t() / math.sqrt(len(put.weight))).permute(2, 0, 1))
    x = torch.stack(x)
    for i, layer in enumerate(G.synthesis.layers):
        w = layer.weight
        s = ws[:, i + 1] @ layer.affine.weight.t() / math.sqrt(ws.shape[2]) + layer.affine.bias
        if i == LAYERS:
            s = s / math.sqrt(w.shape[1])
        else:
            w = w / w.square().mean(dim=[1, 2, 3], keepdim=True).sqrt()
            s = s / s.square().mean().sqrt()
        each = w[None] * s[:, None, :, None, None]
        if i < LAYERS:
            each = each / (each.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).sqrt()
        each = each / layer.magnitude_ema.sqrt()
        x = torch.cat([F.conv2d(one[None], v, padding=w.shape[-1] - 1) for one, v in zip(x, each, strict=True)])
        x = x + layer.bias[:, None, None]
        if i < LAYERS:
            x = plain_filter(x, layer.up_filter, layer.how["up"], 1, layer.how["padding"])
            x = F.leaky_relu(x, 0.2) * math.sqrt(2)
            x = plain_filter(x.clamp(-256, 256), layer.down_filter, 1, layer.how["down"], [0] * 4)
        x = x.clamp(-256, 256)
    return x / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("resolution", "base"), [(16, (4, 4)), (32, (1, 2))])
def test_images_and_gradients_of_a_plain_definition(kind, resolution, base):
    G = generator(resolution, kind=kind, base=base)
    G.synthesis.input.transform.copy_(torch.tensor([[0.9, 0.3, 0.2], [-0.2, 1.1, -0.1], [0, 0, 1]]))
    ws, y = normal(2, G.num_ws, 10, seed=1), normal(2, 3, *G.img_size, seed=2)
    found, wanted = G.synthesis(ws), plain_image(G, ws)
    close(found.detach(), wanted.detach(), 1e-8)
    parameters = [p for name, p in G.named_parameters() if name.startswith("synthesis")]
    mine, plain = (torch.autograd.grad((image * y).sum(), parameters) for image in (found, wanted))
    largest = max(float(g.abs().max()) for g in plain)
    for a, b in zip(mine, plain, strict=True):
        assert float((a - b).abs().max()) < 1e-8 * largest


# --- filters and sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taps", "cutoff", "width", "rate"), [(12, 2, 6.6, 32), (24, 5, 3.1, 64), (13, 3, 1, 16)])
def test_filters_are_those_of_scipy(taps, cutoff, width, rate):
    f = low_pass_taps(taps, cutoff, width, rate)
    np.testing.assert_allclose(f, signal.firwin(taps, cutoff, width=width, fs=rate), rtol=1e-9, atol=1e-12)
    x = (np.arange(taps) - (taps - 1) / 2) / rate
    r = np.sqrt(x[:, None] ** 2 + x**2).clip(1e-9)
    window = np.kaiser(taps, signal.kaiser_beta(signal.kaiser_atten(taps, width / (rate / 2))))
    wanted = special.j1(2 * cutoff * math.pi * r) / (math.pi * r) * window * window[:, None]
    np.testing.assert_allclose(radial_low_pass_taps(taps, cutoff, width, rate), wanted / wanted.sum(), atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resolution", [4, 8, 64, 128, 256, 1024])
def test_properties_of_layers(kind, resolution):
    how = {"channel_base": 32768, "channel_max": 512, "img_channels": 3}
    every = signals(resolution, (4, 4), layers=LAYERS, critical=2, **how)
    assert [s.size for s in every[-2:]] == [(resolution, resolution)] * 2
    assert [s.cutoff for s in every[-3:]] == [resolution / 2] * 3
    for i, after in enumerate(every):
        before = every[max(i - 1, 0)]
        to_rgb = i == LAYERS
        kernel = 1 if to_rgb else KINDS[kind]["kernel"]
        change = resampling(before, after, kernel=kernel, radial=KINDS[kind]["radial"], to_rgb=to_rgb)
        assert before.rate * change.up == after.rate * change.down
        assert (change.up, change.down) == (1, 1) if to_rgb else change.down == 2
        for f in (change.up_filter, change.down_filter):
            assert (f is None) == to_rgb
            if f is None:
                continue
            assert abs(float(f.sum()) - 1) < 1e-12
            for other in (f.flip(0), f.flip(-1), f.t()):
                torch.testing.assert_close(f, other, rtol=0, atol=1e-15)
        critical = after.cutoff * 2 == after.rate
        dimensions = 2 if kind == "R" and not critical else 1
        assert change.down_filter is None or change.down_filter.ndim == dimensions
        taps = [1 if f is None else len(f) for f in (change.up_filter, change.down_filter)]
        left, right, top, bottom = change.padding
        grown = (before.size[0] + kernel - 1) * change.up + top + bottom - taps[0] + 1
        assert (grown - taps[1]) // change.down + 1 == after.size[0]
        assert (left, right) == (top, bottom)
        # Centres stay where they are: what is cut off or added on both sides differs by the phase of the grids only.
        assert abs((left - right) - (change.up - 1)) <= 1


def test_sizes_and_channels_of_published_networks():
    def layers(resolution: int, base: int, most: int) -> list[str]:
        how = {"layers": 14, "critical": 2, "channel_base": base, "channel_max": most, "img_channels": 3}
        return [f"{s.size[0]}_{s.channels}" for s in signals(resolution, (4, 4), **how)]

    at_1024 = (
        "36_512 36_512 52_512 52_512 84_512 148_512 148_512 276_323 276_203 532_128 1044_81 1044_51 1044_32 1024_32"
    )
    at_256 = "36_512 36_512 36_512 52_512 52_512 84_512 84_512 148_512 148_512 148_362 276_256 276_181 276_128 256_128"
    assert layers(1024, 32768, 512) == [*at_1024.split(), "1024_3"]
    assert layers(256, 32768, 512) == [*at_256.split(), "256_3"]
    assert layers(1024, 65536, 1024)[7] == "276_645"


# --- what all generators can do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("resolution", "base", "channels"), [(4, (4, 4), 1), (8, (4, 6), 3), (16, (3, 5), 4), (16, (1, 1), 2)]
)
def test_base_grids_and_channels(kind, resolution, base, channels):
    G = generator(resolution, kind=kind, base=base, img_channels=channels)
    size = (base[0] * resolution // 4, base[1] * resolution // 4)
    assert (G.img_size, G.num_ws) == (size, 16)
    image = G(normal(2, 8))
    assert image.shape == (2, channels, *size)
    assert image.isfinite().all()
    gradients = torch.autograd.grad(image.square().sum(), list(G.parameters()))
    assert all(g.isfinite().all() for g in gradients)
    name = G.synthesis.names[0]
    rows, columns = (n * G.synthesis.input.rate // 4 + 20 for n in base)
    assert name == (f"L0_{rows}_6" if rows == columns else f"L0_{rows}x{columns}_6")


@torch.no_grad()
def test_a_wider_grid_shows_more_of_the_same_picture():
    """Pixels are square at any base: the middle of a wide picture is the narrow one, but for what borders change."""
    wide, narrow = generator(64, base=(4, 8)), generator(64, base=(4, 4))
    names = dict(zip(wide.synthesis.names, narrow.synthesis.names, strict=True))
    parts = ((name.split("."), t) for name, t in wide.state_dict().items())
    narrow.load_state_dict({".".join(names.get(part, part) for part in path): t for path, t in parts})
    a, b = wide(normal(1, 8))[..., 32:96], narrow(normal(1, 8))
    inner = (slice(None), slice(None), slice(16, 48), slice(16, 48))
    close(a[inner], b[inner], 1e-3)


@torch.no_grad()
def test_conditions_truncation_and_arguments_without_effect():
    G, z = generator(c_dim=CLASSES), normal(4, 8)
    with pytest.raises(ValueError, match="conditional"):
        G(z)
    differ(G(z, labels(4)), G(z, labels(4).roll(1, 0)))
    G = generator()
    mean = G.mapping.w_avg
    close(G(z, psi=0), G.synthesis(mean.expand(1, 16, -1)).expand(4, -1, -1, -1))
    ws = G.styles(z, psi=0.6, cutoff=3)
    close(ws[:, 2], mean + 0.6 * (G.mapping(z) - mean))
    close(ws[:, 3], G.mapping(z))
    assert torch.equal(G(z), G(z, noise="random", alpha=0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind):
    """Path length, whose derivative is compared with finite differences along a random direction."""
    G = generator(8, kind=kind, base=(4, 5))
    y, ws = normal(2, 3, *G.img_size, seed=1) / 8, normal(2, 16, 10, seed=2).requires_grad_(True)
    parameters = list(G.synthesis.parameters())
    directions = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]

    def value() -> torch.Tensor:
        return (terms.path_lengths(G.synthesis(ws), ws, y) - 0.1).square().sum()

    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * 1e-6 * d
        values.append(float(value().detach()))
    assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-5 * abs(slope)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_at_sampling_rates(kind):
    whole, low = (
        generator(32, kind=kind, low_precision=name, low_precision_at=[32]).float() for name in ("fp32", "bf16")
    )
    z, seen = normal(4, 8).float(), {}
    for name, layer in low.synthesis.named_children():
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    with torch.no_grad():
        image, other = whole(z), low(z)
    assert other.dtype == torch.float32
    assert 0 < float((other - image).std() / image.std()) < 0.05
    rates = {name: getattr(low.synthesis, name).rate for name in seen}
    assert {rates[name] for name, dtype in seen.items() if dtype == torch.bfloat16} == {32}
    assert {rates[name] for name, dtype in seen.items() if dtype == torch.float32} == {16}
    low(z).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in low.parameters()
    )


def test_the_highest_resolutions_are_those_of_the_published_networks():
    """`low_precision_resolutions` n: layers whose rate times 2^n is above the resolution."""
    model = StyleGAN3Config(low_precision="fp16", low_precision_resolutions=4, channel_base=2048, channel_max=8)
    kwargs = NETWORKS["stylegan3"].g_kwargs(model, NetworkShape(1024, 1024, False, 3, 0, 4))
    with torch.device("meta"):
        G: Any = Generator(**kwargs)
    for layer in G.synthesis.layers:
        assert (layer.dtype == torch.float16) == (layer.rate * 16 > 1024)
        assert layer.fp16 == (layer.dtype == torch.float16)


@torch.no_grad()
def test_half_precision_does_not_overflow():
    """What a GPU computes in float16, computed here with that dtype; large styles, weights and running means of small
    inputs cancel."""
    whole = generator(16).float()
    for layer in whole.synthesis.layers[:-1]:
        layer.weight.mul_(300)
        layer.affine.weight.mul_(30)
    half = copy.deepcopy(whole)
    for layer in half.synthesis.layers:
        layer.dtype, layer.fp16 = torch.float16, True
    z = normal(2, 8).float()
    try:
        found = half(z)
    except RuntimeError as error:
        pytest.skip(f"this CPU cannot convolve float16: {error}")
    assert found.isfinite().all()
    assert float((found - whole(z)).std() / whole(z).std()) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_on_a_gpu(kind, precision):
    """Images and gradients are close to those of float32 on the CPU."""
    whole, low = (
        generator(32, kind=kind, low_precision=name, low_precision_at=[16, 32]).float() for name in ("fp32", precision)
    )
    low, z, found = to_channels_last(low.cuda()), normal(4, 8).float(), []
    for net in (whole, low):
        image = net(z.to(next(net.parameters()).device))
        image.square().sum().backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None])
        found.append((image.detach().cpu(), grads))
    (image, grads), (other, other_grads) = found
    assert other.dtype == torch.float32
    assert float((other - image).std() / image.std()) < 0.05
    assert float(torch.cosine_similarity(other_grads, grads, dim=0)) > 0.95


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_channels_last_gives_the_same_results(kind):
    G = generator(kind=kind, base=(4, 6)).float()
    other: Any = to_channels_last(copy.deepcopy(G))
    layouts: list[bool] = []
    for layer in other.synthesis.children():
        layer.register_forward_hook(
            lambda _, __, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    z = normal(2, 8).float()
    close(other(z), G(z), 1e-5)
    assert layouts == [True] * 16
    assert G.synthesis.input(G.mapping(z)).is_contiguous()


@torch.no_grad()
def test_a_snapshot_gives_the_same_generator_bit_for_bit(tmp_path):
    model = StyleGAN3Config(equivariance="rotation", channel_base=64, channel_max=6, z_dim=8, w_dim=10, base=[4, 6])
    kwargs = NETWORKS["stylegan3"].g_kwargs(model, NetworkShape(16, 16, False, 3, 0, 4))
    G = Generator(**json.loads(json.dumps(kwargs))).eval()
    path = tmp_path / "G.safetensors"
    save_snapshot(path, G, {"network": "stylegan3", "kwargs": kwargs, "alpha": 1.0, "nimg": 5})
    loaded = load_snapshot(path)
    assert loaded.state_dict().keys() == G.state_dict().keys()
    for psi in (1.0, 0.7):
        assert torch.equal(loaded(z := torch.randn(2, 8), psi=psi), G(z, psi=psi))


def test_running_mean_squares_follow_the_inputs():
    G, z = generator(), normal(4, 8)
    before = [layer.magnitude_ema.clone() for layer in G.synthesis.layers]
    inputs = []
    for layer in G.synthesis.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].square().mean()))
    ws = G.styles(z)
    image = G.synthesis(ws)
    assert all(torch.equal(layer.magnitude_ema, b) for layer, b in zip(G.synthesis.layers, before, strict=True))
    inputs.clear()
    # A pass uses the values from before it.
    assert torch.equal(G.synthesis(ws, followed_batch=500), image)
    beta = 0.5 ** (500 / HALF_LIFE)
    for layer, start, now in zip(G.synthesis.layers, before, inputs, strict=True):
        torch.testing.assert_close(layer.magnitude_ema, beta * start + (1 - beta) * now)
    differ(G.synthesis(ws), image * (1 + 1e-2))
    assert declares(G.synthesis, "followed_batch")
    other: Any = NETWORKS["stylegan2"].G(resolution=4)
    assert not declares(other.synthesis, "followed_batch")


# --- the configuration ------------------------------------------------------------------------------------------------


def test_the_discriminator_has_channels_of_its_own():
    overrides = ["model=stylegan3", "model.equivariance=rotation", "model.channel_base=512", "model.channel_max=64"]
    model, shape = config_of(*overrides, "resolution=16").model, NetworkShape(16, 16, False, 3, 0, 4)
    assert NETWORKS["stylegan3"].d_kwargs(model, shape)["channel_max"] == 64
    model = config_of(*overrides, "resolution=16", "model.d_channel_base=256", "model.d_channel_max=32").model
    kwargs = NETWORKS["stylegan3"].d_kwargs(model, shape)
    assert (kwargs["channel_base"], kwargs["channel_max"]) == (256, 32)
    kwargs = NETWORKS["stylegan3"].g_kwargs(model, shape)
    assert (kwargs["channel_base"], kwargs["channel_max"]) == (512, 64)
    assert (kwargs["kernel"], kwargs["radial"]) == (1, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["growth.start=8", "resolution=16"], "stylegan3 networks do not grow"),
        (["growth.schedule=auto"], "stylegan3 networks do not grow"),
        (["model.equivariance=shear"], "must be translation or rotation"),
        (["model.d_channel_base=512"], "model.d_channel_base=512 is not possible: it must be at least 1024"),
        (["model.d_channel_max=30", "model.mbstd_channels=4"], "a divisor of 30"),
        (["model.noise=false"], "model.noise is no key of model.name=stylegan3"),
    ],
)
def test_what_is_not_possible_is_refused(overrides, message):
    assert message in refused("model=stylegan3", *overrides)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kernel": 2}, "kernel is 2"),
        ({"layers": 2, "critical": 2}, "layers is 2"),
        ({"fade": True}, "does not grow"),
        ({"radial": 1}, "radial is 1"),
    ],
)
def test_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=message):
        generator(8, **kwargs)


def test_networks_that_have_no_public_form():
    with pytest.raises(UsageError, match="square"):
        to_public(generator(base=(4, 6)))


@pytest.mark.parametrize("kind", ["translation", "rotation"])
def test_a_step_has_a_cost(kind):
    small = ["resolution=16", "model.channel_base=256", "model.channel_max=16", "model.z_dim=8", "model.w_dim=8"]
    config = config_of("model=stylegan3", f"model.equivariance={kind}", *small)
    cost = cost_of(config, phases(config)[0], 3, 0)
    wider = config_of("model=stylegan3", f"model.equivariance={kind}", *small, "model.channel_max=32")
    more = cost_of(wider, phases(wider)[0], 3, 0)
    assert 0 < cost.flops_per_image < more.flops_per_image
    assert 0 < cost.bytes_per_image < more.bytes_per_image
