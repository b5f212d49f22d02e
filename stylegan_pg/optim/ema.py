"""The exponential moving average of the generator's weights, which is sampled and exported (Karras et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def update(G_ema: nn.Module, G: nn.Module, weight: torch.Tensor) -> None:
    """G_ema <- G_ema + weight (G - G_ema) for parameters; buffers are copied. Both have the same structure.

    Args:
        weight: of shape [] on their device, 1 - beta.
    """
    foreach: Any = torch  # whose _foreach_ functions, which torch's own optimisers use, are missing in stubs
    averages = list(G_ema.parameters())
    steps = foreach._foreach_sub(list(G.parameters()), averages)
    foreach._foreach_mul_(steps, weight)
    foreach._foreach_add_(averages, steps)
    if buffers := list(G_ema.buffers()):
        foreach._foreach_copy_(buffers, list(G.buffers()))
