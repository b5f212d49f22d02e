"""A byte stream of a server's response, a command's output or a file, limited to the requested range. Errors of reading
are converted to the exceptions of retry.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from stylegan_pg.data.storage.retry import TransientFault
from stylegan_pg.urls import shown

CHUNK, PIECE = 1 << 20, 1 << 16


class Stream(Protocol):
    """Anything that can be read like a file. `read1` returns available bytes without waiting for more."""

    def read(self, n: int, /) -> bytes: ...

    def read1(self, n: int, /) -> bytes: ...


class Body:
    """A stream of a part of another stream.

    Args:
        raw: An object with read(n) and possibly read1(n).
        url: The URL, for messages.
        length: The number of bytes of this stream; None for all.
        skip: The number of bytes of `raw` before the first byte of this stream.
        exact: Whether ending before `length` bytes is a TransientFault.
        faults: A context manager that converts errors of reading to faults. It does not cover errors of the caller.
    """

    def __init__(
        self,
        raw: Any,
        url: str,
        length: int | None = None,
        skip: int = 0,
        *,
        exact: bool = False,
        faults: Callable[[str], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self.raw, self.url, self.left, self.skip, self.exact, self.faults = raw, url, length, skip, exact, faults

    def read(self, n: int) -> bytes:
        with self.faults(self.url):
            return self._read(n, self.raw.read)

    def read1(self, n: int) -> bytes:
        some = getattr(self.raw, "read1", None)
        with self.faults(self.url):
            return self._read(n, some) if some else self._read(min(n, PIECE), self.raw.read)

    def _read(self, n: int, take: Callable[[int], bytes]) -> bytes:
        if self.left == 0:
            return b""
        while self.skip:
            got = self.raw.read(min(self.skip, CHUNK))
            if not got:
                return b""  # `raw` has fewer than `skip` bytes
            self.skip -= len(got)
        data = take(n if self.left is None else min(n, self.left))
        if self.left is not None:
            if not data and self.left and self.exact:
                raise TransientFault(f"{shown(self.url)}: the connection ended {self.left} bytes too early")
            self.left -= len(data)
        return data
