"""The section `loss`: the objective, and a class for each regularisation term with the keys that it reads.

The class of an entry of `loss.terms` is chosen by its `name`. TERMS is the only list of terms and ObjectiveName that of
objectives; the dictionaries in losses/ map the same names to functions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from stylegan_pg.config.curves import Scheduled, numbers_in
from stylegan_pg.config.fields import at_least_0, by_kimg, by_resolution, choice, positive, scheduled, share, such_that

MOST_NOISE = 100.0  # images are in about [-1, 1]
MOST_SIGMA = 170.0  # a filter has at most 1024 taps (ops/upfirdn2d.py)


class ObjectiveName(str, Enum):
    """What G and D minimise; losses/objectives.py has the functions."""

    LOGISTIC = "logistic"
    SATURATING = "saturating"
    WGAN = "wgan"
    LSGAN = "lsgan"
    HINGE = "hinge"
    RELATIVISTIC = "relativistic"


@dataclass(frozen=True)
class TermConfig:
    """A regularisation term: `weight` times its value is added to the loss of its side at every `every`-th step."""

    name: str = MISSING  # which term
    weight: Scheduled = scheduled(at_least_0(1.0))  # factor of its value in the loss
    every: int = positive(1)  # steps from one to the next; the value is multiplied by as much
    weight_at: dict[int, float] = by_resolution()  # weights by resolution, instead of `weight`
    weight_from: dict[int, float] = by_kimg()  # {kimg: weight} from there on, instead of the others

    @property
    def is_used(self) -> bool:
        """Whether any of its weights is above 0."""
        ends = (number for _, number in numbers_in(self.weight, ""))
        return any(ends) or any(self.weight_at.values()) or any(self.weight_from.values())

    @property
    def of_groups(self) -> bool:
        """Whether it compares groups of `model.mbstd_group` images, which must then be in one pass."""
        return False

    def options(self) -> dict[str, Any]:
        """The keys that only this term has: arguments of its function."""
        common = {f.name for f in dataclasses.fields(TermConfig)}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in common}


@dataclass(frozen=True)
class R1Config(TermConfig):
    name: str = "r1"


@dataclass(frozen=True)
class R2Config(TermConfig):
    name: str = "r2"


@dataclass(frozen=True)
class GradientPenaltyConfig(TermConfig):
    name: str = "gradient_penalty"
    target: float = positive(1.0)  # norm of the gradient that is not penalised


@dataclass(frozen=True)
class DriftConfig(TermConfig):
    name: str = "drift"


@dataclass(frozen=True)
class DraganConfig(TermConfig):
    name: str = "dragan"
    target: float = positive(1.0)  # norm of the gradient that is not penalised
    noise: str = choice("normal", "uniform")  # around images: 0.25 N(0, 1), or 0.5 u times the image's own deviation


@dataclass(frozen=True)
class PathLengthConfig(TermConfig):
    name: str = "path_length"


@dataclass(frozen=True)
class FeatureMatchingConfig(TermConfig):
    name: str = "feature_matching"
    norm: str = choice("l2", "l1")  # squared norm of the difference of mean features, or its mean absolute value

    @property
    def of_groups(self) -> bool:
        return True


@dataclass(frozen=True)
class DiversityConfig(TermConfig):
    name: str = "diversity"
    limit: float = positive(1.0)  # ratio of the differences of images and latents from which on nothing is gained


@dataclass(frozen=True)
class HistoricalAveragingConfig(TermConfig):
    name: str = "historical_averaging"


TERMS: dict[str, type[TermConfig]] = {
    cls.name: cls
    for cls in (
        R1Config,
        R2Config,
        GradientPenaltyConfig,
        DriftConfig,
        DraganConfig,
        PathLengthConfig,
        FeatureMatchingConfig,
        DiversityConfig,
        HistoricalAveragingConfig,
    )
}


@dataclass(frozen=True)
class LossConfig:
    objective: str = choice(*(name.value for name in ObjectiveName))  # what G and D minimise
    g_weight: float = at_least_0(1.0)  # factor of the objective in G's loss; 0: G minimises its terms only
    real_target: float = such_that(
        1.0, lambda target: 0.5 < target <= 1, "above 0.5 and at most 1"
    )  # what D is to say of real images; 0.9: one-sided label smoothing
    instance_noise: Scheduled = scheduled(
        at_least_0(0.0, most=MOST_NOISE)
    )  # standard deviation of the noise that is added to all images that D sees; 0: none
    d_clip: float = at_least_0(0.0)  # limit of the magnitude of D's weights after each of its steps (WGAN); 0: none
    r1_gamma: Scheduled = scheduled(
        at_least_0(10.0)
    )  # weight of R1, the penalty on D's gradients at real images; 0: no R1
    r1_gamma_at: dict[int, float] = by_resolution()  # R1's weights by resolution, instead of r1_gamma
    r1_gamma_from: dict[int, float] = by_kimg()  # {kimg: gamma} from there on, at every resolution
    r1_every: int = positive(16)  # steps of D from one R1 to the next
    pl_weight: Scheduled = scheduled(at_least_0(2.0))  # weight of path length regularisation; 0: none
    pl_weight_at: dict[int, float] = by_resolution()  # its weights by resolution, instead of pl_weight
    pl_weight_from: dict[int, float] = by_kimg()  # {kimg: weight} from there on, at every resolution
    pl_every: int = positive(4)  # steps of G from one path length regularisation to the next
    pl_decay: float = share(0.01)  # share of a new path length in the running mean
    pl_batch_shrink: int = positive(2)  # path lengths are computed of the batch divided by this
    blur_sigma: Scheduled = scheduled(
        at_least_0(0.0, most=MOST_SIGMA)
    )  # width sigma in pixels of the blur 2^-(x/sigma)^2 of all images that D sees; 0: none
    blur_sigma_at: dict[int, float] = by_resolution(of=at_least_0(0.0, most=MOST_SIGMA))  # the same by resolution
    blur_sigma_from: dict[int, float] = by_kimg(of=at_least_0(0.0, most=MOST_SIGMA))  # {kimg: width} from there on
    style_mixing: float = share(0.9)  # probability of mixing the styles of two latents in an image
    terms: list[TermConfig] = field(default_factory=list)  # further terms; see `stylegan-pg config loss.terms`

    def r1(self) -> R1Config:
        """R1 with its weights, also if they are 0."""
        at, since = self.r1_gamma_at, self.r1_gamma_from
        return R1Config(weight=self.r1_gamma, every=self.r1_every, weight_at=at, weight_from=since)

    def path_length(self) -> PathLengthConfig:
        """Path length with its weights, also if they are 0."""
        at, since = self.pl_weight_at, self.pl_weight_from
        return PathLengthConfig(weight=self.pl_weight, every=self.pl_every, weight_at=at, weight_from=since)

    def all_terms(self) -> list[TermConfig]:
        """R1 and path length, if they have a weight, and the further terms."""
        own: list[TermConfig] = [self.r1(), self.path_length()]
        return [term for term in own if term.is_used] + list(self.terms)
