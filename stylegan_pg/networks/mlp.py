"""A small pair of multi-layer perceptrons for points, or for pictures of any size as vectors.

They show the effect of objectives on toy data, with the same trainer as the large networks. They do not grow.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import MLPConfig
from stylegan_pg.networks import growing
from stylegan_pg.networks.form import Form, NetworkShape
from stylegan_pg.networks.latent_law import LatentLaw
from stylegan_pg.networks.minibatch import MinibatchScore
from stylegan_pg.networks.ranges import checked

SLOPE = 0.2  # of D's leaky ReLU


def layers(sizes: list[int], act: nn.Module) -> nn.Sequential:
    """Dense layers from sizes[0] to sizes[-1] features, [N, first] -> [N, last], with `act` between them."""
    dense = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in dense[:-1] for part in (layer, act)), dense[-1])


class Mapping(nn.Module):
    """Concatenates z [N, z_dim], transformed to its law, and the label [N, c_dim] (or None) to w [N, z_dim + c_dim]."""

    w_avg: torch.Tensor

    def __init__(self, law: LatentLaw, w_dim: int):
        super().__init__()
        self.law = law
        self.register_buffer("w_avg", torch.zeros([w_dim]))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        z = self.law(z)
        return z if c is None else torch.cat([z, c.to(z.dtype)], dim=1)


class Synthesis(nn.Module):
    """ws [N, 1, w_dim] -> images [N, C, H, W], without noise inputs or fades."""

    num_ws = 1

    def __init__(self, sizes: list[int], img_shape: tuple[int, int, int]):
        super().__init__()
        self.img_shape = img_shape
        self.layers = layers(sizes, nn.ReLU())

    def forward(
        self,
        ws: torch.Tensor,
        *,
        alpha: float | torch.Tensor = 1.0,
        noise: str = "const",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        return self.layers(ws[:, 0]).reshape(-1, *self.img_shape)


class Generator(growing.Generator):
    """z [N, z_dim] -> images [N, img_channels, *img_size], not limited to a range."""

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        img_size: tuple[int, int] = (1, 1),
        img_channels: int = 2,
        z_dim: int = 512,
        c_dim: int = 0,
        width: int = 128,
        hidden: int = 3,
        latent: str = "normal",
        categories: Sequence[int] = (),
        continuous: int = 0,
    ):
        law = LatentLaw(z_dim, latent, categories, continuous)
        w_dim, rows, columns = z_dim + c_dim, *img_size
        synthesis = Synthesis([w_dim, *[width] * hidden, img_channels * rows * columns], (img_channels, rows, columns))
        super().__init__(Form(4, img_size, img_channels, c_dim), z_dim, w_dim, Mapping(law, w_dim), synthesis)
        self.resolution = resolution  # only a label; img_size is the size of the pictures

    @property
    def law(self) -> LatentLaw:
        """What becomes of z first."""
        return self.mapping.law


class Discriminator(nn.Module):
    """Images [N, img_channels, *img_size] and c [N, c_dim], concatenated -> scores [N, 1]; with more `outputs`,
    further numbers behind them, [N, outputs], for heads.

    `minibatch_kernels` add minibatch discrimination over groups of `mbstd_group` images.
    """

    filter: torch.Tensor

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        img_size: tuple[int, int] = (1, 1),
        img_channels: int = 2,
        c_dim: int = 0,
        width: int = 128,
        hidden: int = 3,
        outputs: int = 1,
        minibatch_kernels: int = 0,
        minibatch_dims: int = 5,
        mbstd_group: int = 4,
    ):
        super().__init__()
        self.resolution, self.img_channels, self.c_dim = resolution, img_channels, c_dim
        self.register_buffer("filter", torch.ones([1, 1]), persistent=False)  # nothing fades
        sizes = [img_channels * img_size[0] * img_size[1] + c_dim, *[width] * hidden, outputs]
        self.layers = layers(sizes, nn.LeakyReLU(SLOPE))
        self.has_minibatch = minibatch_kernels > 0
        if self.has_minibatch:
            self.minibatch = MinibatchScore(sizes[-2], minibatch_kernels, minibatch_dims, mbstd_group)

    @property
    def score_layer(self) -> nn.Module:
        return self.layers[-1]

    def forward(
        self, img: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float | torch.Tensor = 1.0, batches: int = 1
    ) -> torch.Tensor:
        """Images of one of several `batches` meet in minibatch discrimination only, if there is any."""
        x = img.flatten(1)
        x = x if c is None or not self.c_dim else torch.cat([x, c.to(x.dtype)], dim=1)
        if not self.has_minibatch:
            return self.layers(x)
        features = self.layers[:-1](x)
        return self.score_layer(features) + self.minibatch(features, batches)


def _common(model: MLPConfig, shape: NetworkShape) -> dict[str, Any]:
    """The width is model.channel_max, the number of hidden layers model.mapping_layers."""
    return {
        "resolution": shape.resolution,
        "img_size": [side * shape.resolution // 4 for side in model.base],
        "img_channels": shape.img_channels,
        "c_dim": shape.c_dim,
        "width": model.channel_max,
        "hidden": model.mapping_layers,
    }


def discriminator_kwargs(model: MLPConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    minibatch = {"minibatch_kernels": model.minibatch_kernels, "minibatch_dims": model.minibatch_dims}
    return {**_common(model, shape), **minibatch, "mbstd_group": shape.mbstd_group}


def generator_kwargs(model: MLPConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, of the same width and depth."""
    return {**_common(model, shape), "z_dim": model.z_dim, "latent": model.latent}
