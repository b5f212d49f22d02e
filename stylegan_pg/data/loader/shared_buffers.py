"""Memory that workers fill with batches and the trainer empties, over and over.

Fresh shared memory costs as much time as a tenth to a third of the decoding that fills it, and the small /dev/shm of
containers is soon full of it; these pages are made once, and belong to no file system.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch


class Slots:
    """`count` arrays of one shape, shared with the processes that are forked from here on."""

    def __init__(self, count: int, shape: Sequence[int], dtype: type[np.generic]):
        memory = mmap.mmap(-1, max(count * math.prod(shape) * np.dtype(dtype).itemsize, 1))
        self.arrays = np.frombuffer(memory, dtype, count * math.prod(shape)).reshape(count, *shape)
        self.free = list(range(count)) if self.arrays.size else []

    def take(self) -> int | None:
        """A slot that nobody uses, the last used first; None if there is none."""
        return self.free.pop() if self.free else None

    def lend(self, slot: int) -> torch.Tensor:
        """A slot's memory as a tensor; the slot is free again when neither that nor any view of it is left."""
        array = self.arrays[slot].view()
        weakref.finalize(array, self.free.append, slot).atexit = False
        return torch.from_numpy(array)
