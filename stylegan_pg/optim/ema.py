"""The exponential moving average of the generator's weights, which is sampled and exported (Karras et al. 2018)."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update(G_ema: nn.Module, G: nn.Module, beta: float) -> None:
    """G_ema <- beta G_ema + (1 - beta) G for parameters; buffers are copied. Both have the same structure."""
    lerp = torch._foreach_lerp_  # type: ignore[attr-defined]  # as torch's own optimisers do
    lerp(list(G_ema.parameters()), list(G.parameters()), 1 - beta)
    if buffers := list(G_ema.buffers()):
        torch._foreach_copy_(buffers, list(G.buffers()))  # type: ignore[attr-defined]  # not in stubs
