"""DCGAN's generator and discriminator: transposed and strided convolutions with batch normalisation (Radford et al.
2016), with the layers and names of PyTorch's published example, for any resolution and any base grid.

With a `channel_base` of 2048, a resolution of 64 and 100 latents these have the example's 3,576,704 and 2,765,568
parameters. Layers are at `main.{i}`; what lies between them (activations) has no parameters. A label is concatenated
with the latents in G; in D it is concatenated with the picture as constant planes, or its embedding is multiplied with
the features (Miyato and Koyama 2018).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import DCGANConfig
from stylegan_pg.networks.form import Form, NetworkShape
from stylegan_pg.networks.latent_law import LatentLaw
from stylegan_pg.networks.ranges import checked

SLOPE = 0.2  # of D's leaky ReLU
DEVIATION = 0.02  # of initial weights


def initialize(net: nn.Module) -> None:
    """Draw weights of convolutions from N(0, 0.02) and those of normalisations from N(1, 0.02), whose biases are 0
    (Radford et al. 2016, section 4)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, DEVIATION)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, DEVIATION)
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """z [N, z_dim], c [N, c_dim] -> images [N, img_channels, *base * resolution / 4] in [-1, 1]."""

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: Sequence[int] = (4, 4),
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 100,
        channel_base: int = 2048,
        channel_max: int = 512,
        latent: str = "normal",
        categories: Sequence[int] = (),
        continuous: int = 0,
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim, channel_base, channel_max)
        self.resolution, self.img_channels, self.img_size = resolution, img_channels, form.size(resolution)
        self.z_dim, self.c_dim = z_dim, c_dim
        self.law = LatentLaw(z_dim, latent, categories, continuous)
        *hidden, _ = form.resolutions
        widths = [z_dim + c_dim, *(form.channels(r) for r in hidden), img_channels]
        self.main = nn.Sequential()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            how = {"kernel_size": 4, "stride": 2, "padding": 1} if i else {"kernel_size": form.size(4)}
            self.main.append(nn.ConvTranspose2d(a, b, **how, bias=False))
            if i < len(hidden):
                self.main.extend([nn.BatchNorm2d(b), nn.ReLU()])
        self.main.append(nn.Tanh())
        initialize(self)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        z = self.law(z)
        if c is not None and self.c_dim:
            z = torch.cat([z, c.to(z.dtype)], dim=1)
        return self.main(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images [N, img_channels, *base * resolution / 4] and c [N, c_dim] -> scores [N, 1].

    `label` says what becomes of c: "concatenation" with the image, or "projection" of the features.
    """

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: Sequence[int] = (4, 4),
        img_channels: int = 3,
        c_dim: int = 0,
        channel_base: int = 2048,
        channel_max: int = 512,
        label: str = "projection",
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim, channel_base, channel_max)
        self.resolution, self.img_channels, self.c_dim, self.label = resolution, img_channels, c_dim, label
        inputs = img_channels + (c_dim if label == "concatenation" else 0)
        widths = [inputs, *(form.channels(r) for r in reversed(form.resolutions[:-1])), 1]
        self.main = nn.Sequential()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            last = i == len(widths) - 2
            how = {"kernel_size": form.size(4)} if last else {"kernel_size": 4, "stride": 2, "padding": 1}
            self.main.append(nn.Conv2d(a, b, **how, bias=False))
            if not last:
                self.main.extend([nn.BatchNorm2d(b)] if i else [])
                self.main.append(nn.LeakyReLU(SLOPE))
        self.channels = widths[-2]  # of the features
        self.feature_size = form.size(4)
        initialize(self)
        if c_dim and label == "projection":
            self.embed = nn.Linear(c_dim, self.channels, bias=False)
            nn.init.normal_(self.embed.weight, 0.0, DEVIATION)

    def features(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """What the last layer makes scores of: [N, channels, *base]."""
        if self.label == "concatenation" and c is not None:
            planes = c.to(images.dtype)[:, :, None, None].expand(-1, -1, *images.shape[2:])
            images = torch.cat([images, planes], dim=1)
        return self.main[:-1](images)

    def scores(self, features: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [N, 1] of features."""
        score = self.main[-1](features).flatten(1)
        if c is None or self.label != "projection" or not self.c_dim:
            return score
        return score + (self.embed(c.to(features.dtype)) * features.sum(dim=[2, 3])).sum(dim=1, keepdim=True)

    def forward(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return self.scores(self.features(images, c), c)


def _common(model: DCGANConfig, shape: NetworkShape) -> dict[str, Any]:
    return {
        "resolution": shape.resolution,
        "base": list(model.base),
        "img_channels": shape.img_channels,
        "c_dim": shape.c_dim,
        "channel_base": model.channel_base,
        "channel_max": model.channel_max,
    }


def generator_kwargs(model: DCGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    return {**_common(model, shape), "z_dim": model.z_dim, "latent": model.latent}


def discriminator_kwargs(model: DCGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    return {**_common(model, shape), "label": model.label}
