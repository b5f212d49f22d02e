"""The deterministic stream: which real images make up a batch follows from (seed, nimg) alone.

Epoch e shows the whole dataset in the order of a permutation drawn from (seed, e); image number n of a run is the one
at place n mod count of epoch n div count. So resuming is starting at nimg, at any batch, rank count or resolution.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from stylegan_pg.data.table import CorruptSample, SampleTable
from stylegan_pg.errors import RunError
from stylegan_pg.rng import derive

READ_TRIES = 4  # of a sample whose file cannot be read; the waits between them double from 0.1 s

PATIENCE = 30.0  # seconds that a worker goes on after SIGTERM


@dataclass
class Batch:
    """A rank's share of a batch: image uint8 [n, C, H, W], of points float32; condition float32 [n, classes], one-hot,
    or None; bad: what each corrupt sample that had to be replaced was; fault: why it could not be read, if so."""

    image: torch.Tensor
    condition: torch.Tensor | None
    bad: list[str]
    fault: str = ""


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(derive(seed, "order", epoch)).permutation(count)


def sample_at(seed: int, n: int, count: int) -> tuple[int, int]:
    """(epoch, ordinal within the dataset) of the n-th image of a run."""
    epoch, place = divmod(n, count)
    return epoch, int(_order(seed, epoch, count)[place])


def flipped(seed: int, epoch: int, ordinal: int) -> bool:
    """The mirror option's coin for one image in one epoch."""
    return bool(derive(seed, "mirror", epoch, ordinal) & 1)


def one_hot(labels: Sequence[int] | np.ndarray | torch.Tensor, classes: int) -> torch.Tensor:
    """Class numbers [n] -> float32 [n, classes]."""
    return torch.nn.functional.one_hot(torch.as_tensor(labels).long(), classes).float()


def read_image(table: SampleTable, ordinal: int) -> tuple[np.ndarray, int, list[str]]:
    """The image at `ordinal`, uint8 [C, H, W]; the ordinal it really came from; what was bad on the way.

    A file that cannot be read right now is tried again. Bytes that are bad every time are replaced by the next
    sample, which is the same on every machine.

    Raises:
        RunError: if a file stays unreadable, or nothing in the dataset can be decoded.
    """
    bad: list[str] = []
    for step in range(len(table)):
        i = (ordinal + step) % len(table)
        problem: Exception | None = None
        garbled = 0
        for attempt in range(READ_TRIES):
            try:
                return table.image(i), i, bad
            except CorruptSample as error:
                problem = error
                garbled += 1
                if garbled == 2:  # read twice with the same result: the bytes are bad
                    break
            except OSError as error:
                problem = error
                time.sleep(0.1 * 2**attempt)
        if garbled < 2:
            raise RunError(f"{table.paths[table.shard[i]]} cannot be read: {problem}")
        bad.append(str(problem))
    raise RunError(f"no sample of {table.paths[0]} and its neighbours can be decoded: pack the dataset again")


class _Samples(Dataset):
    """Whole batches by lists of (epoch, ordinal); runs in the worker processes."""

    def __init__(self, table: SampleTable, classes: int, seed: int, mirror: bool):
        self.table, self.classes, self.seed, self.mirror = table, classes, seed, mirror

    def __getitems__(self, wanted: list[tuple[int, int]]) -> Batch:
        n = len(wanted)
        images = np.empty([n, self.table.channels, *self.table.image_size], self.table.dtype)
        labels = np.zeros([n], np.int64)
        bad: list[str] = []
        for k, (epoch, ordinal) in enumerate(wanted):
            try:
                image, source, problems = read_image(self.table, ordinal)
            except RunError as error:  # told by the parent: a worker's own exception comes wrapped in a traceback
                return Batch(torch.empty(0), None, bad, str(error))
            images[k] = image[:, :, ::-1] if self.mirror and flipped(self.seed, epoch, ordinal) else image
            labels[k] = self.table.label[source]
            bad += problems
        return Batch(torch.from_numpy(images), one_hot(labels, self.classes) if self.classes else None, bad)


class _Positions(Sampler):
    """For each step, the (epoch, ordinal) of this rank's share of the batch."""

    def __init__(self, seed: int, count: int, start: int, end: int, batch: int, share: Sequence[int]):
        self.seed, self.count, self.share = seed, count, share
        self.range = range(start, end, batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for nimg in self.range:
            yield [sample_at(self.seed, nimg + i, self.count) for i in self.share]

    def __len__(self) -> int:
        return len(self.range)


def _in_worker(_: int) -> None:
    # Ctrl-C and SIGTERM may go to all processes, but it is the trainer that decides when to stop: a worker outlives
    # the step that is being finished, and then goes in any case.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(PATIENCE, os._exit, [0]).start())


def batches(
    table: SampleTable,
    *,
    seed: int,
    start: int,
    end: int,
    batch: int,
    share: Sequence[int],
    classes: int = 0,
    mirror: bool = False,
    workers: int = 2,
) -> Generator[Batch, None, None]:
    """This rank's part of every batch from nimg `start` to `end` (both at batch boundaries of the run).

    Close the generator to end its workers.

    Raises:
        RunError: if a file stays unreadable.

    Args:
        share: indices into the global batch that are this rank's, in its order.
        classes: number of classes for one-hot conditions, 0 for none.
        workers: processes that read and decode ahead; the images do not depend on it.
    """
    loader = DataLoader(
        _Samples(table, classes, seed, mirror),
        batch_sampler=_Positions(seed, len(table), start, end, batch, share),
        num_workers=workers,
        collate_fn=_whole,  # type: ignore[arg-type]  # its stub wants lists; __getitems__ makes whole batches
        worker_init_fn=_in_worker,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # else the global stream gives it a seed that nothing here uses
    )
    iterator = iter(loader)
    try:
        for item in iterator:
            if item.fault:
                raise RunError(item.fault)
            yield item
    finally:  # at once, and not when the garbage is collected
        stop = getattr(iterator, "_shutdown_workers", None)
        if stop:
            stop()


def _whole(batch: Batch) -> Batch:
    return batch


def read_batch(table: SampleTable, ordinals: Sequence[int]) -> torch.Tensor:
    """Images uint8 [n, C, H, W] by their place in the dataset."""
    return torch.from_numpy(np.stack([read_image(table, int(i))[0] for i in ordinals]))
