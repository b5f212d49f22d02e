"""What is gathered of images, generated or real, and with what: shared out in blocks, merged exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.images import over_white
from stylegan_pg.metrics.protocol import NETWORK, Protocol
from stylegan_pg.metrics.similarity import ms_ssim
from stylegan_pg.metrics.statistics import InceptionScore, Moments
from stylegan_pg.metrics.swd import PatchCollector
from stylegan_pg.rng import derive

BLOCK = 64  # images, whose contents follow from (seed, number)
FEATURE = {"fid": "pool", "kid": "pool", "is": "logits", "pr": "fc2"}


@dataclass(frozen=True)
class Tools:
    """With what is measured.

    Attributes:
        device: where networks run; images and statistics are on the CPU.
        weights: files for the feature networks, recognised by what is in them.
        extractor: instead of Inception and VGG16, pixels or "package.module:function"; empty for those.
        precision: of the feature networks, fp32 or bf16.
        batch: images at a time.
        seed: which latents, and which real images where not all are taken.
        cache: whether what is computed of real images is kept on disk.
    """

    device: torch.device
    weights: tuple[str, ...] = ()
    extractor: str = ""
    precision: str = "fp32"
    batch: int = 32
    seed: int = 0
    cache: bool = True


class Networks:
    """Feature networks, loaded when they are first asked for."""

    def __init__(self, tools: Tools):
        self.tools = tools
        self._loaded: dict[str, Any] = {}

    def of(self, kind: str) -> Any:
        """The extractor that a kind of metric looks at images with; for ppl2 the distance.

        Raises:
            UsageError: for weights that are missing or do not fit.
        """
        from stylegan_pg.metrics import features  # torchvision and torch-fidelity take their time

        tools = self.tools
        name = tools.extractor if kind != "ppl2" and tools.extractor else NETWORK[kind]
        if name not in self._loaded:
            with torch.random.fork_rng(devices=[]):  # networks are initialised before their weights are put in
                if name == "lpips":
                    self._loaded[name] = features.load_distance(tools.weights, tools.device)
                else:
                    self._loaded[name] = features.load_extractor(name, tools.weights, tools.device, tools.precision)
        return self._loaded[name]

    def feature(self, kind: str) -> str:
        return "pool" if self.tools.extractor else FEATURE[kind]


class Rows:
    """Features kept as they are, in the order of their images."""

    def __init__(self):
        self.parts: dict[int, torch.Tensor] = {}

    def add(self, first: int, rows: torch.Tensor) -> None:
        self.parts[first] = rows

    def merge(self, other: Rows) -> None:
        self.parts |= other.parts

    def all(self) -> torch.Tensor:
        return torch.cat([self.parts[first] for first in sorted(self.parts)])


class LazyMoments:
    """Moments of features whose width shows when the first of them come."""

    def __init__(self, found: Moments | None = None):
        self.found = found

    def add(self, _first: int, rows: torch.Tensor) -> None:
        self.found = self.found or Moments(rows.shape[1])
        self.found.add(rows)

    def merge(self, other: LazyMoments) -> None:
        if self.found is None:
            self.found = other.found
        elif other.found is not None:
            self.found.merge(other.found)

    def moments(self) -> Moments:
        assert self.found is not None
        return self.found


def gatherer(p: Protocol, size: tuple[int, int], channels: int, seed: int, side: str) -> Any:
    """What takes in one side ("real" or "fake") of a metric, for images of this size (height, width)."""
    if p.kind == "swd":
        return PatchCollector(size, min(channels, 3), seed=derive(seed, side))
    if p.kind in ("kid", "pr", "ppl2", "ms_ssim"):
        return Rows()
    return InceptionScore(p.count) if p.kind == "is" else LazyMoments()


def take_in(
    p: Protocol, into: Any, first: int, images: torch.Tensor, networks: Networks, known: dict[str, Any]
) -> None:
    """Images with numbers from `first` on, RGBA ones over white; `known` holds the features that were already computed
    of them."""
    images = over_white(images)
    if p.kind == "swd":
        into.add(images, first)
    elif p.kind == "ms_ssim":  # of pairs: the even numbers with the odd ones behind them
        into.add(first, ms_ssim(images[0::2], images[1::2]))
    else:
        network = networks.of(p.kind)
        if network.identity not in known:
            known[network.identity] = network(images)
        rows = feature_of(known[network.identity], networks.feature(p.kind), network.identity)[: len(images)]
        if p.kind == "is":
            into.add(range(first, first + len(rows)), rows)
        else:
            into.add(first, rows)


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
    yield from range(dist.rank(), -(-total // BLOCK), dist.world())


def merge(parts: list[Any]) -> Any:
    """All ranks' parts as one."""
    for part in parts[1:]:
        parts[0].merge(part)
    return parts[0]
