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
from stylegan_pg.networks.minibatch import MinibatchScore
from stylegan_pg.networks.ranges import checked
from stylegan_pg.networks.virtual_norm import VirtualBatchNorm, normalized

SLOPE = 0.2  # of D's leaky ReLU
DEVIATION = 0.02  # of initial weights


def initialize(net: nn.Module) -> None:
    """Draw weights of convolutions from N(0, 0.02) and those of normalisations from N(1, 0.02), whose biases are 0
    (Radford et al. 2016, section 4)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, DEVIATION)
        elif isinstance(module, (nn.BatchNorm2d, VirtualBatchNorm)):
            nn.init.normal_(module.weight, 1.0, DEVIATION)
            nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """z [N, z_dim], c [N, c_dim] -> images [N, img_channels, *base * resolution / 4] in [-1, 1].

    With `normalization` "virtual" it keeps a reference batch of latents, which is drawn with its weights.
    """

    reference: torch.Tensor
    reference_c: torch.Tensor

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
        normalization: str = "batch",
        references: int = 64,
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim, channel_base, channel_max)
        self.resolution, self.img_channels, self.img_size = resolution, img_channels, form.size(resolution)
        self.z_dim, self.c_dim = z_dim, c_dim
        self.law = LatentLaw(z_dim, latent, categories, continuous)
        *hidden, _ = form.resolutions
        widths = [z_dim + c_dim, *(form.channels(r) for r in hidden), img_channels]
        self.main, plain = nn.Sequential(), normalization == "none"
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            how: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1} if i else {"kernel_size": form.size(4)}
            self.main.append(nn.ConvTranspose2d(a, b, **how, bias=plain and i < len(hidden)))
            if i < len(hidden):
                self.main.extend([normalized(normalization, b, references), nn.ReLU()])
        self.main.append(nn.Tanh())
        initialize(self)
        self.references = references if normalization == "virtual" else 0
        if self.references:
            self.register_buffer("reference", torch.randn(references, z_dim))
            if c_dim:
                self.register_buffer("reference_c", torch.zeros(references, c_dim))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        if self.references:
            z = torch.cat([self.reference.to(z.dtype), z])
            c = None if c is None or not self.c_dim else torch.cat([self.reference_c, c.to(z.dtype)])
        z = self.law(z)
        if c is not None and self.c_dim:
            z = torch.cat([z, c.to(z.dtype)], dim=1)
        return self.main(z[:, :, None, None])[self.references :]

    def refer(self, images: torch.Tensor, c: torch.Tensor | None) -> None:
        """Take the conditions [references, c_dim] of real pictures for the latents of the reference batch."""
        if c is not None:
            self.reference_c.copy_(c)


class Discriminator(nn.Module):
    """Images [N, img_channels, *base * resolution / 4] and c [N, c_dim] -> scores [N, 1].

    `label` says what becomes of c: "concatenation" with the image, or "projection" of the features.
    With `normalization` "virtual" it keeps a reference batch of real pictures (`refer`). `minibatch_kernels` add
    minibatch discrimination over groups of `mbstd_group` images.
    """

    reference: torch.Tensor
    reference_c: torch.Tensor

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
        normalization: str = "batch",
        references: int = 64,
        minibatch_kernels: int = 0,
        minibatch_dims: int = 5,
        mbstd_group: int = 4,
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim, channel_base, channel_max)
        self.resolution, self.img_channels, self.c_dim, self.label = resolution, img_channels, c_dim, label
        inputs = img_channels + (c_dim if label == "concatenation" else 0)
        widths = [inputs, *(form.channels(r) for r in reversed(form.resolutions[:-1])), 1]
        self.main, plain = nn.Sequential(), normalization == "none"
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            last = i == len(widths) - 2
            how: dict[str, Any] = (
                {"kernel_size": form.size(4)} if last else {"kernel_size": 4, "stride": 2, "padding": 1}
            )
            self.main.append(nn.Conv2d(a, b, **how, bias=plain and i > 0 and not last))
            if not last:
                self.main.extend([normalized(normalization, b, references)] if i else [])
                self.main.append(nn.LeakyReLU(SLOPE))
        self.channels = widths[-2]  # of the features
        self.feature_size = form.size(4)
        initialize(self)
        if c_dim and label == "projection":
            self.embed = nn.Linear(c_dim, self.channels, bias=False)
            nn.init.normal_(self.embed.weight, 0.0, DEVIATION)
        self.has_minibatch = minibatch_kernels > 0
        if self.has_minibatch:
            size = self.channels * self.feature_size[0] * self.feature_size[1]
            self.minibatch = MinibatchScore(size, minibatch_kernels, minibatch_dims, mbstd_group)
        self.references = references if normalization == "virtual" else 0
        if self.references:
            self.register_buffer("reference", torch.zeros(references, img_channels, *form.size(resolution)))
            if c_dim:
                self.register_buffer("reference_c", torch.zeros(references, c_dim))

    @property
    def score_layer(self) -> nn.Module:
        return self.main[-1]

    def refer(self, images: torch.Tensor, c: torch.Tensor | None) -> None:
        """Take real pictures [references, C, H, W], and their conditions, as the reference batch."""
        self.reference.copy_(images)
        if c is not None:
            self.reference_c.copy_(c)

    def features(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """What the last layer makes scores of: [N, channels, *base]."""
        if self.references:
            images = torch.cat([self.reference.to(images.dtype), images])
            c = None if c is None or not self.c_dim else torch.cat([self.reference_c, c.to(images.dtype)])
        if self.label == "concatenation" and c is not None:
            planes = c.to(images.dtype)[:, :, None, None].expand(-1, -1, *images.shape[2:])
            images = torch.cat([images, planes], dim=1)
        return self.main[:-1](images)[self.references :]

    def scores(self, features: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [N, 1] of features."""
        score = self.main[-1](features).flatten(1)
        if self.has_minibatch:
            score = score + self.minibatch(features)
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
        "normalization": model.normalization,
        "references": model.references,
    }


def generator_kwargs(model: DCGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    return {**_common(model, shape), "z_dim": model.z_dim, "latent": model.latent}


def discriminator_kwargs(model: DCGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    minibatch = {"minibatch_kernels": model.minibatch_kernels, "minibatch_dims": model.minibatch_dims}
    return {**_common(model, shape), "label": model.label, **minibatch, "mbstd_group": shape.mbstd_group}
