"""A creative adversarial network (Elgammal et al. 2017): art of no known style.

D tells real pictures from generated ones, and, with a head on the same features, the style of real pictures, which is
their class. G makes pictures that D takes for real, but whose style D cannot tell: it minimises the cross-entropy of
the uniform distribution and D's styles. G and D are DCGAN's, without conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stylegan_pg.config import CANConfig, Config
from stylegan_pg.data.classes import one_hot
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.errors import UsageError
from stylegan_pg.losses.removal import AMBIGUITIES, inspection
from stylegan_pg.networks import NetworkShape, style_head
from stylegan_pg.systems.base import Context, Values
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.latents import Latents


class CAN(GAN):
    """The system of a configuration with system.name=can."""

    g_reports = (*GAN.g_reports, "ambiguity")
    d_reports = (*GAN.d_reports, "style_loss")
    own: CANConfig
    styles: int = 2  # until a dataset was looked at, which a plan may not have

    def use(self, config: Config) -> None:
        super().use(config)
        assert isinstance(config.system, CANConfig)
        self.own = config.system
        self.pair = self.pair._replace(D=style_head.Discriminator)

    def look_at(self, index: DatasetIndex) -> None:
        """
        Raises:
            UsageError: pictures have no class.
        """
        bare = int((index.table(self.config.resolution).label < 0).sum())
        if bare or len(index.label_names) < 2:
            has = f"{bare} of {index.count} pictures in it have none" if index.label_names else "it has none"
            raise UsageError(
                f"system.name=can reads the styles of pictures from their classes, of which {index.path} needs two or "
                f"more, and {has if bare or not index.label_names else 'it has one'}: pack it with --labels (folders: "
                "a folder for each style), and with --unlabelled skip"
            )
        self.styles = len(index.label_names)

    def fields(self) -> Sequence[str]:
        return ["class"]

    def d_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        return super().d_kwargs(form) | {"styles": self.styles, "head_width": self.own.head_width}

    def discriminator_heads(self, x: Context, latents: Latents, real: Any, fake: Any) -> Values:
        """The cross-entropy of the styles of real pictures."""
        loss = inspection(real.styles, one_hot(x.field("class"), self.styles).to(real.styles.dtype))
        return {"loss": self.own.style_weight * loss, "style_loss": loss}

    def generator_heads(self, x: Context, latents: Latents, fake: Any) -> Values:
        """How far the styles that D sees in generated pictures are from none."""
        loss = AMBIGUITIES[self.own.ambiguity](fake.styles)
        return {"loss": self.own.ambiguity_weight * loss, "ambiguity": loss}


def entropy(styles: torch.Tensor) -> torch.Tensor:
    """The entropy [N] of D's styles, in nats, for logits [N, K]: ln K where it cannot tell, 0 where it is certain."""
    log_p = torch.log_softmax(styles, dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)
