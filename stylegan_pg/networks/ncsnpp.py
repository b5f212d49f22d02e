"""The networks of the denoising diffusion GAN for pictures (Xiao et al. 2022, appendix C): a U-Net of the NCSN++ kind
(Song et al. 2021) whose group normalisations are modulated by a latent, and a residual discriminator of (x_t, x_{t+1}).

Resampling filters pictures with [1, 3, 3, 1]. Sums of two branches are divided by sqrt(2). Weights are drawn uniformly
with the variance 1 / mean(fan in, fan out); those of the last layer of each branch are almost 0 at the start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stylegan_pg.config import DDGANConfig
from stylegan_pg.networks.diffusion import Diffusion, ReverseChain, time_embedding
from stylegan_pg.networks.form import NetworkShape
from stylegan_pg.networks.layers import low_pass, minibatch_stddev, normalize_2nd_moment, resampling_conv2d
from stylegan_pg.networks.ranges import checked
from stylegan_pg.ops import downsample2d, upsample2d

TAPS = (1, 3, 3, 1)
SLOPE = 0.2  # of D's leaky ReLU
ALMOST_0 = 1e-10  # variance of the weights that begin almost at 0, relative to the others
GROUPS, PER_GROUP = 32, 4  # most groups of a normalisation, and least channels of a group
STAGES = {"small": (2, 4, 8, 8), "large": (4, 8, 8, 8, 8, 8)}  # channels of D's blocks, in units of its width
ROOT_2 = math.sqrt(2)


def drawn(layer: nn.Module, scale: float = 1.0) -> Any:
    """A dense layer or convolution with weights of the variance `scale` / mean(fan in, fan out), and biases 0."""
    weight: Any = layer.weight
    nn.init.xavier_uniform_(weight, math.sqrt(scale))
    if isinstance(layer.bias, torch.Tensor):
        nn.init.zeros_(layer.bias)
    return layer


def conv(a: int, b: int, kernel: int = 3, *, bias: bool = True, scale: float = 1.0) -> Any:
    """A convolution of `a` to `b` channels that keeps the size."""
    return drawn(nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=bias), scale)


def groups_of(channels: int) -> int:
    """The number of groups of a normalisation: the largest divisor of the channels up to min(channels / 4, 32)."""
    most = max(min(channels // PER_GROUP, GROUPS), 1)
    return next(n for n in range(most, 0, -1) if channels % n == 0)


class AdaptiveNorm(nn.Module):
    """Group normalisation of x [N, C, H, W], multiplied by and added to what a dense layer makes of w [N, w_dim]."""

    def __init__(self, channels: int, w_dim: int):
        super().__init__()
        self.groups = groups_of(channels)
        self.style = drawn(nn.Linear(w_dim, 2 * channels))
        nn.init.ones_(self.style.bias[:channels])

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        gamma, beta = self.style(w)[:, :, None, None].chunk(2, dim=1)
        return gamma * F.group_norm(x, self.groups, eps=1e-6) + beta


class Block(nn.Module):
    """A residual block [N, a, H, W] -> [N, b, ...] of the same size, or with `up` or `down` twice or half as large; e
    [N, 4 n] is the embedding of t, and w [N, w_dim] that of z."""

    filter: torch.Tensor

    def __init__(self, a: int, b: int, e_dim: int, w_dim: int, *, up: bool = False, down: bool = False):
        super().__init__()
        self.up, self.down = up, down
        self.register_buffer("filter", low_pass(TAPS), persistent=False)
        self.norm0, self.conv0 = AdaptiveNorm(a, w_dim), conv(a, b)
        self.time = drawn(nn.Linear(e_dim, b))
        self.norm1, self.conv1 = AdaptiveNorm(b, w_dim), conv(b, b, scale=ALMOST_0)
        self.skip = conv(a, b, 1) if a != b or up or down else None

    def resized(self, x: torch.Tensor) -> torch.Tensor:
        return upsample2d(x, self.filter) if self.up else downsample2d(x, self.filter) if self.down else x

    def forward(self, x: torch.Tensor, e: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = self.conv0(self.resized(F.silu(self.norm0(x, w))))
        h = F.silu(self.norm1(h + self.time(F.silu(e))[:, :, None, None], w))
        x = self.resized(x)
        return ((x if self.skip is None else self.skip(x)) + self.conv1(h)) / ROOT_2


class Attention(nn.Module):
    """Self-attention between all pixels of x [N, C, H, W], added to it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups_of(channels), channels, eps=1e-6)
        self.query, self.key, self.value = (conv(channels, channels, 1) for _ in range(3))
        self.out = conv(channels, channels, 1, scale=ALMOST_0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(q.shape[1]), dim=2)
        return (x + self.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))) / ROOT_2


class Halved(nn.Module):
    """The input pyramid's step: x [N, a, H, W] -> [N, b, H / 2, W / 2], filtered, then a strided convolution."""

    filter: torch.Tensor

    def __init__(self, a: int, b: int):
        super().__init__()
        self.register_buffer("filter", low_pass(TAPS), persistent=False)
        self.conv = conv(a, b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = resampling_conv2d(x, self.conv.weight, self.filter, down=2)
        return x + self.conv.bias[:, None, None]


class Denoiser(nn.Module):
    """x_{t+1} [N, img_channels, H, W], t [N], z [N, z_dim] -> x_0 [N, img_channels, H, W] in [-1, 1].

    Args:
        widths: channels of each resolution, from the highest down. blocks: residual blocks of each. n: channels of the
            first layer. attention: for each resolution, whether attention follows its blocks.
    """

    down: Any  # ModuleLists of ModuleLists
    up: Any

    def __init__(
        self,
        img_channels: int,
        z_dim: int,
        *,
        n: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        w_dim: int,
        mapping_layers: int,
    ):
        super().__init__()
        e_dim, self.n = 4 * n, n
        self.time = nn.ModuleList([drawn(nn.Linear(n, e_dim)), drawn(nn.Linear(e_dim, e_dim))])
        mapping = [z_dim, *[w_dim] * (mapping_layers + 1)]
        self.mapping = nn.ModuleList([drawn(nn.Linear(a, b)) for a, b in itertools.pairwise(mapping)])
        self.first = conv(img_channels, n)
        self.down, self.pyramid, kept, now, shown = nn.ModuleList(), nn.ModuleList(), [n], n, img_channels
        for i, width in enumerate(widths):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(Block(now, width, e_dim, w_dim))
                stage.extend([Attention(width)] if attention[i] else [])
                kept.append(now := width)
            if i < len(widths) - 1:
                stage.append(Block(now, now, e_dim, w_dim, down=True))
                self.pyramid.append(Halved(shown, now))
                shown = now
                kept.append(now)
            self.down.append(stage)
        self.middle = nn.ModuleList([Block(now, now, e_dim, w_dim), Attention(now), Block(now, now, e_dim, w_dim)])
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            stage = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.append(Block(now + kept.pop(), width, e_dim, w_dim))
                now = width
            stage.extend([Attention(width)] if attention[i] else [])
            stage.extend([Block(now, now, e_dim, w_dim, up=True)] if i else [])
            self.up.append(stage)
        self.norm = nn.GroupNorm(groups_of(now), now, eps=1e-6)
        self.last = conv(now, img_channels, scale=ALMOST_0)

    def mapped(self, z: torch.Tensor) -> torch.Tensor:
        """w [N, w_dim] of z [N, z_dim]."""
        w = normalize_2nd_moment(z)
        for layer in self.mapping:
            w = F.silu(layer(w))
        return w

    def forward(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        w = self.mapped(z)
        e = self.time[1](F.silu(self.time[0](time_embedding(t, self.n, x.dtype))))
        kept, shown = [self.first(x)], x
        for i, stage in enumerate(self.down):
            for part in stage:
                if isinstance(part, Attention):  # of the block before it
                    kept[-1] = part(kept[-1])
                elif part.down:
                    shown = (self.pyramid[i](shown) + part(kept[-1], e, w)) / ROOT_2
                    kept.append(shown)
                else:
                    kept.append(part(kept[-1], e, w))
        first, attention, second = self.middle
        h = second(attention(first(kept[-1], e, w)), e, w)
        for stage in self.up:
            for part in stage:
                if isinstance(part, Attention):
                    h = part(h)
                else:
                    h = part(h if part.up else torch.cat([h, kept.pop()], dim=1), e, w)
        return torch.tanh(self.last(F.silu(self.norm(h))))


class Generator(ReverseChain):
    """z [N, z_dim] -> images [N, img_channels, *base * resolution / 4]; see ReverseChain for z.

    `z_dim` is that of each step. The `multipliers` of the width `width` are those of the resolutions from the highest
    down; no layer has more than `channel_max` channels.

    Raises:
        ValueError: the pictures cannot be halved as often as there are resolutions.
    """

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: Sequence[int] = (4, 4),
        img_channels: int = 3,
        z_dim: int = 100,
        steps: int = 4,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        width: int = 128,
        channel_max: int = 512,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_each: int = 2,
        attention_at: Sequence[int] = (16,),
        w_dim: int = 256,
        mapping_layers: int = 4,
    ):
        rows, columns = (side * resolution // 4 for side in base)
        halved = 2 ** (len(multipliers) - 1)
        if rows % halved or columns % halved:
            raise ValueError(f"pictures of {rows}x{columns} cannot be halved {len(multipliers) - 1} times")
        denoiser = Denoiser(
            img_channels,
            z_dim,
            n=min(width, channel_max),
            widths=[min(width * m, channel_max) for m in multipliers],
            blocks=blocks_each,
            attention=[resolution >> i in attention_at for i in range(len(multipliers))],
            w_dim=w_dim,
            mapping_layers=mapping_layers,
        )
        super().__init__(denoiser, Diffusion(steps, beta_min, beta_max), z_dim, (img_channels, rows, columns))
        self.resolution = resolution


class DownBlock(nn.Module):
    """A block of D: [N, a, H, W] -> [N, b, ...], with `down` half as large; e [N, time_dim] is the embedding of t."""

    filter: torch.Tensor

    def __init__(self, a: int, b: int, time_dim: int, down: bool):
        super().__init__()
        self.halves = down
        self.register_buffer("filter", low_pass(TAPS), persistent=False)
        self.conv0, self.conv1 = conv(a, b), conv(b, b, scale=ALMOST_0)
        self.time, self.skip = drawn(nn.Linear(time_dim, b)), conv(a, b, 1, bias=False)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        h = self.conv0(F.leaky_relu(x, SLOPE)) + self.time(e)[:, :, None, None]
        h = F.leaky_relu(h, SLOPE)
        if self.halves:
            h, x = downsample2d(h, self.filter), downsample2d(x, self.filter)
        return (self.conv1(h) + self.skip(x)) / ROOT_2


class Discriminator(nn.Module):
    """x_t and x_{t+1} [N, img_channels, *base * resolution / 4] and t [N] -> scores [N, 1].

    `stages` says how many blocks there are: "small", four of which the last three halve the picture, or "large", six
    that do. Channels are multiples of `width`, `channel_max` at most.

    Raises:
        ValueError: the pictures are too small for so many halvings.
    """

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: Sequence[int] = (4, 4),
        img_channels: int = 3,
        width: int = 64,
        channel_max: int = 512,
        time_dim: int = 128,
        stages: str = "small",
        mbstd_group: int = 4,
        mbstd_channels: int = 1,
    ):
        super().__init__()
        self.resolution, self.img_channels, self.c_dim, self.time_dim = resolution, img_channels, 0, time_dim
        self.mbstd_group, self.mbstd_channels = mbstd_group, mbstd_channels
        units = [2, *STAGES[stages]]
        halves = [units[i + 1] > 2 for i in range(len(units) - 1)]
        if min(base) * resolution // 4 < 2 ** sum(halves):
            raise ValueError(f"pictures of resolution {resolution} cannot be halved {sum(halves)} times: take small")
        widths = [min(width * n, channel_max) for n in units]
        self.time = nn.ModuleList([drawn(nn.Linear(time_dim, time_dim)) for _ in range(2)])
        self.first = conv(2 * img_channels, widths[0], 1)
        self.blocks = nn.ModuleList(
            DownBlock(a, b, time_dim, down) for a, b, down in zip(widths[:-1], widths[1:], halves, strict=True)
        )
        self.final = conv(widths[-1] + mbstd_channels, widths[-1], scale=ALMOST_0)
        self.last = drawn(nn.Linear(widths[-1], 1))

    @property
    def score_layer(self) -> nn.Module:
        return self.last

    def as_trained(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of images as x_t and as x_{t+1}, for predictions of a step's cost."""
        return self(images, torch.zeros([len(images)], dtype=torch.long, device=images.device), images)

    def forward(self, x: torch.Tensor, t: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        e = self.time[1](F.leaky_relu(self.time[0](time_embedding(t, self.time_dim, x.dtype)), SLOPE))
        e = F.leaky_relu(e, SLOPE)
        h = self.first(torch.cat([x, x_next], dim=1))
        for block in self.blocks:
            h = block(h, e)
        if self.mbstd_channels:
            h = minibatch_stddev(h, min(self.mbstd_group, len(h)), self.mbstd_channels)
        return self.last(F.leaky_relu(self.final(h), SLOPE).sum(dim=[2, 3]))


def generator_kwargs(model: DDGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    return {
        "resolution": shape.resolution,
        "base": list(model.base),
        "img_channels": shape.img_channels,
        "z_dim": model.z_dim,
        "steps": model.steps,
        "beta_min": model.beta_min,
        "beta_max": model.beta_max,
        "width": model.width,
        "channel_max": model.channel_max,
        "multipliers": list(model.multipliers),
        "blocks_each": model.blocks,
        "attention_at": list(model.attention_at),
        "w_dim": model.w_dim,
        "mapping_layers": model.mapping_layers,
    }


def discriminator_kwargs(model: DDGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    return {
        "resolution": shape.resolution,
        "base": list(model.base),
        "img_channels": shape.img_channels,
        "width": model.d_width,
        "channel_max": model.channel_max,
        "time_dim": model.d_time_dim,
        "stages": model.d_stages,
        "mbstd_group": shape.mbstd_group,
        "mbstd_channels": model.mbstd_channels,
    }
