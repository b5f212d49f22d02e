"""The order of training images: a function of (shard sizes, seed, window) and the number of images shown before.

An epoch of a dataset is a permutation of its shards, followed by a permutation of the samples within each group of
consecutive shards. A group holds at least `window` samples of at least SPREAD shards (or all shards if there are
fewer), so a reader needs the shards of one group at a time. Image n of a run is position n mod count of epoch n div
count. Computing it replays nothing, and does not depend on ranks or workers.

A permutation sorts raw words of Philox, a counter-based generator (Salmon et al. 2011) whose words are the same in all
versions of numpy, keyed by rng.derive(seed, purpose, epoch, ...).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np

from stylegan_pg.rng import derive

WINDOW = 65536  # samples
SPREAD = 8  # shards
BLOCK = 256  # positions within which a mixture keeps its proportions
_TRIES, _STRAIGHT = 32, 0.05  # arrangements that are tried, and the correlation with the file order that is accepted

_Value = TypeVar("_Value")


def flipped(seed: int, epoch: int, ordinal: int) -> bool:
    """Whether data.mirror flips an image in an epoch (for a mixture: in the epoch of its source)."""
    return bool(derive(seed, "mirror", epoch, ordinal) & 1)


def permutation(n: int, seed: int, purpose: str, *key: int) -> np.ndarray:
    """A permutation int64 [n] that depends on the arguments only, and is the same in every version of numpy."""
    words = np.random.Philox(key=derive(seed, purpose, *key)).random_raw(n)
    return np.argsort(words, kind="stable")


class _Epoch(NamedTuple):
    """The shards in the order of an epoch [shards], and the borders of its groups, counted in shards and in samples."""

    shards: np.ndarray
    first_shard: list[int]
    first_sample: list[int]


class Order:
    """The order of one dataset."""

    def __init__(self, shard_counts: Sequence[int], seed: int, window: int = WINDOW):
        """shard_counts: samples of each shard. Samples are numbered (ordinals) consecutively through the shards."""
        self.counts = np.asarray(shard_counts, np.int64)
        self.seed, self.window = seed, max(int(window), 1)
        self.ends = np.cumsum(self.counts)
        self.count = int(self.ends[-1]) if len(self.ends) else 0
        if not self.count:
            raise ValueError("an order of no samples")
        self._epochs: dict[Hashable, _Epoch] = {}
        self._groups: dict[Hashable, np.ndarray] = {}

    @property
    def shards(self) -> int:
        return len(self.counts)

    def at(self, n: int) -> tuple[int, int]:
        """(epoch, ordinal) of the n-th image of a run, n >= 0."""
        epoch, place = divmod(n, self.count)
        group = bisect.bisect_right(self._epoch(epoch).first_sample, place) - 1
        return epoch, int(self._group(epoch, group)[place - self._epoch(epoch).first_sample[group]])

    def shards_ahead(self, n: int, groups: int = 1) -> list[int]:
        """The shards that images n and later need, in the order of first use: those of the rest of n's group and of
        `groups` - 1 further groups."""
        return [shard for _distance, shard in self.needs(n, groups)]

    def needs(self, n: int, groups: int = 1) -> list[tuple[int, int]]:
        """As shards_ahead; each shard with the number of images between n and the first image from it."""
        found: dict[int, int] = {}
        at = n
        for _ in range(groups):
            epoch, place = divmod(at, self.count)
            first = self._epoch(epoch).first_sample
            group = bisect.bisect_right(first, place) - 1
            left = self._group(epoch, group)[place - first[group] :]
            shards, index = np.unique(np.searchsorted(self.ends, left, side="right"), return_index=True)
            for i in np.argsort(index):
                found.setdefault(int(shards[i]), at - n + int(index[i]))
            at += len(left)
        return [(distance, shard) for shard, distance in found.items()]

    def _epoch(self, epoch: int) -> _Epoch:
        return _kept(self._epochs, epoch, 2, lambda: self._arrange(epoch))

    def _group(self, epoch: int, group: int) -> np.ndarray:
        """The ordinals of a group's samples in the order in which they are shown."""

        def make() -> np.ndarray:
            shards, edge, _ = self._epoch(epoch)
            mine = shards[edge[group] : edge[group + 1]]
            starts, ends = (self.ends - self.counts)[mine].tolist(), self.ends[mine].tolist()
            ordinals = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
            return ordinals[permutation(len(ordinals), self.seed, "order", epoch, group)]

        return _kept(self._groups, (epoch, group), 3, make)

    def _arrange(self, epoch: int) -> _Epoch:
        """The shards and groups of an epoch. Arrangements that happen to resemble the order of the files are rejected,
        which would be frequent with few groups."""
        best, least = None, 2.0
        for attempt in range(_TRIES):
            arranged = self._cut(permutation(self.shards, self.seed, "shards", epoch, attempt))
            likeness = self._likeness(arranged)
            if likeness < least:
                best, least = arranged, likeness
            if likeness < _STRAIGHT:
                break
        assert best is not None
        return best

    def _cut(self, shards: np.ndarray) -> _Epoch:
        ends = np.cumsum(self.counts[shards])
        edge, sample = [0], [0]
        while True:
            last = max(int(np.searchsorted(ends, sample[-1] + self.window)), edge[-1] + SPREAD - 1)  # of this group
            left = self.count - int(ends[min(last, self.shards - 1)])
            if left < self.window or self.shards - 1 - last < SPREAD:  # too little for another group
                return _Epoch(shards, [*edge, self.shards], [*sample, self.count])
            edge.append(last + 1)
            sample.append(int(ends[last]))

    def _likeness(self, epoch: _Epoch) -> float:
        """Absolute correlation between the positions of samples in the files and the positions of their groups."""
        if len(epoch.first_shard) == 2:  # one group
            return 0.0
        weight = self.counts[epoch.shards].astype(float)
        x = (self.ends - self.counts / 2)[epoch.shards]
        middle = np.add(epoch.first_sample[:-1], epoch.first_sample[1:]) / 2
        y = np.repeat(middle, np.diff(epoch.first_shard))
        (xx, xy), (_, yy) = np.cov(x, y, aweights=weight).tolist()
        return abs(xy) / math.sqrt(xx * yy)


class Mixture:
    """Several datasets in proportion to weights, each with its own order and epochs: within an epoch of its source
    every sample is shown once.

    Ordinals and shards are numbered consecutively through the sources. Each source gets its share of every BLOCK
    positions, rounded so that errors do not accumulate; the positions within a block are drawn at random.
    """

    def __init__(self, sources: Sequence[Order], weights: Sequence[float], seed: int):
        """Weights are greater than 0; their sum does not matter."""
        if len(sources) != len(weights) or not sources or min(weights) <= 0:
            raise ValueError("a mixture takes one weight above 0 for each of its sources")
        self.sources, self.seed = list(sources), seed
        exact = [Fraction(weight) for weight in weights]
        self._sums = [sum(exact[: i + 1], Fraction(0)) for i in range(len(exact))]
        self._share = [float(weight / self._sums[-1]) for weight in exact]
        self.first = [sum(s.count for s in sources[:i]) for i in range(len(sources))]
        self.first_shard = [sum(s.shards for s in sources[:i]) for i in range(len(sources))]
        self.count = sum(s.count for s in sources)
        self._blocks: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def shards(self) -> int:
        return sum(source.shards for source in self.sources)

    def at(self, n: int) -> tuple[int, int]:
        """(epoch of its source, ordinal) of the n-th image of a run, n >= 0."""
        source, before = self.source_at(n)
        epoch, ordinal = self.sources[source].at(before)
        return epoch, self.first[source] + ordinal

    def source_at(self, n: int) -> tuple[int, int]:
        """The source of the n-th image of a run, and how many images of that source are shown before it."""
        block, place = divmod(n, BLOCK)
        sources, before = self._block(block)
        return int(sources[place]), int(before[place])

    def shards_ahead(self, n: int, groups: int = 1) -> list[int]:
        """As Order.shards_ahead, for a group of every source."""
        block, place = divmod(n, BLOCK)
        sources, _ = self._block(block)
        wanted = []
        for i, quota in enumerate(self._before(block)):
            shown = quota + int(np.count_nonzero(sources[:place] == i))
            needs = self.sources[i].needs(shown, groups)
            wanted += [(distance / self._share[i], self.first_shard[i] + shard) for distance, shard in needs]
        return [shard for _distance, shard in sorted(wanted)]

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources [BLOCK] of a block's positions, and for each the number of earlier images of the same source."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            start, end = self._before(block), self._before(block + 1)
            quotas = np.subtract(end, start)
            drawn = permutation(BLOCK, self.seed, "mixture", block)
            sources = np.repeat(np.arange(len(quotas)), quotas)[drawn]
            before = np.empty([BLOCK], np.int64)
            for i, first in enumerate(start):
                before[sources == i] = np.arange(first, end[i])
            return sources, before

        return _kept(self._blocks, block, 4, make)

    def _before(self, block: int) -> list[int]:
        """The number of images of each source in all blocks before this one.

        The total is split between the last source and the others, that again, and so on. With this rounding the number
        of a source never decreases from block to block.
        """
        left = block * BLOCK
        counts = []
        for i in range(len(self._sums) - 1, 0, -1):
            others = left * self._sums[i - 1] / self._sums[i]
            rounded = (2 * others.numerator + others.denominator) // (2 * others.denominator)
            counts.append(left - rounded)
            left = rounded
        return [left, *reversed(counts)]


def _kept(store: dict[Hashable, _Value], key: Hashable, limit: int, make: Callable[[], _Value]) -> _Value:
    """store[key], computed if it is missing; the oldest entries beyond `limit` are dropped."""
    if key not in store:
        value = make()
        while len(store) >= limit:
            store.pop(next(iter(store)), None)
        store[key] = value
        return value
    return store[key]
