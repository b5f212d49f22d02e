"""Two systems whose discriminator is an autoencoder, and whose scores are energies: the errors of its reconstructions.

BEGAN (Berthelot et al. 2017, "BEGAN: Boundary Equilibrium Generative Adversarial Networks") holds the errors of
generated and of real pictures in a ratio; EBGAN (Zhao et al. 2017, "Energy-based Generative Adversarial Networks")
pushes the energies of generated pictures up to a margin. The losses are in losses/energies.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from stylegan_pg.config import BEGANSystemConfig, Config, EBGANSystemConfig, ObjectiveName
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import Objective
from stylegan_pg.losses.energies import began_d, convergence, ebgan_d, energy_g, moved_balance, pulling_away
from stylegan_pg.networks import NetworkShape, Pair
from stylegan_pg.systems.base import Context, Step, Sums, Values
from stylegan_pg.systems.gan import GAN
from stylegan_pg.systems.latents import Latents
from stylegan_pg.systems.state import GANState, a_number, must, or_null


def no_objective(config: Config) -> None:
    """
    Raises:
        UsageError: the configuration asks for an objective, which a system with losses of its own would not minimise.
    """
    if config.loss.objective != ObjectiveName.LOGISTIC:
        name = config.system.name
        raise UsageError(
            f"loss.objective={config.loss.objective} has no effect with system.name={name}, whose losses are functions "
            "of energies: leave it away"
        )


def must_have_code(D: Any, name: str) -> None:
    """
    Raises:
        UsageError: D is no autoencoder.
    """
    if not hasattr(D, "encoder"):
        raise UsageError(f"system.name={name} needs a discriminator that is an autoencoder: take model.name=began")


@dataclass
class BEGANState(GANState):
    """What BEGAN changes from step to step."""

    k: float = field(default=0.0, metadata=must(a_number(0, 1)))  # weight of generated pictures in D's loss
    convergence: float | None = field(default=None, metadata=must(or_null(a_number(0))))  # of the last step


class BEGAN(GAN):
    """D minimises L(x) - k L(G(z)), G minimises L(G(z)), and k moves so that L(G(z)) becomes gamma L(x), where L is the
    error of D's reconstruction (Berthelot et al. 2017, section 3.4)."""

    running: BEGANState

    def __init__(self, config: Config, pair: Pair | None = None):
        super().__init__(config, pair)
        no_objective(config)
        assert isinstance(config.system, BEGANSystemConfig)
        self.running = BEGANState(augment_p=self.running.augment_p, k=config.system.k)
        self.objective = Objective(energy_g, self.minimised_by_d)

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        super().build(form, conditions)
        must_have_code(self.D, "began")

    def minimised_by_d(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        return began_d(real, fake, self.running.k)

    def after_step(self, step: Step, sums: Sums, tensors: Mapping[str, torch.Tensor]) -> None:
        """Move k by the errors of this step's pictures; a step without one of them, as of D alone, leaves it."""
        super().after_step(step, sums, tensors)
        settings, now = self.config.system, self.running
        assert isinstance(settings, BEGANSystemConfig)
        if "score_real" in sums and "loss_g" in sums:
            real, fake = (sums[name][0] / sums[name][1] for name in ("score_real", "loss_g"))
            now.k = moved_balance(now.k, real, fake, settings.gamma, settings.k_rate)
            now.convergence = convergence(real, fake, settings.gamma)

    def statistics(self) -> dict[str, float]:
        now = self.running
        measure = {} if now.convergence is None else {"convergence": now.convergence}
        return super().statistics() | {"k": now.k} | measure


class EBGAN(GAN):
    """D minimises E(x) + max(0, margin - E(G(z))), G minimises E(G(z)), where E is the energy (Zhao et al. 2017,
    equations 1 and 2), and the codes of generated pictures are pulled away from one another (section 2.4).

    The pulling-away term compares the pictures of each minibatch-stddev group, which are always in one pass, so that it
    is the same on any number of ranks; with model.mbstd_group=train.batch it is that of the whole batch.
    """

    g_reports = (*GAN.g_reports, "pulling_away")

    def __init__(self, config: Config, pair: Pair | None = None):
        super().__init__(config, pair)
        no_objective(config)
        self.objective = Objective(energy_g, partial(ebgan_d, margin=self.settings.margin))

    @property
    def settings(self) -> EBGANSystemConfig:
        assert isinstance(self.config.system, EBGANSystemConfig)
        return self.config.system

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        super().build(form, conditions)
        must_have_code(self.D, "ebgan")
        if self.settings.pulling and form.mbstd_group < 2:
            raise UsageError(
                f"system.pulling={self.settings.pulling:g} compares the pictures of a group, and model.mbstd_group="
                f"{self.config.model.mbstd_group} leaves one in each: take model.mbstd_group=train.batch, or "
                "system.pulling=0"
            )

    def generator_heads(self, x: Context, latents: Latents, fake: Any) -> Values:
        cosines = pulling_away(fake.code, self.form.mbstd_group)
        return {"loss": self.settings.pulling * cosines, "pulling_away": cosines}
