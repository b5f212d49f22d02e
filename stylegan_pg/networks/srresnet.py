"""The generator and the discriminator of Jin et al. 2017 ("Towards the Automatic Anime Characters Creation with
Generative Adversarial Networks", figures 3 and 4), for any resolution and base grid.

G is the network of SRResNet (Ledig et al. 2017, "Photo-Realistic Single Image Super-Resolution"): residual blocks at
one low resolution, with a skip around all of them, and then stages that double the resolution by sub-pixel convolution.
D has residual blocks and strided convolutions, and no batch normalisation. With the defaults and a resolution of 128,
G's blocks work at 16x16 with 64 channels and three stages follow, and D's last features are 2x2 with 1024 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import SRResNetConfig
from stylegan_pg.networks.form import Form, NetworkShape
from stylegan_pg.networks.latent_law import LatentLaw
from stylegan_pg.networks.ranges import checked

SLOPE = 0.2  # of D's leaky ReLU
LAST_KERNEL = 9  # of G's layer to RGB


def initialize(net: nn.Module) -> None:
    """Draw weights from N(0, 1 / inputs of the layer), so that activations keep their size without normalisation;
    biases are 0. The four pixels that a sub-pixel convolution makes of one begin equal, so that images begin without a
    pattern of dots (Aitken et al. 2017, "Checkerboard artifact free sub-pixel convolution", section 2)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for stage in getattr(net, "stages", ()):
        weight = stage[0].weight.data
        weight.copy_(weight[::4].repeat_interleave(4, dim=0))


class Residual(nn.Module):
    """x + layers(x), and then an activation."""

    def __init__(self, *layers: nn.Module, act: Callable[[], nn.Module] = nn.Identity):
        super().__init__()
        self.layers, self.act = nn.Sequential(*layers), act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.layers(x))


def _conv(a: int, b: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, stride, (kernel - 1) // 2, bias=bias)


def _g_block(width: int) -> Residual:
    """A residual block of G, which ends without an activation (Ledig et al. 2017, figure 4)."""
    first, second = (_conv(width, width, bias=False) for _ in range(2))
    return Residual(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))


def _g_blocks(width: int, depth: int) -> Residual:
    """G's residual blocks, a batch normalisation, and the skip around them. The last block adds no bias, because that
    normalisation would subtract it again: its gradient would be rounding alone, which Adam magnifies."""
    blocks = [_g_block(width) for _ in range(depth)]
    for block in blocks[-1:]:
        block.layers[-1].register_parameter("bias", None)
    return Residual(*blocks, nn.BatchNorm2d(width))


def _d_block(width: int) -> nn.Module:
    """A residual block of D."""
    return Residual(_conv(width, width), _leaky(), _conv(width, width), act=_leaky)


def _leaky() -> nn.Module:
    return nn.LeakyReLU(SLOPE)


class Generator(nn.Module):
    """z [N, z_dim], c [N, c_dim] -> images [N, img_channels, *base * resolution / 4] in [-1, 1].

    Args:
        width: channels of all hidden layers. depth: residual blocks. start: resolution of the blocks, or that of the
            images if it is lower.
    """

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: tuple[int, int] = (4, 4),
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 128,
        width: int = 64,
        depth: int = 16,
        start: int = 16,
        latent: str = "normal",
    ):
        super().__init__()
        form, start = Form(resolution, base, img_channels, c_dim), min(start, resolution)
        self.resolution, self.img_channels, self.img_size = resolution, img_channels, form.size(resolution)
        self.z_dim, self.c_dim = z_dim, c_dim
        self.law = LatentLaw(z_dim, latent)
        rows, columns = form.size(start)
        self.first = nn.Sequential(
            nn.Linear(z_dim + c_dim, width * rows * columns, bias=False),
            nn.Unflatten(1, (width, rows, columns)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.blocks = _g_blocks(width, depth)
        self.stages = nn.Sequential()
        for _ in range((resolution // start).bit_length() - 1):
            up = (_conv(width, 4 * width, bias=False), nn.PixelShuffle(2), nn.BatchNorm2d(width), nn.ReLU())
            self.stages.append(nn.Sequential(*up))
        self.to_rgb = nn.Sequential(_conv(width, img_channels, LAST_KERNEL), nn.Tanh())
        initialize(self)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        z = self.law(z)
        if c is not None and self.c_dim:
            z = torch.cat([z, c.to(z.dtype)], dim=1)
        return self.to_rgb(self.stages(self.blocks(self.first(z))))


class Discriminator(nn.Module):
    """Images [N, img_channels, *base * resolution / 4] -> scores [N, 1], or, with more `outputs`, further numbers
    behind them for heads, [N, outputs].

    Conditions c [N, c_dim], which the published network does not take, are multiplied with the features (Miyato and
    Koyama 2018).

    Args:
        depth: residual blocks of each stage.
    """

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: tuple[int, int] = (4, 4),
        img_channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 2048,
        channel_max: int = 1024,
        depth: int = 2,
        outputs: int = 1,
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim, channel_base, channel_max)
        self.resolution, self.img_channels, self.c_dim = resolution, img_channels, c_dim
        rows, columns = form.size(resolution)
        width, r = img_channels, resolution
        self.main = nn.Sequential()
        while r > 2 and min(rows, columns) > 1:
            blocks = [_d_block(width) for _ in range(depth)] if r < resolution else []
            r, rows, columns = r // 2, rows // 2, columns // 2
            self.main.extend([*blocks, _conv(width, form.channels(r), 4, 2), _leaky()])
            width = form.channels(r)
        self.channels, self.feature_size = width, (rows, columns)
        self.last = nn.Linear(width * rows * columns, outputs)
        if c_dim:
            self.embed = nn.Linear(c_dim, width, bias=False)
        initialize(self)

    @property
    def score_layer(self) -> nn.Module:
        return self.last

    def features(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """What the last layer makes scores of: [N, channels, *feature_size]."""
        return self.main(images)

    def scores(self, features: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [N, 1] of features, or with further numbers behind them [N, outputs]."""
        result = self.last(features.flatten(1))
        if c is None or not self.c_dim:
            return result
        fit = (self.embed(c.to(features.dtype)) * features.sum(dim=[2, 3])).sum(dim=1, keepdim=True)
        return torch.cat([result[:, :1] + fit, result[:, 1:]], dim=1)

    def forward(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return self.scores(self.features(images, c), c)


def _common(model: SRResNetConfig, shape: NetworkShape) -> dict[str, Any]:
    return {
        "resolution": shape.resolution,
        "base": list(model.base),
        "img_channels": shape.img_channels,
        "c_dim": shape.c_dim,
    }


def generator_kwargs(model: SRResNetConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    how = {"width": model.g_channels, "depth": model.blocks, "start": model.start_resolution}
    return {**_common(model, shape), "z_dim": model.z_dim, "latent": model.latent, **how}


def discriminator_kwargs(model: SRResNetConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    how = {"channel_base": model.channel_base, "channel_max": model.channel_max, "depth": model.d_blocks}
    return {**_common(model, shape), **how}
