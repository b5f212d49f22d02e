"""Augmentation of what D sees, real and generated alike, in two steps.

Parameters are drawn for the global batch from (seed, nimg) by every rank, which then picks its rows and applies them:
what an image becomes does not depend on how a batch was dealt out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stylegan_pg.augment import ada, diffaugment
from stylegan_pg.config import AugmentConfig
from stylegan_pg.ops.reference import in_layout_of

Params = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Augment:
    """What a configuration with a mode other than "none" asks for."""

    config: AugmentConfig

    def draw(self, count: int, p: float, generator: torch.Generator, size: tuple[int, int]) -> Params:
        """Parameters of `count` images of `size` (height, width), each tensor [count, ...] on the CPU; DiffAugment
        knows no p."""
        if self.config.mode == "diffaugment":
            return diffaugment.draw(self.config.policy, count, generator, size)
        return ada.draw(self.config.pipeline, count, p, generator, size)

    def apply(self, images: torch.Tensor, params: Params) -> torch.Tensor:
        """Images [N, C, H, W] of about [-1, 1] (1 to 4 channels: grey or RGB, with or without alpha), changed by
        parameters of N rows: same shape, dtype, device and layout, twice differentiable.

        Parameters stay on the CPU, where they decide what there is to do.
        """
        half = images.dtype in (torch.float16, torch.bfloat16)
        apply = diffaugment.apply if self.config.mode == "diffaugment" else ada.apply
        planes = images.contiguous()  # in which resampling is faster, on CPUs several times
        return in_layout_of(images, apply(planes.float() if half else planes, params).to(images.dtype))


def make(config: AugmentConfig) -> Augment | None:
    """The augmentation of a configuration, None where there is none."""
    return None if config.mode == "none" else Augment(config)


def pick(params: Params, indices: list[int]) -> Params:
    """The rows of some images of the batch, for `apply`."""
    return {k: v[indices] for k, v in params.items()}


def adjust(p: float, sign: float, batch: int, interval: int, target: float, kimg: float) -> float:
    """The controller's next p: a step towards more if D's scores of real images are too sure of it, else towards less
    (Karras et al. 2020, ADA, section 3.1).

    Args:
        p: probability up to now, in [0, 1].
        sign: r_t, the mean of sign(D(real)) since the last adjustment, in [-1, 1].
        batch: images per step.
        interval: steps between adjustments.
        target: value of r_t that is aimed at.
        kimg: thousands of images over which p can go from 0 to 1.
    """
    step = batch * interval / (kimg * 1000)
    return min(max(p + step * ((sign > target) - (sign < target)), 0.0), 1.0)
