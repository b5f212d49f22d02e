"""Pictures with several attributes each, such as anime characters (Jin et al. 2017, "Towards the Automatic Anime
Characters Creation with Generative Adversarial Networks", section 4).

G is given attributes a, zeros and ones, which are drawn from those of the real images. D returns a score and a logit
for each attribute, and is not given attributes. Both sides add to what the objective asks for the binary cross entropy
of the attributes, summed over them, D also for generated images:

    L_D = w objective_d + BCE(x, a) + BCE(G(z, a), a) + penalty,    L_G = w objective_g + BCE(G(z, a), a)

w is the number of attributes by default, 34 in the paper. The penalty is the term `dragan` of `loss.terms`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from stylegan_pg.config import AnimeConfig, Config, TermConfig
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NetworkShape
from stylegan_pg.systems.base import Context, Values
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.heads import with_outputs
from stylegan_pg.systems.latents import Latents

REMEDY = (
    "pack a CSV of zeros and ones with a named column for each attribute (stylegan-pg pack --vector "
    "attributes=FILE.csv) and give data.conditional=true data.condition=attributes"
)


class Judgement(NamedTuple):
    scores: torch.Tensor  # [N, 1]
    attributes: torch.Tensor  # logits [N, attributes]


def attribute_loss(logits: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The sum [N] over the attributes of the binary cross entropy of logits [N, K] with zeros and ones [N, K]."""
    return F.binary_cross_entropy_with_logits(logits, a.to(logits.dtype), reduction="none").sum(dim=1)


def share_right(logits: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The share [N] of the attributes that logits [N, K] tell right."""
    return ((logits > 0) == (a > 0.5)).to(logits.dtype).mean(dim=1)


class Anime(GAN):
    """The system of a configuration with system.name=anime."""

    g_reports = (*GAN.g_reports, "attribute_loss_g")
    d_reports = (*GAN.d_reports, "attribute_loss_d", "attributes_right")

    @property
    def own(self) -> AnimeConfig:
        assert isinstance(self.config.system, AnimeConfig)
        return self.config.system

    @property
    def adversarial(self) -> float:
        """The factor w of the objective."""
        weight = self.own.adversarial_weight
        return float(self.form.c_dim) if weight is None else weight

    def use(self, config: Config) -> None:
        """
        Raises:
            UsageError: the run is not conditional.
        """
        super().use(config)
        if not config.data.conditional:
            raise UsageError(f"system.name=anime learns the attributes of pictures: {REMEDY}")

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        """
        Raises:
            UsageError: the conditions are no vectors of zeros and ones.
        """
        if conditions is not None and conditions.are_classes:
            raise UsageError(
                f"system.name=anime learns attributes, of which a picture may have several, and the condition is the "
                f"class: {REMEDY}"
            )
        if conditions is not None:
            odd = conditions.values[~np.isin(conditions.values, (0, 1))]
            if odd.size:
                raise UsageError(
                    f"system.name=anime learns attributes that are zeros and ones, and the vector {conditions.field} "
                    f"holds {odd[0]:g}: {REMEDY}"
                )
        super().build(form, conditions)

    def d_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        kwargs = super().d_kwargs(dataclasses.replace(form, c_dim=0))
        return with_outputs(self.pair.D, kwargs, form.c_dim, self.own.name, self.config.model.name)

    def judged(self, output: torch.Tensor) -> Judgement:
        return Judgement(output[:, :1], output[:, 1:])

    def generator_loss(self, x: Context, turn: str) -> Values:
        values = super().generator_loss(x, turn)
        return {**values, "loss": values["loss"] + (self.adversarial - 1) * values["loss_g"]}

    def discriminator_loss(self, x: Context, due: list[TermConfig]) -> Values:
        values = super().discriminator_loss(x, due)
        return {**values, "loss": values["loss"] + (self.adversarial - 1) * values["loss_d"]}

    def generator_heads(self, x: Context, latents: Latents, fake: Judgement) -> Values:
        assert latents.c is not None
        loss = attribute_loss(fake.attributes, latents.c)
        return {"loss": self.own.g_attribute_weight * loss, "attribute_loss_g": loss}

    def discriminator_heads(self, x: Context, latents: Latents, real: Judgement, fake: Judgement) -> Values:
        assert x.condition is not None
        assert latents.c is not None
        loss = attribute_loss(real.attributes, x.condition)
        both = loss + attribute_loss(fake.attributes, latents.c)
        right = share_right(real.attributes, x.condition)
        return {"loss": self.own.attribute_weight * both, "attribute_loss_d": loss, "attributes_right": right}
