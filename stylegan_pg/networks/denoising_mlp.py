"""Multi-layer perceptrons for a denoising diffusion GAN of points, or of pictures of any size as vectors.

The step t is given to both networks as one of T numbers that is 1, the others being 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import DDGANPointsConfig
from stylegan_pg.networks.diffusion import Diffusion, ReverseChain
from stylegan_pg.networks.form import NetworkShape
from stylegan_pg.networks.mlp import SLOPE, layers
from stylegan_pg.networks.ranges import checked


def one_of(t: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Steps t [N] -> [N, steps], 1 at t and 0 elsewhere."""
    return nn.functional.one_hot(t, steps).to(dtype)


class Denoiser(nn.Module):
    """x_{t+1} [N, C, H, W], t [N], z [N, z_dim] -> x_0 [N, C, H, W], not limited to a range."""

    def __init__(self, steps: int, z_dim: int, shape: tuple[int, int, int], width: int, hidden: int):
        super().__init__()
        self.steps, self.shape, size = steps, shape, math.prod(shape)
        self.layers = layers([size + steps + z_dim, *[width] * hidden, size], nn.ReLU())

    def forward(self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        given = torch.cat([x.flatten(1), one_of(t, self.steps, x.dtype), z.to(x.dtype)], dim=1)
        return self.layers(given).unflatten(1, self.shape)


class Generator(ReverseChain):
    """z [N, z_dim] -> images [N, img_channels, *img_size]; see ReverseChain for z. `z_dim` is that of each step."""

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        img_size: tuple[int, int] = (1, 1),
        img_channels: int = 2,
        z_dim: int = 16,
        steps: int = 4,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        width: int = 128,
        hidden: int = 3,
    ):
        shape = (img_channels, *img_size)
        denoiser = Denoiser(steps, z_dim, shape, width, hidden)
        super().__init__(denoiser, Diffusion(steps, beta_min, beta_max), z_dim, shape)
        self.resolution = resolution


class Discriminator(nn.Module):
    """x_t and x_{t+1} [N, img_channels, *img_size] and t [N] -> scores [N, 1]."""

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        img_size: tuple[int, int] = (1, 1),
        img_channels: int = 2,
        steps: int = 4,
        width: int = 128,
        hidden: int = 3,
    ):
        super().__init__()
        self.resolution, self.img_channels, self.c_dim, self.steps = resolution, img_channels, 0, steps
        size = img_channels * img_size[0] * img_size[1]
        self.layers = layers([2 * size + steps, *[width] * hidden, 1], nn.LeakyReLU(SLOPE))

    @property
    def score_layer(self) -> nn.Module:
        return self.layers[-1]

    def as_trained(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of images as x_t and as x_{t+1}, for predictions of a step's cost."""
        return self(images, torch.zeros([len(images)], dtype=torch.long, device=images.device), images)

    def forward(self, x: torch.Tensor, t: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x.flatten(1), x_next.flatten(1), one_of(t, self.steps, x.dtype)], dim=1))


def discriminator_kwargs(model: DDGANPointsConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values: the width is model.channel_max, the number of hidden layers
    model.mapping_layers."""
    return {
        "resolution": shape.resolution,
        "img_size": [side * shape.resolution // 4 for side in model.base],
        "img_channels": shape.img_channels,
        "steps": model.steps,
        "width": model.channel_max,
        "hidden": model.mapping_layers,
    }


def generator_kwargs(model: DDGANPointsConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, of the same width and depth."""
    own = {"z_dim": model.z_dim, "beta_min": model.beta_min, "beta_max": model.beta_max}
    return {**discriminator_kwargs(model, shape), **own}
