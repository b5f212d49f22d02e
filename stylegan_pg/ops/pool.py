"""A pool of reusable memory for the results of the CPU kernels.

glibc gets blocks of more than 32 MiB from the system and returns them each time, and smaller ones often, so results lie
on new pages. Providing new pages takes longer than the kernels' computation (up to 20 times as long in virtual
machines). PyTorch has a caching allocator for GPUs, but none for CPUs. Therefore the memory of large results is
recorded here and, once nothing else refers to it, reused for the next result of the same size.
"""

from __future__ import annotations

import contextlib
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

LEAST = 2**22  # bytes; smaller blocks come from glibc's heap as fast, and mostly are still in the processor's caches
VARIABLE = "STYLEGAN_PG_POOL_MIB"
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of containers and jobs


def default_limit() -> int:
    """The limit of the pool in bytes, used and idle blocks together: STYLEGAN_PG_POOL_MIB (0: no pool), else the
    minimum of 2 GiB and a 16th of the machine's (or job's) memory, divided by the ranks of the node."""
    text = os.environ.get(VARIABLE, "")
    if text.isdecimal():
        return int(text) * 2**20
    if text:
        print(f"warning: {VARIABLE}={text!r} is no number of MiB, and does not count", file=sys.stderr)
    memory = [2**34]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on every system
        memory = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            memory.append(int(Path(path).read_text("ascii")))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(2**31, min(memory) // 16 // max(1, int(ranks) if ranks.isdecimal() else 1))


class Pool:
    """Blocks of memory, as numpy arrays. The storage of a tensor made from a block refers to the array for as long as
    anything (views, numpy arrays, autograd graphs) refers to the storage. So a block that only this pool refers to is
    idle."""

    def __init__(self, limit: int):
        self.limit = limit
        self.blocks: OrderedDict[int, list[Any]] = OrderedDict()  # bytes -> arrays, the sizes by last use
        # Nobody waits for this lock: a call made while another thread (or this one, in a finalizer) holds it does not
        # use the pool.
        self.lock = threading.Lock()
        self.alone = 0
        self.alone = self._holders([_new(64)], 0)

    @property
    def total(self) -> int:
        return sum(nbytes * len(same) for nbytes, same in list(self.blocks.items()))

    @staticmethod
    def _holders(same: list[Any], i: int) -> int:
        return sys.getrefcount(same[i])

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """An uninitialised tensor, or None if the pool has no room."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self.limit or not self.lock.acquire(blocking=False):
            return None
        try:
            same = self.blocks.setdefault(nbytes, [])
            self.blocks.move_to_end(nbytes)
            for i in range(len(same)):
                if self._holders(same, i) == self.alone:
                    return _tensor(same[i], shape, strides, dtype)
            if not self._make_room(nbytes):
                return None
            same.append(_new(nbytes))
            return _tensor(same[-1], shape, strides, dtype)
        finally:
            self.lock.release()

    def _make_room(self, nbytes: int) -> bool:
        """Make room within the limit by freeing idle blocks, those of the least recently used sizes first; nothing is
        freed if that cannot suffice."""
        excess = self.total + nbytes - self.limit
        idle = [(size, i) for size, same in self.blocks.items() for i in self._idle(same)]
        if excess > sum(size for size, _ in idle):
            return False
        given: dict[int, list[int]] = {}
        for size, i in idle:
            if excess > 0:
                given.setdefault(size, []).append(i)
                excess -= size
        for size, indices in given.items():
            self._give_back(size, indices)
        return True

    def _idle(self, same: list[Any]) -> list[int]:
        return [i for i in range(len(same)) if self._holders(same, i) == self.alone]

    def _give_back(self, size: int, indices: list[int]) -> None:
        for i in reversed(indices):
            del self.blocks[size][i]

    def clear(self) -> None:
        """Free all idle blocks."""
        if self.lock.acquire(blocking=False):
            try:
                for size in list(self.blocks):
                    self._give_back(size, self._idle(self.blocks[size]))
                    if not self.blocks[size]:
                        del self.blocks[size]
            finally:
                self.lock.release()


def _new(nbytes: int) -> Any:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy()


def _tensor(block: Any, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(block, dtype=dtype).as_strided_(shape, strides)  # in place: no view of another tensor


_pool: Pool | None = None


def _the_pool() -> Pool:
    global _pool
    if _pool is None:
        _pool = Pool(default_limit())
    return _pool


def clear() -> None:
    """Free all idle blocks, before other sizes are needed or when memory is short."""
    if _pool is not None:
        _pool.clear()


def empty(
    shape: Sequence[int], like: torch.Tensor, layout: torch.memory_format, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised tensor on `like`'s device, of its dtype unless another is given; contiguous, or channels_last
    [N, C, H, W]."""
    dtype = dtype or like.dtype
    if math.prod(shape) * dtype.itemsize < LEAST or not like.is_cpu:
        return torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout)
    try:
        found = _the_pool().empty(shape, _strides(shape, layout), dtype)
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=layout) if found is None else found
    except RuntimeError:  # for want of memory
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
    """x.to(dtype) for another dtype, with a result in pooled memory, in x's layout, differentiable to any order."""
    return x.to(dtype) if watched([x]) else _Converted.apply(x, dtype)
