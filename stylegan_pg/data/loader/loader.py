"""The deterministic data loader: the real images of a batch depend on (seed, nimg) only (see datasets/sampler.py).

No fault is silent. A sample whose bytes are bad every time is replaced by the next one in the dataset, on every machine
alike, and reported with the batch. A fault that may pass (a server that is down, a busy disk) is retried for the
configured patience. After that a batch carries the fault instead of images and is the last one, so that the run can
stop there and continue later.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from stylegan_pg.data.classes import one_hot
from stylegan_pg.data.datasets.sampler import Mixture, Order, flipped
from stylegan_pg.data.datasets.table import CorruptSample, SampleTable
from stylegan_pg.data.loader.shared_buffers import Slots
from stylegan_pg.data.storage import shard_cache
from stylegan_pg.data.storage.retry import Fault, Patience
from stylegan_pg.data.storage.shard_reader import Prefetcher
from stylegan_pg.distributed import stopping
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import printable

AHEAD = range(2, 5)  # bounds for the number of batches that each worker prepares ahead,
AHEAD_BYTES = 256 << 20  # which is chosen so that they take about so many bytes together
IN_USE = 3  # batches that the consumer holds at a time: the step's, the next one, and a spare one
IN_A_ROW = 1000  # consecutive bad samples, after which the dataset itself must be wrong
LINGER = 30.0  # seconds that a worker continues after SIGTERM
PREFETCH_THREADS = 4
LOOK_AHEAD = 1.0  # seconds between updates of the shards to prefetch


class Bad(NamedTuple):
    """A sample whose bytes are bad every time; `kind` is one of table.KINDS."""

    resolution: int
    ordinal: int
    kind: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"sample {self.ordinal} in {printable(self.shard)}: {self.reason}"


@dataclass
class Batch:
    """A rank's share of a batch.

    image: uint8 [n, C, H, W], channels last (float32 for points). condition: float32 [n, classes], one-hot, or None.
    bad: the samples that were replaced. fault: the reason why there are no images, or "". lasting: whether that fault
    needs a person. ready: the CUDA event after which the tensors hold their values, or None.
    """

    image: torch.Tensor
    condition: torch.Tensor | None
    bad: list[Bad] = field(default_factory=list)
    fault: str = ""
    lasting: bool = False
    ready: Any = None

    def pin_memory(self) -> Batch:
        self.image = self.image.pin_memory()
        self.condition = None if self.condition is None else self.condition.pin_memory()
        return self


def read_sample(table: SampleTable, i: int, out: np.ndarray | None = None) -> np.ndarray:
    """Read sample i, [C, H, W], with retries; see SampleTable.image.

    Raises:
        CorruptSample: the bytes were bad twice, the second time read from the source itself.
        OSError: the sample could not be read for the configured patience.
    """
    waiting, garbled = Patience(shard_cache.settings().patience), 0
    while True:
        try:
            return table.image(i, out)
        except CorruptSample:
            garbled += 1
            if garbled == 2:
                raise
            table.doubt(i)
        except OSError as fault:
            waiting.wait(fault)


def read_image(
    table: SampleTable, ordinal: int, known: Collection[int] = frozenset(), out: np.ndarray | None = None
) -> tuple[np.ndarray, int, list[Bad]]:
    """Read the image at `ordinal`, or the next good one.

    Ordinals in `known` are known to be bad; they are skipped without reading and not reported.

    Returns:
        The image [C, H, W], its ordinal, and the samples that were found to be bad.

    Raises:
        OSError: as read_sample.
        RunError: nothing in the dataset, or IN_A_ROW consecutive samples, can be decoded.
    """
    bad: list[Bad] = []
    for i in ((ordinal + step) % len(table) for step in range(len(table))):
        if i not in known:
            try:
                return read_sample(table, i, out), i, bad
            except CorruptSample as error:
                bad.append(Bad(table.resolution, i, error.kind, error.shard, error.reason))
                if len(bad) == IN_A_ROW:
                    break
    why = f" (the last: {bad[-1]})" if bad else ""
    raise RunError(f"none of {len(bad) or len(table)} samples from {ordinal} on can be decoded{why}: mend the dataset")


class _Wanted(NamedTuple):
    """A request for a rank's share of a batch: (epoch, ordinal) of its samples, the patience in seconds, and the slot
    of shared memory for the images, if one was free."""

    samples: list[tuple[int, int]]
    patience: float
    slot: int | None


class _Read(NamedTuple):
    """The answer to a _Wanted: images [n, H, W, C], or None if they are in the slot; class numbers int64 [n]; the rest
    as in Batch. It holds arrays and not tensors, because sending a tensor between processes takes a file descriptor."""

    slot: int | None
    images: torch.Tensor | None
    labels: np.ndarray
    bad: list[Bad]
    fault: str = ""
    lasting: bool = False


class _Samples(Dataset):
    """Reads whole batches; runs in the worker processes."""

    def __init__(
        self, table: SampleTable, seed: int, mirror: bool, known: Collection[int], slots: Slots, hands: np.ndarray
    ):
        self.table, self.seed, self.mirror, self.known, self.slots = table, seed, mirror, frozenset(known), slots
        self.hands = hands  # the sample that each worker is reading, for the message if it dies

    def __getitems__(self, wanted: _Wanted) -> _Read:
        n, slot = len(wanted.samples), wanted.slot
        # In the decoders' layout, with a pixel's channels together: separating them takes a third of the decoding time.
        shape = [n, *self.table.image_size, self.table.channels]
        pixels = np.empty(shape, self.table.dtype) if slot is None else self.slots.arrays[slot]
        labels = np.zeros([n], np.int64)
        bad: list[Bad] = []
        worker = get_worker_info()
        with shard_cache.patience(wanted.patience):
            for k, (epoch, ordinal) in enumerate(wanted.samples):
                if worker:
                    self.hands[worker.id] = ordinal
                try:
                    _, source, problems = read_image(self.table, ordinal, self.known, pixels[k])
                except (OSError, RunError, UsageError) as error:  # if raised, it would arrive wrapped in a traceback
                    lasting = not isinstance(error, OSError)
                    return _Read(slot, None, labels, bad, self._about(ordinal, error), lasting)
                if self.mirror and flipped(self.seed, epoch, ordinal):
                    image = torch.from_numpy(pixels[k])
                    image.copy_(image.flip(1))  # eight times as fast as NumPy
                labels[k] = self.table.label[source]
                bad += problems
        return _Read(slot, torch.from_numpy(pixels) if slot is None else None, labels, bad)

    def _about(self, ordinal: int, error: Exception) -> str:
        if isinstance(error, OSError) and not isinstance(error, Fault):  # which names the shard itself
            return f"{self.table.paths[self.table.shard[ordinal]]} cannot be read: {error}"
        return str(error)


class _Positions(Sampler):
    """Yields the requests for _Samples, step by step; the first one has its own patience."""

    def __init__(
        self,
        order: Order | Mixture,
        steps: range,
        share: Sequence[int],
        first_patience: float | None,
        slots: Slots,
    ):
        self.order, self.steps, self.share, self.first, self.slots = order, steps, share, first_patience, slots

    def __iter__(self) -> Iterator[_Wanted]:
        patience = shard_cache.settings().patience
        for nimg in self.steps:
            first = nimg == self.steps.start and self.first is not None
            samples = [self.order.at(nimg + i) for i in self.share]
            yield _Wanted(samples, (self.first or 0.0) if first else patience, self.slots.take())

    def __len__(self) -> int:
        return len(self.steps)


def _in_worker(settings: shard_cache.Settings, _: int) -> None:
    gc.freeze()  # so that the garbage collector ignores the parent's objects
    shard_cache.configure(settings)
    global _workers
    _workers = []  # the parent's
    stopping.be_worker()
    # SIGTERM, and SIGHUP of a closed terminal, may reach all processes, but the trainer decides when to stop. A worker
    # therefore continues for LINGER seconds, so that the step can be finished, but does not wait for servers any more.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_soon(*_: Any) -> None:
    if not Patience.giving_up:
        Patience.give_up()
        timer = threading.Timer(LINGER, os._exit, [0])
        timer.daemon = True  # so that it does not keep a finished worker alive
        timer.start()


def give_up_waiting() -> None:
    """End all retries of this process and its workers, so that pending batches come with a fault. For a process that is
    about to stop; safe in a signal handler."""
    Patience.give_up()
    for worker in _workers:
        worker.terminate()  # see _in_worker


_workers: list[Any] = []  # of this process's streams


def batches(
    table: SampleTable,
    order: Order | Mixture,
    *,
    start: int,
    end: int,
    batch: int,
    share: Sequence[int],
    classes: int = 0,
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
        classes: number of classes for one-hot conditions, 0 for none.
        mirror: whether images are flipped at random.
        workers: processes that read and decode ahead; the images do not depend on it.
        known: ordinals of bad samples, which are replaced without reading them.
        prefetch: number of remote shards beyond those in use that are fetched ahead.
        first_patience: seconds of retries for the first batch, None for the configured patience.
        pin: put batches into pinned memory, from where copies to a GPU overlap with its work.
    """
    steps = range(start, end, batch)
    shape = [len(share), *table.image_size, table.channels]
    size = max(math.prod(shape) * np.dtype(table.dtype).itemsize, 1)
    depth = min(max(AHEAD_BYTES // (size * max(workers, 1)), AHEAD[0]), AHEAD[-1])
    slots = Slots(min(depth * workers + IN_USE, len(steps)), shape, table.dtype)
    hands = Slots(1, [max(workers, 1)], np.int64).arrays[0]
    loader = DataLoader(
        _Samples(table, order.seed, mirror, known, slots, hands),
        batch_sampler=_Positions(order, steps, share, first_patience, slots),  # type: ignore[arg-type]  # not lists
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        collate_fn=_whole,  # type: ignore[arg-type]  # its stub wants lists; __getitems__ makes whole batches
        worker_init_fn=functools.partial(_in_worker, shard_cache.settings()),
        prefetch_factor=depth if workers else None,
        generator=torch.Generator(),  # otherwise DataLoader would draw a seed from the global random stream
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until a worker has installed its handler
    try:
        iterator = iter(loader)  # this forks, which must happen before threads are started
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    mine = list(getattr(iterator, "_workers", ()))
    _workers.extend(mine)
    ahead = _Ahead(table, order, prefetch) if prefetch and shard_cache.settings().limit and steps else None
    try:
        for nimg in steps:
            if ahead:
                ahead.look(nimg)
            item = _assembled(_next(iterator, functools.partial(_why_died, mine, hands, table)), slots, classes)
            yield item.pin_memory() if pin and not item.fault else item
            if item.fault:
                return
            del item  # the slot becomes free when the consumer drops its reference, too
    finally:  # immediately, and not at the next garbage collection
        if ahead:
            ahead.close()
        for worker in mine:
            _workers.remove(worker)
            worker.terminate()  # it may be waiting for data that is not needed any more
        stop = getattr(iterator, "_shutdown_workers", None)
        if stop:
            stop()


class _Ahead:
    """Prefetches the remote shards that will be needed: those of the present group of the order, and some of the
    next."""

    def __init__(self, table: SampleTable, order: Order | Mixture, count: int):
        self.shards = table.remote_shards()
        self.order, self.count, self.last = order, count, float("-inf")
        self.prefetcher = Prefetcher(min(count, PREFETCH_THREADS)) if self.shards else None

    def look(self, nimg: int) -> None:
        if self.prefetcher and time.monotonic() - self.last > LOOK_AHEAD:
            self.last = time.monotonic()
            now = self.order.shards_ahead(nimg, 1)
            later = [i for i in self.order.shards_ahead(nimg, 2) if i not in now]
            self.prefetcher.want([self.shards[i] for i in [*now, *later[: self.count]] if i in self.shards])

    def close(self) -> None:
        if self.prefetcher:
            self.prefetcher.close()


def _next(iterator: Iterator[_Read], why_died: Callable[[], str]) -> _Read:
    try:
        return next(iterator)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        return _Read(None, None, np.zeros([0], np.int64), [], why_died())


_KILLED = "a process that reads ahead was killed, perhaps for want of memory (smaller data.workers need less)"


def _why_died(workers: list[Any], hands: np.ndarray, table: SampleTable) -> str:
    """A message that says what ended a worker, and which sample it was reading."""
    for worker, ordinal in zip(workers, hands.tolist(), strict=True):
        worker.join(1.0 if worker.exitcode is None and not worker.is_alive() else 0.0)
        if worker.exitcode is not None and worker.exitcode < 0:
            died = signal.Signals(-worker.exitcode)
            if died != signal.SIGKILL:
                return f"a process that reads ahead was ended by {died.name} as it decoded {table.place_of(ordinal)}"
            return f"{_KILLED}; the last that it had was {table.place_of(ordinal)}"
    return _KILLED


def _whole(read: _Read) -> _Read:
    return read


def _assembled(read: _Read, slots: Slots, classes: int) -> Batch:
    images = slots.lend(read.slot) if read.slot is not None else read.images
    if read.fault or images is None:
        return Batch(torch.empty(0), None, read.bad, read.fault, read.lasting)
    return Batch(images.permute(0, 3, 1, 2), one_hot(read.labels, classes) if classes else None, read.bad)


def read_batch(table: SampleTable, ordinals: Sequence[int], bad: list[Bad] | None = None) -> torch.Tensor:
    """Read images uint8 [n, C, H, W] by their ordinals; replaced samples are appended to `bad`.

    Raises:
        OSError, RunError: as read_image.
    """
    read = [read_image(table, int(i)) for i in ordinals]
    if bad is not None:
        bad += [one for *_, problems in read for one in problems]
    return torch.from_numpy(np.stack([image for image, *_ in read]))
