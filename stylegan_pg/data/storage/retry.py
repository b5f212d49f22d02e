"""Classification of read faults as passing or lasting, and retries of the passing ones."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
GRACE = 10.0  # seconds that a connection gets for its first bytes, however short the patience
SLOWEST = 1024  # bytes per second, below which what arrives is no progress


class Fault(OSError):  # noqa: N818 - what happened
    """Something cannot be read; the message names it."""


class Passing(Fault):
    """May pass by itself: no connection, a timeout, HTTP 5xx or 429, a truncated body, a failed command."""


class Lasting(Fault):
    """A fault that needs a person: a missing file, no permission, no credentials, no such command."""


_dice = random.SystemRandom()  # has no state, which forked processes would share


class Patience:
    """Retries with exponential backoff: pauses double up to 15 s, with random jitter, until `seconds` have passed since
    the last progress. `give_up` ends all waits of this process."""

    giving_up = False

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.furthest = 0  # bytes received, for callers that measure progress in bytes
        self.progress()

    def progress(self) -> None:
        self.since, self.pauses, self.bytes = time.monotonic(), 0, 0

    def arrived(self, n: int, named: str) -> None:
        """Record that n more bytes have arrived. They count as progress only at SLOWEST bytes per second or more, as a
        server that sends single bytes could otherwise stall a run for ever.

        Raises:
            Passing: there was no progress for the configured time.
        """
        self.bytes += n
        spent = time.monotonic() - self.since
        if self.bytes >= SLOWEST * spent:
            self.progress()
        elif spent > max(self.seconds, GRACE):
            raise Passing(f"{named}: it sends less than {SLOWEST} bytes a second")

    def wait(self, fault: OSError, longest: float = 15.0) -> None:
        """Sleep before the next attempt, or raise `fault` if the time is over."""
        pause = min(0.1 * 2**self.pauses, longest) * (0.5 + _dice.random())
        self.pauses = min(self.pauses + 1, 16)
        pause = min(pause, self.since + self.seconds - time.monotonic())
        if pause <= 0 or Patience.giving_up:
            raise fault
        while pause > 0 and not Patience.giving_up:  # in slices: a signal may end it
            time.sleep(min(pause, 0.2))
            pause -= 0.2

    @staticmethod
    def give_up() -> None:
        """End all waits of this process, which is about to exit. Safe in a signal handler."""
        Patience.giving_up = True


def patiently(seconds: float, ask: Callable[[], T]) -> T:
    """Call `ask` until it returns, retrying for `seconds` while it raises Passing."""
    waiting = Patience(seconds)
    while True:
        try:
            return ask()
        except Passing as fault:
            waiting.wait(fault)
