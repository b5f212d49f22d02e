"""The real images of a metric: which images are used, and their statistics, which are cached in memory and on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.loader.reading import Bad, read_batch
from stylegan_pg.data.storage.remote import is_remote, stat_url
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics import base, gather, real_cache
from stylegan_pg.metrics.accumulators import Accumulator
from stylegan_pg.metrics.base import ImageMetric, ImageSet, Metric
from stylegan_pg.metrics.gather import Networks
from stylegan_pg.rng import generator

log = logging.getLogger(__name__)


def _version(table: SampleTable) -> str:
    """Return a text that changes when the contents of foreign tars change. The identity of such a dataset covers only
    the layout of its tars, so this hash adds their paths or URLs, sizes, and modification times or ETags. It is "" for
    a dataset without foreign tars."""
    facts = []
    for tar in (tar for tar in table.tars if tar.foreign):
        here = not is_remote(tar.path)
        facts.append(f"{os.path.abspath(tar.path) if here else tar.path} {tar.bytes}")
        facts.append(stat_url(tar.path).tag if here else tar.tag)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32] if facts else ""


def warn_damaged(ordinals: set[int], which: str) -> None:
    """Log a warning that images could not be decoded.

    Args:
        ordinals: The positions of the damaged images in the dataset.
        which: "real" or "measured", for the message.
    """
    what = f"{len(ordinals)} of the {which} images are damaged and were replaced by their neighbours"
    log.warning(f"{what}: metrics are of those (stylegan-pg data check names them)")


class RealSide:
    """The real images of a measurement: all images, or all images of one class, at one resolution of a dataset.

    Attributes:
        table: The samples of the dataset at this resolution.
        ordinals: The positions of the used images in the table.
        source: "the dataset" or "the class", for messages.

    Raises:
        UsageError: if the dataset has no image of the class.
    """

    def __init__(self, index: DatasetIndex, resolution: int, networks: Networks, only_class: int | None = None):
        self.table, self.networks, self.settings = index.table(resolution), networks, networks.settings
        self.name = f"{index.identity}-{resolution} | class {only_class}"
        if index.channels == 4:
            self.name += " | over white"  # older versions ignored alpha and cached statistics without these words
        if version := _version(self.table):
            self.name += f" | tars {version}"
        self.ordinals, self.source = np.arange(len(self.table)), "the dataset"
        if only_class is not None:
            self.ordinals, self.source = np.flatnonzero(self.table.label == only_class), "the class"
        if not len(self.ordinals):
            raise UsageError(f"the dataset has no image of class {only_class}")
        self._results: dict[str, Any] = {}  # on rank 0: {key: result of the accumulator}
        self._reported: set[int] = set()  # on rank 0: damaged images that a warning has named

    def check(self, metric: Metric) -> None:
        """Check that there are enough real images.

        Raises:
            UsageError: if there are too few for this metric.
        """
        metric.check_count(len(self.ordinals), self.source)

    def _image_numbers(self, metric: ImageMetric) -> np.ndarray:
        """Return the numbers of the used images, in order. Number len(ordinals) + i is the mirrored copy of image i."""
        available = len(self.ordinals) * (1 + metric.mirror)
        if metric.full:
            return np.arange(available)
        return torch.randperm(available, generator=generator(self.settings.seed, "swd-real")).numpy()[: metric.count]

    def result(self, metric: Metric) -> Any:
        """Return the result of the accumulator of real images on rank 0. It is None on the other ranks, and for metrics
        that do not use real images. All ranks must call this."""
        if not isinstance(metric, ImageMetric) or not metric.uses_real_images:
            return None
        key, cacheable = self._key(metric)
        with dist.main_decides() as box:
            if dist.is_main():
                if key not in self._results and cacheable:
                    self._load_cached(key, metric)
                box.append(key in self._results)
        if not box[0]:
            self._gather(metric, key, cacheable)
        return self._results.get(key)

    def _key(self, metric: ImageMetric) -> tuple[str, bool]:
        """Return a text that contains everything on which the statistics of real images depend, and whether they may
        be cached on disk. The names of the cached files are hashes of this text, so changing its form invalidates
        them."""
        kind, seed = metric.accumulator_class, self.settings.seed
        facts = [kind.statistic, self.name, "all" if metric.full else f"{metric.count} of seed {seed}"]
        facts.append(f"mirror {metric.mirror}")
        own = type(metric).observe is not ImageMetric.observe
        cacheable = self.settings.cache and kind.cacheable and not own
        if own:
            facts.append(f"as {metric.kind} observes them")
        if metric.network:
            with dist.together():
                network = self.networks.get(metric.network)
            facts += [network.identity, self.networks.feature(metric)]
            cacheable = cacheable and network.cacheable
        return " | ".join(facts), cacheable

    def _gather(self, metric: ImageMetric, key: str, cacheable: bool) -> None:
        """Accumulate the real images on all ranks, and store the result."""
        with dist.together():
            mine = self._read(metric)
        parts = dist.gather_on_main(mine)
        with dist.main_decides():
            if parts is not None:
                real, bad = gather.merge([part for part, _ in parts]), set().union(*(bad for _, bad in parts))
                self._results[key] = real.result()
                if bad - self._reported:
                    warn_damaged(bad, "real")
                self._reported |= bad
                if cacheable and not bad:
                    self._save_cached(key, real)

    def _read(self, metric: ImageMetric) -> tuple[Accumulator, set[int]]:
        """Return an accumulator of this rank's share of the real images, and the ordinals of damaged images."""
        images = ImageSet("real", self.table.image_size, self.table.channels, self.settings.seed)
        accumulator = metric.accumulator(images)
        bad: list[Bad] = []
        numbers, batch = self._image_numbers(metric), self.settings.batch
        starts = [b * base.BLOCK + i for b in gather.own_blocks(len(numbers)) for i in range(0, base.BLOCK, batch)]
        starts = [first for first in starts if first < len(numbers)]

        def read(first: int) -> torch.Tensor:
            some = numbers[first : min(first + batch, (first // base.BLOCK + 1) * base.BLOCK)]
            images = read_batch(self.table, self.ordinals[some % len(self.ordinals)].tolist(), bad)
            mirrored = torch.from_numpy(some >= len(self.ordinals))
            images[mirrored] = images[mirrored].flip(3)
            return images

        with ThreadPoolExecutor(1) as reader:  # the next images are decoded while the network computes
            pending = [reader.submit(read, first) for first in starts[:2]]
            for k, first in enumerate(starts):
                images = pending.pop(0).result()
                pending += [reader.submit(read, i) for i in starts[k + 2 : k + 3]]
                gather.observe_images(metric, accumulator, first, images, self.networks, {})
        return accumulator, {one.ordinal for one in bad}

    def _load_cached(self, key: str, metric: ImageMetric) -> None:
        try:
            if (found := real_cache.load(key)) is not None:
                self._results[key] = metric.accumulator_class.from_state(found).result()
        except PermissionError:
            pass  # there is no cache folder; _save_cached warns about it
        except (ValueError, KeyError) as error:
            log.warning(f"a cached statistic is damaged and is computed again ({error})", extra={"all_ranks": True})

    def _save_cached(self, key: str, real: Accumulator) -> None:
        try:
            real_cache.save(key, real.state())
        except OSError as error:
            log.warning(f"statistics of the real images could not be cached: {error}", extra={"all_ranks": True})
