"""Memory for the CPU kernels' results, kept and used again.

glibc gives what is larger than 32 MiB back to the system at once, and often less, so that the next result lies on new
pages; handing those out takes longer than what the kernels compute (2 to 20 times, where the host of a virtual machine
has to find them first). PyTorch has a caching allocator for GPUs and none for CPUs. So storages of large results are
remembered here; one that nothing else holds any more is used for the next result of the same size.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch

LEAST = 2**25  # bytes: what glibc always takes from the system. Smaller ones it mostly keeps, and still in the caches
VARIABLE = "STYLEGAN_PG_POOL_MIB"


def default_limit() -> int:
    """Bytes to keep at most, used and idle: STYLEGAN_PG_POOL_MIB (0: none), else 2 GiB, or a 16th of the machine's
    memory where that is less."""
    text = os.environ.get(VARIABLE, "")
    if text.isdecimal():
        return int(text) * 2**20
    if text:
        print(f"warning: {VARIABLE}={text!r} is no number of MiB, and does not count", file=sys.stderr)
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return 2**30
    return min(2**31, memory // 16)


class Pool:
    """Storages of results. One is idle if no tensor and no Python object but this one holds it."""

    def __init__(self, limit: int):
        self.blocks: dict[int, list[list[Any]]] = {}  # bytes -> [[storage, address]], the sizes by last use
        self.total = 0
        self.lock = threading.Lock()  # autograd has threads of its own
        self.alone: tuple[int, int] | None = None
        self.limit = limit if self._can_tell() else 0

    def _can_tell(self) -> bool:
        """Whether this PyTorch, which calls none of it public, says who holds a storage."""
        if not hasattr(torch._C, "_storage_Use_Count"):
            return False
        block = self._new(64)
        self.alone = self._holders(block)
        tensor = torch.empty(0).set_(block[0], 0, [16], [1])
        seen = [self._idle(block, 64)]
        other = tensor[3:]
        del tensor
        seen.append(self._idle(block, 64))
        holder = other.untyped_storage()
        del other
        seen.append(self._idle(block, 64))
        del holder
        return not any(seen) and self._idle(block, 64)

    @staticmethod
    def _new(nbytes: int) -> list[Any]:
        storage = torch.UntypedStorage(nbytes)
        return [storage, storage.data_ptr()]

    @staticmethod
    def _holders(block: list[Any]) -> tuple[int, int]:
        storage = block[0]
        return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)

    def _idle(self, block: list[Any], nbytes: int) -> bool:
        if self._holders(block) != self.alone:
            return False
        storage, address = block
        return storage.data_ptr() == address and storage.nbytes() == nbytes  # neither moved nor resized since

    def take(self, nbytes: int) -> torch.UntypedStorage | None:
        """A storage of that size with anything in it, or None where there is no room for one."""
        with self.lock:
            same = self.blocks.pop(nbytes, [])
            self.blocks[nbytes] = same  # now the last used
            for block in same:
                if self._idle(block, nbytes):
                    return block[0]
            if self.total + nbytes > self.limit:
                self._release(self.total + nbytes - self.limit, but=nbytes)
                if self.total + nbytes > self.limit:
                    return None
            block = self._new(nbytes)
            same.append(block)
            self.total += nbytes
            return block[0]

    def _release(self, excess: float, but: int = 0) -> None:
        """Forget idle blocks, of sizes not used for long at first, and those that are no longer what they were."""
        for nbytes in [n for n in self.blocks if n != but]:
            kept = []
            for block in self.blocks[nbytes]:
                if excess > 0 and (self._idle(block, nbytes) or block[0].data_ptr() != block[1]):
                    self.total -= nbytes
                    excess -= nbytes
                else:
                    kept.append(block)
            self.blocks[nbytes] = kept
            if not kept:
                del self.blocks[nbytes]

    def clear(self) -> None:
        """Give all that is idle back."""
        with self.lock:
            self._release(math.inf)


_pool: Pool | None = None


def _the_pool() -> Pool:
    global _pool
    if _pool is None:
        _pool = Pool(default_limit())
    return _pool


def clear() -> None:
    """Give the memory of results back that nothing uses: other sizes come, or others need it."""
    if _pool is not None:
        _pool.clear()


def empty(shape: Sequence[int], like: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Uninitialised, of `like`'s dtype and on its device; contiguous, or channels_last [N, C, H, W]."""
    nbytes = math.prod(shape) * like.element_size()
    if nbytes >= LEAST and like.is_cpu and (storage := _the_pool().take(nbytes)) is not None:
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape, _strides(shape, layout))  # type: ignore[call-overload]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _strides(shape: Sequence[int], layout: torch.memory_format) -> list[int]:
    if layout == torch.channels_last:
        _, c, h, w = shape
        return [h * w * c, 1, w * c, c]
    strides, step = [0] * len(shape), 1
    for i in range(len(shape) - 1, -1, -1):
        strides[i] = step
        step *= shape[i]
    return strides
