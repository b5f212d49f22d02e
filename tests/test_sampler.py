"""The order of training images is a function of (seed, nimg), independent of ranks, workers and the starting point."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stylegan_pg.config.schedule import deal
from stylegan_pg.data.datasets.points import PointTable
from stylegan_pg.data.datasets.sampler import BLOCK, SPREAD, WINDOW, Mixture, Order, permutation
from stylegan_pg.data.datasets.table import Tar
from stylegan_pg.data.loader.loader import batches

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(sum)
SEEDS = st.integers(0, 2**40)
WINDOWS = st.integers(1, 300)
quick = settings(max_examples=100, deadline=None)
few = settings(max_examples=40, deadline=None)


def stretch(order: Order | Mixture, start: int, end: int) -> list[tuple[int, int]]:
    return [order.at(n) for n in range(start, end)]


def numbers(count: int) -> PointTable:
    """Return a dataset whose images are their own numbers."""
    nothing = np.zeros([count], np.int64)
    return PointTable(
        tars=[Tar("numbers")],
        shard=nothing.astype(np.int32),
        offset=nothing,
        size=nothing,
        label=nothing,
        crc32=nothing.astype(np.uint32),
        resolution=4,
        channels=2,
        base=(1, 1),
        points=np.stack([np.arange(count), np.arange(count)], axis=1).astype(np.float32),
    )


# --- one dataset ------------------------------------------------------------------------------------------------------


@quick
@given(COUNTS, SEEDS, WINDOWS, st.integers(0, 10**6))
def test_an_epoch_is_a_permutation(counts, seed, window, epoch):
    order = Order(counts, seed, window)
    count = sum(counts)
    shown = stretch(order, epoch * count, (epoch + 1) * count)
    assert {e for e, _ in shown} == {epoch}
    assert sorted(ordinal for _, ordinal in shown) == list(range(count))


@quick
@given(COUNTS, SEEDS, WINDOWS, st.integers(0, 10**9), st.data())
def test_start_in_the_middle_equals_the_tail(counts, seed, window, start, data):
    end = start + 3 * sum(counts)
    whole = stretch(Order(counts, seed, window), start, end)
    begin = data.draw(st.integers(start, end))
    assert stretch(Order(counts, seed, window), begin, end) == whole[begin - start :]
    used = Order(counts, seed, window)
    stretch(used, 0, 5)  # earlier calls change nothing
    assert stretch(pickle.loads(pickle.dumps(used)), begin, end) == whole[begin - start :]


@quick
@given(COUNTS, SEEDS, WINDOWS, st.integers(0, 10**5), st.integers(1, 3))
def test_shards_ahead_are_in_order_of_first_use(counts, seed, window, start, groups):
    order = Order(counts, seed, window)
    ends = np.cumsum(counts)
    shown = (int(np.searchsorted(ends, order.at(n)[1], side="right")) for n in itertools.count(start))
    wanted = order.shards_ahead(start, groups)
    assert len(set(wanted)) == len(wanted)
    seen: list[int] = []
    while len(seen) < len(wanted):
        shard = next(shown)
        if shard not in seen:
            seen.append(shard)
    assert seen == wanted


@quick
@given(COUNTS, SEEDS, WINDOWS)
def test_group_sizes(counts, seed, window):
    """A reader needs few shards at a time: between two positions, at most those of the groups between them."""
    assume(0 not in counts)
    order = Order(counts, seed, window)
    if sum(counts) < 2 * window or len(counts) < 2 * SPREAD:
        assert len(order.shards_ahead(0)) == len(counts)  # one group
        return
    n, sizes = 0, []
    ends = np.cumsum(counts)
    while n < sum(counts):
        ahead = order.shards_ahead(n)
        assert len(ahead) >= SPREAD
        size = sum(counts[shard] for shard in ahead)
        assert size >= window
        # All images of these shards come now, and none is needed again within the epoch.
        group = {int(np.searchsorted(ends, order.at(n + i)[1], side="right")) for i in range(size)}
        assert group == set(ahead)
        sizes.append(size)
        n += size
    assert n == sum(counts)
    largest = max(counts)
    assert all(size <= 2 * (window + SPREAD * largest) for size in sizes)


@quick
@given(COUNTS, SEEDS)
def test_epochs_and_seeds_differ(counts, seed):
    count = sum(counts)
    assume(count >= 12)
    order = Order(counts, seed)
    epochs = [stretch(order, e * count, (e + 1) * count) for e in range(2)]
    other = stretch(Order(counts, seed + 1), 0, count)
    assert len({tuple(ordinal for _, ordinal in shown) for shown in [*epochs, other]}) == 3


def test_order_does_not_change_between_versions():
    """Checkpoints must be continued by later versions."""
    assert permutation(12, 3, "golden", 5).tolist() == [1, 7, 6, 0, 4, 2, 5, 10, 3, 11, 8, 9]
    order = Order([7, 3, 5, 11, 4, 4, 4, 4, 9, 2, 2, 2, 2, 2, 2, 2, 2, 30], 1, 20)
    assert [order.at(n) for n in (0, 1, 94, 95, 10**9)] == [(0, 54), (0, 55), (0, 68), (0, 20), (10309278, 87)]


def test_memory_is_proportional_to_the_window():
    order = Order([1000] * 2000, 0, 20_000)
    for n in range(0, 4_000_000, 9973):
        order.at(n)
    held = sum(group.nbytes for group in order._groups.values())
    assert held <= 3 * 8 * 2 * 20_000


# --- ranks, workers, worlds that change -------------------------------------------------------------------------------


@quick
@given(
    COUNTS,
    SEEDS,
    WINDOWS,
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4
    ),  # numbers of ranks, and steps with each
    st.integers(1, 4),  # group of minibatch stddev
    st.integers(1, 6),  # groups in a batch
    st.integers(0, 10**6),
)
def test_order_is_independent_of_world_sizes(counts, seed, window, worlds, group, groups, first):
    """Each entry of `worlds` is a restart with another number of ranks. No image is lost or repeated."""
    table, batch = numbers(sum(counts)), group * groups
    nimg = start = first * batch
    shown: list[int] = []
    for ranks, steps in worlds:
        parts = deal(batch, group, min(ranks, groups))
        end = nimg + steps * batch
        streams = [  # every rank has its own order object, like a process
            batches(table, Order(counts, seed, window), start=nimg, end=end, batch=batch, share=share, workers=0)
            for share in parts
        ]
        for step in zip(*streams, strict=True):
            whole = torch.full([batch], -1)
            for share, part in zip(parts, step, strict=True):
                whole[list(share)] = part.image[:, 0, 0, 0].long()
            shown += whole.tolist()
        nimg = end
    assert shown == [ordinal for _, ordinal in stretch(Order(counts, seed, window), start, nimg)]


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(COUNTS, SEEDS, WINDOWS, st.integers(1, 2), st.integers(0, 10**6))
def test_order_is_independent_of_workers(counts, seed, window, workers, first):
    how = {"start": 6 * first, "end": 6 * first + 60, "batch": 6, "share": [5, 0, 2]}
    order = Order(counts, seed, window)
    table = numbers(sum(counts))
    alone, together = (torch.cat([b.image for b in batches(table, order, workers=w, **how)]) for w in (0, workers))
    assert torch.equal(alone, together)


# --- mixtures ---------------------------------------------------------------------------------------------------------

WEIGHTS = st.floats(0.001, 1000)
MIXED = st.lists(st.tuples(COUNTS, WEIGHTS), min_size=1, max_size=5)


def mixture(sources: list[tuple[list[int], float]], seed: int, window: int) -> Mixture:
    return Mixture([Order(counts, seed, window) for counts, _ in sources], [weight for _, weight in sources], seed)


@few
@given(MIXED, SEEDS, WINDOWS, st.integers(0, 10**7))
def test_sources_of_a_mixture_keep_their_order(sources, seed, window, start):
    mixed = mixture(sources, seed, window)
    firsts = np.cumsum([0, *(sum(counts) for counts, _ in sources)])
    shown: list[list[tuple[int, int]]] = [[] for _ in sources]
    before = [0] * len(sources)
    for n in range(start, start + 2 * BLOCK + 17):
        epoch, ordinal = mixed.at(n)
        source = int(np.searchsorted(firsts, ordinal, side="right")) - 1
        place = mixed.source_at(n)
        assert place[0] == source
        before[source] = place[1] if not shown[source] else before[source]
        shown[source].append((epoch, ordinal - int(firsts[source])))
    for (counts, _), begin, found in zip(sources, before, shown, strict=True):
        assert found == stretch(Order(counts, seed, window), begin, begin + len(found))


@few
@given(MIXED, SEEDS, st.integers(0, 10**5))
def test_mixture_proportions_hold_everywhere(sources, seed, block):
    mixed, n = mixture(sources, seed, WINDOW), block * BLOCK
    total = sum(weight for _, weight in sources)
    following: dict[int, int] = {}
    for i in range(n, n + 8 * BLOCK):
        source, before = mixed.source_at(i)
        following.setdefault(source, before)
    for source, before in following.items():
        # Each of the splits between a source and those before it is rounded by up to a half.
        assert abs(before - n * sources[source][1] / total) <= max(len(sources) / 2, 1)


@few
@given(MIXED, SEEDS, WINDOWS, st.integers(0, 10**5))
def test_shards_ahead_of_a_mixture(sources, seed, window, start):
    mixed = mixture(sources, seed, window)
    ahead = mixed.shards_ahead(start)
    assert len(set(ahead)) == len(ahead)
    ends = np.cumsum([count for counts, _ in sources for count in counts])
    assert int(np.searchsorted(ends, mixed.at(start)[1], side="right")) in ahead
    first, shown = 0, dict(reversed([mixed.source_at(n) for n in range(start, start + 8 * BLOCK)]))
    for i, (counts, _) in enumerate(sources):
        mine = [shard - first for shard in ahead if first <= shard < first + len(counts)]
        assert mine
        if i in shown:  # from here on, the order of this source alone
            assert mine == Order(counts, seed, window).shards_ahead(shown[i])
        first += len(counts)


# --- quality ----------------------------------------------------------------------------------------------------------


def likeness(shown: list[int]) -> float:
    """Return Spearman's rank correlation of an order with that of the files. Both are permutations, so it equals
    Pearson's."""
    return float(np.corrcoef(np.arange(len(shown)), shown)[0, 1])


@pytest.mark.parametrize(
    ("shards", "size", "window"),
    [(40, 500, 2000), (16, 1000, 1000), (17, 997, 4000), (200, 100, 1000), (64, 300, 1), (300, 64, 4096)],
)
def test_order_is_uncorrelated_with_files(shards, size, window):
    order, count = Order([size] * shards, 0, window), shards * size
    for epoch in range(6):
        shown = [ordinal for _, ordinal in stretch(order, epoch * count, (epoch + 1) * count)]
        assert abs(likeness(shown)) < 0.1
        place = np.empty([count], np.int64)
        place[shown] = np.arange(count)
        together = np.mean(place[1:] // 32 == place[:-1] // 32)  # neighbours in a batch of 32
        assert together < 3 * 32 / min(count, max(window, SPREAD * size))
