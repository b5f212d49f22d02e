"""The dataset of a configuration: one, or several in proportions (`data.mixture`)."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field

import numpy as np

from stylegan_pg.config import Config
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.sampler import WINDOW, Mixture, Order
from stylegan_pg.data.datasets.table import SampleTable, join
from stylegan_pg.data.storage import shard_cache
from stylegan_pg.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MixtureIndex(DatasetIndex):
    """Several datasets, concatenated; the order draws from them in proportion. Classes of the same name are united."""

    sources: tuple[DatasetIndex, ...] = field(repr=False)
    weights: tuple[float, ...]

    def table(self, resolution: int) -> SampleTable:
        """As DatasetIndex.table. Raises UsageError with the source's name if one lacks the resolution."""
        tables = [source.table(resolution) for source in self.sources]
        labels = []
        for source, table in zip(self.sources, tables, strict=True):
            place = {name: number for number, name in enumerate(self.label_names)}
            numbers = [place[name] for name in source.label_names] if place else [-1] * len(source.label_names)
            labels.append(np.array([*numbers, -1])[table.label])  # the last element maps -1, no label, to itself
        return join(tables, labels)

    def order(self, seed: int, window: int = WINDOW) -> Order | Mixture:
        # A source's order does not depend on the others, nor on its place among them.
        orders = [source.order(seed, window) for source in self.sources]
        return Mixture([one for one in orders if isinstance(one, Order)], self.weights, seed)

    def source_of(self, ordinal: int) -> str:
        for source in self.sources:
            if ordinal < source.count:
                return f"{source.path}: {source.source_of(ordinal)}"
            ordinal -= source.count
        return ""


def load_dataset(config: Config) -> DatasetIndex:
    """Open the dataset of data.url or data.mixture, and configure this process's shard cache.

    Raises:
        UsageError: as load_index, or sources that do not fit together.
        RunError: a server does not answer.
    """
    data = config.data
    shard_cache.configure(shard_cache.CacheSettings(data.cache_dir, int(data.cache_gib * 2**30), data.patience_sec))
    base = (config.model.base[0], config.model.base[1])
    if data.mixture:
        first: DatasetIndex = mix([load_index(url, base) for url in data.mixture], list(data.mixture.values()))
    else:
        first = load_index(data.url, base)
    return with_others(first, {name: load_index(url, base) for name, url in data.unpaired.items()})


def with_others(first: DatasetIndex, others: dict[str, DatasetIndex]) -> DatasetIndex:
    """A dataset together with further ones that are not aligned with it (data.unpaired).

    Raises:
        UsageError: one of them has pictures of another shape, or lacks a resolution of the first.
    """
    for name, other in others.items():
        if other.base != first.base:
            raise UsageError(
                f"data.unpaired: {name}: the base of {other.path} is {_said(other.base)}, that of {first.path} "
                f"{_said(first.base)}: pack one of them again"
            )
        if lacking := sorted(set(first.resolutions) - set(other.resolutions)):
            raise UsageError(
                f"data.unpaired: {name}: {other.path} lacks the resolution {lacking[0]}, which {first.path} has: pack "
                "it with the same --resolution and --lowest"
            )
    if not others:
        return first
    names = "".join(f" {name} {other.identity}" for name, other in sorted(others.items()))
    identity = hashlib.sha256(f"{first.identity} and{names}".encode()).hexdigest()
    return dataclasses.replace(first, others=others, identity=identity)


def mix(sources: list[DatasetIndex], weights: list[float]) -> MixtureIndex:
    """Combine several datasets. Raises UsageError if shapes or channels differ, or no resolution is common to all."""
    first = sources[0]
    for other in sources[1:]:
        for what, a, b in (("base", first.base, other.base), ("channels", first.channels, other.channels)):
            if a != b:
                raise UsageError(
                    f"data.mixture: {first.path} and {other.path} do not fit together: {what} {_said(a)} and "
                    f"{_said(b)}; pack one of them again"
                )
    for source in sources:
        if source.path.startswith("points:"):
            raise UsageError(f"data.mixture: {source.path} cannot be mixed: give it as data.url")
    common = set(first.resolutions).intersection(*(source.resolutions for source in sources[1:]))
    if not common:
        listed = "; ".join(f"{s.path} has {', '.join(map(str, s.resolutions))}" for s in sources)
        raise UsageError(f"data.mixture: no resolution is in all of them ({listed}): pack with the same --resolution")
    labelled = all(source.label_names for source in sources)
    total = sum(weights)
    shares = "".join(f" {source.identity} {w / total:.9f}" for source, w in zip(sources, weights, strict=True))
    return MixtureIndex(
        path=" + ".join(source.path for source in sources),
        count=sum(source.count for source in sources),
        resolutions=tuple(sorted(common)),
        channels=first.channels,
        label_names=tuple(dict.fromkeys(name for s in sources for name in s.label_names)) if labelled else (),
        identity=hashlib.sha256(f"mixture{shares}".encode()).hexdigest(),
        shards=tuple(shard for source in sources for shard in source.shards),
        base=first.base,
        fields={n: f for n, f in first.fields.items() if all(source.fields.get(n) == f for source in sources)},
        sources=tuple(sources),
        weights=tuple(weights),
    )


def _said(value: int | tuple[int, int]) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
