"""TensorBoard, which a run does without where it cannot be imported, or written."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Board:
    """A TensorBoard log in `folder`, of a run that starts or continues at `nimg`. The first fault is told by `say` and
    ends the log until the run's next start; none is raised."""

    def __init__(self, folder: Path, nimg: int, say: Callable[[str], None]):
        self.say = say
        self.writer: Any = None
        self._try(self._open, folder, nimg)

    def _open(self, folder: Path, nimg: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _no_tracebacks()
        # purge_step hides what an interrupted run had logged beyond its last checkpoint.
        self.writer = SummaryWriter(str(folder), purge_step=nimg + 1 if nimg else None)

    def _try(self, function: Callable[..., object], *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:  # also what libraries that do not fit together raise: it is no part of the training
            self.writer = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.say(
                f"warning: no TensorBoard log from here on ({reason}); training goes on (output.tensorboard=false is "
                "without it, stats.jsonl has the same numbers)"
            )

    def scalar(self, name: str, value: float, nimg: int) -> None:
        if self.writer and math.isfinite(value):
            self._try(self.writer.add_scalar, name, value, nimg)

    def image(self, name: str, picture: torch.Tensor, nimg: int) -> None:
        """uint8 [C, H, W]."""
        if self.writer:
            self._try(self.writer.add_image, name, picture, nimg)

    def close(self) -> None:
        if self.writer:
            self._try(self.writer.close)


@functools.cache
def _no_tracebacks() -> None:
    """Its writing thread hands faults over, and raises them once more for nobody."""
    others = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            others(args)

    threading.excepthook = hook
