"""The checkpoints of a run: written by a thread of rank 0 while training goes on, and tried again where that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.config import CheckpointConfig
from stylegan_pg.distributed import process_group as dist


class Checkpoints:
    """Of one run, on all ranks; only rank 0 writes."""

    def __init__(self, folder: Path, config: CheckpointConfig, log: Callable[[str], None], warn: Callable[[str], None]):
        """log: writes a line to the log alone; warn: shows it, too."""
        self.folder, self.config, self.log, self.warn = folder, config, log, warn
        self.writer = checkpoint.Writer(folder, config.keep)
        self.failures = 0  # writes that have failed in a row
        self.failing = False  # too many have

    def start(self, nimg: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Copy tensors and state, and begin to write them. On rank 0."""
        self.writer.start(nimg, tensors, state)

    def settle(self, *, wait: bool = False, final: bool = False) -> None:
        """Learn what became of the last checkpoint; a failure is logged and counted, and tried again at the next tick.
        After the `final` one there is none. A collective call."""
        outcome = dist.broadcast_object(self.writer.outcome(wait=wait) if dist.is_main() else None)
        if outcome is None:
            return
        nimg, fault = outcome
        if not fault:
            self.failures, self.failing = 0, False
            self.log(written(nimg))
            return
        self.failures += 1
        newest = next(iter(checkpoint.found(self.folder)), None)
        self.warn(
            f"warning: the checkpoint at {kimg(nimg)} kimg could not be written ({fault}); the last good one is "
            f"{newest or 'none yet'} (failure {self.failures} of {self.config.max_failures})"
        )
        if self.failures >= self.config.max_failures or final:
            self.failing = True

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written, as when the run has failed meanwhile."""
        if outcome := self.writer.outcome(wait=True):
            self.log(written(*outcome))


def written(nimg: int, fault: str = "") -> str:
    return f"the checkpoint at {kimg(nimg)} kimg: {fault or 'written'}"
