"""The worker processes of the loader: their start, their end on request, and the reasons of unexpected exits."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.storage import shard_cache
from stylegan_pg.data.storage.retry import Retries
from stylegan_pg.distributed import stopping

LINGER = 30.0  # seconds that a worker continues after SIGTERM

running: list[Any] = []  # the workers of this process's loaders


def begin(settings: shard_cache.CacheSettings, _: int) -> None:
    """Initialise a worker process. `settings` are those of the parent."""
    gc.freeze()  # so that the garbage collector ignores the parent's objects
    shard_cache.configure(settings)
    running.clear()  # these are the parent's
    stopping.be_worker()
    # SIGTERM, and SIGHUP of a closed terminal, may reach all processes, but the trainer decides when to stop. A worker
    # therefore continues for LINGER seconds, so that the step can be finished, but does not wait for servers any more.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_soon(*_: Any) -> None:
    if not Retries.giving_up:
        Retries.give_up()
        timer = threading.Timer(LINGER, os._exit, [0])
        timer.daemon = True  # so that it does not keep a finished worker alive
        timer.start()


def give_up_waiting() -> None:
    """End all retries of this process and its workers, so that pending batches are delivered with a fault. This is for
    a process that is about to stop, and is safe in a signal handler."""
    Retries.give_up()
    for worker in running:
        worker.terminate()  # see _end_soon


_KILLED = "a loader worker was killed, perhaps because memory ran out (fewer data.workers need less)"


def why_died(workers: Sequence[Any], progress: np.ndarray, tables: Sequence[SampleTable]) -> str:
    """Return a message about the signal that ended a worker and the sample that it was reading. `progress`, int64
    [workers, 2], contains the index of a table and an ordinal in it for each worker."""
    for worker, (table, ordinal) in zip(workers, progress.tolist(), strict=True):
        worker.join(1.0 if worker.exitcode is None and not worker.is_alive() else 0.0)
        if worker.exitcode is not None and worker.exitcode < 0:
            died = signal.Signals(-worker.exitcode)
            place = tables[table].place_of(ordinal)
            if died != signal.SIGKILL:
                return f"a loader worker crashed ({died.name}) while it decoded {place}"
            return f"{_KILLED}; its last sample was {place}"
    return _KILLED
