"""The network pairs by name, and the copying of weights when networks grow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn

from stylegan_pg.config import (
    BEGANConfig,
    CharsConfig,
    CodesConfig,
    DCGANConfig,
    DDGANConfig,
    DDGANPointsConfig,
    MLPConfig,
    ProGANConfig,
    R3GANConfig,
    SRResNetConfig,
    StyleGAN2Config,
    StyleGAN3Config,
    StyleGANConfig,
)
from stylegan_pg.networks import (
    began,
    chars,
    codes,
    dcgan,
    denoising_mlp,
    mlp,
    ncsnpp,
    progan,
    r3gan,
    srresnet,
    stylegan,
    stylegan2,
    stylegan3,
)
from stylegan_pg.networks.form import NetworkShape
from stylegan_pg.networks.ranges import check_arguments

__all__ = [
    "NETWORKS",
    "NetworkShape",
    "Pair",
    "accepted",
    "check_arguments",
    "copy_same_names",
    "declares",
    "shown_to",
    "to_channels_last",
]

MODULES = {
    StyleGAN2Config.name: stylegan2,
    StyleGANConfig.name: stylegan,
    ProGANConfig.name: progan,
    StyleGAN3Config.name: stylegan3,
    R3GANConfig.name: r3gan,
    DCGANConfig.name: dcgan,
    SRResNetConfig.name: srresnet,
    BEGANConfig.name: began,
    DDGANConfig.name: ncsnpp,
    DDGANPointsConfig.name: denoising_mlp,
    MLPConfig.name: mlp,
    CodesConfig.name: codes,
    CharsConfig.name: chars,
}
Kwargs = Callable[[Any, NetworkShape], dict[str, Any]]  # of a ModelConfig, of the pair's own class


class Pair(NamedTuple):
    """A generator's and a discriminator's class, and the functions that give their keyword arguments, which are plain
    JSON values: `pair.G(**pair.g_kwargs(model, shape))`."""

    G: type[nn.Module]
    D: type[nn.Module]
    g_kwargs: Kwargs
    d_kwargs: Kwargs


def _pair(module: Any) -> Pair:
    return Pair(module.Generator, module.Discriminator, module.generator_kwargs, module.discriminator_kwargs)


NETWORKS = {name: _pair(module) for name, module in MODULES.items()}


def to_channels_last(module: nn.Module) -> nn.Module:
    """Switch a network to channels_last, which is faster on CPUs and in 16 bits (results differ by rounding only).

    Modules whose output starts a layout have an attribute `memory_format`, which is set; a discriminator uses the
    layout of its images.
    """
    for part in module.modules():
        if hasattr(part, "memory_format"):
            part.memory_format = torch.channels_last  # type: ignore[assignment]  # no tensor, as pyright assumes
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a keyword of its own


def copy_same_names(new: nn.Module, old: nn.Module) -> list[str]:
    """Growth: copy every parameter and buffer of `old` that `new` has, too; returns the names that `old` lacks."""
    source = old.state_dict()
    target = new.state_dict()
    for name, tensor in target.items():
        if name in source:
            tensor.copy_(source[name])
    return sorted(target.keys() - source.keys())


@lru_cache(maxsize=256)
def _keywords(forward: Any) -> frozenset[str] | None:
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def accepted(net: nn.Module, **how: Any) -> dict[str, Any]:
    """The keyword arguments that a network's forward pass accepts; a plain network does not accept alpha, for
    example."""
    known = _keywords(type(net).forward)
    return how if known is None else {name: value for name, value in how.items() if name in known}


def shown_to(D: Any, G: Any, images: torch.Tensor) -> torch.Tensor:
    """What D judges of images [N, C, H, W]: the images, or, if it judges codes, what G encodes them to [N, z_dim]."""
    return G.encode(images) if getattr(D, "judges_codes", False) else images


def declares(net: nn.Module, name: str) -> bool:
    """Whether a network's forward pass declares a keyword argument of this name; one that takes any does not."""
    return name in (_keywords(type(net).forward) or ())
