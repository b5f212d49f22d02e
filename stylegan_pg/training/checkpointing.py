"""The checkpoints of a run. A thread of rank 0 writes them while training goes on; a write that fails is repeated."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.config import CheckpointConfig
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.monitoring.logs import FILE_ONLY

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, on all ranks; only rank 0 writes."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self.folder, self.config = folder, config
        self.writer = checkpoint.Writer(folder, config.keep)
        self.newest: int | None = None  # nimg of the last one that was written since the start
        self.failures = 0  # writes that have failed in a row
        self.failing = False  # too many have

    def start(self, nimg: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Copy tensors and state, and begin to write them. On rank 0."""
        self.writer.start(nimg, tensors, state)

    def take_outcome(self, *, wait: bool = False, final: bool = False) -> None:
        """Log and count the outcome of the last write, if it is complete. A failed write is repeated at the next tick.
        A collective call.

        Args:
            wait: wait until the write is complete.
            final: there is no next tick, so a failure makes `failing` true at once.
        """
        outcome = dist.broadcast_object(self.writer.outcome(wait=wait) if dist.is_main() else None)
        if outcome is None:
            return
        nimg, fault = outcome
        if not fault:
            self.failures, self.failing, self.newest = 0, False, nimg
            log.info(written(nimg), extra=FILE_ONLY)
            return
        self.failures += 1
        newest = next(iter(checkpoint.found(self.folder)), None)
        log.warning(
            f"the checkpoint at {kimg(nimg)} kimg could not be written ({fault}); the last good one is "
            f"{newest or 'none yet'} (failure {self.failures} of {self.config.max_failures})"
        )
        if self.failures >= self.config.max_failures or final:
            self.failing = True

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written, for example after a fault. On rank 0."""
        if outcome := self.writer.outcome(wait=True):
            nimg, fault = outcome
            self.newest = self.newest if fault else nimg
            log.info(written(*outcome), extra=FILE_ONLY)


def written(nimg: int, fault: str = "") -> str:
    return f"the checkpoint at {kimg(nimg)} kimg: {fault or 'written'}"
