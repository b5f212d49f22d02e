"""Lets the program go on when its console is lost.

A pipe whose reader has ended, a closed terminal, a full disk behind `2>`, and descriptors that were closed from the
start make each write fail; a stopped terminal makes it wait for ever. After `tolerate`, such output is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

STUCK_MS = 5000  # milliseconds for which a console may accept nothing, such as a terminal stopped by Ctrl-S
NAMES = {"stdout": 1, "stderr": 2}

_lost: list[str] = []  # losses that `lost` has not returned yet


class _Lossy(io.RawIOBase):
    """Writes to a file descriptor, and drops what it does not accept."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.descriptor = name, NAMES[name]
        self.reported = self.stuck = False
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
                    raise BlockingIOError(errno.EAGAIN, f"nothing was accepted for {STUCK_MS / 1000:g} s")
                self.stuck = False
                rest = rest[
                    os.write(self.descriptor, rest[: select.PIPE_BUF]) :
                ]  # this size is written without waiting
        except OSError as fault:
            self.lose(fault.strerror or str(fault))
        return size

    def lose(self, reason: str) -> None:
        if not self.reported:
            self.reported = True
            _lost.append(f"standard {'output' if self.name == 'stdout' else 'error'}: {reason}")


def open_closed() -> None:
    """Open /dev/null in place of standard input, output and error if they are closed (`2>&-`). Otherwise the next file
    that is opened gets their number, and the output of libraries is written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # os.open takes the lowest free number


def tolerate(*names: str) -> None:
    """From now on, printing to these streams ("stdout", "stderr") never fails; `lost` reports which output is lost."""
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
        # A raw stream, as with `python -u`, so that nothing remains in a buffer at the end.
        text = io.TextIOWrapper(raw, encoding, errors="backslashreplace", line_buffering=True)  # type: ignore[arg-type]
        setattr(sys, name, text)


def _is_console(stream: Any, descriptor: int) -> bool:
    """Whether a stream is missing, or writes to this descriptor and not to an object in this process, such as that of a
    test."""
    if stream is None or stream.closed:
        return True
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False


def lost() -> list[str]:
    """The streams that have lost output since the last call, with reasons; each is reported once."""
    found = _lost[:]
    del _lost[: len(found)]
    return found
