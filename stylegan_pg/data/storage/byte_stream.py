"""A byte stream over a response, a command or a file, limited to the wanted range, with errors turned into faults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from stylegan_pg.data.storage.retry import Passing
from stylegan_pg.urls import shown

CHUNK, PIECE = 1 << 20, 1 << 16


class Stream(Protocol):
    def read(self, n: int, /) -> bytes: ...

    def read1(self, n: int, /) -> bytes: ...  # as read, but returns what is available without waiting for more


class Body:
    """A stream of `length` bytes (None: all) of `raw`, after its first `skip` bytes.

    raw: has read(n), and perhaps read1(n). exact: ending before `length` bytes is a passing fault. faults: a context
    that turns errors of reading into faults; it does not cover errors of the caller.
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
                return b""  # shorter than `start`
            self.skip -= len(got)
        data = take(n if self.left is None else min(n, self.left))
        if self.left is not None:
            if not data and self.left and self.exact:
                raise Passing(f"{shown(self.url)}: the connection ended {self.left} bytes too early")
            self.left -= len(data)
        return data
