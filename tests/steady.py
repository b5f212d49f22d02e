"""What a training step must not do: wait for the device, send it something, or make other operations than the last step
of its kind. It is checked on a CPU, where the same operations are made as on a GPU."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from stylegan_pg.planning.operations import Operations
from stylegan_pg.training import engine
from stylegan_pg.training.engine import Engine

RANDOM = {
    "rand",
    "randint",
    "randperm",
    "bernoulli",
    "multinomial",
}  # drawn beforehand; noise is "randn", on the device
Steps = dict[Hashable, list[Operations]]  # by phase and kind


def recorded(into: Steps) -> Any:
    """A replacement of Engine.start that records the operations of each step by its kind."""
    start = Engine.start

    def record(self: Engine, step: Any, updates: Any) -> Any:
        with Operations() as operations:
            made = start(self, step, updates)
        into[str(self.state.phase), engine._kind(updates)].append(operations)
        return made

    return record


def empty() -> Steps:
    return defaultdict(list)


def problems(steps: Steps) -> list[str]:
    """What is wrong with steps, from the second of each kind on; a kind of which there are fewer than three says
    nothing. The first one of a kind draws when its losses ask, and Adam makes its moments."""
    found, compared = [], 0
    for kind, every in steps.items():
        for operations in every[1:]:
            found += [f"{kind}: the host reads ({name})" for name in operations.reads]
            found += [f"{kind}: a copy from {a} to {b}" for a, b in operations.transfers]
            found += [f"{kind}: a tensor of the host's numbers ({name})" for name in operations.from_host]
            found += [f"{kind}: drawn within the step: {name}" for name in sorted({*operations.counts()} & RANDOM)]
        if len(every) < 3:
            continue
        compared += 1
        for one, other in itertools.pairwise(every[1:]):
            unlike = next((pair for pair in zip(one.made, other.made, strict=False) if pair[0] != pair[1]), None)
            if unlike or len(one.made) != len(other.made):
                found.append(f"{kind}: other operations, {len(one.made)} and {len(other.made)}; {unlike}")
    return found if compared else [*found, "no kind of step was made three times"]
