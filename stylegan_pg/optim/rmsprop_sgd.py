"""RMSProp and gradient descent with momentum, whose numbers are on the device, so that they may change between replays
of a captured step. The device decides whether a step is made, as in adam.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from stylegan_pg.optim.adam import Rates

_foreach: Any = torch  # whose _foreach_ functions are missing in stubs


class DeviceOptimizer:
    """What the two have in common: one moment of each parameter, which begins with zeros.

    Args:
        parameters: on one device and of one dtype. Those without a gradient are left out of a step.
    """

    moment: str  # its name in checkpoints, which is torch's

    def __init__(self, parameters: Iterable[nn.Parameter], rates: Rates, eps: float):
        self.parameters, self.rates, self.eps = list(parameters), rates, eps
        self.state: dict[nn.Parameter, dict[str, torch.Tensor]] = defaultdict(dict)
        device = self.parameters[0].device
        self.lr, self.beta1, self.beta2 = (torch.full([], x, dtype=torch.float64, device=device) for x in rates)

    @property
    def host_numbers(self) -> tuple[float, ...]:
        """The numbers that a captured step contains: none."""
        return ()

    def use(self, rates: Rates) -> None:
        """Take the numbers for the next steps."""
        for number, before, now in zip((self.lr, self.beta1, self.beta2), self.rates, rates, strict=True):
            if now != before:
                number.fill_(now)
        self.rates = rates

    @torch.no_grad()
    def make_step(self, held: torch.Tensor) -> None:
        """Update weights and moments if `held`, of shape [], is 0; otherwise nothing changes, also where gradients are
        not finite."""
        trained = [p for p in self.parameters if p.grad is not None]
        if not trained:
            return
        for p in trained:
            if self.moment not in self.state[p]:
                self.state[p][self.moment] = torch.zeros_like(p, memory_format=torch.preserve_format)
        left_out = held != 0
        grads = [p.grad.masked_fill(left_out, 0) for p in trained if p.grad is not None]
        moments = [self.state[p][self.moment] for p in trained]
        made = 1 - held.double()  # factors are computed in float64
        changes = self._changes(moments, grads, made, trained[0].dtype)
        _foreach._foreach_mul_(changes, (self.lr * made).to(trained[0].dtype))
        _foreach._foreach_sub_(trained, changes)

    def _changes(
        self, moments: list[torch.Tensor], grads: list[torch.Tensor], made: torch.Tensor, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Move the moments where `made`, of shape [], is 1 (not 0), and return new tensors: what the learning rate
        multiplies."""
        raise NotImplementedError


class DeviceRMSProp(DeviceOptimizer):
    """RMSProp as torch.optim.RMSprop computes it: the mean v of squared gradients with the decay beta2, and the step
    lr g / (sqrt(v) + eps). There is no correction of the mean's start, unlike in Adam."""

    moment = "square_avg"

    def _changes(
        self, moments: list[torch.Tensor], grads: list[torch.Tensor], made: torch.Tensor, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        share = (1 - self.beta2) * made
        _foreach._foreach_mul_(moments, (1 - share).to(dtype))
        _foreach._foreach_add_(moments, _foreach._foreach_mul(_foreach._foreach_mul(grads, grads), share.to(dtype)))
        divisors = _foreach._foreach_sqrt(moments)
        _foreach._foreach_add_(divisors, self.eps)
        return _foreach._foreach_div(grads, divisors)


class DeviceSGD(DeviceOptimizer):
    """Stochastic gradient descent as torch.optim.SGD computes it: m <- beta1 m + g, and the step lr m."""

    moment = "momentum_buffer"

    def _changes(
        self, moments: list[torch.Tensor], grads: list[torch.Tensor], made: torch.Tensor, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        _foreach._foreach_mul_(moments, (1 - (1 - self.beta1) * made).to(dtype))
        _foreach._foreach_add_(moments, grads)  # zeros where the step is held
        return _foreach._foreach_mul(moments, made.to(dtype))


OPTIMIZERS: dict[str, type[DeviceOptimizer]] = {"rmsprop": DeviceRMSProp, "sgd": DeviceSGD}
"""By the name that `optim.name` gives; optimizer_step.py has Adam besides."""
