"""The real side of metrics: which images count, and their statistics, which are kept in memory and on disk."""

from __future__ import annotations

import hashlib
import os
import sys
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


def _version(table: SampleTable) -> str:
    """Return a text that changes with the contents of foreign tars, whose identity says only how they are laid out. It
    is a hash of paths or URLs, sizes, and times or ETags, and "" for a dataset without such tars."""
    facts = []
    for tar in (tar for tar in table.tars if tar.foreign):
        here = not is_remote(tar.path)
        facts.append(f"{os.path.abspath(tar.path) if here else tar.path} {tar.bytes}")
        facts.append(stat_url(tar.path).tag if here else tar.tag)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32] if facts else ""


def tell_bad(ordinals: set[int], which: str) -> None:
    """Warn on stderr that so many images could not be decoded; `which` is "real" or "measured"."""
    what = f"{len(ordinals)} of the {which} images are damaged and were replaced by their neighbours"
    print(f"warning: {what}: metrics are of those (stylegan-pg data check names them)", file=sys.stderr)


class RealSide:
    """The real images of a comparison: one resolution of a dataset, or one class of it.

    Raises:
        UsageError: if the dataset has no image of the class.
    """

    def __init__(self, index: DatasetIndex, resolution: int, networks: Networks, only_class: int | None = None):
        self.table, self.networks, self.tools = index.table(resolution), networks, networks.tools
        self.name = f"{index.identity}-{resolution} | class {only_class}"
        if index.channels == 4:
            self.name += " | over white"  # cached statistics without these words ignored alpha
        if version := _version(self.table):
            self.name += f" | tars {version}"
        self.mine, self.whose = np.arange(len(self.table)), "the dataset"
        if only_class is not None:
            self.mine, self.whose = np.flatnonzero(self.table.label == only_class), "the class"
        if not len(self.mine):
            raise UsageError(f"the dataset has no image of class {only_class}")
        self._known: dict[str, Any] = {}  # on rank 0
        self._bad: set[int] = set()  # there too: damaged pictures that were told

    def check(self, metric: Metric) -> None:
        """Check that there are enough real images.

        Raises:
            UsageError: if there are too few for this metric.
        """
        metric.check_count(len(self.mine), self.whose)

    def _numbers(self, metric: ImageMetric) -> np.ndarray:
        """Return the numbers of the images that count, in order; numbers from len(mine) on mean mirrored copies."""
        there = len(self.mine) * (1 + metric.mirror)
        if metric.full:
            return np.arange(there)
        return torch.randperm(there, generator=generator(self.tools.seed, "swd-real")).numpy()[: metric.count]

    def of(self, metric: Metric) -> Any:
        """Return the result of the real side's accumulator on rank 0. It is None on the other ranks, and for metrics
        that do not compare. All ranks must call this."""
        if not isinstance(metric, ImageMetric) or not metric.compares:
            return None
        key, lasting = self._key(metric)
        with dist.main_decides() as box:
            if dist.is_main():
                if key not in self._known and lasting:
                    self._recall(key, metric)
                box.append(key in self._known)
        if not box[0]:
            self._gather(metric, key, lasting)
        return self._known.get(key)

    def _key(self, metric: ImageMetric) -> tuple[str, bool]:
        """Return a text of all that the real side of a metric depends on, and whether its statistics may be kept on
        disk. Files of the cache are named after this text, so they are lost if it changes."""
        how, seed = metric.accumulates, self.tools.seed
        facts = [how.statistic, self.name, "all" if metric.full else f"{metric.count} of seed {seed}"]
        facts.append(f"mirror {metric.mirror}")
        own = type(metric).observe is not ImageMetric.observe
        lasting = self.tools.cache and how.lasting and not own
        if own:
            facts.append(f"as {metric.kind} observes them")
        if metric.network:
            with dist.together():
                network = self.networks.of(metric.network)
            facts += [network.identity, self.networks.feature(metric)]
            lasting = lasting and network.lasting
        return " | ".join(facts), lasting

    def _gather(self, metric: ImageMetric, key: str, lasting: bool) -> None:
        """Accumulate the real images on all ranks, and keep the result."""
        with dist.together():
            mine = self._read(metric)
        parts = dist.gather_on_main(mine)
        with dist.main_decides():
            if parts is not None:
                real, bad = gather.merge([part for part, _ in parts]), set().union(*(bad for _, bad in parts))
                self._known[key] = real.result()
                if bad - self._bad:
                    tell_bad(bad, "real")
                self._bad |= bad
                if lasting and not bad:
                    self._keep(key, real)

    def _read(self, metric: ImageMetric) -> tuple[Accumulator, set[int]]:
        """Return the accumulator of this rank's share of the real images, and the ordinals of damaged ones."""
        images = ImageSet("real", self.table.image_size, self.table.channels, self.tools.seed)
        into = metric.accumulator(images)
        bad: list[Bad] = []
        numbers, batch = self._numbers(metric), self.tools.batch
        starts = [b * base.BLOCK + i for b in gather.share(len(numbers)) for i in range(0, base.BLOCK, batch)]
        starts = [first for first in starts if first < len(numbers)]

        def read(first: int) -> torch.Tensor:
            some = numbers[first : min(first + batch, (first // base.BLOCK + 1) * base.BLOCK)]
            images = read_batch(self.table, self.mine[some % len(self.mine)].tolist(), bad)
            mirrored = torch.from_numpy(some >= len(self.mine))
            images[mirrored] = images[mirrored].flip(3)
            return images

        with ThreadPoolExecutor(1) as reader:  # the next images are decoded while these are looked at
            pending = [reader.submit(read, first) for first in starts[:2]]
            for k, first in enumerate(starts):
                images = pending.pop(0).result()
                pending += [reader.submit(read, i) for i in starts[k + 2 : k + 3]]
                gather.take_in(metric, into, first, images, self.networks, {})
        return into, {one.ordinal for one in bad}

    def _recall(self, key: str, metric: ImageMetric) -> None:
        try:
            if (found := real_cache.load(key)) is not None:
                self._known[key] = metric.accumulates.from_state(found).result()
        except PermissionError:
            pass  # no cache at all, which _keep tells
        except (ValueError, KeyError) as error:
            print(f"warning: a cached statistic is damaged and computed anew ({error})", file=sys.stderr)

    def _keep(self, key: str, real: Accumulator) -> None:
        try:
            real_cache.save(key, real.state())
        except OSError as error:
            print(f"warning: statistics of the real images could not be kept: {error}", file=sys.stderr)
