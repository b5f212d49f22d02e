"""The networks of ProGAN and StyleGAN compared with formulas from their papers, and their initialisation."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import CLASSES, close, discriminator, generator, labels, normal

from stylegan_pg.networks import NETWORKS
from stylegan_pg.networks.form import Form

State = dict[str, torch.Tensor]
ROOT2 = math.sqrt(2)


def lrelu(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x, 0.2 * x)


def per_channel(v: torch.Tensor) -> torch.Tensor:
    return v[:, None, None]


def conv(x: torch.Tensor, weight: torch.Tensor, gain: float = ROOT2, padding: int = 0) -> torch.Tensor:
    """A convolution with He's constant applied at run time."""
    return F.conv2d(x, weight * gain / math.sqrt(weight[0].numel()), padding=padding)


def dense(x: torch.Tensor, state: State, name: str, gain: float = 1.0, lr: float = 1.0) -> torch.Tensor:
    weight = state[f"{name}.weight"] * gain * lr / math.sqrt(x.shape[1])
    return x @ weight.t() + lr * state[f"{name}.bias"]


def pixel_norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()


def nearest(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def box(x: torch.Tensor) -> torch.Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def blur(x: torch.Tensor) -> torch.Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    return F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


def true_convolution(weight: torch.Tensor) -> torch.Tensor:
    """Flip the kernel. Up-sampling layers convolve, the other layers correlate."""
    return weight.flip([2, 3])


def progan_images(state: State, z: torch.Tensor, resolutions: list[int]) -> torch.Tensor:
    z = pixel_norm(z)
    first = state["synthesis.b4.first.weight"] * ROOT2 / 4 / math.sqrt(z.shape[1])
    x = torch.einsum("ni,iohw->nohw", z, first) + per_channel(state["synthesis.b4.first.bias"])
    x = pixel_norm(lrelu(x))
    for r in resolutions:
        block = f"synthesis.b{r}."
        if r > 4:
            weight = true_convolution(state[block + "conv0.weight"])
            x = conv(nearest(x), weight, padding=1) + per_channel(state[block + "conv0.bias"])
            x = pixel_norm(lrelu(x))
        x = conv(x, state[block + "conv1.weight"], padding=1) + per_channel(state[block + "conv1.bias"])
        x = pixel_norm(lrelu(x))
    rgb = f"synthesis.b{resolutions[-1]}.torgb"
    return conv(x, state[rgb + ".weight"], gain=1) + per_channel(state[rgb + ".bias"])


def stylegan_images(
    state: State, z: torch.Tensor, c: torch.Tensor | None, resolutions: list[int], noise: bool
) -> torch.Tensor:
    w = pixel_norm(z)
    if c is not None:
        w = torch.cat([w, pixel_norm(dense(c, state, "mapping.embed"))], dim=1)
    for i in range(2):
        w = lrelu(dense(w, state, f"mapping.fc{i}", gain=ROOT2, lr=0.01))

    def epilogue(x: torch.Tensor, name: str) -> torch.Tensor:
        if noise:
            x = x + state[name + ".noise_const"] * per_channel(state[name + ".noise_weight"])
        x = lrelu(x + per_channel(state[name + ".bias"]))
        mean, var = x.mean(dim=[2, 3], keepdim=True), x.var(dim=[2, 3], keepdim=True, correction=0)
        style = dense(w, state, name + ".affine")[..., None, None]
        scale, shift = style[:, : x.shape[1]], style[:, x.shape[1] :]
        return (x - mean) / (var + 1e-8).sqrt() * (1 + scale) + shift

    x = state["synthesis.b4.learned_input"].expand(len(z), -1, -1, -1)
    x = epilogue(x, "synthesis.b4.input")
    for r in resolutions:
        block = f"synthesis.b{r}."
        if r > 4:
            # The whole result of the convolution is blurred, including the part outside of the image.
            x = nearest(F.pad(x, [2, 2, 2, 2]))
            x = blur(conv(x, true_convolution(state[block + "conv0.weight"])))[..., 2:-2, 2:-2]
            x = epilogue(x, block + "conv0")
        x = epilogue(conv(x, state[block + "conv1.weight"], padding=1), block + "conv1")
    rgb = f"synthesis.b{resolutions[-1]}.torgb"
    return conv(x, state[rgb + ".weight"], gain=1) + per_channel(state[rgb + ".bias"])


def scores_of(state: State, x: torch.Tensor, c: torch.Tensor | None, resolutions: list[int], kind: str) -> torch.Tensor:
    """The scores of both discriminators, with minibatch stddev in groups of four."""

    def layer(x: torch.Tensor, name: str, padding: int) -> torch.Tensor:
        return lrelu(conv(x, state[name + ".weight"], padding=padding) + per_channel(state[name + ".bias"]))

    x = layer(x, f"b{resolutions[-1]}.fromrgb", 0)
    for r in resolutions[:0:-1]:
        x = layer(x, f"b{r}.conv0", 1)
        if kind == "progan":
            x = box(layer(x, f"b{r}.conv1", 1))
        else:
            x = conv(blur(F.pad(x, [2, 2, 2, 2])), state[f"b{r}.conv1.weight"])
            x = lrelu(box(x) + per_channel(state[f"b{r}.conv1.bias"]))
    groups = len(x) // 4
    deviation = torch.stack([(x[i::groups].var(dim=0, correction=0) + 1e-8).sqrt().mean() for i in range(groups)])
    extra = deviation.repeat(4)[:, None, None, None].expand(-1, 1, *x.shape[2:])
    x = layer(torch.cat([x, extra], dim=1), "b4.conv", 1)
    x = dense(lrelu(dense(x.flatten(1), state, "b4.fc", gain=ROOT2)), state, "b4.out")
    if c is not None:
        e = pixel_norm(dense(c, state, "mapping.embed"))
        x = (x * e).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
    return x


@pytest.mark.parametrize("kind", ["progan", "stylegan"])
@pytest.mark.parametrize("base", [(4, 4), (4, 6)])
@pytest.mark.parametrize("c_dim", [0, CLASSES])
@pytest.mark.parametrize("resolution", [4, 16])
@torch.no_grad()
def test_generators_equal_the_papers_formulas(resolution, c_dim, base, kind):
    G = generator(resolution, kind=kind, c_dim=c_dim, base=base)
    state, resolutions = G.state_dict(), G.synthesis.resolutions
    z, c = normal(3, 8), labels(3) if c_dim else None
    if kind == "progan":
        close(G(z, c), progan_images(state, z if c is None else torch.cat([z, c], dim=1), resolutions), 1e-6)
    else:
        close(G(z, c), stylegan_images(state, z, c, resolutions, noise=True), 1e-6)
        close(G(z, c, noise="none"), stylegan_images(state, z, c, resolutions, noise=False), 1e-6)


@pytest.mark.parametrize("kind", ["progan", "stylegan"])
@pytest.mark.parametrize(("base", "c_dim"), [((4, 4), 0), ((4, 6), 0), ((4, 4), CLASSES)])
@pytest.mark.parametrize("resolution", [4, 16])
@torch.no_grad()
def test_discriminators_equal_the_papers_formulas(resolution, base, c_dim, kind):
    D = discriminator(resolution, kind=kind, base=base, c_dim=c_dim)
    x, c = normal(8, 3, base[0] * resolution // 4, base[1] * resolution // 4), labels(8) if c_dim else None
    close(D(x, c), scores_of(D.state_dict(), x, c, D.resolutions[::-1], kind), 1e-6)


def test_published_channels_and_parameter_counts():
    """Karras et al. 2018, table 2. The published code has 23,079,115 and 23,087,249 parameters for ProGAN at 1024x1024
    and 26,219,627 for StyleGAN's generator, each with the RGB layers of all nine resolutions."""
    form = Form(1024, channel_base=16384)
    channels = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
    assert {r: form.channels(r) for r in form.resolutions} == channels
    lower = [channels[r] for r in form.resolutions[:-1]]
    torgb, fromrgb = sum(3 * n + 3 for n in lower), sum(3 * n + n for n in lower)
    counts = {}
    for name in ("progan", "stylegan"):
        with torch.device("meta"):
            how: dict[str, Any] = {"resolution": 1024, "channel_base": 16384}
            nets = NETWORKS[name].G(**how), NETWORKS[name].D(**how)
        counts[name] = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert counts["progan"] == [23_079_115 - torgb, 23_087_249 - fromrgb]
    assert counts["stylegan"] == [26_219_627 - torgb, 23_087_249 - fromrgb]


def initial(name: str, which: str, **kwargs: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(NETWORKS[name], which)(channel_base=1024, channel_max=64, **kwargs)


@pytest.mark.parametrize("name", ["progan", "stylegan"])
@torch.no_grad()
def test_the_equalised_learning_rate_preserves_the_variance(name):
    """Weights start from N(0, 1); with them leaky ReLU layers turn mean squares of 1 into (1 + 0.2^2)."""
    G = initial(name, "G", resolution=32, z_dim=64)
    D = initial(name, "D", resolution=32)
    for net in (G, D):
        for parameter, p in net.named_parameters():
            if parameter.endswith("weight") and "noise" not in parameter:
                scale = 0.01 if "mapping" in parameter else 1.0
                assert abs(float(p.std()) * scale - 1) < 4 / math.sqrt(2 * p.numel()) + 0.01, parameter
            elif parameter.endswith("learned_input"):
                assert (p == 1).all()
            else:
                assert (p == 0).all(), parameter
    layers = [D.b32.conv0, D.b4.fc]
    if name == "progan":
        layers += [D.b32.conv1, G.synthesis.b8.conv0, G.synthesis.b8.conv1]
    for layer in layers:
        if layer.weight.ndim == 4:
            y = layer(normal(16, layer.weight.shape[1], 16, 16).float())[
                ..., 2:-2, 2:-2
            ]  # without the border, which depends on zero padding
        else:
            y = layer(normal(256, layer.weight.shape[1]).float())
        assert abs(float(y.square().mean()) / 1.04 - 1) < 0.1
    image = G(normal(8, 64).float(), noise="random")
    assert 0.5 < float(image.std()) < 2.5
