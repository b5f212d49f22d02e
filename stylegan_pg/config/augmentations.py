"""The section `augment`: a class for each way of augmenting the images that D sees, with the keys that it reads.

The class is chosen by `augment.mode`. AUGMENTATIONS is the only list of modes, and the letters and policies are listed
at their fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stylegan_pg.config.curves import Scheduled
from stylegan_pg.config.fields import (
    Demand,
    between,
    by_kimg,
    by_resolution,
    positive,
    scheduled,
    share,
    some_of,
    table,
)

# The operations of ADA's pipeline by letter, in their order.
OPERATIONS = {
    "b": ("flip", "turns", "shift"),
    "g": ("scale", "rotation", "stretch", "move"),
    "c": ("brightness", "contrast", "luma_flip", "hue", "saturation"),
    "f": ("bands",),
    "n": ("noise",),
    "o": ("cutout",),
}


def _are_multipliers(given: Mapping[str, float]) -> bool:
    known = [name for names in OPERATIONS.values() for name in names]
    return given.keys() <= set(known) and all(0 <= factor < math.inf for factor in given.values())


MULTIPLIERS = Demand(
    _are_multipliers,
    "a table from operations to numbers of 0 or more; the operations are "
    + "; ".join(f"{letter}: {', '.join(names)}" for letter, names in OPERATIONS.items()),
)


@dataclass(frozen=True)
class AugmentConfig:
    """Real and generated images are changed at random before D sees them (Karras et al. 2020, ADA); or, with the mode
    "none", they are not."""

    mode: str = "none"  # whether D's images are changed at random, and how the probability of that is chosen


@dataclass(frozen=True)
class PipelineConfig(AugmentConfig):
    """What the modes with ADA's pipeline read."""

    p: Scheduled = scheduled(share(0.0))  # probability of each operation: at the start (ada), or always (fixed)
    pipeline: str = some_of("bgc", "bgcfno")  # b: blit, g: geometry, c: colour, f: filter, n: noise, o: cutout
    multipliers: dict[str, float] = table("operation", MULTIPLIERS)  # factors of p for single operations, instead of 1


@dataclass(frozen=True)
class FixedConfig(PipelineConfig):
    mode: str = "fixed"
    p_at: dict[int, float] = by_resolution(of=share(0.0))  # probabilities by resolution, instead of p
    p_from: dict[int, float] = by_kimg(of=share(0.0))  # {kimg: probability} from there on


@dataclass(frozen=True)
class ADAConfig(PipelineConfig):
    mode: str = "ada"
    target: float = between(0.6, -1, 1)  # of the mean sign of D's scores of real images, to which p is adapted
    interval: int = positive(4)  # steps between adjustments of p
    kimg: float = positive(500.0)  # thousands of images within which p can go from 0 to 1


@dataclass(frozen=True)
class DiffAugmentConfig(AugmentConfig):
    mode: str = "diffaugment"
    policy: str = some_of("color,translation,cutout", ("color", "translation", "cutout"), ",")  # kinds of changes


AUGMENTATIONS: dict[str, type[AugmentConfig]] = {
    cls.mode: cls for cls in (AugmentConfig, ADAConfig, FixedConfig, DiffAugmentConfig)
}
