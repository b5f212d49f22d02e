"""Feature networks of a measurement, how metrics look at images with them, and how ranks share the images out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.images import over_white
from stylegan_pg.metrics import base
from stylegan_pg.metrics.accumulators import Accumulator
from stylegan_pg.metrics.base import ImageMetric, Tools


class Networks:
    """Feature networks, each of which is loaded when it is first asked for."""

    def __init__(self, tools: Tools):
        self.tools = tools
        self._loaded: dict[str, Any] = {}

    def of(self, network: str) -> Any:
        """Return the extractor of that name, or the user's extractor in its place; for "lpips" the distance.

        Raises:
            UsageError: if weights are missing or do not fit.
        """
        from stylegan_pg.metrics import features  # torchvision and torch-fidelity take their time

        tools = self.tools
        name = tools.extractor if network != "lpips" and tools.extractor else network
        if name not in self._loaded:
            with torch.random.fork_rng(devices=[]):  # networks are initialised before their weights are put in
                if name == "lpips":
                    self._loaded[name] = features.load_distance(tools.weights, tools.device)
                else:
                    self._loaded[name] = features.load_extractor(name, tools.weights, tools.device, tools.precision)
        return self._loaded[name]

    def feature(self, metric: ImageMetric) -> str:
        """Return the name of the extractor's output that a metric looks at."""
        return "pool" if self.tools.extractor else metric.feature


def take_in(
    metric: ImageMetric,
    into: Accumulator,
    first: int,
    images: torch.Tensor,
    networks: Networks,
    known: dict[str, Any],
) -> None:
    """Let a metric look at images and its accumulator take in what it observes.

    Args:
        first: The number of the first image.
        images: uint8 [n, C, H, W]; RGBA images are laid over white.
        known: Features by network that were already computed of these images, and perhaps of more that follow them.
            New ones are added.
    """
    seen = over_white(images)
    if metric.network:
        network = networks.of(metric.network)
        if network.identity not in known:
            known[network.identity] = network(seen)
        found = feature_of(known[network.identity], networks.feature(metric), network.identity)
        seen = found[: len(images)]
    into.add(metric.observe(seen), first)


def feature_of(found: dict[str, torch.Tensor], name: str, network: str) -> torch.Tensor:
    """Return one of an extractor's outputs, [n, d].

    Raises:
        UsageError: if it gives none of that name.
    """
    if name not in found:
        raise UsageError(f"the extractor {network} gives {', '.join(found)}, but no {name!r}: name another extractor")
    return found[name]


def share(total: int) -> Iterator[int]:
    """Yield the numbers of this rank's blocks of so many images."""
    yield from range(dist.rank(), -(-total // base.BLOCK), dist.world())


def merge(parts: list[Accumulator]) -> Accumulator:
    """Merge the accumulators of all ranks into the first one."""
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]
