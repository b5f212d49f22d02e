"""Objectives: pairs of functions of D's scores, with one value per score, that G and D minimise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stylegan_pg.config import LossConfig, ObjectiveName


def logistic_g(fake: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Non-saturating generator loss softplus(-D(G(z))), same shape as `fake` (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake)


def logistic_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """softplus(D(G(z))) + softplus(-D(x)), same shape as the scores (Goodfellow et al. 2014, equation 1)."""
    return F.softplus(fake) + F.softplus(-real)


def smoothed_logistic_d(real: torch.Tensor, fake: torch.Tensor, *, target: float) -> torch.Tensor:
    """logistic_d with the target of real images lowered to `target` in (0, 1], that of generated ones staying 0: the
    cross entropy softplus(-D(x)) + (1 - target) D(x), whose best D(x) as a probability is `target` times the published
    one (Salimans et al. 2016, section 3.4)."""
    return F.softplus(fake) + F.softplus(-real) + (1 - target) * real


def saturating_g(fake: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """log(1 - sigmoid(D(G(z)))), the generator loss of the minimax game (Goodfellow et al. 2014, equation 1)."""
    return -F.softplus(fake)


def wgan_g(fake: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """-D(G(z)) (Arjovsky et al. 2017, algorithm 1); also the generator loss of the hinge objective."""
    return -fake


def wgan_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """D(G(z)) - D(x) (Arjovsky et al. 2017, algorithm 1); a gradient penalty or loss.d_clip keeps D Lipschitz."""
    return fake - real


def lsgan_g(fake: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """(D(G(z)) - 1)^2 / 2 (Mao et al. 2017, equation 9)."""
    return (fake - 1).square() / 2


def lsgan_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """((D(x) - 1)^2 + D(G(z))^2) / 2 (Mao et al. 2017, equation 9)."""
    return ((real - 1).square() + fake.square()) / 2


def smoothed_lsgan_d(real: torch.Tensor, fake: torch.Tensor, *, target: float) -> torch.Tensor:
    """lsgan_d with the target of real images `target` in place of 1: ((D(x) - target)^2 + D(G(z))^2) / 2."""
    return ((real - target).square() + fake.square()) / 2


def hinge_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - D(x)) + max(0, 1 + D(G(z))) (Lim and Ye 2017; Miyato et al. 2018, equation 16)."""
    return F.relu(1 - real) + F.relu(1 + fake)


def relativistic_g(fake: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """softplus(D(x) - D(G(z))) of the i-th generated with the i-th real image (Jolicoeur-Martineau 2019, RSGAN;
    Huang et al. 2024, R3GAN)."""
    if real is None:
        raise ValueError("the relativistic generator loss needs D's scores of real images")
    return F.softplus(real - fake)


def relativistic_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """softplus(D(G(z)) - D(x)) of the i-th generated with the i-th real image, as in relativistic_g."""
    return F.softplus(fake - real)


def scores_of(output: Any) -> list[torch.Tensor]:
    """The scores in a discriminator's output, as a list. The output is a tensor [N, ...], several of them (at several
    scales), or a named tuple whose field `scores` is one of these."""
    scores = getattr(output, "scores", output)
    return list(scores) if isinstance(scores, (list, tuple)) else [scores]


def per_image(function: Callable[..., torch.Tensor], *outputs: Any) -> torch.Tensor:
    """Apply a function of scores to each score in the discriminators' `outputs`; returns its mean for each image [N].

    If there are several tensors of scores, each of them has the same weight, whatever its size. An output of None is
    passed to the function as None.
    """
    lists = [scores_of(output) for output in outputs if output is not None]
    values = []
    for some in zip(*lists, strict=True):
        given = iter(some)
        arguments = [None if output is None else next(given) for output in outputs]
        value = function(*arguments).flatten(1)
        values.append(value.squeeze(1) if value.shape[1] == 1 else value.mean(dim=1))
    return values[0] if len(values) == 1 else torch.stack(values).mean(dim=0)


class Objective(NamedTuple):
    """The losses of both sides, elementwise in the scores: g(D(G(z)), D(x)) and d(D(x), D(G(z))).

    If `paired`, g needs D(x), the scores of as many real images; otherwise D(x) may be None. `probability` makes of a
    score the probability that D gives its image of being a real one; None where scores have no such meaning.
    """

    g: Callable[..., torch.Tensor]
    d: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    paired: bool = False
    probability: Callable[[torch.Tensor], torch.Tensor] | None = None


OBJECTIVES: dict[str, Objective] = {
    ObjectiveName.LOGISTIC: Objective(logistic_g, logistic_d, probability=torch.sigmoid),
    ObjectiveName.SATURATING: Objective(saturating_g, logistic_d, probability=torch.sigmoid),
    ObjectiveName.WGAN: Objective(wgan_g, wgan_d),
    ObjectiveName.LSGAN: Objective(lsgan_g, lsgan_d),
    ObjectiveName.HINGE: Objective(wgan_g, hinge_d),
    ObjectiveName.RELATIVISTIC: Objective(relativistic_g, relativistic_d, paired=True),
}

SMOOTHED: dict[str, Callable[..., torch.Tensor]] = {
    ObjectiveName.LOGISTIC: smoothed_logistic_d,
    ObjectiveName.SATURATING: smoothed_logistic_d,
    ObjectiveName.LSGAN: smoothed_lsgan_d,
}
"""D's losses with a target for real images; the other objectives have none. config/checks.py refuses loss.real_target
with these."""


def objective_of(loss: LossConfig) -> Objective:
    """The objective of a configuration, with one-sided label smoothing (loss.real_target) where it is on."""
    objective = OBJECTIVES[loss.objective]
    if loss.real_target == 1:
        return objective
    return objective._replace(d=partial(SMOOTHED[loss.objective], target=loss.real_target))
