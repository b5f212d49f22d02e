"""The deterministic data loader: the fields of a batch depend on (seed, nimg) only (see datasets/sampler.py).

A batch that cannot be read carries the fault instead of images and is the last one, so that the run can stop there and
continue later. What is retried and what is replaced, reading.py says.
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from stylegan_pg.data.datasets.sampler import Mixture, Order
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.loader import workers as processes
from stylegan_pg.data.loader.parts import OrderedTable, Part, Spec, parts_of
from stylegan_pg.data.loader.reading import Bad
from stylegan_pg.data.loader.shared_buffers import SharedBuffers
from stylegan_pg.data.storage import shard_cache
from stylegan_pg.data.storage.retry import Fault
from stylegan_pg.data.storage.shard_reader import Prefetcher
from stylegan_pg.errors import RunError, UsageError

AHEAD = range(2, 5)  # bounds for the number of batches that each worker prepares ahead,
AHEAD_BYTES = 256 << 20  # which is chosen so that they take about so many bytes together
IN_USE = 3  # batches that the consumer holds at a time: the step's, the next one, and a spare one
PREFETCH_THREADS = 4
LOOK_AHEAD = 1.0  # seconds between updates of the shards to prefetch


@dataclass
class Batch:
    """A rank's share of a batch.

    fields: the values of its n images by field (parts.py lists the names). Pictures are uint8 [n, C, H, W], channels
    last (float32 for points); "class" int64 [n]; vectors float32 [n, size]; arrays [n, ...]; texts a list of n. masks:
    the pictures among them whose pixels are whole numbers, not colours. bad: the samples that were replaced. fault: the
    reason why there are no images, or "". lasting: whether that fault needs a person. ready: the CUDA event after which
    the tensors hold their values, or None.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    masks: frozenset[str] = frozenset()
    bad: list[Bad] = field(default_factory=list)
    fault: str = ""
    lasting: bool = False
    ready: Any = None

    @property
    def image(self) -> torch.Tensor:
        return self.fields["image"]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """The fields, with `change` applied to those that are tensors."""
        return {n: change(v) if isinstance(v, torch.Tensor) else v for n, v in self.fields.items()}

    def pin_memory(self) -> Batch:
        self.fields = self.map(torch.Tensor.pin_memory)
        return self


class _Wanted(NamedTuple):
    """A request for a rank's share of a batch: for each part (epoch, ordinal) of its samples, the patience in seconds,
    and for each picture field the slot of shared memory, if one was free."""

    samples: list[list[tuple[int, int]]]
    patience: float
    slots: dict[str, int | None]


class _Read(NamedTuple):
    """The answer to a _Wanted: the values of fields that are not in a slot, arrays with n rows or lists of n texts; the
    rest as in Batch. It holds arrays and not tensors, because sending a tensor between processes takes a file
    descriptor."""

    slots: dict[str, int | None]
    values: dict[str, Any]
    bad: list[Bad]
    fault: str = ""
    lasting: bool = False


class _Samples(Dataset):
    """Reads whole batches; runs in the worker processes."""

    def __init__(self, parts: Sequence[Part], mirror: bool, slots: Mapping[str, SharedBuffers], progress: np.ndarray):
        self.parts, self.mirror, self.slots = parts, mirror, slots
        self.progress = progress  # part and ordinal that each worker is reading, for the message if it dies
        self.specs = specs_of(parts)

    def __getitems__(self, wanted: _Wanted) -> _Read:
        n, bad, worker = len(wanted.samples[0]), [], get_worker_info()
        out = {name: self._memory(name, spec, n, wanted.slots.get(name)) for name, spec in self.specs.items()}
        with shard_cache.patience(wanted.patience):
            for j, part in enumerate(self.parts):
                for k, (epoch, ordinal) in enumerate(wanted.samples[j]):
                    if worker:
                        self.progress[worker.id] = j, ordinal
                    try:
                        bad += part.read((epoch, ordinal), k, out, self.mirror)
                    except (OSError, RunError, UsageError) as error:  # if raised, it would come wrapped in a traceback
                        lasting = not isinstance(error, OSError)
                        return _Read(wanted.slots, {}, bad, _about(part, ordinal, error), lasting)
        return _Read(wanted.slots, {n: v for n, v in out.items() if wanted.slots.get(n) is None}, bad)

    def _memory(self, name: str, spec: Spec, n: int, slot: int | None) -> Any:
        """Room for n values. Pictures are in the decoders' layout, with a pixel's channels together: separating them
        takes a third of the decoding time."""
        if slot is not None:
            return self.slots[name].arrays[slot]
        return [""] * n if spec.dtype is None else np.empty([n, *spec.shape], spec.dtype)


def specs_of(parts: Sequence[Part]) -> dict[str, Spec]:
    """The fields of a batch by name."""
    return {name: spec for part in parts for name, spec in part.specs().items()}


def _about(part: Part, ordinal: int, error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, Fault):  # which names the shard itself
        table = part.source.table
        return f"{table.paths[table.shard[ordinal]]} cannot be read: {error}"
    return str(error)


class _Positions(Sampler):
    """Yields the requests for _Samples, step by step; the first one has its own patience."""

    def __init__(
        self,
        parts: Sequence[Part],
        steps: range,
        share: Sequence[int],
        first_patience: float | None,
        slots: Mapping[str, SharedBuffers],
    ):
        self.parts, self.steps, self.share, self.first, self.slots = parts, steps, share, first_patience, slots

    def __iter__(self) -> Iterator[_Wanted]:
        patience = shard_cache.settings().patience
        for nimg in self.steps:
            first = nimg == self.steps.start and self.first is not None
            samples = [[part.at(nimg, i, self.steps.step) for i in self.share] for part in self.parts]
            slots = {name: memory.acquire() for name, memory in self.slots.items()}
            yield _Wanted(samples, (self.first or 0.0) if first else patience, slots)

    def __len__(self) -> int:
        return len(self.steps)


def batches(
    table: SampleTable,
    order: Order | Mixture,
    *,
    start: int,
    end: int,
    batch: int,
    share: Sequence[int],
    fields: Sequence[str] = (),
    others: Mapping[str, OrderedTable] | None = None,
    derived: Mapping[str, str] | None = None,
    mirror: bool = False,
    workers: int = 2,
    known: Collection[int] = frozenset(),
    prefetch: int = 0,
    first_patience: float | None = None,
    pin: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's share of every batch from nimg `start` to `end` (both at batch boundaries of the run).

    A batch with a fault is the last one. Closing the generator ends its workers.

    Args:
        table: the samples of one resolution.
        order: the order of the images, for as many samples as the table has.
        start, end: in images.
        batch: images of the global batch.
        share: indices of this rank's images within the global batch.
        fields: the fields of a batch besides "image", see parts.py.
        others: further datasets by name, each with an order of its own.
        derived: recipes of conditions by name, see derived.py.
        mirror: whether images are flipped at random, with all fields that lie on their pixels.
        workers: processes that read and decode ahead; the images do not depend on it.
        known: ordinals of bad samples, which are replaced without reading them.
        prefetch: number of remote shards beyond those in use that are fetched ahead.
        first_patience: seconds of retries for the first batch, None for the configured patience.
        pin: put batches into pinned memory, from where copies to a GPU overlap with its work.

    Raises:
        UsageError: as parts_of.
    """
    steps = range(start, end, batch)
    parts = parts_of(fields, OrderedTable(table, order, frozenset(known)), others, derived)
    specs = specs_of(parts)
    pictures = {n: ([len(share), *s.shape], s.dtype) for n, s in specs.items() if s.is_picture}
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in pictures.values())
    depth = min(max(AHEAD_BYTES // max(size * max(workers, 1), 1), AHEAD[0]), AHEAD[-1])
    count = min(depth * workers + IN_USE, len(steps))
    slots = {name: SharedBuffers(count, shape, dtype) for name, (shape, dtype) in pictures.items()}
    progress = SharedBuffers(1, [max(workers, 1), 2], np.int64).arrays[0]
    loader = DataLoader(
        _Samples(parts, mirror, slots, progress),
        batch_sampler=_Positions(parts, steps, share, first_patience, slots),  # type: ignore[arg-type]  # not lists
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        collate_fn=_whole,  # type: ignore[arg-type]  # its stub wants lists; __getitems__ makes whole batches
        worker_init_fn=functools.partial(processes.begin, shard_cache.settings()),
        prefetch_factor=depth if workers else None,
        generator=torch.Generator(),  # otherwise DataLoader would draw a seed from the global random stream
    )
    with contextlib.ExitStack() as stack:
        iterator, mine = stack.enter_context(_started(loader))
        why_died = functools.partial(processes.why_died, mine, progress, [part.source.table for part in parts])
        ahead = [stack.enter_context(contextlib.closing(one)) for one in _prefetchers(parts, prefetch, steps)]
        for nimg in steps:
            for one in ahead:
                one.look(nimg)
            item = _assembled(_next(iterator, why_died), slots, specs)
            yield item.pin_memory() if pin and not item.fault else item
            if item.fault:
                return
            del item  # the slots become free when the consumer drops its reference, too


@contextlib.contextmanager
def _started(loader: DataLoader) -> Iterator[tuple[Iterator[Any], list[Any]]]:
    """A loader's iterator and workers, which are ended immediately behind the block, and not at the next garbage
    collection."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until a worker has installed its handler
    try:
        iterator = iter(loader)  # this forks, which must happen before threads are started
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    mine = list(getattr(iterator, "_workers", ()))
    processes.running.extend(mine)
    try:
        yield iterator, mine
    finally:
        for worker in mine:
            processes.running.remove(worker)
            worker.terminate()  # it may be waiting for data that is not needed any more
        stop = getattr(iterator, "_shutdown_workers", None)
        if stop:
            stop()


def _prefetchers(parts: Sequence[Part], count: int, steps: range) -> list[_Ahead]:
    if not (count and shard_cache.settings().limit and steps):
        return []
    return [_Ahead(part.source, count) for part in parts if not part.is_next]


class _Ahead:
    """Prefetches the remote shards that will be needed: those of the present group of the order, and some of the
    next."""

    def __init__(self, source: OrderedTable, count: int):
        self.shards = source.table.remote_shards()
        self.order, self.count, self.last = source.order, count, float("-inf")
        self.prefetcher = Prefetcher(min(count, PREFETCH_THREADS)) if self.shards else None

    def look(self, nimg: int) -> None:
        if self.prefetcher and time.monotonic() - self.last > LOOK_AHEAD:
            self.last = time.monotonic()
            now = self.order.shards_ahead(nimg, 1)
            later = [i for i in self.order.shards_ahead(nimg, 2) if i not in now]
            self.prefetcher.request([self.shards[i] for i in [*now, *later[: self.count]] if i in self.shards])

    def close(self) -> None:
        if self.prefetcher:
            self.prefetcher.close()


def _next(iterator: Iterator[_Read], why_died: Callable[[], str]) -> _Read:
    try:
        return next(iterator)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return _Read({}, {}, [], why_died())


def _whole(read: _Read) -> _Read:
    return read


def _assembled(read: _Read, slots: Mapping[str, SharedBuffers], specs: Mapping[str, Spec]) -> Batch:
    lent = {name: slots[name].as_tensor(slot) for name, slot in read.slots.items() if slot is not None}
    if read.fault:
        return Batch({"image": torch.empty(0)}, frozenset(), read.bad, read.fault, read.lasting)
    values = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in read.values.items()} | lent
    fields = {name: values[name].permute(0, 3, 1, 2) if s.is_picture else values[name] for name, s in specs.items()}
    return Batch(fields, frozenset(name for name, s in specs.items() if s.is_mask), read.bad)


class _At(Order):
    """The order in which these samples come, once."""

    def __init__(self, ordinals: Sequence[int], count: int, seed: int):
        super().__init__([count], seed)
        self.ordinals = [int(i) % count for i in ordinals]

    def at(self, n: int) -> tuple[int, int]:
        return 0, self.ordinals[n]


def read_fields(
    table: SampleTable,
    ordinals: Sequence[int],
    fields: Sequence[str],
    seed: int,
    others: Mapping[str, SampleTable] | None = None,
    derived: Mapping[str, str] | None = None,
) -> Batch:
    """The pictures and fields of some samples, for sample grids, with those of the same ordinals of further datasets.

    Raises:
        OSError, RunError: as reading.read_good.
    """
    count = len(ordinals)
    sources = {n: OrderedTable(t, _At(ordinals, len(t), seed)) for n, t in (others or {}).items()}
    parts = parts_of(fields, OrderedTable(table, _At(ordinals, len(table), seed)), sources, derived)
    specs = specs_of(parts)
    samples = _Samples(parts, False, {}, np.zeros([1, 2], np.int64))
    wanted = [[part.at(0, i, count) for i in range(count)] for part in parts]
    read = samples.__getitems__(_Wanted(wanted, shard_cache.settings().patience, {}))
    if read.fault:
        raise RunError(read.fault)
    return _assembled(read, {}, specs)
