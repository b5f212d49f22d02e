"""One thread that owns all generators: the newest request of each kind first, videos in between."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)

MOST_WAITING = 256  # requests; further ones are refused
STARVED_SEC = 1.0  # after which a step of a video goes before a picture


class SupersededError(Exception):
    """A newer request with the same key took the place of this one."""


class BusyError(Exception):
    """Too many requests wait."""


class Worker:
    """Runs functions one after another in a thread of its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, tuple[Callable[[], Any], Future[Any]]] = OrderedDict()
        self._long: deque[Iterator[Any]] = deque()
        self._closed = False
        self._current: str | None = None  # key of the request that is being executed
        self._thread = threading.Thread(target=self._run, name="explorer-worker", daemon=True)
        self._thread.start()

    def ask(self, key: str, function: Callable[[], Any]) -> Future[Any]:
        """Call the function soon; a waiting one with the same key is dropped, and its future raises SupersededError.

        Raises:
            BusyError: too many requests wait, or the worker is closed.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed or (len(self._waiting) >= MOST_WAITING and key not in self._waiting):
                raise BusyError
            older = self._waiting.get(key)
            self._waiting[key] = function, future  # which keeps the place of an older one in the order
            self._changed.notify()
        if older is not None and older[1].set_running_or_notify_cancel():
            older[1].set_exception(SupersededError())
        return future

    def outdated(self) -> bool:
        """Whether a newer request with the same key waits for the one that is executed, or the worker is closed. A
        function that takes long may ask this, and raise SupersededError."""
        return self._closed or (self._current is not None and self._current in self._waiting)

    def steps(self, work: Iterator[Any]) -> None:
        """Exhaust an iterator, one element at a time, while no request waits (but at least one each second)."""
        with self._changed:
            self._long.append(work)
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the function that it executes, and close the iterators. Waiting requests fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        last_step = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._long)
                if self._closed:
                    break
                starved = time.monotonic() - last_step > STARVED_SEC
                work = self._long[0] if self._long and (starved or not self._waiting) else None
                key, one = (None, None) if work is not None else self._waiting.popitem(last=False)
                self._current = key
            if work is not None:
                self._step(work)
                last_step = time.monotonic()
            elif one is not None:
                _answer(*one)
        for work in self._long:
            close = getattr(work, "close", None)
            if close is not None:
                close()
        for _, future in self._waiting.values():
            future.cancel()

    def _step(self, work: Iterator[Any]) -> None:
        """Take one element, and put the iterator behind the others."""
        try:
            next(work)
            ended = False
        except StopIteration:
            ended = True
        except Exception:  # the iterators report their own faults; the thread must go on
            log.exception("a task of the explorer failed")
            ended = True
        with self._changed:
            self._long.popleft()
            if not ended:
                self._long.append(work)


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
