"""Loss-Sensitive GAN: D is trained until a generated image loses by its distance from a real one (Qi 2017,
"Loss-Sensitive Generative Adversarial Networks on Lipschitz Densities", with the cost of its section on GLS-GAN).

With L = -D, the loss that D gives an image, D minimises C(Delta(x, G(z)) + L(x) - L(G(z))), where Delta is the mean
absolute difference of the two images times `system.margin`, and C(a) = max(a, slope a). A slope of 0 gives LS-GAN, in
which pairs that are far enough apart no longer count; a slope of 1 gives WGAN. G minimises L(G(z)).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from stylegan_pg.config import Config, LossSensitiveConfig, TermConfig
from stylegan_pg.losses import Objective, per_image
from stylegan_pg.losses.objectives import wgan_d, wgan_g
from stylegan_pg.networks import Pair
from stylegan_pg.systems.base import Context, Step
from stylegan_pg.systems.gan import GAN


def distances(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The mean absolute difference [N] of the i-th images of two batches [N, C, H, W], without a gradient."""
    return (real - fake).detach().abs().flatten(1).mean(dim=1)


def margin_cost(real: torch.Tensor, fake: torch.Tensor, *, margins: torch.Tensor, slope: float) -> torch.Tensor:
    """max(a, slope a) with a = margin + D(G(z)) - D(x), of scores [N, ...] and margins [N]; of the scores' shape."""
    return F.leaky_relu(margins.reshape(-1, *[1] * (real.dim() - 1)) + fake - real, slope)


class LossSensitiveGAN(GAN):
    """A real and a generated image of the same condition meet, and their difference is the margin."""

    def __init__(self, config: Config, pair: Pair | None = None):
        super().__init__(config, pair)
        self.objective = Objective(wgan_g, wgan_d)

    @property
    def own(self) -> LossSensitiveConfig:
        assert isinstance(self.config.system, LossSensitiveConfig)
        return self.config.system

    def compare(self, x: Context, real: Any, fake: Any, images: Mapping[str, torch.Tensor]) -> torch.Tensor:
        margins = self.own.margin * distances(images["real"], images["fake"])
        return per_image(partial(margin_cost, margins=margins, slope=self.own.slope), real, fake)

    def meets(self, due: list[TermConfig]) -> bool:
        return True

    def constants(self, step: Step) -> Hashable:
        return self.own_constants(step)
