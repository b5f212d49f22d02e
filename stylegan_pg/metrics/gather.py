"""Loading of feature networks, accumulation of what metrics observe, and distribution of the images over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.images import over_white
from stylegan_pg.metrics import base
from stylegan_pg.metrics.accumulators import Accumulator
from stylegan_pg.metrics.base import ImageMetric, Settings


class Networks:
    """The feature networks of a measurement. Each is loaded at its first use."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._loaded: dict[str, Any] = {}

    def get(self, network: str) -> Any:
        """Return the feature extractor of this name, or the user's extractor that replaces it. For "lpips", return the
        distance function.

        Raises:
            UsageError: if weights are missing or do not fit.
        """
        from stylegan_pg.metrics import features  # imported late, because torchvision and torch-fidelity are slow

        settings = self.settings
        name = settings.extractor if network != "lpips" and settings.extractor else network
        if name not in self._loaded:
            with torch.random.fork_rng(devices=[]):  # constructors draw initial weights from the global generator
                if name == "lpips":
                    self._loaded[name] = features.load_distance(settings.weights, settings.device)
                else:
                    self._loaded[name] = features.load_extractor(
                        name, settings.weights, settings.device, settings.precision
                    )
        return self._loaded[name]

    def feature(self, metric: ImageMetric) -> str:
        """Return the name of the extractor's output that a metric uses."""
        return "pool" if self.settings.extractor else metric.feature


def observe_images(
    metric: ImageMetric,
    accumulator: Accumulator,
    first: int,
    images: torch.Tensor,
    networks: Networks,
    known: dict[str, Any],
) -> None:
    """Compute what a metric observes in a batch of images, and add it to the accumulator.

    Args:
        metric: The metric.
        accumulator: The metric's accumulator.
        first: The number of the first image.
        images: uint8 [n, C, H, W]. RGBA images are composited over white.
        networks: The feature networks.
        known: {identity of a network: its features} that have been computed for these images, and possibly for images
            that follow them in the batch. Newly computed features are added.
    """
    seen = over_white(images)
    if metric.network:
        network = networks.get(metric.network)
        if network.identity not in known:
            known[network.identity] = network(seen)
        found = select_feature(known[network.identity], networks.feature(metric), network.identity)
        seen = found[: len(images)]
    accumulator.add(metric.observe(seen), first)


def select_feature(found: dict[str, torch.Tensor], name: str, network: str) -> torch.Tensor:
    """Return the extractor's output `name`, [n, d].

    Raises:
        UsageError: if the extractor has no output of this name.
    """
    if name not in found:
        raise UsageError(
            f"the extractor {network} returns {', '.join(found)}, but not {name!r}: choose another extractor"
        )
    return found[name]


def own_blocks(total: int) -> Iterator[int]:
    """Yield the numbers of the blocks that this rank processes, for `total` images."""
    yield from range(dist.rank(), -(-total // base.BLOCK), dist.world())


def merge(parts: list[Accumulator]) -> Accumulator:
    """Merge the accumulators of all ranks into the first one."""
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]
