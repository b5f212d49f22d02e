"""What the averages of ema.profiles cost: memory, time of a step, and disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stylegan_pg.config import Config
from stylegan_pg.config.schedule import Phase

COPIES = 2  # numbers that are kept of each weight: the average, and what rounding has left out (optim/ema.py)
LAUNCHES = 7  # operations of a step for each average
MOVED = 19  # numbers that these read or write for each weight
BANDWIDTH = 2e12  # bytes per second between a device and its memory that the time is given for


@dataclass(frozen=True)
class AveragesCost:
    """Costs of all averages of a run.

    Attributes:
        count: of averages.
        bytes: on each device, and in each checkpoint, in the phase of the largest generator.
        moved: bytes that a step moves between the device and its memory there.
        files: stored during the run. stored: bytes of all files.
    """

    count: int
    bytes: int
    moved: int
    files: int
    stored: int

    def __str__(self) -> str:
        mib, gib = 2**20, 2**30
        return (
            f"ema.profiles: {self.count} average{'s' * (self.count != 1)} take {self.bytes / mib:.4g} MiB of each "
            f"device's memory and of each checkpoint; a step moves {self.moved / mib:.4g} MiB for them "
            f"({1000 * self.moved / BANDWIDTH:.2g} ms at {BANDWIDTH / 1e12:g} TB per second); {self.files} files in "
            f"averages/ take {self.stored / gib:.3g} GiB"
        )


def moments(phase: Phase, every_kimg: float) -> int:
    """How many times averages are stored in a phase: where a multiple of every_kimg is reached, and at its end."""
    every = max(round(every_kimg * 1000), 1) if every_kimg > 0 else 0
    if not every:
        return 1
    steps = range(phase.start + phase.batch, phase.end, phase.batch)  # nimg behind every step but the last one
    if every <= phase.batch:
        return len(steps) + 1
    inner = phase.end - phase.batch
    return inner // every - phase.start // every + 1


def cost(config: Config, phases: Iterable[tuple[Phase, int]]) -> AveragesCost | None:
    """The costs for phases with the numbers of parameters of their generators (buffers are left out); None if no
    averages are kept."""
    count, width = len(config.ema.profiles), 8 if config.train.dtype == "float64" else 4
    if not count:
        return None
    pairs = list(phases)
    largest = count * width * max(parameters for _, parameters in pairs)
    files = [(count * moments(phase, config.ema.every_kimg), width * parameters) for phase, parameters in pairs]
    return AveragesCost(
        count, COPIES * largest, MOVED * largest, sum(n for n, _ in files), sum(n * size for n, size in files)
    )
