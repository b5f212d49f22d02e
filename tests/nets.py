"""Small networks of every kind with random weights, for tests of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from stylegan_pg.networks import NETWORKS

# {kind: (name of the pair, arguments that select the kind)}; StyleGAN2 in its three architectures
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "skip": ("stylegan2", {"architecture": "skip"}),
    "resnet": ("stylegan2", {"architecture": "resnet"}),
    "orig": ("stylegan2", {"architecture": "orig"}),
    "stylegan": ("stylegan", {}),
    "progan": ("progan", {}),
}
WITH_MAPPING = ["skip", "stylegan"]
CLASSES = 3
SMALL = {"channel_base": 64, "channel_max": 12}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(make: Callable[[], torch.nn.Module], seed: int = 0) -> Any:
    """Build a network in float64 with random offsets of all parameters and buffers, so that no noise strength or bias
    is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = make().double()
        for tensor in net.state_dict().values():
            tensor += 0.3 * torch.randn_like(tensor)
    return net


def generator(resolution: int, seed: int = 0, *, kind: str = "skip", **kwargs: Any) -> Any:
    name, how = KINDS[kind]
    mapping = {} if name == "progan" else {"w_dim": 10, "mapping_layers": 2}
    given = {"resolution": resolution, "z_dim": 8, **SMALL, **mapping, **how, **kwargs}
    return shaken(lambda: NETWORKS[name].G(**given), seed)


def discriminator(resolution: int, seed: int = 0, *, kind: str = "resnet", **kwargs: Any) -> Any:
    name, how = KINDS[kind]
    mapping = {"mapping_layers": 2} if name == "stylegan2" else {}
    return shaken(lambda: NETWORKS[name].D(**{"resolution": resolution, **SMALL, **mapping, **how, **kwargs}), seed)


def labels(n: int) -> torch.Tensor:
    return F.one_hot(torch.arange(n) % CLASSES, CLASSES).double()


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


def differ(a: torch.Tensor, b: torch.Tensor) -> None:
    assert float((a - b).abs().max()) > 1e-3 * float(b.abs().max())
