"""The console as a convenience: where nobody takes any more what is printed, the program goes on.

A pipe whose reader has left, a terminal that was closed or stopped, a full disk behind `2>`, descriptors that were
closed from the start: all of that ends a write with a fault, or keeps it waiting for ever.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

STUCK_MS = 5000  # for which a console may take nothing, as a terminal does that is stopped by Ctrl-S
NAMES = {"stdout": 1, "stderr": 2}

_lost: list[str] = []  # what is not told yet


class _Lossy(io.RawIOBase):
    """Writes to a file descriptor what that takes, and drops the rest."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.descriptor = name, NAMES[name]
        self.told = self.stuck = False
        self.ready = select.poll()
        self.ready.register(self.descriptor, select.POLLOUT)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data) -> int:
        rest = bytes(data)
        size = len(rest)
        try:
            while rest:
                if not self.ready.poll(0 if self.stuck else STUCK_MS):
                    self.stuck = True
                    raise BlockingIOError(errno.EAGAIN, f"nothing was taken for {STUCK_MS / 1000:g} s")
                self.stuck = False
                rest = rest[os.write(self.descriptor, rest[: select.PIPE_BUF]) :]  # so much is taken without waiting
        except OSError as fault:
            self.lose(fault.strerror or str(fault))
        return size

    def lose(self, reason: str) -> None:
        if not self.told:
            self.told = True
            _lost.append(f"standard {'output' if self.name == 'stdout' else 'error'}: {reason}")


def open_closed() -> None:
    """Have standard input, output and error lead to nowhere where they were closed (`2>&-`): else the next file that is
    opened gets their numbers, and what libraries print ends up in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # which gets the lowest number that is free


def tolerate(*names: str) -> None:
    """From now on nothing fails that is printed to these ("stdout", "stderr"); `lost` tells what became of them."""
    open_closed()
    for name in names:
        before = getattr(sys, name)
        if not _is_console(before, NAMES[name]):
            continue
        raw = _Lossy(name)
        if before is None:
            raw.lose("it was closed at the start")
        else:
            with contextlib.suppress(OSError, ValueError):
                before.flush()
        encoding = getattr(before, "encoding", None) or "utf-8"
        # A raw stream where a buffered one is expected, as with `python -u`: nothing is left to be written at the end.
        text = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)  # type: ignore[arg-type]
        setattr(sys, name, text)


def _is_console(stream: Any, descriptor: int) -> bool:
    """Whether a stream, if there is one, leads to this descriptor, rather than to somebody in this process who listens,
    such as a test."""
    if stream is None or stream.closed:
        return True
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def lost() -> list[str]:
    """Which of them do not take everything, and why: each is told once."""
    told = _lost[:]
    del _lost[: len(told)]
    return told
