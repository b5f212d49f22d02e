"""The batches of a run: this rank's share of them from phase to phase, and a record of damaged pictures.

Ranks stay in step whatever one of them cannot read. A batch without images is found one step before it is needed, and
in that step the ranks agree to stop (trainer.py); all ranks know of damaged pictures from the next tick on.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from stylegan_pg.config import Config
from stylegan_pg.config.schedule import Phase, deal
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.loader.loader import Batch, batches
from stylegan_pg.data.loader.parts import OrderedTable, parts_of
from stylegan_pg.data.loader.reading import Bad
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.rng import derive
from stylegan_pg.training.devices import Devices

FIRST_BATCH_PATIENCE = 10.0  # seconds, at most, for the first pictures

Fed = tuple[Phase, Batch]


class TrainingBatches:
    """Of one run of a configuration on one dataset."""

    def __init__(self, config: Config, index: DatasetIndex, parallel: Devices, plan: list[Phase]):
        self.config, self.index, self.parallel, self.plan = config, index, parallel, plan
        self.met: set[Bad] = set()  # by this rank, since the last `gather`
        self.damaged: dict[
            tuple[str, int, int], Bad
        ] = {}  # those that any rank has met, by dataset, resolution and ordinal

    def batches(self, start: int, fields: Sequence[str]) -> Generator[Fed, None, None]:
        """This rank's batches from nimg `start` on, each with its phase and these fields; one with a fault is the
        last."""
        config = self.config
        order = self.index.order(config.seed, config.data.window)
        for phase in self.plan:
            if phase.end <= start:
                continue
            try:
                table = self.index.table(phase.resolution)
                others = self.others(phase.resolution)
            except (OSError, RunError) as error:  # where it has to come from a server
                yield phase, Batch({"image": torch.empty(0)}, fault=str(error))
                return
            data = batches(
                table,
                order,
                start=max(start, phase.start),
                end=phase.end,
                batch=phase.batch,
                share=deal(phase.batch, phase.mbstd_group, dist.world())[dist.rank()],
                fields=fields,
                others=others,
                derived=config.data.derived,
                mirror=config.data.mirror,
                workers=config.data.workers,
                known=self.known("", phase.resolution),
                prefetch=config.data.prefetch_shards,
                first_patience=min(FIRST_BATCH_PATIENCE, config.data.patience_sec) if phase.start <= start else None,
                pin=self.parallel.device.type == "cuda",
            )
            with contextlib.closing(data):
                for batch in data:
                    yield phase, self.parallel.send(batch)
                    if batch.fault:
                        return

    def check(self, fields: Sequence[str]) -> None:
        """
        Raises:
            UsageError: the data does not have one of these fields.
        """
        resolution = self.config.resolution
        first = OrderedTable(self.index.table(resolution), self.index.order(self.config.seed, self.config.data.window))
        parts_of(fields, first, self.others(resolution), self.config.data.derived)

    def others(self, resolution: int) -> dict[str, OrderedTable]:
        """The further datasets (data.unpaired) at one resolution, each with an order of its own."""
        return {
            name: OrderedTable(
                index.table(resolution),
                index.order(derive(self.config.seed, f"dataset {name}"), self.config.data.window),
                self.known(name, resolution),
            )
            for name, index in self.index.others.items()
        }

    def known(self, dataset: str, resolution: int) -> frozenset[int]:
        """The ordinals of the damaged pictures of one dataset at one resolution."""
        return frozenset(ordinal for name, r, ordinal in self.damaged if (name, r) == (dataset, resolution))

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
        met = {_key(bad): bad for some in dist.gather_objects(sorted(self.met)) for bad in some}
        self.met.clear()
        new = {key: met[key] for key in sorted(met.keys() - self.damaged.keys())}
        self.damaged |= new
        return list(new.values())

    def kinds(self, resolution: int | None = None) -> Counter[str]:
        """How many damaged pictures there are of which kind, at one resolution or all."""
        return Counter(bad.kind for (_, r, _), bad in self.damaged.items() if resolution in (None, r))

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
        """The damaged pictures, for a checkpoint; those of the first dataset without its name, as earlier versions
        wrote them."""
        return [list(bad if bad.dataset else bad[:-1]) for bad in self.damaged.values()]

    def load(self, state: list[Any]) -> None:
        known = [Bad(*facts) for facts in state if not isinstance(facts, str)]  # as they once were
        self.damaged = {_key(bad): bad for bad in known}


def _key(bad: Bad) -> tuple[str, int, int]:
    return bad.dataset, bad.resolution, bad.ordinal
