"""Images, generated or real, looked at by metrics: with which networks, and shared out in blocks over the ranks."""

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
    """Feature networks, loaded when they are first asked for."""

    def __init__(self, tools: Tools):
        self.tools = tools
        self._loaded: dict[str, Any] = {}

    def of(self, network: str) -> Any:
        """The extractor of that name, or the user's in its place; for "lpips" the distance.

        Raises:
            UsageError: for weights that are missing or do not fit.
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
        """Which of the extractor's features a metric looks at."""
        return "pool" if self.tools.extractor else metric.feature


def take_in(
    metric: ImageMetric,
    into: Accumulator,
    first: int,
    images: torch.Tensor,
    networks: Networks,
    known: dict[str, Any],
) -> None:
    """Images with numbers from `first` on, RGBA ones over white; `known` holds the features that were already computed
    of them, and perhaps of more that follow."""
    seen = over_white(images)
    if metric.network:
        network = networks.of(metric.network)
        if network.identity not in known:
            known[network.identity] = network(seen)
        found = feature_of(known[network.identity], networks.feature(metric), network.identity)
        seen = found[: len(images)]
    into.add(metric.observe(seen), first)


def feature_of(found: dict[str, torch.Tensor], name: str, network: str) -> torch.Tensor:
    """One of an extractor's features, [n, d].

    Raises:
        UsageError: where it gives none of that name.
    """
    if name not in found:
        raise UsageError(f"the extractor {network} gives {', '.join(found)}, but no {name!r}: name another extractor")
    return found[name]


def share(total: int) -> Iterator[int]:
    """This rank's blocks of so many images."""
    yield from range(dist.rank(), -(-total // base.BLOCK), dist.world())


def merge(parts: list[Accumulator]) -> Accumulator:
    """All ranks' parts as one."""
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]
