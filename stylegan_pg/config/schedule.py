"""The schedule: pure functions of nimg, the number of real images shown to the discriminator.

Every result follows from the configuration and nimg alone, so a run can be continued, also on other machines, without
knowing its past.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from stylegan_pg.config import Config, FixedConfig, GrowingConfig, PipelineConfig, ProGANConfig, TermConfig, curves
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
    g_lr: float  # at its start; learning_rate gives it at every nimg
    d_lr: float
    fade_length: int  # images over which alpha rises from 0 to 1, also if total_kimg ends the phase earlier
    size: tuple[int, int]  # rows and columns of a picture
    optimizer: str  # Adam's moments at the start of the phase: reset, or carry over by name

    def step(self, nimg: int) -> int:
        """Index of the training step within the phase."""
        return (nimg - self.start) // self.batch

    def alpha(self, nimg: int) -> float:
        """Weight in [0, 1] of the newest blocks; 1 outside fades (Karras et al. 2018, figure 2)."""
        return min((nimg - self.start) / self.fade_length, 1.0) if self.fade else 1.0

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]} {'fade' if self.fade else 'stable'}"


def at(resolution: int, table: Mapping[int, T], default: T) -> T:
    """The value for a resolution: its entry in the table, or the default."""
    return table.get(resolution, default)


def size_at(resolution: int, base: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a picture at a resolution; `base` are those at resolution 4. A base of [4, 6] gives
    (1024, 1536) at 1024."""
    return base[0] * resolution // 4, base[1] * resolution // 4


def in_tables(section: Any, key: str, resolution: int, nimg: float) -> float | None:
    """The number that the tables of a key give after nimg images: the entry of the last kimg in `key_from` that has
    been reached, otherwise the resolution's entry in `key_at`, otherwise None.

    section: the section of the configuration that has the key, such as config.ema, or a term. A table that it lacks
    counts as empty.
    """
    since: Mapping[int, float] = getattr(section, f"{key}_from", {})
    reached = [kimg for kimg in since if nimg >= kimg * 1000]
    return since[max(reached)] if reached else getattr(section, f"{key}_at", {}).get(resolution)


def number(section: Any, key: str, resolution: int, nimg: float) -> float:
    """The number that a key stands for after nimg images: that of its tables, otherwise its value, or that of its
    curves."""
    found = in_tables(section, key, resolution, nimg)
    return curves.at(getattr(section, key), nimg) if found is None else found


def moves(section: Any, key: str, resolution: int, nimg: float) -> bool:
    """Whether that number lies on a curve, so that it changes from step to step."""
    return in_tables(section, key, resolution, nimg) is None and curves.moves(getattr(section, key), nimg)


def term_weight(term: TermConfig, resolution: int, nimg: float) -> float:
    """Weight of a regularisation term."""
    return number(term, "weight", resolution, nimg)


def weighs(term: TermConfig, phase: Phase) -> bool:
    """Whether a term has a weight at the end of a phase or, if it follows curves, at its begin or an end of theirs."""
    places = [phase.end - 1.0]
    if curves.is_curve(term.weight):
        ends = (n for curve in curves.curves_of(term.weight) for n in (curve.begin, curve.end))
        places += [phase.start, *(n for n in ends if phase.start <= n < phase.end)]
    return any(term_weight(term, phase.resolution, nimg) > 0 for nimg in places)


@dataclass(frozen=True)
class _Rates:
    """The learning rate of a side and its tables, with the table that both sides share."""

    lr: curves.Scheduled
    lr_at: Mapping[int, float]
    lr_from: Mapping[int, float]


def _rates(config: Config, side: str) -> _Rates:
    o = config.optim
    if side == "G":
        return _Rates(o.g_lr, {**o.lr_at, **o.g_lr_at}, o.g_lr_from)
    return _Rates(o.d_lr, {**o.lr_at, **o.d_lr_at}, o.d_lr_from)


def learning_rate(config: Config, side: str, resolution: int, nimg: float) -> float:
    """Learning rate of a side ("G" or "D"), without the factor of lazy terms. `optim.lr_scale_at` multiplies what is
    neither in a table by kimg nor in one by resolution."""
    rates = _rates(config, side)
    found = in_tables(rates, "lr", resolution, nimg)
    return curves.at(rates.lr, nimg) * at(resolution, config.optim.lr_scale_at, 1.0) if found is None else found


def augment_p(config: Config, resolution: int, nimg: float) -> float | None:
    """Probability of augmentation for augment.mode=fixed, at the start of a run for ada; None for other modes."""
    given = config.augment
    if isinstance(given, FixedConfig):
        return number(given, "p", resolution, nimg)
    return given.p if isinstance(given, PipelineConfig) else None


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to limit."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)


def images_meet(config: Config) -> bool:
    """Whether the images of a group meet, in a network or in a term, so that they must be in one pass."""
    terms = config.loss.all_terms()
    return config.model.images_meet or config.system.images_meet or any(term.of_groups for term in terms)


def phases(config: Config) -> list[Phase]:
    """All phases of a run, back to back from nimg 0; each lasts a whole number of batches (rounded up).

    Growth starts with a stable phase; each doubling is a fade and a stable phase, and the last one runs until
    `train.total_kimg`. A phase that begins before this total and would end after it ends there; later phases are left
    out.

    Raises:
        UsageError: if a micro-batch is smaller than one minibatch-stddev group, or no phase has a length.
    """
    if config.growth.schedule == "auto":
        config = automatic(config)
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
        group = largest_divisor(batch, config.model.mbstd_group) if images_meet(config) else 1
        micro = at(resolution, config.train.micro_batch_at, config.train.micro_batch)
        if 0 < micro < group:
            raise UsageError(
                f"train.micro_batch={micro} at {resolution}x{resolution} cannot hold a minibatch-stddev group of "
                f"{group} images: raise it, or lower model.mbstd_group"
            )
        end = start + math.ceil(length / batch) * batch
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
                g_lr=learning_rate(config, "G", resolution, start),
                d_lr=learning_rate(config, "D", resolution, start),
                fade_length=math.ceil(whole / batch) * batch,
                size=size_at(resolution, config.model.base),
                optimizer=at(resolution, growth.optimizer_at, growth.optimizer),
            )
        )
        start = end
    if not result:
        raise UsageError("all phases have no length: raise growth.stable_kimg, growth.fade_kimg or train.total_kimg")
    return result


def shortfall(config: Config) -> str:
    """A message if train.total_kimg, or phases without a length, end a run before `resolution` or the end of its fade.
    It names the total that is needed. "" if the run ends with whole networks of `resolution`."""
    last = phases(config)[-1]
    if last.resolution == config.resolution and last.alpha(last.end) >= 1:
        return ""
    size = "{}x{}".format(*size_at(config.resolution, config.model.base))
    share = f" at {last.alpha(last.end):.0%} of it" if last.fade else ""
    ends = f"ends in {last}{share}, and gives no whole generator of {size}"
    if config.train.total_kimg is None:
        return f"the run {ends}: give growth.stable_kimg_at or growth.fade_kimg_at a length above 0 for it"
    whole = phases(dataclasses.replace(config, train=dataclasses.replace(config.train, total_kimg=None)))
    grown = max((p.end for p in whole if p.fade or p.resolution < config.resolution), default=0) / 1000
    return (
        f"train.total_kimg={config.train.total_kimg:.10g} {ends}: growing takes {grown:.10g} kimg, and with the last "
        f"stable phase {max(whole[-1].end / 1000, grown):.10g}; give train.total_kimg={whole[-1].end / 1000:.10g}"
    )


def automatic(config: Config) -> Config:
    """The configuration with the automatic schedule written into its tables. The schedule follows from (resolution,
    total_kimg, growth.devices). Entries that the tables have already are kept, and `growth.schedule` becomes "tables".

    The rules extend the published schedules for 1 to 8 devices (Karras et al. 2018, appendix A.1; 2019, appendix C).

    - Fades and stable phases all have the same length. The last resolution, including its fade, lasts five times as
      long, or longer if `growth.stable_kimg` and `fade_kimg` limit the length. ProGAN's 12,000 kimg to 1024x1024 are
      twenty times 600, and StyleGAN's 25,000 have the same 600.
    - A batch has 2048 / resolution images, so that the cost of a step is about the same at all resolutions. It has at
      most 128 images per device and 512 in all, and at least one minibatch-stddev group (without minibatch stddev, 4
      images) per device, because it is divided in whole groups. For eight devices: 512, 256, 128, 64, 32, 32, ...
    - `optim.g_lr` and `d_lr` belong to these 2048 / resolution images. With a batch that is k times as large, the rate
      is sqrt(k) times as high, rounded up to halves, but not above the published maximum of 0.003. Curves are
      multiplied by the same factors, which are written into `optim.lr_scale_at`; their largest value is what is not
      raised above the maximum.
    - A micro-batch needs the memory of four images at 1024x1024 with channel_base 32768, which is published for devices
      of 16 GB. The number of channels halves when the side doubles, so memory grows with the side, not with the area.

    Raises:
        UsageError: if a phase would last less than eight steps.
    """
    growth, train, optim, model = config.growth, config.train, config.optim, config.model
    assert train.total_kimg is not None, "checks.check ensures it"
    assert isinstance(model, GrowingConfig), "as above"
    start = growth.start or min(4 if isinstance(model, ProGANConfig) else 8, config.resolution)
    resolutions = [start << i for i in range((config.resolution // start).bit_length())]
    stretch = train.total_kimg / (2 * len(resolutions) + 2)
    stable, fade = min(growth.stable_kimg, stretch), min(growth.fade_kimg, stretch)
    share = model.mbstd_group if model.mbstd_channels else 4
    unit = growth.devices * share
    batches = {r: max(unit, min(2048 // r, 128 * growth.devices, 512)) for r in resolutions}
    batches = {r: math.ceil(batch / unit) * unit for r, batch in batches.items()} | train.batch_at
    for r in resolutions[:-1]:
        if 0 < min(stable, fade) * 1000 < 8 * batches[r]:
            raise UsageError(
                f"growth.schedule=auto: train.total_kimg={train.total_kimg:g} leaves {min(stable, fade):g} kimg for a "
                f"phase at resolution {r}, less than eight batches of {batches[r]}: raise train.total_kimg or "
                "growth.start, or lower growth.devices"
            )
    limit = max(0.003 / max(curves.largest(optim.g_lr), curves.largest(optim.d_lr)), 1.0)
    factor = {r: min(max(math.ceil(2 * math.sqrt(batches[r] * r / 2048)) / 2, 1.0), limit) for r in resolutions}
    factor |= optim.lr_scale_at
    are_curves = curves.is_curve(optim.g_lr) or curves.is_curve(optim.d_lr)

    def rates(rate: Any, table: Mapping[int, float]) -> dict[int, float]:
        if curves.is_curve(rate):
            return dict(table)
        return {r: float(f"{rate * factor[r]:.6g}") for r in resolutions if r not in optim.lr_at} | dict(table)

    micro = {r: max(min(2**27 // (model.channel_base * r), batches[r] // growth.devices), share) for r in resolutions}
    return dataclasses.replace(
        config,
        growth=dataclasses.replace(
            growth,
            schedule="tables",
            start=start,
            stable_kimg_at=dict.fromkeys(resolutions, round(stable, 3)) | growth.stable_kimg_at,
            fade_kimg_at=dict.fromkeys(resolutions[1:], round(fade, 3)) | growth.fade_kimg_at,
        ),
        train=dataclasses.replace(train, batch_at=batches, micro_batch_at=micro | train.micro_batch_at),
        optim=dataclasses.replace(
            optim,
            g_lr_at=rates(optim.g_lr, optim.g_lr_at),
            d_lr_at=rates(optim.d_lr, optim.d_lr_at),
            lr_scale_at=factor if are_curves else optim.lr_scale_at,
        ),
    )


def phase_at(plan: list[Phase], nimg: int) -> Phase:
    """The phase that contains nimg; at the end of the run and after it, the last phase."""
    return next((p for p in plan if nimg < p.end), plan[-1])


def ema_half_life(config: Config, resolution: int, nimg: float) -> float:
    """Half-life of the weights' moving average in thousand images, without `ema.rampup`."""
    return number(config.ema, "kimg", resolution, nimg)


def blur_sigma(config: Config, resolution: int, nimg: float) -> float:
    """Width in pixels of the blur of what D sees, 0 for none."""
    return number(config.loss, "blur_sigma", resolution, nimg)


def instance_noise(config: Config, resolution: int, nimg: float) -> float:
    """Standard deviation of the noise in what D sees, 0 for none."""
    return number(config.loss, "instance_noise", resolution, nimg)


def ema_beta(batch: int, nimg: int, kimg: float, rampup: float | None) -> float:
    """Decay per step of the weights' moving average, 0.5^(batch / half-life). The half-life is `kimg` thousand images,
    or the share `rampup` of the nimg images seen if that is less."""
    half_life = kimg * 1000
    if rampup is not None:
        half_life = min(half_life, nimg * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))


def crossed(every_kimg: float, before: int, after: int) -> bool:
    """Whether a multiple of every_kimg thousand images (rounded to at least one image) lies in (before, after]; never
    if every_kimg is 0."""
    every = max(round(every_kimg * 1000), 1) if every_kimg > 0 else 0
    return every > 0 and after // every > before // every


def lazy_ratio(intervals: list[int]) -> float:
    """Factor k/(k+1) of Adam's learning rate, and exponent of its betas, for a side with lazy terms at every k-th step
    (Karras et al. 2020, appendix B); with several terms, one over its number of optimizer steps per training step."""
    return 1 / (1 + sum(1 / k for k in intervals))


def deal(batch: int, group: int, parts: int) -> list[list[int]]:
    """Divide the indices of a batch among `parts` ranks or micro-batches, in whole minibatch-stddev groups.

    Group m of the batch is {m, m + batch/group, m + 2 batch/group, ...}; part k takes the groups k, k + parts, ...,
    ordered such that the groups within the part are these groups. If parts divides batch/group, this is the
    strided slice k::parts. Parts beyond the number of groups are empty.
    """
    groups = batch // group
    return [[g * groups + m for g in range(group) for m in range(part, groups, parts)] for part in range(parts)]
