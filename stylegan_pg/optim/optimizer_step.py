"""One optimizer step of a network: gradients are summed over the ranks by this package's all-reduce, and every rank
runs the optimizer.

Any number of backward passes, also with second derivatives, add to the gradients of a network. Then
`NetworkOptimizer.step` sums the gradients over the ranks and updates the weights, unless the loss or a gradient is not
finite. The device decides this, so that the host can go on to start the next operations; the host reads the reason
later. deepspeed.py does the same with DeepSpeed, whose step the host has to decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.optim import moments
from stylegan_pg.optim.adam import DeviceAdam, Rates
from stylegan_pg.optim.grad_allreduce import GradientAllReduce
from stylegan_pg.optim.rmsprop_sgd import OPTIMIZERS

OUT_OF_MEMORY = "out of memory"  # the reason if any rank ran out of memory
CONSTANTS = 256  # factors of losses that are remembered; those that follow a schedule may be many
# Messages of errors without a type of their own: of the host, and of libraries that allocate memory themselves.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device or the host could not allocate a tensor."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in NO_MEMORY)


class Verdict(NamedTuple):
    """Whether a step was made, as tensors on the device that are equal on all ranks.

    values: [2 + n], the sum of the loss, the number of ranks that were short of memory, and the norms of n gradients.
    held: of shape [], 0 if the weights were updated, else 1.
    """

    names: list[str]  # of the n parameters
    values: torch.Tensor
    held: torch.Tensor

    @property
    def short(self) -> torch.Tensor:
        """The number of ranks that were short of memory, of shape []."""
        return self.values[1]

    def fault(self, values: Sequence[float]) -> str:
        """The reason why the weights were not updated, "" if they were: OUT_OF_MEMORY if any rank was short, otherwise
        what was not finite: "the loss", or the name of the first parameter with such a gradient.

        Args:
            values: those of the verdict, read by the host.
        """
        loss, short, *sizes = values
        if short:
            return OUT_OF_MEMORY
        if not math.isfinite(loss):
            return "the loss"
        return next((name for name, size in zip(self.names, sizes, strict=True) if not math.isfinite(size)), "")


class NetworkOptimizer:
    """A network and its optimiser; each rank has all of its moments.

    A step consists of `begin`, as many calls of `backward` as were announced, and `step`.
    """

    RELIEF = "divide the moments among the ranks (train.engine=deepspeed, train.zero_stage=1)"  # to save memory
    optimizer: Any

    def __init__(
        self, parallel: Any, net: nn.Module, named: dict[str, nn.Parameter], rates: Rates, beta2_moves: bool = False
    ):
        """`named`: the parameters that are trained. `beta2_moves`: whether `rates.beta2` will change often."""
        self.parallel, self.net, self.named = parallel, net, named
        self.rates, self.beta2_moves = rates, beta2_moves
        self.kind, self.left = "", 0
        self.overlaps = True  # whether sums over the ranks start during the last backward pass
        self.constants: dict[Any, torch.Tensor] = {}
        self._build()

    def _build(self) -> None:
        name, eps = self.parallel.optim.name, self.parallel.optim.eps
        if name in OPTIMIZERS:
            self.optimizer = OPTIMIZERS[name](self.named.values(), self.rates, eps)
        else:
            capturable = self.parallel.device.type == "cuda" and self.parallel.train.graphs != "off"
            self.optimizer = DeviceAdam(self.named.values(), self.rates, eps, capturable, self.beta2_moves)
        self.sums = GradientAllReduce(list(self.named.values()), self.parallel.train.bucket_mib)

    def close(self) -> None:
        """Release the network, so that another optimizer can be made for it or its successor."""
        self.sums.close()

    def use(self, rates: Rates) -> None:
        """Take the optimizer's numbers for the next steps."""
        if rates != self.rates:
            self.rates = rates
            self._use()

    def _use(self) -> None:
        self.optimizer.use(self.rates)

    @property
    def host_numbers(self) -> tuple[float, ...]:
        """The numbers that a captured step contains."""
        return self.optimizer.host_numbers

    def begin(self, kind: str, passes: int) -> None:
        """Start a step of a kind, which is the same on all ranks, with this number of backward passes on this rank."""
        self._clear()
        self.kind, self.left = kind, passes

    def _clear(self) -> None:
        for p in self.named.values():
            p.grad = None

    def backward(self, loss: torch.Tensor, factor: float = 1.0) -> None:
        """Add the gradients of `factor` times a loss of shape [], this rank's part of the sum over all ranks."""
        assert self.left > 0, "more backward passes than were announced"
        self.left -= 1
        if self.left == 0:
            self._last()
        factor_, scale = self._constant(factor, loss), self.parallel.scale
        loss.backward(factor_ if scale is None else factor_ * scale.to(loss.dtype))

    def _constant(self, value: float, like: torch.Tensor) -> torch.Tensor:
        """A number as a tensor on the device of another, made once."""
        key = (value, like.dtype, like.device)
        if key not in self.constants:
            if len(self.constants) >= CONSTANTS and self.overlaps:  # captured steps may need them
                self.constants.clear()
            self.constants[key] = torch.full([], value, dtype=like.dtype, device=like.device)
        return self.constants[key]

    def _last(self) -> None:
        if dist.world() > 1 and self.overlaps:
            self.sums.arm(self.kind)

    def exchange(self, loss: torch.Tensor, short: bool = False, halted: torch.Tensor | None = None) -> torch.Tensor:
        """Sum gradients and reports over the ranks. A collective call.

        Args:
            loss: this rank's loss, of shape []; it is only checked to be finite.
            short: whether this rank ran out of memory before its last pass.
            halted: of shape []; unless it is 0, the weights are not updated, because of an update before.

        Returns:
            [3]: the sum of the loss, the number of ranks that were short, and `halted`.

        Raises:
            PeersLost: another rank is gone.
        """
        self.sums.finish(self.kind)
        return self._reports(loss, short, halted)

    def _reports(self, loss: torch.Tensor, short: bool, halted: torch.Tensor | None) -> torch.Tensor:
        loss = loss.detach().to(next(iter(self.named.values())).dtype).reshape([])
        sums = dist.all_reduce(torch.stack([loss, torch.full_like(loss, float(short))]))
        return torch.cat([sums, (torch.zeros_like(loss) if halted is None else halted).reshape(1)])

    def step(self, reports: torch.Tensor) -> Verdict:
        """Update the weights if nothing speaks against it, and clear the gradients. The host waits for nothing.

        A parameter that no pass reached has the gradient zero, so that it is treated alike on one rank and on many.

        Args:
            reports: of `exchange`.

        Raises:
            RunError: the memory is too small for the optimiser's moments.
        """
        named, grads = self._trained()
        unscale(grads, self.parallel.scale)
        values = torch.cat([reports[:2], self._sizes(grads)])
        # 0 if all are finite, no rank was short, and no update before was held for that
        held = ((values * 0).sum() + reports[1:].sum()).ne(0).to(torch.float32)
        try:
            self._apply(held)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            numbers = sum(p.numel() for p in self.named.values())
            raise RunError(
                f"out of memory in the optimiser's step of a network of {numbers / 1e6:.1f} million parameters, "
                f"whose memory does not depend on the micro-batch. Lower model.channel_base, {self.RELIEF}, or "
                "take larger devices; the last checkpoint is kept"
            ) from None
        self._clear()
        return Verdict(named, values, held)

    def fill(self) -> None:
        """Give parameters that no pass reached the gradient zero."""
        self._trained()

    def _trained(self) -> tuple[list[str], list[torch.Tensor]]:
        """Names and gradients of the parameters that are not frozen now; zeros for those that no pass reached."""
        trained = {name: p for name, p in self.named.items() if p.requires_grad}
        for p in trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return list(trained), [p.grad for p in trained.values() if p.grad is not None]

    def _sizes(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Norms [n] that are finite if the sums of the gradients over the ranks are."""
        return norms(grads)

    def _apply(self, held: torch.Tensor) -> None:
        """Make the optimizer's step where `held` is 0."""
        self.optimizer.make_step(held)

    def clip(self, limit: float, held: torch.Tensor) -> None:
        """Clamp the weights that are not frozen to [-limit, limit], if the step was made."""
        trained = [p for p in self.named.values() if p.requires_grad]
        with torch.no_grad():
            bound = torch.where(held == 0, limit, float("inf")).to(trained[0].dtype)
            for p in trained:
                p.clamp_(-bound, bound)

    def gather(self) -> dict[str, torch.Tensor]:
        """The optimizer's state by parameter name ("exp_avg/mapping.fc0.weight"), on every rank. The form does not
        depend on the engine or the number of ranks. The tensors may be those in use. A collective call."""
        return moments.optimizer_tensors(self.net, self.optimizer)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `gather`, which must also be called after weights were changed from outside. Names that the
        network does not have are ignored; parameters without a state in `tensors` start with none."""
        moments.restore_optimizer(self.net, self.optimizer, tensors, self.parallel.optim.name)


def unscale(grads: Sequence[torch.Tensor], scale: torch.Tensor | None) -> None:
    """Divide gradients in place by the loss scale, of shape []; None: 1."""
    if scale is not None and grads:
        torch._foreach_mul_(grads, scale.reciprocal().to(grads[0].dtype))  # type: ignore[attr-defined]  # not in stubs


def norms(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norms [n] of n gradients."""
    return torch.stack(torch._foreach_norm(grads))  # type: ignore[attr-defined]  # as torch's clip_grad_norm_ does
