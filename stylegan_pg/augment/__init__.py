"""Augmentation of the real and generated images that D receives, in two steps.

Every rank draws the parameters of the global batch from a stream seeded by (seed, nimg), and applies those of its own
images. So the augmentation of an image does not depend on how the batch was dealt out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stylegan_pg.augment import ada, diffaugment
from stylegan_pg.config import AugmentConfig, DiffAugmentConfig, PipelineConfig
from stylegan_pg.ops.reference import in_layout_of

Params = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Augment:
    """The augmentation of a configuration whose mode is not "none"."""

    config: PipelineConfig | DiffAugmentConfig

    def draw(self, count: int, p: float, generator: torch.Generator, size: tuple[int, int]) -> Params:
        """Draw the parameters of `count` images of `size` (height, width), tensors [count, ...] on the CPU. DiffAugment
        ignores p."""
        if isinstance(self.config, DiffAugmentConfig):
            return diffaugment.draw(self.config.policy, count, generator, size)
        return ada.draw(self.config.pipeline, count, p, generator, size, self.config.multipliers)

    def instructions(self, params: Params, size: tuple[int, int], channels: int) -> Params:
        """What `perform` needs of drawn parameters, for images of this size and number of channels; on the CPU, with a
        row for each image."""
        return params if isinstance(self.config, DiffAugmentConfig) else ada.instructions(params, size, channels)

    def perform(self, images: torch.Tensor, how: Params) -> torch.Tensor:
        """Augment images; the result has the same shape, dtype, device and layout and is twice differentiable.

        Args:
            images: [N, C, H, W] in about [-1, 1], with 1 to 4 channels: grey or RGB, with or without alpha.
            how: instructions of N rows, on the device of the images.
        """
        half = images.dtype in (torch.float16, torch.bfloat16)
        perform = diffaugment.perform if isinstance(self.config, DiffAugmentConfig) else ada.perform
        planes = images.contiguous()  # resampling is faster in this layout, several times on CPUs
        return in_layout_of(images, perform(planes.float() if half else planes, how).to(images.dtype))

    def apply(self, images: torch.Tensor, params: Params) -> torch.Tensor:
        """Augment images as drawn parameters of N rows say, see `perform`."""
        how = self.instructions(params, (images.shape[2], images.shape[3]), images.shape[1])
        return self.perform(images, {name: t.to(images.device) for name, t in how.items()})


def make(config: AugmentConfig) -> Augment | None:
    """The augmentation of a configuration, None if its mode is "none"."""
    return Augment(config) if isinstance(config, PipelineConfig | DiffAugmentConfig) else None


def pick(params: Params, indices: list[int]) -> Params:
    """The rows of some images of the batch, for `apply`."""
    return {k: v[indices] for k, v in params.items()}


def adjust(p: float, sign: float, batch: int, interval: int, target: float, kimg: float) -> float:
    """ADA's next p: it increases if r_t is above the target, which indicates overfitting, and decreases if it is below
    (Karras et al. 2020, ADA, section 3.1).

    Args:
        p: present probability, in [0, 1].
        sign: r_t, the mean of sign(D(real)) since the last adjustment, in [-1, 1].
        batch: images per step.
        interval: steps between adjustments.
        target: the value that r_t should have.
        kimg: thousands of images within which p can change from 0 to 1.
    """
    step = batch * interval / (kimg * 1000)
    return min(max(p + step * ((sign > target) - (sign < target)), 0.0), 1.0)
