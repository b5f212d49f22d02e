"""A pool of reusable memory for the results of the CPU kernels.

glibc requests blocks of more than 32 MiB from the system and returns them when they are freed, so every large result
uses new memory pages. Providing new pages takes longer than the kernels' computation, in virtual machines up to 20
times as long. PyTorch has a caching allocator for GPUs but none for CPUs. This pool therefore keeps a reference to the
memory of large results. Once nothing else refers to a block, the next result of the same size reuses it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.ops.operators import watched
from stylegan_pg.ops.reference import layout_of

log = logging.getLogger(__name__)

MIN_BYTES = 2**22  # smaller blocks come from glibc's heap as fast, and are mostly still in the processor's caches
VARIABLE = "STYLEGAN_PG_POOL_MIB"
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of containers and jobs


def default_limit() -> int:
    """Return the limit of the pool in bytes, for used and idle blocks together. It is STYLEGAN_PG_POOL_MIB if set (0
    disables the pool). Otherwise it is 1/16 of the machine's (or job's) memory divided by the number of ranks on the
    node, and at most 2 GiB."""
    text = os.environ.get(VARIABLE, "")
    if text.isdecimal():
        return int(text) * 2**20
    if text:
        log.warning(f"{VARIABLE}={text!r} is not a number of MiB and is ignored")
    memory = [2**34]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # some systems lack sysconf or these names
        memory = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the text "max", which is not a number, means no limit
            memory.append(int(Path(path).read_text("ascii")))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(2**31, min(memory) // 16 // max(1, int(ranks) if ranks.isdecimal() else 1))


class Pool:
    """A pool of memory blocks, which are NumPy arrays.

    A tensor's storage refers to its block as long as anything (a view, a NumPy array, an autograd graph) refers to the
    storage. A block to which only this pool refers is therefore idle.

    Args:
        limit: The largest total size of all blocks in bytes.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.blocks: OrderedDict[int, list[Any]] = OrderedDict()  # {bytes: arrays}, in the order of last use
        # No call waits for this lock. If another thread (or this thread, in a finalizer) holds it, the call does not
        # use the pool.
        self.lock = threading.Lock()
        self.idle_refcount = 0
        self.idle_refcount = self._refcount([_new(64)], 0)

    @property
    def total(self) -> int:
        return sum(nbytes * len(arrays) for nbytes, arrays in list(self.blocks.items()))

    @staticmethod
    def _refcount(arrays: list[Any], i: int) -> int:
        return sys.getrefcount(arrays[i])

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Return an uninitialised tensor, or None if the limit would be exceeded."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self.limit or not self.lock.acquire(blocking=False):
            return None
        try:
            arrays = self.blocks.setdefault(nbytes, [])
            self.blocks.move_to_end(nbytes)
            for i in range(len(arrays)):
                if self._refcount(arrays, i) == self.idle_refcount:
                    return _tensor(arrays[i], shape, strides, dtype)
            if not self._free_up(nbytes):
                return None
            arrays.append(_new(nbytes))
            return _tensor(arrays[-1], shape, strides, dtype)
        finally:
            self.lock.release()

    def _free_up(self, nbytes: int) -> bool:
        """Free idle blocks until a block of `nbytes` fits into the limit, and return whether it fits. The least
        recently used sizes are freed first. If freeing all of them is not enough, nothing is freed."""
        excess = self.total + nbytes - self.limit
        idle = [(size, i) for size, arrays in self.blocks.items() for i in self._idle(arrays)]
        if excess > sum(size for size, _ in idle):
            return False
        given: dict[int, list[int]] = {}
        for size, i in idle:
            if excess > 0:
                given.setdefault(size, []).append(i)
                excess -= size
        for size, indices in given.items():
            self._free(size, indices)
        return True

    def _idle(self, arrays: list[Any]) -> list[int]:
        return [i for i in range(len(arrays)) if self._refcount(arrays, i) == self.idle_refcount]

    def _free(self, size: int, indices: list[int]) -> None:
        for i in reversed(indices):
            del self.blocks[size][i]

    def clear(self) -> None:
        """Free all idle blocks."""
        if self.lock.acquire(blocking=False):
            try:
                for size in list(self.blocks):
                    self._free(size, self._idle(self.blocks[size]))
                    if not self.blocks[size]:
                        del self.blocks[size]
            finally:
                self.lock.release()


def _new(nbytes: int) -> Any:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy()


def _tensor(block: Any, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(block, dtype=dtype).as_strided_(shape, strides)  # in place, so that it is not a view


_pool: Pool | None = None


def _default_pool() -> Pool:
    global _pool
    if _pool is None:
        _pool = Pool(default_limit())
    return _pool


def clear() -> None:
    """Free all idle blocks. Call this before other sizes are needed, or when memory is scarce."""
    if _pool is not None:
        _pool.clear()


def empty(
    shape: Sequence[int], like: torch.Tensor, layout: torch.memory_format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return an uninitialised tensor on the device of `like`. `layout` is contiguous, or channels_last for [N, C, H,
    W]. The dtype is that of `like` by default."""
    dtype = dtype or like.dtype
    if math.prod(shape) * dtype.itemsize < MIN_BYTES or not like.is_cpu:
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)
    try:
        found = _default_pool().empty(shape, _strides(shape, layout), dtype)
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout) if found is None else found
    except RuntimeError:  # out of memory
        clear()
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout)


def _strides(shape: Sequence[int], layout: torch.memory_format) -> list[int]:
    if layout == torch.channels_last:
        _, c, h, w = shape
        return [h * w * c, 1, w * c, c]
    strides, step = [0] * len(shape), 1
    for i in range(len(shape) - 1, -1, -1):
        strides[i] = step
        step *= shape[i]
    return strides


class _Converted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        return empty(x.shape, x, layout_of(x), dtype).copy_(x)

    @staticmethod
    def backward(ctx, *gradients):
        return converted(gradients[0], ctx.dtype), None


def converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x.to(dtype) in pooled memory and in x's layout, differentiable to any order. `dtype` must differ from
    x.dtype."""
    return x.to(dtype) if watched([x]) else _Converted.apply(x, dtype)
