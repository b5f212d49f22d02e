"""The schedule: pure functions of nimg, the number of real images shown to the discriminator.

Every answer follows from the configuration and nimg alone, so that a run can be continued, or split among other
machines, without asking what happened before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from stylegan_pg.config import Config, TermConfig
from stylegan_pg.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one resolution, either fading the newest blocks in or stable; nimg in [start, end)."""

    index: int
    resolution: int
    fade: bool
    start: int
    end: int
    batch: int
    mbstd_group: int  # divides the batch
    micro_batch: int  # images per pass of a device, a multiple of mbstd_group; 0: the device's whole share
    g_lr: float
    d_lr: float
    fade_length: int  # images over which alpha rises from 0 to 1, also where total_kimg cuts the phase short

    def step(self, nimg: int) -> int:
        """Index of the training step within the phase."""
        return (nimg - self.start) // self.batch

    def alpha(self, nimg: int) -> float:
        """Weight in [0, 1] of the newest blocks; 1 outside fades (Karras et al. 2018, figure 2)."""
        return min((nimg - self.start) / self.fade_length, 1.0) if self.fade else 1.0

    def __str__(self) -> str:
        return f"{self.resolution}x{self.resolution} {'fade' if self.fade else 'stable'}"


def at(resolution: int, table: Mapping[int, T], default: T) -> T:
    """The value for a resolution: its own, or the default."""
    return table.get(resolution, default)


def term_weight(term: TermConfig, resolution: int, nimg: int) -> float:
    """Weight of a regularisation term: of the last kimg in `weight_from` that has been reached, else the
    resolution's, else the term's one."""
    reached = [kimg for kimg in term.weight_from if nimg >= kimg * 1000]
    return term.weight_from[max(reached)] if reached else at(resolution, term.weight_at, term.weight)


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to limit."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def phases(config: Config) -> list[Phase]:
    """All phases of a run, back to back from nimg 0; each lasts a whole number of batches (rounded up).

    Growth starts with a stable phase; each doubling is a fade and a stable phase, and the last one runs until
    `train.total_kimg`. Phases behind that are left out, and one that it falls into ends there.

    Raises:
        UsageError: if a micro-batch cannot hold one minibatch-stddev group, or nothing is left to train.
    """
    growth, total = config.growth, config.train.total_kimg
    plan: list[tuple[int, bool, float]] = []
    r = growth.start or config.resolution
    while r <= config.resolution:
        if plan:
            plan.append((r, True, at(r, growth.fade_kimg_at, growth.fade_kimg)))
        plan.append((r, False, at(r, growth.stable_kimg_at, growth.stable_kimg)))
        r *= 2
    result: list[Phase] = []
    start = 0
    for i, (resolution, fade, kimg) in enumerate(plan):
        length = whole = round(kimg * 1000)
        if total is not None:
            left = round(total * 1000) - start
            length = left if i == len(plan) - 1 else min(length, left)
        if length <= 0:
            continue
        batch = at(resolution, config.train.batch_at, config.train.batch)
        group = largest_divisor(batch, config.model.mbstd_group) if config.model.mbstd_channels else 1
        micro = at(resolution, config.train.micro_batch_at, config.train.micro_batch)
        if 0 < micro < group:
            raise UsageError(
                f"train.micro_batch={micro} at {resolution}x{resolution} cannot hold a minibatch-stddev group of "
                f"{group} images: raise it, or lower model.mbstd_group"
            )
        end = start + math.ceil(length / batch) * batch
        lr = config.optim.lr_at.get(resolution)
        result.append(
            Phase(
                index=len(result),
                resolution=resolution,
                fade=fade,
                start=start,
                end=end,
                batch=batch,
                mbstd_group=group,
                micro_batch=micro // group * group,
                g_lr=config.optim.g_lr if lr is None else lr,
                d_lr=config.optim.d_lr if lr is None else lr,
                fade_length=math.ceil(whole / batch) * batch,
            )
        )
        start = end
    if not result:
        raise UsageError("all phases have no length: raise growth.stable_kimg, growth.fade_kimg or train.total_kimg")
    return result


def phase_at(plan: list[Phase], nimg: int) -> Phase:
    """The phase that nimg falls into; the last one at and behind the end."""
    return next((p for p in plan if nimg < p.end), plan[-1])


def ema_beta(batch: int, nimg: int, kimg: float, rampup: float | None) -> float:
    """Decay per step for a half-life of `kimg` thousand images, or of the share `rampup` of those seen if less
    (numerics: 0.5^(batch / min(ema_nimg, nimg * rampup)))."""
    half_life = kimg * 1000
    if rampup is not None:
        half_life = min(half_life, nimg * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))


def crossed(every_kimg: float, before: int, after: int) -> bool:
    """Whether a multiple of every_kimg thousand images (one image at least) lies in (before, after]; never for 0."""
    every = max(round(every_kimg * 1000), 1) if every_kimg > 0 else 0
    return every > 0 and after // every > before // every


def lazy_ratio(intervals: list[int]) -> float:
    """Share k/(k+1) of Adam's lr, and power of its betas, for a player with lazy terms every k steps (Karras et al.
    2020, appendix B); with several, one over the number of its optimiser steps per training step."""
    return 1 / (1 + sum(1 / k for k in intervals))


def deal(batch: int, group: int, parts: int) -> list[list[int]]:
    """Indices of a batch dealt out to `parts` ranks or micro-batches in whole minibatch-stddev groups.

    Group m of the batch is {m, m + batch/group, m + 2 batch/group, ...}; part k takes the groups k, k + parts, ...,
    ordered such that the part's own groups are these very groups. Where parts divides batch/group this is the
    strided slice k::parts. Parts beyond the number of groups stay empty.
    """
    groups = batch // group
    return [[g * groups + m for g in range(group) for m in range(part, groups, parts)] for part in range(parts)]
