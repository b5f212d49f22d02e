"""The mean of a network's weights over all its steps so far, for historical averaging (Salimans et al. 2016, section
3.3). It is part of checkpoints, and lives on the networks' device, so that no step has to wait for the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STEPS = "steps"

foreach: Any = torch  # whose _foreach_ functions are missing in stubs


class History:
    """The mean of the weights of one network after each of its steps in a phase; before the first one there is none.

    Attributes:
        tensors: {parameter's name: mean}, and the number of steps, float64 of shape [].
    """

    def __init__(self, net: nn.Module):
        self.tensors = {f"mean.{name}": torch.zeros_like(p) for name, p in net.named_parameters()}
        self.tensors[STEPS] = torch.zeros([], dtype=torch.float64, device=next(net.parameters()).device)

    @property
    def steps(self) -> torch.Tensor:
        """Of shape []."""
        return self.tensors[STEPS]

    @property
    def means(self) -> list[torch.Tensor]:
        """In the order of the network's parameters."""
        return [t for name, t in self.tensors.items() if name != STEPS]

    def known(self) -> torch.Tensor:
        """0 before the first step, and 1 from then on, of shape []."""
        return (self.steps > 0).to(self.means[0].dtype)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take in the weights after a step."""
        steps, means = self.steps, self.means
        steps += 1
        weight = steps.reciprocal().to(means[0].dtype)
        moves = foreach._foreach_sub([p.detach() for p in net.parameters()], means)
        foreach._foreach_mul_(moves, weight)
        foreach._foreach_add_(means, moves)
