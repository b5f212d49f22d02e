"""Mixtures of Gaussians in the plane as datasets, for counting the modes that a generator finds.

`data.url: points:ring` or `points:grid25` takes the place of a packed dataset's folder. A point is an image of one
pixel with two channels, float32 [2, 1, 1]. All points are held in memory and depend on the name only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.sampler import WINDOW, Order
from stylegan_pg.data.datasets.table import SampleTable, Tar
from stylegan_pg.errors import UsageError

PREFIX = "points:"
RESOLUTION, BASE = 4, (1, 1)  # one pixel
PER_MODE = 1000  # points, drawn once


class GaussianMixture(NamedTuple):
    """m equally likely modes: their centres, float64 [m, 2], and the standard deviation of each in both directions."""

    centres: np.ndarray
    deviation: float


def _ring() -> np.ndarray:
    angle = np.arange(8) * (2 * math.pi / 8)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _grid(side: int) -> np.ndarray:
    x = np.linspace(-1, 1, side)
    return np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)


# The ring has the radius 1. The grid is the usual one, 5 x 5 at a distance of 2 with deviation 0.05, shrunk by 4.
MIXTURES = {"ring": GaussianMixture(_ring(), 0.02), "grid25": GaussianMixture(_grid(5), 0.0125)}


@dataclass(frozen=True, kw_only=True)
class PointTable(SampleTable):
    """Points, float32 [count, 2], with the interface of a packed dataset's table; nothing is read from files."""

    points: np.ndarray

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32

    def image(self, i: int, out: np.ndarray | None = None) -> np.ndarray:
        """Point i, float32 [2, 1, 1] in about [-1, 1], written to `out` ([1, 1, 2]) if given."""
        out = np.empty([1, 1, 2], np.float32) if out is None else out
        out[0, 0] = self.points[i]
        return out.transpose(2, 0, 1)


@dataclass(frozen=True, kw_only=True)
class PointIndex(DatasetIndex):
    """The points of a mixture as a dataset; the label of a point is the mode it was drawn from."""

    samples: PointTable = field(repr=False)
    mixture: GaussianMixture = field(repr=False)

    def table(self, resolution: int) -> PointTable:
        """As DatasetIndex.table. Raises UsageError for another resolution than 4."""
        if resolution not in self.resolutions:
            raise UsageError(f"{self.path} has no resolution {resolution}: set resolution={RESOLUTION}")
        return self.samples

    def order(self, seed: int, window: int = WINDOW) -> Order:
        return Order([self.count], seed, window)

    def source_of(self, ordinal: int) -> str:
        return f"{self.path}[{ordinal}]"


def load_points(url: str) -> PointIndex:
    """The dataset of `points:NAME`, which is always the same.

    Raises:
        UsageError: the name is unknown.
    """
    mixture = MIXTURES.get(url.removeprefix(PREFIX))
    if mixture is None:
        raise UsageError(f"{url}: no such points; choose {' or '.join(PREFIX + name for name in MIXTURES)}")
    modes = len(mixture.centres)
    label = np.arange(modes * PER_MODE) % modes
    noise = np.random.default_rng(modes).standard_normal([len(label), 2])
    points = (mixture.centres[label] + mixture.deviation * noise).astype(np.float32)
    nothing = np.zeros([len(label)], np.int64)
    table = PointTable(
        tars=[Tar(url)],
        shard=nothing.astype(np.int32),
        offset=nothing,
        size=nothing,
        label=label,
        crc32=nothing.astype(np.uint32),
        resolution=RESOLUTION,
        channels=2,
        base=BASE,
        points=points,
    )
    return PointIndex(
        path=url,
        count=len(label),
        resolutions=(RESOLUTION,),
        channels=2,
        base=BASE,
        label_names=tuple(str(i) for i in range(modes)),
        identity=hashlib.sha256(url.encode() + points.astype("<f4").tobytes()).hexdigest(),
        shards=(),
        samples=table,
        mixture=mixture,
    )
