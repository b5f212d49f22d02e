"""The division of a global batch among the ranks, and on each rank into micro-batches, always in whole groups.

A group is a set of images that must be in one pass, such as those that minibatch stddev compares. Groups are determined
by the global batch alone (schedule.deal), so the result does not depend on ranks and micro-batches.
"""

from __future__ import annotations

import math

from stylegan_pg.config.schedule import Phase, deal
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.systems.base import Loss


def cut(share: list[int], group: int, passes: int) -> list[list[int]]:
    """Divide a rank's share into at most `passes` lists of positions in it, each of whole groups."""
    return [part for part in deal(len(share), group, min(passes, len(share) // group)) if part] if share else []


class MicroBatches:
    """This rank's share of the batches of one phase, and its parts."""

    def __init__(self, phase: Phase, size: int = 0):
        """`size` is the number of images of a micro-batch that was found to fit into memory; 0: as configured."""
        self.phase = phase
        self.share = deal(phase.batch, phase.mbstd_group, dist.world())[dist.rank()]
        self.largest = len(deal(phase.batch, phase.mbstd_group, dist.world())[0])  # of any rank
        self.size = min(size or phase.micro_batch or self.largest, self.largest)
        self.split(size or phase.micro_batch)

    def split(self, size: int) -> None:
        passes = math.ceil(len(self.share) / size) if size else 1
        self.parts = cut(self.share, self.phase.mbstd_group, passes)

    def of(self, loss: Loss) -> tuple[list[int], list[list[int]]]:
        """(positions of this rank's images in the global batch of a loss, their division into passes)."""
        if loss.of_batch:
            return self.share, self.parts
        share = deal(loss.count, loss.group, dist.world())[dist.rank()]
        return share, cut(share, loss.group, max(len(self.parts), 1))

    def halve(self, where: str, nimg: int) -> str:
        """Halve the micro-batch, on all ranks, after one of them ran out of memory in `where`; returns a warning.

        Raises:
            RunError: the micro-batch is one minibatch-stddev group already; the message names remedies.
        """
        phase, before, group = self.phase, self.size, self.phase.mbstd_group
        if before <= group:
            raise RunError(
                f"out of memory in {where} at nimg {nimg} ({phase}) with a micro-batch of {before}, which cannot "
                f"be halved: a minibatch-stddev group is {group}. Lower model.mbstd_group or model.channel_base, set "
                "model.low_precision, raise loss.pl_batch_shrink if it was path_length, or take larger devices"
            )
        self.size = max(before // 2 // group, 1) * group
        self.split(self.size)
        return (
            f"out of memory in {where} at nimg {nimg} ({phase}): the micro-batch is now {self.size} instead of "
            f"{before}, the batch still {phase.batch}; train.micro_batch={self.size} avoids this"
        )
