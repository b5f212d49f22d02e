"""The batches of a run: this rank's share of them from phase to phase, and a record of damaged pictures.

Ranks stay in step whatever one of them cannot read. A batch without images is found one step before it is needed, and
in that step the ranks agree to stop (trainer.py); all ranks know of damaged pictures from the next tick on.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from stylegan_pg.config import Config
from stylegan_pg.config.schedule import Phase, deal
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.loader.loader import Bad, Batch, batches
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.training.devices import Devices

START_PATIENCE = 10.0  # seconds, at most, for the first pictures

Fed = tuple[Phase, Batch]


class TrainingBatches:
    """Of one run of a configuration on one dataset."""

    def __init__(self, config: Config, index: DatasetIndex, parallel: Devices, plan: list[Phase]):
        self.config, self.index, self.parallel, self.plan = config, index, parallel, plan
        self.met: set[Bad] = set()  # by this rank, since the last `gather`
        self.told: dict[tuple[int, int], Bad] = {}  # by all ranks; by resolution and ordinal

    def batches(self, start: int, classes: int) -> Generator[Fed, None, None]:
        """This rank's batches from nimg `start` on, each with its phase; one with a fault is the last."""
        config = self.config
        order = self.index.order(config.seed, config.data.window)
        for phase in self.plan:
            if phase.end <= start:
                continue
            try:
                table = self.index.table(phase.resolution)
            except (OSError, RunError) as error:  # where it has to come from a server
                yield phase, Batch(torch.empty(0), None, fault=str(error))
                return
            data = batches(
                table,
                order,
                start=max(start, phase.start),
                end=phase.end,
                batch=phase.batch,
                share=deal(phase.batch, phase.mbstd_group, dist.world())[dist.rank()],
                classes=classes,
                mirror=config.data.mirror,
                workers=config.data.workers,
                known={ordinal for resolution, ordinal in self.told if resolution == phase.resolution},
                prefetch=config.data.prefetch_shards,
                first_patience=min(START_PATIENCE, config.data.patience_sec) if phase.start <= start else None,
                pin=self.parallel.device.type == "cuda",
            )
            with contextlib.closing(data):
                for batch in data:
                    yield phase, self.parallel.send(batch)
                    if batch.fault:
                        return

    def first(self, stream: Iterator[Fed], asked: Callable[[], bool]) -> Fed | None:
        """The first batch; None where there is nothing left to do, or any rank was `asked` to stop while it waited.

        Raises:
            RunError: on all ranks, if one of them has no data.
        """
        with dist.together():
            ahead = next(stream, None)
            fault = ahead[1].fault if ahead else ""
            if fault and not asked():
                raise RunError(f"there is no data to start with: {fault}")
        return None if any(dist.gather_objects(bool(fault))) else ahead

    def why_no_more(self, ahead: Batch, asked: bool) -> list[str]:
        """Why some rank cannot go on, if no rank was asked to stop; `ahead` is what this one would go on with. A
        collective call.

        Raises:
            RunError: on all ranks, if one of them never will.
        """
        all_ranks = dist.gather_objects((ahead.fault, ahead.lasting, asked))
        if lasting := sorted({fault for fault, final, _ in all_ranks if final}):
            raise RunError("; ".join(lasting))
        given_up = any(asked for *_, asked in all_ranks)  # which makes faults of what was only slow
        return [] if given_up else sorted({fault for fault, *_ in all_ranks if fault})

    def use(self, batch: Batch) -> None:
        """A batch was trained on: what was bad about it counts."""
        self.met.update(batch.bad)

    def gather(self) -> list[Bad]:
        """The damaged pictures that any rank has met and that were not known before. A collective call."""
        met = {(bad.resolution, bad.ordinal): bad for some in dist.gather_objects(sorted(self.met)) for bad in some}
        self.met.clear()
        new = {key: met[key] for key in sorted(met.keys() - self.told.keys())}
        self.told |= new
        return list(new.values())

    def kinds(self, resolution: int | None = None) -> Counter[str]:
        """How many damaged pictures there are of which kind, at one resolution or all."""
        return Counter(bad.kind for (r, _), bad in self.told.items() if resolution in (None, r))

    def check_share(self, resolution: int) -> None:
        """
        Raises:
            RunError: if too many pictures are damaged.
        """
        share, kinds = self.config.data.max_bad_share, self.kinds(resolution)
        damaged = sum(kinds.values())
        if damaged > max(share * self.index.count, 1 if share else 0):  # one is no share
            what = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
            raise RunError(
                f"{damaged} of {self.index.count} pictures of {self.index.path} at resolution {resolution} are damaged "
                f"({what}), more than data.max_bad_share={share:g} allows; {self.config.run}/data-faults.jsonl names "
                "them: restore the shards, or allow a larger share"
            )

    def state(self) -> list[list[Any]]:
        """The damaged pictures, for a checkpoint."""
        return [list(bad) for bad in self.told.values()]

    def load(self, state: list[Any]) -> None:
        known = [Bad(*facts) for facts in state if not isinstance(facts, str)]  # as they once were
        self.told = {(bad.resolution, bad.ordinal): bad for bad in known}
