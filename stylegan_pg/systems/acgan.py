"""AC-GAN: G is given classes, and D tells them (Odena et al. 2017, "Conditional Image Synthesis with Auxiliary
Classifier GANs"); also the K + 1 classes of Salimans et al. 2016 ("Improved Techniques for Training GANs", section 5).

D is not given the class of an image. With `system.classifier=auxiliary` it returns a score and K logits, and both sides
add the cross entropy of the class to what the objective asks for, D also for generated images:

    L_D = objective_d + weight * (CE(x, c) + CE(G(z, c), c)),    L_G = objective_g + weight * CE(G(z, c), c)

With `joint` the K logits are all: D distinguishes K classes of real images and, as a further class with the logit 0,
generated ones. Its score is that of "real", log sum_k exp(logit_k), and only real images have a class for D. With the
logistic objective and weight 1, D's loss is then the cross entropy over the K + 1 classes, and G's that of the class it
was asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stylegan_pg.config import ACGANConfig, Config
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NetworkShape
from stylegan_pg.systems.base import Context, Step, Values
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.heads import with_outputs
from stylegan_pg.systems.latents import Latents


class Judgement(NamedTuple):
    scores: torch.Tensor  # [N, 1]
    classes: torch.Tensor  # logits [N, classes]


def joint_judgement(logits: torch.Tensor) -> Judgement:
    """The judgement of K classes beside a further one with the logit 0: logits [N, K]."""
    return Judgement(logits.logsumexp(dim=1, keepdim=True), logits)


def class_loss(logits: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Cross entropy [N] of logits [N, K] with one-hot classes [N, K]."""
    return F.cross_entropy(logits, c.argmax(dim=1), reduction="none")


def share_right(logits: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """1 for each image [N] whose class has the largest logit, otherwise 0."""
    return (logits.argmax(dim=1) == c.argmax(dim=1)).to(logits.dtype)


class ACGAN(GAN):
    """A conditional G against a D that classifies."""

    g_reports = (*GAN.g_reports, "class_loss_g")
    d_reports = (*GAN.d_reports, "class_loss_d", "class_right")

    @property
    def own(self) -> ACGANConfig:
        assert isinstance(self.config.system, ACGANConfig)
        return self.config.system

    def use(self, config: Config) -> None:
        """
        Raises:
            UsageError: the run is not conditional.
        """
        super().use(config)
        if not config.data.conditional:
            raise UsageError(
                f"system.name={config.system.name} learns classes: give data.conditional=true, with data that were "
                "packed with classes (stylegan-pg pack --labels folders)"
            )

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        """
        Raises:
            UsageError: the conditions are vectors.
        """
        if conditions is not None and not conditions.are_classes:
            raise UsageError(
                f"system.name={self.own.name} learns classes, but the condition is the vector {conditions.field}: give "
                "data.condition=class, with data that were packed with classes (stylegan-pg pack --labels folders)"
            )
        super().build(form, conditions)

    def d_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        further = form.c_dim if self.own.classifier == "auxiliary" else form.c_dim - 1
        kwargs = super().d_kwargs(dataclasses.replace(form, c_dim=0))
        return with_outputs(self.pair.D, kwargs, further, self.own.name, self.config.model.name)

    def judged(self, output: torch.Tensor) -> Judgement:
        if self.own.classifier == "joint":
            return joint_judgement(output)
        return Judgement(output[:, :1], output[:, 1:])

    def generator_heads(self, x: Context, latents: Latents, fake: Judgement) -> Values:
        assert latents.c is not None
        loss = class_loss(fake.classes, latents.c)
        return {"loss": self.own.weight * loss, "class_loss_g": loss}

    def discriminator_heads(self, x: Context, latents: Latents, real: Judgement, fake: Judgement) -> Values:
        assert x.condition is not None
        assert latents.c is not None
        loss = class_loss(real.classes, x.condition)
        both = loss + class_loss(fake.classes, latents.c) if self.own.classifier == "auxiliary" else loss
        right = share_right(real.classes, x.condition)
        return {"loss": self.own.weight * both, "class_loss_d": loss, "class_right": right}

    def constants(self, step: Step) -> Hashable:
        """As of a GAN: the weight of the classes never changes."""
        return self.own_constants(step) if type(self) is ACGAN else None
