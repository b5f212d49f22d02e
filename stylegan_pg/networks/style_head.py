"""DCGAN's discriminator with a head that tells the style of a picture (Elgammal et al. 2017, section 3.3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from stylegan_pg.networks import dcgan


class Judgement(NamedTuple):
    """What the discriminator says of images."""

    scores: torch.Tensor  # [N, 1]
    styles: torch.Tensor  # logits [N, styles]


class Discriminator(dcgan.Discriminator):
    """Images [N, img_channels, H, W] -> Judgement. The head has one hidden layer on the features that scores are made
    of, and so has the form of the published one, whose hidden layers have 1024 and 512 units.

    Args:
        styles: number of styles. head_width: hidden units of the head. kwargs: those of DCGAN's discriminator.
    """

    def __init__(self, *, styles: int, head_width: int, **kwargs: Any):
        super().__init__(**kwargs)
        rows, columns = self.feature_size
        self.style = nn.Sequential(
            nn.Flatten(),
            nn.Linear(self.channels * rows * columns, head_width),
            nn.LeakyReLU(dcgan.SLOPE),
            nn.Linear(head_width, styles),
        )

    def forward(self, images: torch.Tensor, c: torch.Tensor | None = None) -> Judgement:  # type: ignore[override]
        features = self.features(images, c)
        return Judgement(self.scores(features, c), self.style(features))
