"""The real side of metrics: which images count, what is gathered of them, kept in memory and on disk."""

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
from stylegan_pg.data.loader.loader import Bad, read_batch
from stylegan_pg.data.storage.remote import is_remote, stat_url
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics import gather, real_cache
from stylegan_pg.metrics.gather import LazyMoments, Networks, Rows
from stylegan_pg.metrics.protocol import Protocol
from stylegan_pg.metrics.statistics import Moments
from stylegan_pg.rng import generator

SIDE = {"fid": "moments", "kid": "rows", "pr": "rows", "swd": "patches"}  # the other kinds compare with nothing
LEAST = {"kid": 2, "pr": 4}


def _version(table: SampleTable) -> str:
    """What changes with the contents of foreign tars, whose identity says only how they are laid out: paths or URLs,
    sizes, and times or ETags; "" where there are none."""
    facts = []
    for tar in (tar for tar in table.tars if tar.foreign):
        here = not is_remote(tar.path)
        facts.append(f"{os.path.abspath(tar.path) if here else tar.path} {tar.bytes}")
        facts.append(stat_url(tar.path).tag if here else tar.tag)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32] if facts else ""


def tell_bad(ordinals: set[int], which: str) -> None:
    """Say how many pictures could not be decoded."""
    what = f"{len(ordinals)} of the {which} images are damaged and were replaced by their neighbours"
    print(f"warning: {what}: metrics are of those (stylegan-pg data check names them)", file=sys.stderr)


def check_count(p: Protocol, images: int, whose: str) -> None:
    """
    Raises:
        UsageError: where so many real images, somebody's, are too few for a metric.
    """
    there = images * (1 + p.mirror)
    if p.kind in ("fid", "kid", "pr") and not p.full and p.count > there:
        advice = f"use {p.kind}..._full, or a smaller count"
        raise UsageError(f"{p.name} needs {p.count} real images, {whose} has {there}: {advice}")
    least = LEAST.get(p.kind, 0)
    if min(there, p.count) < least:
        raise UsageError(f"{p.name} needs at least {least} images of each kind, {whose} has {there}: leave it away")


class RealSide:
    """One resolution of a dataset, or one class of it.

    Raises:
        UsageError: for a class that it does not have.
    """

    def __init__(self, index: DatasetIndex, resolution: int, networks: Networks, only_class: int | None = None):
        self.table, self.networks, self.tools = index.table(resolution), networks, networks.tools
        self.name = f"{index.identity}-{resolution} | class {only_class}"
        if index.channels == 4:
            self.name += " | over white"  # what was kept without these words had dropped the alpha
        if version := _version(self.table):
            self.name += f" | tars {version}"
        self.mine, self.whose = np.arange(len(self.table)), "the dataset"
        if only_class is not None:
            self.mine, self.whose = np.flatnonzero(self.table.label == only_class), "the class"
        if not len(self.mine):
            raise UsageError(f"the dataset has no image of class {only_class}")
        self._known: dict[str, Any] = {}  # on rank 0
        self._bad: set[int] = set()  # there too: damaged pictures that were told

    def check(self, p: Protocol) -> None:
        """
        Raises:
            UsageError: where there are too few real images for a metric.
        """
        check_count(p, len(self.mine), self.whose)

    def _numbers(self, p: Protocol) -> np.ndarray:
        """Which images, in which order; those from len(mine) on are mirrored copies."""
        there = len(self.mine) * (1 + p.mirror)
        if p.full:
            return np.arange(there)
        return torch.randperm(there, generator=generator(self.tools.seed, "swd-real")).numpy()[: p.count]

    def of(self, p: Protocol) -> Any:
        """What a metric compares with, on rank 0; None on the others. A collective call."""
        side = SIDE.get(p.kind)
        if side is None:
            return None
        facts = [side, self.name, "all" if p.full else f"{p.count} of seed {self.tools.seed}", f"mirror {p.mirror}"]
        lasting = self.tools.cache and p.kind != "swd"
        if p.kind != "swd":
            with dist.together():
                network = self.networks.of(p.kind)
            facts += [network.identity, self.networks.feature(p.kind)]
            lasting = lasting and network.lasting
        key = " | ".join(facts)
        with dist.main_decides() as box:
            if dist.is_main():
                if key not in self._known and lasting:
                    self._recall(key, side)
                box.append(key in self._known)
        if not box[0]:
            with dist.together():
                mine = self._read(p)
            parts = dist.gather_on_main(mine)
            with dist.main_decides():
                if parts is not None:
                    real, bad = gather.merge([part for part, _ in parts]), set().union(*(bad for _, bad in parts))
                    self._known[key] = real.descriptors() if p.kind == "swd" else real
                    if bad - self._bad:
                        tell_bad(bad, "real")
                    self._bad |= bad
                    if lasting and not bad:
                        self._keep(key, real)
        return self._known.get(key)

    def _read(self, p: Protocol) -> tuple[Any, set[int]]:
        """This rank's share, and which pictures of it are damaged."""
        into = gather.gatherer(p, self.table.image_size, self.table.channels, self.tools.seed, "real")
        bad: list[Bad] = []
        numbers, batch = self._numbers(p), self.tools.batch
        starts = [b * gather.BLOCK + i for b in gather.share(len(numbers)) for i in range(0, gather.BLOCK, batch)]
        starts = [first for first in starts if first < len(numbers)]

        def read(first: int) -> torch.Tensor:
            some = numbers[first : min(first + batch, (first // gather.BLOCK + 1) * gather.BLOCK)]
            images = read_batch(self.table, self.mine[some % len(self.mine)].tolist(), bad)
            mirrored = torch.from_numpy(some >= len(self.mine))
            images[mirrored] = images[mirrored].flip(3)
            return images

        with ThreadPoolExecutor(1) as reader:  # the next images are decoded while these are looked at
            pending = [reader.submit(read, first) for first in starts[:2]]
            for k, first in enumerate(starts):
                images = pending.pop(0).result()
                pending += [reader.submit(read, i) for i in starts[k + 2 : k + 3]]
                gather.take_in(p, into, first, images, self.networks, {})
        return into, {one.ordinal for one in bad}

    def _recall(self, key: str, side: str) -> None:
        try:
            found = real_cache.load(key)
            if found is not None and side == "rows":
                self._known[key] = Rows()
                self._known[key].add(0, found["rows"])
            elif found is not None:
                self._known[key] = LazyMoments(Moments.from_state(found))
        except PermissionError:
            pass  # no cache at all, which _keep tells
        except (ValueError, KeyError) as error:
            print(f"warning: a cached statistic is damaged and computed anew ({error})", file=sys.stderr)

    def _keep(self, key: str, real: Any) -> None:
        try:
            real_cache.save(key, {"rows": real.all()} if isinstance(real, Rows) else real.moments().state())
        except OSError as error:
            print(f"warning: statistics of the real images could not be kept: {error}", file=sys.stderr)
