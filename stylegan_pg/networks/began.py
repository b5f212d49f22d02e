"""The generator and the autoencoder of BEGAN (Berthelot et al. 2017, section 3.5), for any resolution and base grid.

All convolutions are 3x3 with ELU. The encoder has n, 2 n, 3 n, ... channels from the highest resolution down to 8x8,
and a dense layer makes the code. The decoder has n channels everywhere and enlarges pictures by repeating pixels. The
generator has the decoder's form. Both end in a convolution without activation; the skip connections and the vanishing
residuals that the paper mentions as options are left out.

The discriminator's score of a picture is its energy, the error of its reconstruction (Zhao et al. 2017, section 2).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stylegan_pg.config import BEGANConfig
from stylegan_pg.networks.form import Form, NetworkShape
from stylegan_pg.networks.latent_law import LatentLaw
from stylegan_pg.networks.ranges import checked

SMALLEST = 8  # the resolution that codes are made of


class Energy(NamedTuple):
    """What the discriminator makes of pictures."""

    scores: torch.Tensor  # [N, 1], the errors of their reconstructions
    code: torch.Tensor  # [N, code_dim]


def energy_of(images: torch.Tensor, decoded: torch.Tensor, kind: str) -> torch.Tensor:
    """The energy [N] of images [N, C, H, W] with the reconstruction `decoded`: the mean absolute difference
    ("absolute", Berthelot et al. 2017, section 3.1), the mean squared one ("squared"), or its Euclidean norm ("norm",
    Zhao et al. 2017, equation 8), whose derivative is 0 where it is 0."""
    difference = (images - decoded).flatten(1)
    if kind == "norm":
        return torch.linalg.vector_norm(difference, dim=1)
    return (difference.abs() if kind == "absolute" else difference.square()).mean(dim=1)


class Decoder(nn.Module):
    """Codes [N, size] -> images [N, img_channels, *form.size(form.resolution)], not limited to a range."""

    def __init__(self, form: Form, size: int, width: int):
        super().__init__()
        resolutions = [r for r in form.resolutions if r >= SMALLEST] or form.resolutions
        rows, columns = form.size(resolutions[0])
        self.first = nn.Linear(size, width * rows * columns)
        self.unflatten = nn.Unflatten(1, (width, rows, columns))
        self.layers = nn.Sequential()
        for r in resolutions:
            if r > resolutions[0]:
                self.layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(2):
                self.layers.extend([nn.Conv2d(width, width, 3, padding=1), nn.ELU()])
        self.layers.append(nn.Conv2d(width, form.img_channels, 3, padding=1))

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        return self.layers(self.unflatten(self.first(code)))


class Encoder(nn.Module):
    """Images [N, img_channels, *form.size(form.resolution)] -> codes [N, size]."""

    def __init__(self, form: Form, size: int, width: int, most: int):
        super().__init__()
        stages = len([r for r in form.resolutions if r >= SMALLEST]) or 1
        widths = [min(width * i, most) for i in range(1, stages + 1)]
        self.layers = nn.Sequential(nn.Conv2d(form.img_channels, widths[0], 3, padding=1), nn.ELU())
        for i, (a, b) in enumerate(itertools.pairwise([widths[0], *widths])):
            stride = 2 if i < stages - 1 else 1
            self.layers.extend([nn.Conv2d(a, b, 3, padding=1), nn.ELU()])
            self.layers.extend([nn.Conv2d(b, b, 3, stride=stride, padding=1), nn.ELU()])
        rows, columns = form.size(form.resolution >> (stages - 1))
        self.last = nn.Linear(widths[-1] * rows * columns, size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(images).flatten(1))


class Generator(nn.Module):
    """z [N, z_dim] -> images [N, img_channels, *base * resolution / 4] in about [-1, 1]."""

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: Sequence[int] = (4, 4),
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 64,
        width: int = 64,
        channel_max: int = 512,
        latent: str = "normal",
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim)
        self.resolution, self.img_channels, self.img_size = resolution, img_channels, form.size(resolution)
        self.z_dim, self.c_dim = z_dim, c_dim
        self.law = LatentLaw(z_dim, latent)
        self.decoder = Decoder(form, z_dim + c_dim, min(width, channel_max))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        z = self.law(z)
        return self.decoder(z if c is None or not self.c_dim else torch.cat([z, c.to(z.dtype)], dim=1))


class Discriminator(nn.Module):
    """Images [N, img_channels, *base * resolution / 4] -> their energies [N, 1] and codes [N, code_dim].

    A condition c [N, c_dim] is concatenated with the code, so that a picture which does not fit it is decoded worse.
    """

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: Sequence[int] = (4, 4),
        img_channels: int = 3,
        c_dim: int = 0,
        code_dim: int = 64,
        width: int = 64,
        channel_max: int = 512,
        energy: str = "absolute",
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim)
        self.resolution, self.img_channels, self.c_dim, self.energy = resolution, img_channels, c_dim, energy
        self.encoder = Encoder(form, code_dim, width, channel_max)
        self.decoder = Decoder(form, code_dim + c_dim, min(width, channel_max))

    @property
    def score_layer(self) -> nn.Module:
        """The decoder, whose input is the code."""
        return self.decoder

    def decode(self, code: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Images of codes [N, code_dim]."""
        return self.decoder(code if c is None or not self.c_dim else torch.cat([code, c.to(code.dtype)], dim=1))

    def forward(self, images: torch.Tensor, c: torch.Tensor | None = None) -> Energy:
        code = self.encoder(images)
        return Energy(energy_of(images, self.decode(code, c), self.energy)[:, None], code)


def _common(model: BEGANConfig, shape: NetworkShape) -> dict[str, Any]:
    return {
        "resolution": shape.resolution,
        "base": list(model.base),
        "img_channels": shape.img_channels,
        "c_dim": shape.c_dim,
        "width": model.width,
        "channel_max": model.channel_max,
    }


def generator_kwargs(model: BEGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    return {**_common(model, shape), "z_dim": model.z_dim, "latent": model.latent}


def discriminator_kwargs(model: BEGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    return {**_common(model, shape), "code_dim": model.code_dim or model.z_dim, "energy": model.energy}
