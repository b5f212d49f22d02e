"""An encoder and a decoder of pictures, and an inspector that tries to read something from their codes.

The generator is both: `encode` turns pictures into codes, and the forward pass turns codes and conditions into pictures
again, as the decoder of Fader Networks does (Lample et al. 2017). Batch normalisation without parameters gives each
number of a code the mean 0 and the variance 1, so that N(0, 1) is a code, too, and everything that works with latents
works with codes. The discriminator is the inspector.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import CodesConfig
from stylegan_pg.networks import dcgan, mlp
from stylegan_pg.networks.form import Form, NetworkShape
from stylegan_pg.networks.ranges import checked

SLOPE = 0.2  # of leaky ReLUs
EPSILON = 1e-8  # of the normalisation: what the encoder gives before training varies by 1e-2 only


class Generator(nn.Module):
    """z [N, z_dim], c [N, c_dim] -> images [N, img_channels, *base * resolution / 4] in [-1, 1]; and `encode`.

    The encoder has a strided convolution for each halving and a last one over the base grid; the decoder is DCGAN's
    generator.

    Args:
        kept: numbers that `read` finds in a code; 0: none.
    """

    kept_mean: torch.Tensor
    kept_deviation: torch.Tensor

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        base: Sequence[int] = (4, 4),
        img_channels: int = 3,
        c_dim: int = 0,
        z_dim: int = 64,
        channel_base: int = 2048,
        channel_max: int = 512,
        kept: int = 0,
    ):
        super().__init__()
        form = Form(resolution, base, img_channels, c_dim, channel_base, channel_max)
        self.resolution, self.img_channels, self.img_size = resolution, img_channels, form.size(resolution)
        self.z_dim, self.c_dim = z_dim, c_dim
        widths = [img_channels, *(form.channels(r) for r in reversed(form.resolutions[:-1]))]
        self.encoder = nn.Sequential()
        for a, b in itertools.pairwise(widths):
            self.encoder.extend([nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(SLOPE)])
        self.encoder.append(nn.Conv2d(widths[-1], z_dim, form.size(4), bias=False))  # the normalisation takes it off
        self.normal = nn.BatchNorm1d(z_dim, eps=EPSILON, affine=False)
        self.decoder = dcgan.Generator(
            resolution=resolution,
            base=base,
            img_channels=img_channels,
            c_dim=c_dim,
            z_dim=z_dim,
            channel_base=channel_base,
            channel_max=channel_max,
        )
        if kept:
            self.kept = nn.Linear(z_dim, kept)
            self.register_buffer("kept_mean", torch.zeros([kept]))
            self.register_buffer("kept_deviation", torch.ones([kept]))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The codes [N, z_dim] of images [N, img_channels, H, W] in [-1, 1]."""
        return self.normal(self.encoder(images).flatten(1))

    def read(self, codes: torch.Tensor) -> torch.Tensor:
        """The kept field [N, kept] as it stands in codes [N, z_dim], in the field's own units; of a generator with
        `kept` above 0."""
        return self.kept(codes) * self.kept_deviation + self.kept_mean

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return self.decoder(z, c)


class Discriminator(nn.Module):
    """Codes [N, z_dim] -> what the inspector believes of the condition, [N, c_dim]: logits of classes, or a vector."""

    judges_codes = True

    @checked
    def __init__(self, *, z_dim: int = 64, c_dim: int = 1, width: int = 256, hidden: int = 2):
        super().__init__()
        self.z_dim, self.c_dim = z_dim, c_dim
        self.layers = mlp.layers([z_dim, *[width] * hidden, max(c_dim, 1)], nn.LeakyReLU(SLOPE))

    def forward(self, codes: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """`c` is what it should find out, and is ignored."""
        return self.layers(codes)


def generator_kwargs(model: CodesConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    return {
        "resolution": shape.resolution,
        "base": list(model.base),
        "img_channels": shape.img_channels,
        "c_dim": shape.c_dim,
        "z_dim": model.z_dim,
        "channel_base": model.channel_base,
        "channel_max": model.channel_max,
    }


def discriminator_kwargs(model: CodesConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    return {"z_dim": model.z_dim, "c_dim": shape.c_dim, "width": model.d_width, "hidden": model.d_layers}
