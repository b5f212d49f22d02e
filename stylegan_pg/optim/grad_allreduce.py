"""Sums of gradients over the ranks, which are computed while the backward pass continues.

DistributedDataParallel is not used, because it loses track of gradients in passes that differentiate twice through
single modules: parameters of the ranks then diverge without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from stylegan_pg.distributed import process_group as dist


def buckets_of(parameters: Sequence[torch.Tensor], mib: float) -> list[list[int]]:
    """Indices of parameters whose gradients are summed in one message: neighbours of one dtype, added until they have
    at least `mib` MiB."""
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

    The buckets follow from the parameters alone, so the bits of a sum do not depend on when it was started. All ranks
    start the sums in the same order. At the first step of a kind this is the reverse of the parameters' order, and
    later the order in which the buckets were complete on rank 0 at that first step. The sum of a bucket starts when the
    last backward pass of the step has computed all of its gradients. `finish` starts the remaining sums: those of
    parameters that the pass did not reach, and those of a rank that has made fewer passes.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mib: float):
        self.parameters = list(parameters)
        self.buckets = buckets_of(self.parameters, mib)
        self.bucket_of = {i: b for b, bucket in enumerate(self.buckets) for i in bucket}
        self.orders: dict[str, list[int]] = {}  # by kind of step
        self.early = 0  # buckets of the last step whose sums started before its backward pass ended
        self.kind: str | None = None  # of the step whose last backward pass is running, otherwise None
        self.handles = []
        if dist.world() > 1:
            for i, p in enumerate(self.parameters):
                self.handles.append(p.register_post_accumulate_grad_hook(partial(self._arrived, i)))

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self.handles:
            handle.remove()

    def arm(self, kind: str) -> None:
        """Announce that the next backward pass is the last of a step of this kind."""
        self.kind = kind
        self.missing = [{i for i in bucket if self.parameters[i].requires_grad} for bucket in self.buckets]
        self.members = [sorted(missing) for missing in self.missing]  # without frozen parameters
        order = self.orders.get(kind, range(len(self.buckets))[::-1])
        self.queue = [b for b in order if self.members[b]]
        self.complete: list[int] = []
        self.flying: list[tuple[int, torch.Tensor, Callable[[], None]]] = []

    def _arrived(self, i: int, parameter: torch.Tensor) -> None:
        """Autograd's hook: the pass has added everything to the gradient of parameter i."""
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
        """The gradient of parameter i, zeros if no pass has reached it. Autograd calls the hook also for a parameter
        whose gradient stays None."""
        p = self.parameters[i]
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        return p.grad

    def finish(self, kind: str) -> None:
        """Replace the `grad` of every trainable parameter by its sum over the ranks. A collective call, with the same
        kind and the same frozen parameters on all ranks. With one rank it does nothing.

        Raises:
            PeersLost: another rank is gone.
        """
        if dist.world() == 1:
            return
        if self.kind is None:  # this rank has not made its last pass
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
