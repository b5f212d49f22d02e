"""A model of the time of a training step on many devices: computing, starting its operations, and summing gradients
over links of known speed.

The host starts the operations of a step one after another while the device computes those before, so a step takes at
least as long as the host needs. This does not shrink with a device's share of the batch.

To sum the gradients of n devices, 2 (n - 1) / n of their bytes pass each device's link (Patarasuk and Yuan, 2009), and
each message passes trees of depth log2(n) (Sanders et al., 2009). Sums are computed while the backward pass continues
(optim/grad_allreduce.py), which hides a part of their time. benchmarks/scaling.py compares the model with measurements
on slow links.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stylegan_pg.config import Config, rounds
from stylegan_pg.config.schedule import Phase, deal, weighs
from stylegan_pg.errors import UsageError
from stylegan_pg.losses import TERMS
from stylegan_pg.planning.cost import Cost

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Seconds in which the host starts one operation, as far as measured: on an H100, a step at 256x256 of about 2,300
# operations took 128 ms, of which the device computed 69 (benchmarks/launches.py prints the figure of a CPU).
HOST = 5.6e-5
REPLAY = 1.5e-6  # seconds of the device for each operation of a replayed step (train.graphs): assumed, not measured
HIDDEN = 0.4  # share of a pass's time in which sums can run: the backward pass through the network that is trained


@dataclass(frozen=True)
class Link:
    """The link of each device to the others: bits per second in each direction, and seconds of latency per message."""

    bits: float = 1e11
    latency: float = 2e-5

    def __post_init__(self):
        if not 0 < self.bits < math.inf:
            raise UsageError(f"--link-gbit {self.bits / 1e9:g} is not possible: it must be above 0 and finite")


@dataclass(frozen=True)
class StepTimes:
    """A training step with the steps of G and the lazy terms at their share. Times are in seconds."""

    world: int
    images: int  # images of the batch
    share: int  # images on the device that has most
    computing: float
    host: float
    summing: float
    hidden: float  # part of summing that runs during computing
    launches: float = 0.0  # operations

    @property
    def seconds(self) -> float:
        return max(self.computing, self.host) + self.summing - self.hidden

    @property
    def replayed(self) -> float:
        """Seconds with train.graphs, which starts sums only after the passes."""
        return max(self.computing, REPLAY * self.launches) + self.summing

    @property
    def bound(self) -> str:
        """What takes the largest part of the step."""
        parts = {"computing": self.computing, "host": self.host, "links": self.summing - self.hidden}
        return max(parts, key=lambda name: parts[name])

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def sums(config: Config, phase: Phase, cost: Cost) -> list[tuple[float, float]]:
    """(number per step of D, bytes of gradients) of each kind of optimizer step, at a phase's end."""
    width = 8 if config.train.dtype == "float64" else 4
    often = {"D": 1.0, "G": rounds.g_share(config.optim, (phase.end - phase.start) // phase.batch)}
    size = {"D": float(width * cost.d_parameters), "G": float(width * cost.g_parameters)}
    due = [t for t in config.loss.all_terms() if weighs(t, phase)]
    lazy = [(TERMS[t.name], t.every) for t in due]
    steps = [(often[player], size[player]) for player in ("D", "G")]
    own = [(side, every) for s, every in lazy if every > 1 and not s.joins for side in s.on]
    return steps + [(often[side] / every, size[side]) for side, every in own]


def sum_seconds(size: float, world: int, link: Link, pieces: int = 1) -> float:
    """Seconds to sum `size` bytes over all devices, in a number of pieces."""
    if world == 1:
        return 0.0
    return 2 * (world - 1) / world * 8 * size / link.bits + pieces * 2 * math.ceil(math.log2(world)) * link.latency


def step(
    config: Config, phase: Phase, cost: Cost, world: int, flops: float, link: Link, host: float = HOST
) -> StepTimes:
    """The predicted step of a phase on `world` devices with `flops` FLOPs per second each, whose hosts take `host`
    seconds to start an operation."""
    share = max(map(len, deal(phase.batch, phase.mbstd_group, world)))
    passes = math.ceil(share / phase.micro_batch) if phase.micro_batch else 1
    computing = share * cost.flops_per_image / flops
    made = sums(config, phase, cost)
    ready = HIDDEN if config.train.engine == "accelerate" else 0.0  # DeepSpeed receives gradients after the last pass
    # The time of computing is about proportional to the bytes of gradients that are summed.
    whole = sum(often * size for often, size in made)
    summing = hidden = 0.0
    for often, size in made:
        pieces = max(math.ceil(size / (config.train.bucket_mib * 2**20)), 1)
        takes = sum_seconds(size, world, link, pieces)
        window = ready * computing * size / whole / passes if whole else 0.0
        summing += often * takes
        # The last piece is sent when the backward pass has ended.
        hidden += often * min(takes * (1 - 1 / pieces), window)
    launches = cost.launches * passes
    return StepTimes(world, phase.batch, share, computing, host * launches, summing, hidden, launches)


def table(steps: Sequence[StepTimes], phase: Phase, link: Link) -> list[str]:
    """Lines of text. Efficiency is relative to devices with equal shares and without communication."""
    ideal = steps[0].share / steps[0].computing  # images per second of one device
    head = "devices,images/device,computing,host,summing,step,bound by,images/s,efficiency,replayed"
    rows: list[list[str]] = [[*head.split(",")]]
    for s in steps:
        times = [f"{1000 * t:.4g} ms" for t in (s.computing, s.host, s.summing - s.hidden, s.seconds, s.replayed)]
        rate, share = s.images_per_second, s.images_per_second / (ideal * s.world)
        rows.append([str(s.world), str(s.share), *times[:4], s.bound, f"{rate:.4g}", f"{share:.0%}", times[4]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    about = (
        f"A step of {phase}, batch {phase.batch}, by devices, with links of {link.bits / 1e9:g} Gbit/s per device "
        "(host: in which operations are started, while the device computes; summing: what does not overlap with the "
        "backward pass; replayed: the step with train.graphs)"
    )
    used = phase.batch // phase.mbstd_group
    more = [
        f"A batch of {phase.batch} in groups of {phase.mbstd_group} occupies at most {used} devices; a larger "
        "train.batch occupies more."
    ]
    return [about, *lines, *(more if steps[-1].world > used else [])]
