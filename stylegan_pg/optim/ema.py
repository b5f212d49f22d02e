"""Moving averages of the generator's weights, which are sampled and exported: the exponential one (Karras et al. 2018),
and power functions of the time since the start of a phase (Karras et al. 2024, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stylegan_pg.optim import profiles

foreach: Any = torch  # whose _foreach_ functions, which torch's own optimisers use, are missing in stubs


@torch.no_grad()
def update(G_ema: nn.Module, G: nn.Module, weight: torch.Tensor) -> None:
    """G_ema <- G_ema + weight (G - G_ema) for parameters; buffers are copied. Both have the same structure.

    Args:
        weight: of shape [] on their device, 1 - beta.
    """
    averages = list(G_ema.parameters())
    steps = foreach._foreach_sub(list(G.parameters()), averages)
    foreach._foreach_mul_(steps, weight)
    foreach._foreach_add_(averages, steps)
    if buffers := list(G_ema.buffers()):
        foreach._foreach_copy_(buffers, list(G.buffers()))


class PowerAverage:
    """The power-function average of one relative width of all tensors of a generator, on its device.

    Floating-point buffers (such as w_avg, or mean squares of activations) are averaged like parameters: to first order,
    the mean of what an averaged network computes is the average of the means. Other buffers are copied.

    Late in a long run the weight of a step is of the order of 1e-5, and its effect often less than half a unit of the
    last place of a float32. It would be rounded away every time, and the average would stand still. Therefore `rest`
    holds what rounding has left out (compensated summation); the exact average is the sum of both.

    Attributes:
        width: relative, standard deviation of the profile divided by its length.
        since: nimg at which the average began.
        tensors: {name: average}, in the dtypes of the generator's state.
        rest: {name: what is missing in it}, for floating-point tensors.
    """

    def __init__(self, width: float, G: nn.Module, since: int):
        self.width, self.gamma, self.since = width, profiles.gamma_of(width), since
        self.tensors = {name: t.detach().clone() for name, t in G.state_dict().items()}
        self.rest = {name: torch.zeros_like(t) for name, t in self.tensors.items() if t.is_floating_point()}

    @property
    def name(self) -> str:
        """What its parts of a checkpoint are called."""
        return part_name(self.width)

    def weight(self, batch: int, nimg: int) -> float:
        """The weight 1 - beta of G after the step of `batch` images that ends at nimg."""
        return profiles.step_weight(self.gamma, batch, nimg - self.since)

    @torch.no_grad()
    def update(self, G: nn.Module, weight: torch.Tensor) -> None:
        """Move the average towards G, in memory that stays the same.

        Args:
            weight: of shape [] on its device, 1 - beta.
        """
        now, names = G.state_dict(), list(self.rest)
        averages, rests = [self.tensors[name] for name in names], [self.rest[name] for name in names]
        steps = foreach._foreach_sub([now[name] for name in names], averages)
        foreach._foreach_mul_(steps, weight)
        foreach._foreach_add_(rests, steps)  # the change of the exact average since its rounded value
        moved = foreach._foreach_add(averages, rests)
        foreach._foreach_sub_(averages, moved)
        foreach._foreach_add_(rests, averages)  # without the part of it that the rounded value has made
        foreach._foreach_copy_(averages, moved)
        if whole := [name for name in self.tensors if name not in self.rest]:
            foreach._foreach_copy_([self.tensors[name] for name in whole], [now[name] for name in whole])

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """Its tensors as parts of a checkpoint."""
        return {self.name: self.tensors, f"{self.name}_rest": self.rest}

    @torch.no_grad()
    def load(self, parts: Mapping[str, Mapping[str, torch.Tensor]], since: int) -> None:
        """Take over what `parts` gave, with the same names and shapes."""
        self.since = since
        for part, own in self.parts().items():
            for name, t in own.items():
                t.copy_(parts[part][name])

    def restart(self, G: nn.Module, since: int) -> None:
        """Begin anew with the weights that G has now."""
        zeros = {name: torch.zeros([]) for name in self.rest}
        self.load({self.name: G.state_dict(), f"{self.name}_rest": zeros}, since)


def part_name(width: float) -> str:
    return f"average{width:g}"
