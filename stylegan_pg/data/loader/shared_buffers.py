"""Reusable shared memory into which workers decode batches.

Allocating new shared memory for each batch would cost a tenth to a third of the decoding time, and fill the small
/dev/shm of containers. These pages are allocated once, and anonymously, so that they belong to no file system.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence

import numpy as np
import torch


class Slots:
    """`count` arrays of one shape, shared with processes that are forked later."""

    def __init__(self, count: int, shape: Sequence[int], dtype: type[np.generic]):
        memory = mmap.mmap(-1, max(count * math.prod(shape) * np.dtype(dtype).itemsize, 1))
        self.arrays = np.frombuffer(memory, dtype, count * math.prod(shape)).reshape(count, *shape)
        self.free = list(range(count)) if self.arrays.size else []

    def take(self) -> int | None:
        """A free slot, preferably the last used one; None if all are in use."""
        return self.free.pop() if self.free else None

    def lend(self, slot: int) -> torch.Tensor:
        """A slot's memory as a tensor; the slot becomes free when neither the tensor nor a view of it exists any
        more."""
        array = self.arrays[slot].view()
        weakref.finalize(array, self.free.append, slot).atexit = False
        return torch.from_numpy(array)
