"""Network pairs by name, and what it means to grow one."""

from __future__ import annotations

import torch
from torch import nn

from stylegan_pg.networks import mlp, stylegan2

# name -> (generator, discriminator)
NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "stylegan2": (stylegan2.Generator, stylegan2.Discriminator),
    "mlp": (mlp.Generator, mlp.Discriminator),
}


def to_channels_last(module: nn.Module) -> nn.Module:
    """Compute in the layout that is fastest on CPUs and under mixed precision (results differ by rounding only);
    a discriminator follows the layout of the images it is given."""
    for part in module.modules():
        if isinstance(part, stylegan2.SynthesisBlock):
            part.memory_format = torch.channels_last
    return module.to(memory_format=torch.channels_last)


def copy_same_names(new: nn.Module, old: nn.Module) -> list[str]:
    """Growth: give `new` every parameter and buffer of `old` that it also has; returns the names it has anew."""
    source = old.state_dict()
    target = new.state_dict()
    for name, tensor in target.items():
        if name in source:
            tensor.copy_(source[name])
    return sorted(target.keys() - source.keys())
