"""The functions of `stylegan-pg data`: verifying and describing a dataset, and measuring the speed of reading it."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from stylegan_pg import processors
from stylegan_pg.data.datasets.contact_sheet import spread
from stylegan_pg.data.datasets.foreign import ForeignIndex
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.table import CorruptSample, SampleTable
from stylegan_pg.data.images.decode import BadPicture, header
from stylegan_pg.distributed import stopping
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import printable

PART = 64  # samples that a process checks at a time
LOOKED_AT = 64  # pictures of tars of other programs that `looked_at` decodes
NAMES = 10  # names of a field's entries that `info` prints


def check(index: DatasetIndex, resolutions: list[int], workers: int | None = None) -> Iterator[str]:
    """Verify a dataset and yield a line for each fault. Faults are missing or altered files, and samples of which the
    picture, or the value of a further field, has a wrong checksum or cannot be decoded. Tars of other programs have no
    checksums; their samples are decoded and compared with `resolutions`.

    Raises:
        UsageError: The dataset does not have one of the resolutions.
        RunError: A file currently cannot be read.
    """
    for resolution in resolutions:
        if resolution not in index.resolutions:
            index.table(resolution)  # raises the error
    try:
        if index.root:  # a packed dataset
            index.sources()
    except UsageError as error:
        yield str(error)
    context = multiprocessing.get_context("spawn")  # not forked: the parent may have threads
    with ProcessPoolExecutor(workers or processors.count(), context, stopping.be_worker) as pool:
        for resolution in resolutions:
            try:
                table = index.table(resolution)
            except UsageError as error:
                yield f"resolution {resolution}: {error}"
                continue
            parts = [range(i, min(i + PART, len(table))) for i in range(0, len(table), PART)]
            for found in pool.map(functools.partial(_bad, table), parts):
                for ordinal, line in found:
                    source = index.source_of(ordinal)
                    yield line + (f" ({printable(source)})" if source else "")


def _bad(table: SampleTable, ordinals: range) -> list[tuple[int, str]]:
    found = []
    for i in ordinals:
        for read in (table.image, *(functools.partial(table.value, name) for name in table.fields)):
            try:
                read(i)
            except CorruptSample as error:
                found.append((i, str(error)))
            except OSError as error:
                raise RunError(f"{table.paths[table.shard[i]]} cannot be read: {error}") from None
    return found


def info(index: DatasetIndex) -> Iterator[str]:
    """Yield lines that describe the dataset. Raises the exceptions of DatasetIndex.table."""
    height, width = index.size_at(max(index.resolutions))
    colours = {1: "grey", 3: "RGB", 4: "RGBA"}.get(index.channels, f"{index.channels} channels")
    yield f"{index.path}: {index.count} images in {len(index.shards)} shards, {colours}, up to {height}x{width}"
    yield f"identity {index.identity}"
    yield from index.notes
    label = None
    for resolution in index.resolutions:
        table = index.table(resolution)
        label = table.label
        if resolution == min(index.resolutions):
            yield from _fields(table)
        mib, (height, width) = int(table.size.sum()) / 2**20, table.image_size
        yield f"resolution {resolution}: {height}x{width}, {mib:.1f} MiB, {table.size.mean() / 1024:.1f} KiB an image"
    if index.label_names and label is not None:
        counts = Counter(label.tolist())
        yield f"{len(index.label_names)} classes: " + ", ".join(
            f"{printable(name, 60)} {counts[i]}" for i, name in enumerate(index.label_names)
        )
        if counts[-1]:
            yield f"{counts[-1]} images without a label"
    else:
        yield "no labels"
    if isinstance(index, ForeignIndex):
        yield from looked_at(index)


def _fields(table: SampleTable) -> Iterator[str]:
    """Yield lines that describe the further fields."""
    for name, field in table.fields.items():
        size = table.members[name].size if name in table.members else None
        there = f", of {np.count_nonzero(size)} samples" if field.kind == "text" and size is not None else ""
        names = [printable(one, 60) for one in field.names[:NAMES]] + ["..."] * (len(field.names) > NAMES)
        yield f"field {name}: {field}{there}" + (f" ({', '.join(names)})" if names else "")


def looked_at(index: DatasetIndex) -> Iterator[str]:
    """Yield lines that describe some of the pictures in tars of other programs: the number of each kind, the number of
    pictures that are converted to the dataset's channels when they are read, and those that cannot be read. Raises
    RunError and the exceptions of DatasetIndex.table."""
    table = index.table(min(index.resolutions))
    kinds, bad = Counter(), []
    chosen = spread(len(table), LOOKED_AT)
    for ordinal in chosen:
        try:
            table.image(ordinal)
            kinds[header(table.read(ordinal)).kind] += 1
        except (CorruptSample, BadPicture) as error:  # BadPicture if a server sends other bytes the second time
            bad.append(f"{printable(index.source_of(ordinal))}: {getattr(error, 'reason', error)}")
        except OSError as error:
            raise RunError(f"{table.paths[table.shard[ordinal]]} cannot be read: {error}") from None
    yield f"of {len(chosen)} pictures examined: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    plain = {1: "grey", 3: "RGB", 4: "RGBA"}[index.channels]
    others = sum(n for kind, n in kinds.items() if kind.rsplit(" ", 1)[0] != plain)
    if others:
        yield f"{others} of them are converted to {plain} each time they are read; packing would do this only once"
    if bad:
        yield f"{len(bad)} of them cannot be read, for example {bad[0]} (data check examines all)"


def bench(
    index: DatasetIndex, resolution: int, *, batch: int, workers: int, window: int, seconds: float
) -> Iterator[str]:
    """Read batches as in training for this number of seconds, and report the speed. Raises the exceptions of
    loader.batches."""
    from stylegan_pg.data.loader.loader import batches  # imported late: it imports torch, which `check` does not need

    begin = time.perf_counter()
    table = index.table(resolution)
    order = index.order(0, window)
    data = batches(table, order, start=0, end=1 << 40, batch=batch, share=range(batch), workers=workers)
    images = 0
    with contextlib.closing(data):
        next(data)
        first = time.perf_counter()
        yield f"first batch after {first - begin:.2f} s"
        while time.perf_counter() - first < seconds or not images:
            images += len(next(data).image)
        elapsed = time.perf_counter() - first
    mib = images * float(table.size.mean()) / 2**20
    yield (
        f"resolution {resolution}, batches of {batch}, {workers} workers: {images / elapsed:.0f} images/s, "
        f"{mib / elapsed:.1f} MiB/s ({images} images in {elapsed:.1f} s)"
    )
