"""Reading out of shards wherever they are; remote ones come through the node's store of shards."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time

from stylegan_pg.data.storage import remote, shard_cache
from stylegan_pg.data.storage.shard_cache import NoRoom, Shard
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import open_regular
from stylegan_pg.urls import shown

OPEN_FILES, HELD = 64, 4  # files that a process keeps open: plain ones, and ones of the store, which pins them
BYPASS = 10.0  # seconds for which a shard that found no room is read in pieces before it is tried again


# ---------------------------------------------------------------------------------------------------------- reading


def read(
    url: str, offset: int, length: int, *, size: int | None = None, sha256: str | None = None, tag: str = ""
) -> bytes:
    """`length` bytes at `offset` of a shard, fewer only where it ends; a remote shard is fetched first, as a whole.

    Raises OSError (Passing, Lasting) when it could not be read for the configured patience; plain files
    are tried once. UsageError as remote.open_url.
    """
    if not remote.is_remote(url):
        path = remote.file_path(url)
        try:
            return _pread(_plain(path).fd, length, offset)
        except OSError:
            _plain.cache_clear()  # a stale handle (NFS) would fail for ever
            raise
    shard = Shard(url, size, sha256, tag)
    if shard_cache.settings().limit and _bypassed.get(shard, 0.0) < time.monotonic():
        try:
            return _pread(_held(shard, str(shard_cache.folder())).fd, length, offset)
        except NoRoom as reason:
            _say_once(f"{reason}; meanwhile it is read in pieces, which is slow")
            _bypassed[shard] = time.monotonic() + BYPASS
    return remote.read_url(url, offset, offset + length, shard_cache.settings().patience)


def local_path(url: str, size: int | None = None, sha256: str | None = None, tag: str = "") -> str:
    """The path of a shard on this machine, fetched first where it is remote; it may be evicted after other reads.

    Raises as `read`; NoRoom where the cache has no room for it.
    """
    if not remote.is_remote(url):
        return remote.file_path(url)
    shard = Shard(url, size, sha256, tag)
    _held(shard, str(shard_cache.folder()))
    return str(shard_cache.folder() / shard.name)


def doubt(url: str, *, size: int | None = None, sha256: str | None = None, tag: str = "") -> None:
    """Bytes of a shard were found to be wrong: the next `read` takes them from the source again, unless they are known
    to be what the source has."""
    if not remote.is_remote(url):
        _plain.cache_clear()
        return
    shard = Shard(url, size, sha256, tag)
    path = shard_cache.folder() / shard.name
    if not shard_cache.settings().limit or not path.exists():
        return
    with contextlib.suppress(OSError, NoRoom):
        inode = os.fstat(_held(shard, str(shard_cache.folder())).fd).st_ino  # of what was read
        _held.cache_clear()
        status = os.stat(path)
        if status.st_ino != inode:
            return  # somebody else has fetched it anew
        facts, key = shard_cache.facts_of(path), (status.st_ino, status.st_mtime_ns)
        if facts.get("sure") and (key in _intact or shard_cache.digest_of(path) == facts.get("sha256")):
            _intact.add(key)
            return
        shard_cache.write_facts(path, {"url": shown(url), "doubted": facts.get("sha256")})
        os.unlink(path)


class _File:
    """A file descriptor that closes when the last user lets go, so that forgetting it is thread-safe."""

    def __init__(self, fd: int):
        self.fd, self.close = fd, os.close  # at the interpreter's end `os` may be gone before this is

    def __del__(self) -> None:
        self.close(self.fd)


# One cache per process. A fork shares the descriptors harmlessly: pread leaves the file position alone.
@functools.lru_cache(maxsize=OPEN_FILES)
def _plain(path: str) -> _File:
    with open_regular(path) as file:
        return _File(os.dup(file.fileno()))


@functools.lru_cache(maxsize=HELD)
def _held(shard: Shard, _: str) -> _File:
    return _File(shard_cache.fetched(shard))


shard_cache.releases.append(_held.cache_clear)
_bypassed: dict[Shard, float] = {}
_intact: set[tuple[int, int]] = set()  # (inode, time of change) of files whose checksum was seen to be right


def _pread(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file (one pread may return less than asked)."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


@functools.lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- prefetch


class Prefetcher:
    """Threads that bring shards into the cache before they are needed; what they cannot fetch, who reads it will
    miss and report. `want` tells them which, in order of need; they evict none of these."""

    def __init__(self, threads: int):
        self.wanted: list[Shard] = []
        self.busy: set[Shard] = set()
        self.change, self.closed = threading.Condition(), False
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def want(self, shards: list[Shard]) -> None:
        with self.change:
            if shards != self.wanted:
                self.wanted = shards
                self.change.notify_all()

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()
        for thread in self.threads:
            thread.join(2.0)  # one that hangs in a connection ends by itself

    def _run(self) -> None:
        while shard := self._next():
            fault = True
            try:
                os.close(
                    shard_cache.fetched(
                        shard, {s.name for s in self.wanted}, lambda: self.closed or shard not in self.wanted
                    )
                )
                fault = False
            except (OSError, UsageError, NoRoom):
                pass
            with self.change:
                self.busy.discard(shard)
                if fault and not self.closed:
                    self.change.wait(1.0)

    def _next(self) -> Shard | None:
        with self.change:
            while not self.closed:
                for shard in self.wanted:
                    if shard not in self.busy and not (shard_cache.folder() / shard.name).exists():
                        self.busy.add(shard)
                        return shard
                self.change.wait(5.0)  # something may have been evicted
            return None
