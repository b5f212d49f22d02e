"""Classification of read errors as transient or permanent, and retries after transient ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
GRACE = 10.0  # seconds that a connection has for its first bytes, even if the time for retries is shorter
MIN_BYTES_PER_SEC = 1024  # a slower transfer does not count as progress


class Fault(OSError):  # noqa: N818 - it names what happened
    """Data cannot be read. The message names the source."""


class TransientFault(Fault):
    """A fault that may disappear: no connection, a timeout, HTTP 5xx or 429, a truncated body, a failed command."""


class PermanentFault(Fault):
    """A fault that retries cannot resolve: a missing file, no permission, no credentials, an unknown command."""


_random = random.SystemRandom()  # unlike other generators, it has no state that forked processes would share


class Retries:
    """Retries with exponential backoff. Pauses double up to 15 s, with random jitter, until there was no progress for
    `seconds`. `give_up` ends all pauses of this process."""

    giving_up = False

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.furthest = 0  # bytes received, for callers that measure progress in bytes
        self.progress()

    def progress(self) -> None:
        self.since, self.pauses, self.bytes = time.monotonic(), 0, 0

    def arrived(self, n: int, named: str) -> None:
        """Record that n more bytes have arrived. They count as progress only if at least MIN_BYTES_PER_SEC bytes arrive
        per second, because a server that sends single bytes could otherwise stall a run forever.

        Raises:
            TransientFault: if there was no progress for `seconds`.
        """
        self.bytes += n
        spent = time.monotonic() - self.since
        if self.bytes >= MIN_BYTES_PER_SEC * spent:
            self.progress()
        elif spent > max(self.seconds, GRACE):
            raise TransientFault(f"{named}: fewer than {MIN_BYTES_PER_SEC} bytes arrive per second")

    def wait(self, fault: OSError, longest: float = 15.0) -> None:
        """Sleep before the next attempt, or raise `fault` if the time for retries is over."""
        pause = min(0.1 * 2**self.pauses, longest) * (0.5 + _random.random())
        self.pauses = min(self.pauses + 1, 16)
        pause = min(pause, self.since + self.seconds - time.monotonic())
        if pause <= 0 or Retries.giving_up:
            raise fault
        while pause > 0 and not Retries.giving_up:  # it sleeps in short intervals, because a signal may call give_up
            time.sleep(min(pause, 0.2))
            pause -= 0.2

    @staticmethod
    def give_up() -> None:
        """End all pauses of this process, which is about to exit. This may be called in a signal handler."""
        Retries.giving_up = True


def retrying(seconds: float, ask: Callable[[], T]) -> T:
    """Call `ask` and return its result. If it raises TransientFault, call it again for up to `seconds`."""
    retries = Retries(seconds)
    while True:
        try:
            return ask()
        except TransientFault as fault:
            retries.wait(fault)
