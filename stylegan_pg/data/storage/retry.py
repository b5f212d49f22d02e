"""Which faults of reading may pass, and how long they are waited out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
GRACE = 10.0  # seconds that a connection gets for its first bytes, however short the patience
SLOWEST = 1024  # bytes per second, below which what arrives is no progress


class Fault(OSError):  # noqa: N818 - what happened
    """Something that could not be read; the message names it."""


class Passing(Fault):
    """May pass by itself: no connection, a timeout, a server's 5xx or 429, a body that ends early, a failed command."""


class Lasting(Fault):
    """Passes only if somebody does something: not there (any more), not allowed, no credentials, no such command."""


_dice = random.SystemRandom()  # without a state that forked processes would share


class Patience:
    """How long something is tried again: `seconds` since the last progress, with pauses that double, at random by
    half, up to 15 s. Each process waits by itself; `give_up` ends all waits of this one."""

    giving_up = False

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.furthest = 0  # for who sees progress in bytes
        self.progress()

    def progress(self) -> None:
        self.since, self.pauses, self.bytes = time.monotonic(), 0, 0

    def arrived(self, n: int, named: str) -> None:
        """Another n bytes have come, which is progress if they come fast enough; a server that sends a byte now and
        then could hold everything up for ever. Raises Passing where that takes longer than the patience lasts."""
        self.bytes += n
        spent = time.monotonic() - self.since
        if self.bytes >= SLOWEST * spent:
            self.progress()
        elif spent > max(self.seconds, GRACE):
            raise Passing(f"{named}: it sends less than {SLOWEST} bytes a second")

    def wait(self, fault: OSError, longest: float = 15.0) -> None:
        """Sleep before the next attempt; raises `fault` where there is to be none."""
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
        """No more waiting in this process, which is about to end. Safe in a signal handler."""
        Patience.giving_up = True


def patiently(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` returns, asked again for so long while it raises Passing."""
    waiting = Patience(seconds)
    while True:
        try:
            return ask()
        except Passing as fault:
            waiting.wait(fault)
