"""Reading byte ranges of shards, local ones directly and remote ones through the node's shard cache; prefetching."""

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

OPEN_FILES, HELD = (
    64,
    4,
)  # files that a process keeps open: plain ones, and ones in the cache, which cannot be evicted meanwhile
BYPASS = 10.0  # seconds for which a shard that found no room is read in pieces before it is tried again


# ---------------------------------------------------------------------------------------------------------- reading


def read(
    url: str, offset: int, length: int, *, size: int | None = None, sha256: str | None = None, tag: str = ""
) -> bytes:
    """Read `length` bytes at `offset` of a shard, fewer only at its end. A remote shard is fetched as a whole first.

    Raises:
        OSError: it cannot be read; for remote shards Passing or Lasting, after retries for the configured patience.
        UsageError: as remote.open_url.
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
    """The local path of a shard, which is fetched first if it is remote; later reads may evict it.

    Raises:
        As `read`; NoRoom if the cache has no room for it.
    """
    if not remote.is_remote(url):
        return remote.file_path(url)
    shard = Shard(url, size, sha256, tag)
    _held(shard, str(shard_cache.folder()))
    return str(shard_cache.folder() / shard.name)


def doubt(url: str, *, size: int | None = None, sha256: str | None = None, tag: str = "") -> None:
    """Report that bytes of a shard are wrong: the next `read` fetches the shard again, unless its checksum shows that
    it equals the source."""
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
            return  # another process has fetched it again
        facts, key = shard_cache.facts_of(path), (status.st_ino, status.st_mtime_ns)
        if facts.get("sure") and (key in _intact or shard_cache.digest_of(path) == facts.get("sha256")):
            _intact.add(key)
            return
        shard_cache.write_facts(path, {"url": shown(url), "doubted": facts.get("sha256")})
        os.unlink(path)


class _File:
    """A file descriptor that is closed with its last reference, so that evicting it from a cache is thread-safe."""

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
    """Threads that fetch shards into the cache before they are needed.

    `want` names the shards in the order of need; none of them is evicted for another. Faults are ignored here, because
    the reader of the shard meets and reports them.
    """

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
