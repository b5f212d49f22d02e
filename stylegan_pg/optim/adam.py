"""Adam, whose learning rate is a number on the device, so that it may change between replays of a captured step.

PyTorch's fused kernel computes the step. It takes the learning rate as a tensor, but beta2 only as a host's number.
Where beta2 follows a curve, the step therefore consists of PyTorch's `_foreach_` operations, which read both on the
device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

_foreach: Any = torch  # whose _foreach_ functions are missing in stubs


class Rates(NamedTuple):
    """An optimizer's numbers that may change from step to step."""

    lr: float
    beta1: float
    beta2: float

    def of_adam(self) -> dict[str, Any]:
        """The same under the names that torch has for them."""
        return {"lr": float(self.lr), "betas": (float(self.beta1), float(self.beta2))}


class EagerAdam(torch.optim.Adam):
    """PyTorch's Adam without the decorators for torch.compile, which is not used for optimisers here. At the first call
    they would import the compiler, which takes about as long as importing PyTorch."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
    found_inf: torch.Tensor  # of shape []; the step is made where it is 0


class DeviceAdam(EagerAdam):
    """Adam with a learning rate, and if `beta2_moves` a beta2, of shape [] on the device.

    Args:
        parameters: on one device and of one dtype.
        capturable: see torch.optim.Adam; needed where steps are captured as CUDA graphs.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rates: Rates, eps: float, capturable: bool, beta2_moves: bool
    ):
        given = list(parameters)
        device = given[0].device
        read = torch.float64 if device.type == "cpu" else torch.float32  # as the fused kernels read it
        self.rates, self.beta2_moves = rates, beta2_moves
        self.lr = torch.full([], rates.lr, dtype=read, device=device)
        self.beta2 = torch.full([], rates.beta2, dtype=torch.float64, device=device)
        betas = (float(rates.beta1), float(rates.beta2))
        super().__init__(given, lr=self.lr, betas=betas, eps=eps, fused=True, capturable=capturable)

    @property
    def host_numbers(self) -> tuple[float, ...]:
        """The numbers that a captured step contains."""
        return (self.rates.beta1,) if self.beta2_moves else (self.rates.beta1, self.rates.beta2)

    def use(self, rates: Rates) -> None:
        """Take Adam's numbers for the next steps."""
        if rates.lr != self.rates.lr:
            self.lr.fill_(rates.lr)
        if rates.beta2 != self.rates.beta2:
            self.beta2.fill_(rates.beta2)
        for group in self.param_groups:
            group["betas"] = (float(rates.beta1), float(rates.beta2))
        self.rates = rates

    def make_step(self, held: torch.Tensor) -> None:
        """Update weights, moments and numbers of steps if `held`, of shape [], is 0; otherwise nothing changes."""
        if not self.beta2_moves:
            self.found_inf = held
            self.step()
            return
        with torch.no_grad():
            for group in self.param_groups:
                self._step_of(group, held)

    def _step_of(self, group: dict[str, Any], held: torch.Tensor) -> None:
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        means: list[torch.Tensor] = []
        squares: list[torch.Tensor] = []
        counts: list[torch.Tensor] = []
        self._init_group(group, params, grads, means, squares, [], counts)  # of torch's Adam: makes missing moments
        dtype = params[0].dtype
        made = 1 - held.double()  # factors are computed in float64, because 1 - beta2 can be tiny
        beta1, beta2 = torch.full_like(made, self.rates.beta1), self.beta2
        left_out = held != 0
        grads = [g.masked_fill(left_out, 0) for g in grads]  # as they may not be finite
        _foreach._foreach_add_(counts, [made.to(counts[0].dtype)] * len(counts))
        for moments, beta, values in ((means, beta1, grads), (squares, beta2, _foreach._foreach_mul(grads, grads))):
            share = (1 - beta) * made
            _foreach._foreach_mul_(moments, (1 - share).to(dtype))
            _foreach._foreach_add_(moments, _foreach._foreach_mul(values, share.to(dtype)))
        count = torch.stack(counts).double().clamp_(min=1)  # a step that is held may be the first one
        sizes = (self.lr.double() * made / (1 - beta1**count)).to(dtype)
        divisors = _foreach._foreach_sqrt(squares)
        _foreach._foreach_div_(divisors, list((1 - beta2**count).sqrt().to(dtype).unbind()))
        _foreach._foreach_add_(divisors, group["eps"])
        changes = _foreach._foreach_mul(means, list(sizes.unbind()))
        _foreach._foreach_div_(changes, divisors)
        _foreach._foreach_sub_(params, changes)
