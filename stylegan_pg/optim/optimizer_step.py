"""One optimizer step of a network: gradients summed over the ranks by an all-reduce of this package, and Adam on every
rank.

The backward passes of a side add up gradients in its network, however many passes there are and whatever they
differentiate twice; then `NetworkOptimizer.step` sums them over the ranks and moves the weights. deepspeed.py does the
same with DeepSpeed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.optim import moments
from stylegan_pg.optim.grad_allreduce import GradientAllReduce

OUT_OF_MEMORY = "out of memory"  # what NetworkOptimizer.step returns if a rank was
# What errors say that have no type of their own: of the host, and of libraries that get memory beside PyTorch's.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no room for a tensor."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in NO_MEMORY)


class EagerAdam(torch.optim.Adam):
    """PyTorch's Adam without the marks for torch.compile, which optimisers are never given to here: at their first call
    they import the compiler, which takes about as long as importing PyTorch."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class NetworkOptimizer:
    """A network and its optimiser: gradients summed by ourselves, each rank with all of Adam's moments.

    One step is `begin`, as many `backward` as were announced, on any number of forward passes, and `step`.
    """

    RELIEF = "share the moments out (train.engine=deepspeed, train.zero_stage=1 on several ranks)"  # of memory
    optimizer: Any

    def __init__(self, parallel: Any, net: nn.Module, named: dict[str, nn.Parameter], adam: dict):
        self.parallel, self.net, self.named, self.adam = parallel, net, named, adam
        self.kind, self.left = "", 0
        self._build()

    def _build(self) -> None:
        self.optimizer = EagerAdam(self.named.values(), **self.adam)
        self.sums = GradientAllReduce(list(self.named.values()), self.parallel.train.bucket_mib)

    def close(self) -> None:
        """Let go of the network, before another optimizer takes it or its successor."""
        self.sums.close()

    def begin(self, kind: str, passes: int) -> None:
        """Start afresh for a step of a kind, the same on all ranks, with so many backward passes on this rank."""
        self._clear()
        self.kind, self.left = kind, passes

    def _clear(self) -> None:
        for p in self.named.values():
            p.grad = None

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss of shape [], which is this rank's part of the sum over all of them."""
        assert self.left > 0, "more backward passes than were announced"
        self.left -= 1
        if self.left == 0:
            self._last()
        scale = self.parallel.scale
        self.parallel.accelerator.backward(loss * scale if scale != 1 else loss)

    def _last(self) -> None:
        if dist.world() > 1:
            self.sums.arm(self.kind)

    def step(self, loss: torch.Tensor, short: bool = False) -> str:
        """Sum the gradients over the ranks, step, and clear them. A collective call.

        A parameter that a pass did not reach has the gradient zero, on one rank as on many: Adam must not skip it
        here and step it there.

        Args:
            loss: this rank's, of shape []; only whether it is finite counts.
            short: this rank ran out of memory before it had made all of its passes.

        Returns:
            "", or on all ranks alike why nothing has moved: OUT_OF_MEMORY if any rank was short, else what was not
            finite: "the loss" or the first such parameter's name.

        Raises:
            PeersLost: another rank is gone.
            RunError: there is no room for the optimiser's moments.
        """
        self.sums.finish(self.kind)
        named, grads = self._trained()
        unscale(grads, self.parallel.scale)
        return self._move(loss, short, named, norms(grads))

    def _trained(self) -> tuple[list[str], list[torch.Tensor]]:
        """Names and gradients of what is not frozen at the moment; zeros where no pass has been."""
        trained = {name: p for name, p in self.named.items() if p.requires_grad}
        for p in trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return list(trained), [p.grad for p in trained.values() if p.grad is not None]

    def _move(self, loss: torch.Tensor, short: bool, names: list[str], sizes: torch.Tensor) -> str:
        """Make the optimiser's step, unless something speaks against it on any rank."""
        told = dist.all_reduce(torch.stack([loss.detach().to(sizes.dtype).reshape([]), sizes.new_tensor(float(short))]))
        loss_sum, ran_short, *values = torch.cat([told, sizes]).tolist()
        fault = OUT_OF_MEMORY if ran_short else "" if math.isfinite(loss_sum) else "the loss"
        if not fault:
            fault = next((name for name, v in zip(names, values, strict=True) if not math.isfinite(v)), "")
        if not fault:
            try:
                self._apply()
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                numbers = sum(p.numel() for p in self.named.values())
                raise RunError(
                    f"out of memory in the optimiser's step of a network of {numbers / 1e6:.1f} million parameters, "
                    f"which takes the same whatever the micro-batch is. Lower model.channel_base, {self.RELIEF}, or "
                    "take larger devices; the last checkpoint stays"
                ) from None
        self._clear()
        return fault

    def _apply(self) -> None:
        self.optimizer.step()

    def clip(self, limit: float) -> None:
        """Bring the weights that are not frozen into [-limit, limit]."""
        with torch.no_grad():
            for p in self.named.values():
                if p.requires_grad:
                    p.clamp_(-limit, limit)

    def gather(self) -> dict[str, torch.Tensor]:
        """Adam's state by parameter name ("exp_avg/mapping.fc0.weight"), whole, on every rank; those tensors may be
        the ones in use. The same for all engines and any world. A collective call."""
        return moments.optimizer_tensors(self.net, self.optimizer)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `gather`, and to be called whenever weights were changed from outside. Names that the
        network does not have are passed over, those that the tensors lack start afresh."""
        moments.restore_optimizer(self.net, self.optimizer, tensors)


def unscale(grads: Sequence[torch.Tensor], scale: float) -> None:
    if scale != 1:
        for grad in grads:
            grad.mul_(1 / scale)


def norms(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n] of n gradients."""
    return torch.stack(torch._foreach_norm(grads))  # type: ignore[attr-defined]  # as torch's clip_grad_norm_ does
