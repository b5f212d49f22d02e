"""InfoGAN: G is given codes besides noise, and a head Q of D reads them off its images (Chen et al. 2016, "InfoGAN:
Interpretable Representation Learning by Information Maximizing Generative Adversarial Nets").

Both sides minimise their objective minus weight * L_I, a lower bound of the information that an image has of its codes
(equation 5 of the paper):

    L_I = E[log Q(code | G(z, code))] + H(code)

Q is a dense layer of 128 on D's trunk with batch normalisation and leaky ReLU, and a dense layer (appendix C.1). It
gives logits of each categorical code; and of each continuous code the mean of a Gaussian, whose variance is 1
(`system.variance=fixed`), or a further output (`learned`). Q is trained with D, on generated images.

Codes take the last numbers of a latent (networks/latent_law.py), whose length is `model.z_dim` and that of all codes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from stylegan_pg.config import Config, InfoGANConfig
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NetworkShape, Pair
from stylegan_pg.networks.latent_law import Codes, LatentLaw
from stylegan_pg.networks.normalization import group_batch_norms
from stylegan_pg.systems.base import Context, Step, Values
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.heads import with_outputs
from stylegan_pg.systems.latents import Latents

WIDTH, SLOPE = 128, 0.01  # of Q's hidden layer; of its leaky ReLU
LEAST_LOG_VARIANCE = math.log(1e-4)  # of learned ones: a hundredth of the code's range, so that the bound is finite


class Estimate(NamedTuple):
    """What Q says about the codes of N images."""

    categories: list[torch.Tensor]  # logits [N, K] of each categorical code
    mean: torch.Tensor  # [N, continuous]
    log_variance: torch.Tensor | None  # [N, continuous], None: all variances are 1


class Judgement(NamedTuple):
    scores: torch.Tensor  # [N, 1]
    codes: Estimate


class Recognition(nn.Module):
    """Q behind its first dense layer, which is part of D's last one: [N, 128] -> Estimate."""

    def __init__(self, categories: Sequence[int], continuous: int, learned: bool):
        super().__init__()
        self.sizes = [*categories, continuous, continuous if learned else 0]
        self.learned = learned
        self.norm = nn.BatchNorm1d(WIDTH)
        self.out = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, x: torch.Tensor) -> Estimate:
        x = F.leaky_relu(self.norm(x.to(self.out.weight.dtype)), SLOPE)
        *categories, mean, log_variance = self.out(x).split(self.sizes, dim=1)
        return Estimate(categories, mean, log_variance.clamp(min=LEAST_LOG_VARIANCE) if self.learned else None)


def categorical_bound(estimate: Estimate, codes: Codes) -> torch.Tensor:
    """The bound [N] of the information about the categorical codes, in nats: the sum over them of log Q(code | image) +
    ln K."""
    bounds = [
        math.log(logits.shape[1]) - F.cross_entropy(logits, code, reduction="none")
        for logits, code in zip(estimate.categories, codes.categories, strict=True)
    ]
    return torch.stack(bounds).sum(dim=0) if bounds else torch.zeros_like(codes.continuous.sum(dim=1))


def continuous_bound(estimate: Estimate, codes: Codes) -> torch.Tensor:
    """The same [N] for the continuous codes, which are uniform in (-1, 1): the sum over them of the log density of the
    Gaussian + ln 2."""
    squared = (codes.continuous - estimate.mean).square()
    s = torch.zeros_like(squared) if estimate.log_variance is None else estimate.log_variance
    return (math.log(2) - (math.log(2 * math.pi) + s + squared * (-s).exp()) / 2).sum(dim=1)


class InfoGAN(GAN):
    """A GAN with codes."""

    d_reports = (*GAN.d_reports, "code_bound", "code_bound_continuous")

    def __init__(self, config: Config, pair: Pair | None = None):
        super().__init__(config, pair)
        own, model = self.own, config.model
        if not own.categories and not own.continuous:
            raise UsageError("system.categories=[] and system.continuous=0 leave no code: give one of them")
        self.law = LatentLaw(self.z_dim(), getattr(model, "latent", "normal"), own.categories, own.continuous)

    @property
    def own(self) -> InfoGANConfig:
        assert isinstance(self.config.system, InfoGANConfig)
        return self.config.system

    def z_dim(self) -> int:
        """The length of latents with all codes."""
        return self.config.model.z_dim + sum(self.own.categories) + self.own.continuous

    def g_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        """
        Raises:
            UsageError: the generator takes no codes.
        """
        if "categories" not in inspect.signature(self.pair.G.__init__).parameters:
            raise UsageError(
                f"system.name={self.own.name}: the generator of model.name={self.config.model.name} takes no codes; "
                "give model.name=dcgan or mlp"
            )
        own = {"categories": list(self.own.categories), "continuous": self.own.continuous}
        return {**super().g_kwargs(form), "z_dim": self.z_dim(), **own}

    def d_kwargs(self, form: NetworkShape) -> dict[str, Any]:
        return with_outputs(self.pair.D, super().d_kwargs(form), WIDTH, self.own.name, self.config.model.name)

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        super().build(form, conditions)
        own = self.own
        Q = Recognition(own.categories, own.continuous, own.variance == "learned")
        self.D.Q = group_batch_norms(Q, form.mbstd_group)

    def judged(self, output: torch.Tensor) -> Judgement:
        return Judgement(output[:, :1], self.D.Q(output[:, 1:]))

    def bounds(self, latents: Latents, fake: Judgement) -> dict[str, torch.Tensor]:
        """Both bounds [n] for images of these latents, and what is minimised because of them."""
        codes = self.law.codes(latents.z)
        categorical, continuous = (f(fake.codes, codes) for f in (categorical_bound, continuous_bound))
        loss = -self.own.weight * (categorical + continuous)
        return {"loss": loss, "code_bound": categorical, "code_bound_continuous": continuous}

    def generator_heads(self, x: Context, latents: Latents, fake: Judgement) -> Values:
        return {"loss": self.bounds(latents, fake)["loss"]}

    def discriminator_heads(self, x: Context, latents: Latents, real: Judgement, fake: Judgement) -> Values:
        return self.bounds(latents, fake)

    def constants(self, step: Step) -> Hashable:
        """As of a GAN: the weight of the codes never changes."""
        return self.own_constants(step) if type(self) is InfoGAN else None
