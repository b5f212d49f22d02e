"""Sums of gradients over the ranks, on their way while the backward pass still goes on.

Of our own making rather than DistributedDataParallel's: passes that take gradients of gradients through single modules
leave its bookkeeping behind, and ranks drift apart without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from stylegan_pg.distributed import process_group as dist


def buckets_of(parameters: Sequence[torch.Tensor], mib: float) -> list[list[int]]:
    """Indices of parameters that travel together: neighbours of one dtype, `mib` MiB of them or the last one more."""
    result: list[list[int]] = []
    size, dtype = 0, None
    for i, p in enumerate(parameters):
        if not result or p.dtype != dtype or size >= mib * 2**20:
            result.append([])
            size, dtype = 0, p.dtype
        result[-1].append(i)
        size += p.numel() * p.element_size()
    return result


class GradientAllReduce:
    """Sums the gradients of one network's parameters over the ranks, bucket by bucket.

    What is in a bucket follows from the parameters alone, so the bits of a sum do not depend on when it was started.
    Buckets leave in one order on all ranks: the first time a kind of step is made, in the reverse of the parameters'
    order; from then on in the order in which they were complete on rank 0 that time. A bucket leaves when all of its
    gradients have arrived in the last backward pass of the step, and at `finish` whatever is left does: parameters
    that the pass did not reach, passes that this rank did not make.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mib: float):
        self.parameters = list(parameters)
        self.buckets = buckets_of(self.parameters, mib)
        self.bucket_of = {i: b for b, bucket in enumerate(self.buckets) for i in bucket}
        self.orders: dict[str, list[int]] = {}  # by kind of step
        self.early = 0  # buckets of the last step that left before its backward pass was over
        self.kind: str | None = None  # of the step whose last pass is being made, or None
        self.handles = []
        if dist.world() > 1:
            for i, p in enumerate(self.parameters):
                self.handles.append(p.register_post_accumulate_grad_hook(partial(self._arrived, i)))

    def close(self) -> None:
        """Let go of the parameters."""
        for handle in self.handles:
            handle.remove()

    def arm(self, kind: str) -> None:
        """The backward pass that follows is the last of a step of this kind."""
        self.kind = kind
        self.missing = [{i for i in bucket if self.parameters[i].requires_grad} for bucket in self.buckets]
        self.members = [sorted(missing) for missing in self.missing]  # without what is frozen
        order = self.orders.get(kind, range(len(self.buckets))[::-1])
        self.queue = [b for b in order if self.members[b]]
        self.complete: list[int] = []
        self.flying: list[tuple[int, torch.Tensor, Callable[[], None]]] = []

    def _arrived(self, i: int, parameter: torch.Tensor) -> None:
        """A gradient is whole as far as this pass goes; called by autograd."""
        if self.kind is None:
            return
        b = self.bucket_of[i]
        self.missing[b].discard(i)
        if self.missing[b]:
            return
        self.complete.append(b)
        while self.queue and not self.missing[self.queue[0]]:
            self._send(self.queue[0])
            self.queue.pop(0)

    def _send(self, b: int) -> None:
        flat = torch.cat([self._gradient(i).reshape(-1) for i in self.members[b]])
        self.flying.append((b, flat, dist.begin_sum(flat)))

    def _gradient(self, i: int) -> torch.Tensor:
        """Zero where no pass has come by, or none of any effect: autograd calls the hook for these too."""
        p = self.parameters[i]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return p.grad

    def finish(self, kind: str) -> None:
        """Every trainable parameter's `grad` becomes its sum over the ranks. A collective call, of the same kind and
        with the same parameters frozen on all ranks; nothing in a world of one.

        Raises:
            PeersLost: another rank is gone.
        """
        if dist.world() == 1:
            return
        if self.kind is None:  # this rank has not come to its last pass
            self.arm(kind)
        self.early = len(self.flying)
        for b in self.queue:
            self._send(b)
        for b, flat, wait in self.flying:
            wait()
            grads = [self._gradient(i) for i in self.members[b]]
            for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))
        if kind not in self.orders:
            rest = [b for b in range(len(self.buckets))[::-1] if b not in self.complete]
            self.orders[kind] = dist.broadcast_object(self.complete + rest)
        self.kind, self.flying, self.queue = None, [], []
