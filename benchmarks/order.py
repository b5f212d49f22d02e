"""The quality of shuffling: this package's window compared with webdataset's shuffle buffer of the same size.

    python benchmarks/order.py [--shards 200 --size 1000 --batch 32]

Both read the shards in a random order. webdataset then keeps `window` samples in a buffer and returns random ones, as
`wds.WebDataset(..., shardshuffle=True).shuffle(window)` does. The columns are means over epochs:

    likeness    magnitude of the rank correlation between file order and stream order (0 is best)
    together    fraction of neighbouring samples of the files that are in the same batch (1 for reading in order)
    spread      number of shards from which the samples of a batch come

The last line is a uniform permutation of the whole dataset.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator

import numpy as np
from webdataset import filters

from stylegan_pg.data.datasets.sampler import Order


def ours(shards: int, size: int, window: int, epoch: int) -> Iterator[int]:
    order, count = Order([size] * shards, 0, window), shards * size
    return (order.at(n)[1] for n in range(epoch * count, (epoch + 1) * count))


def webdataset(shards: int, size: int, window: int, epoch: int) -> Iterator[int]:
    dice = random.Random(epoch)
    files = list(range(shards))
    dice.shuffle(files)
    samples = (file * size + i for file in files for i in range(size))
    return filters._shuffle(samples, window, min(window, 100), rng=dice)  # what .shuffle(window) calls


def uniform(shards: int, size: int, _: int, epoch: int) -> Iterator[int]:
    return iter(np.random.default_rng(epoch).permutation(shards * size).tolist())


def figures(shown: np.ndarray, size: int, batch: int) -> tuple[float, float, float]:
    count = len(shown)
    assert sorted(shown.tolist()) == list(range(count))
    place = np.empty([count], np.int64)
    place[shown] = np.arange(count)
    likeness = abs(float(np.corrcoef(np.arange(count), shown)[0, 1]))
    together = float(np.mean(place[1:] // batch == place[:-1] // batch))
    whole = shown[: count // batch * batch].reshape(-1, batch) // size
    return likeness, together, float(np.mean([len(set(row.tolist())) for row in whole]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--size", type=int, default=1000, help="samples of a shard")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--windows", type=int, nargs="+", default=[1000, 8000, 65536])
    given = parser.parse_args()
    print(f"{given.shards} shards of {given.size}, batches of {given.batch}, {given.epochs} epochs")
    print("order        window  likeness  together  spread")
    rows = [(name, how, w) for w in given.windows for name, how in (("stylegan_pg", ours), ("webdataset", webdataset))]
    for name, how, window in [*rows, ("uniform", uniform, given.shards * given.size)]:
        found = []
        for epoch in range(given.epochs):
            shown = np.fromiter(how(given.shards, given.size, window, epoch), np.int64)
            found.append(figures(shown, given.size, given.batch))
        likeness, together, spread = np.mean(found, axis=0)
        print(f"{name:11s} {window:7d}    {likeness:.4f}   {together:.5f}   {spread:5.1f}", flush=True)


if __name__ == "__main__":
    main()
