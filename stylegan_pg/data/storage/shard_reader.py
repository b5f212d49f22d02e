"""Reading byte ranges of shards, and prefetching. Local shards are read directly, remote ones through the shard cache
of the node."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time

from stylegan_pg.data.storage import remote, shard_cache
from stylegan_pg.data.storage.shard_cache import CacheFull, RemoteShard
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import open_regular
from stylegan_pg.urls import shown

OPEN_FILES = 64  # local files that a process keeps open
OPEN_CACHED_FILES = 4  # files of the cache that a process keeps open; they cannot be evicted meanwhile
UNCACHED_SEC = 10.0  # for this time, a shard that did not fit into the cache is read without it, sample by sample


# ---------------------------------------------------------------------------------------------------------- reading


def read(
    url: str, offset: int, length: int, *, size: int | None = None, sha256: str | None = None, tag: str = ""
) -> bytes:
    """Read `length` bytes at `offset` of a shard, or fewer at its end. A remote shard is first downloaded completely.

    Raises:
        OSError: if the shard cannot be read. For remote shards it is a TransientFault, after retries for
            `Settings.patience`, or a PermanentFault.
        UsageError: as remote.open_url.
    """
    if not remote.is_remote(url):
        path = remote.file_path(url)
        try:
            return _pread(_plain(path).fd, length, offset)
        except OSError:
            _plain.cache_clear()  # a stale handle (NFS) would fail forever
            raise
    shard = RemoteShard(url, size, sha256, tag)
    if shard_cache.settings().limit and _uncached_until.get(shard, 0.0) < time.monotonic():
        try:
            return _pread(_cached_file(shard, str(shard_cache.folder())).fd, length, offset)
        except CacheFull as reason:
            _warn_once(f"{reason}; meanwhile its samples are read one by one, which is slow")
            _uncached_until[shard] = time.monotonic() + UNCACHED_SEC
    return remote.read_url(url, offset, offset + length, shard_cache.settings().patience)


def local_path(url: str, size: int | None = None, sha256: str | None = None, tag: str = "") -> str:
    """Return the local path of a shard. A remote shard is first downloaded; later reads of other shards may evict it.

    Raises:
        As `read`; also CacheFull if the shard does not fit into the cache.
    """
    if not remote.is_remote(url):
        return remote.file_path(url)
    shard = RemoteShard(url, size, sha256, tag)
    _cached_file(shard, str(shard_cache.folder()))
    return str(shard_cache.folder() / shard.name)


def report_damage(url: str, *, size: int | None = None, sha256: str | None = None, tag: str = "") -> None:
    """Report that bytes of a shard are wrong. The next `read` downloads the shard again, unless its checksum shows that
    the cached file is equal to the source."""
    if not remote.is_remote(url):
        _plain.cache_clear()
        return
    shard = RemoteShard(url, size, sha256, tag)
    path = shard_cache.folder() / shard.name
    if not shard_cache.settings().limit or not path.exists():
        return
    with contextlib.suppress(OSError, CacheFull):
        inode = os.fstat(_cached_file(shard, str(shard_cache.folder())).fd).st_ino  # of the file that was read
        _cached_file.cache_clear()
        status = os.stat(path)
        if status.st_ino != inode:
            return  # another process has downloaded it again
        facts, key = shard_cache.facts_of(path), (status.st_ino, status.st_mtime_ns)
        if facts.get("sure") and (key in _intact or shard_cache.digest_of(path) == facts.get("sha256")):
            _intact.add(key)
            return
        shard_cache.write_facts(path, {"url": shown(url), "doubted": facts.get("sha256")})
        os.unlink(path)


class _File:
    """A file descriptor that is closed when its last reference disappears, so that dropping it from an lru_cache is
    thread-safe."""

    def __init__(self, fd: int):
        self.fd, self.close = fd, os.close  # when the interpreter exits, `os` may be deleted before this object

    def __del__(self) -> None:
        self.close(self.fd)


# Each process has its own cache. Sharing the descriptors after a fork is safe, because pread does not use the file
# position.
@functools.lru_cache(maxsize=OPEN_FILES)
def _plain(path: str) -> _File:
    with open_regular(path) as file:
        return _File(os.dup(file.fileno()))


@functools.lru_cache(maxsize=OPEN_CACHED_FILES)
def _cached_file(shard: RemoteShard, _: str) -> _File:
    return _File(shard_cache.fetch(shard))


shard_cache.release_callbacks.append(_cached_file.cache_clear)
_uncached_until: dict[RemoteShard, float] = {}
_intact: set[tuple[int, int]] = set()  # (inode, modification time) of files whose checksum was verified


def _pread(fd: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`, or fewer at the end of the file. A single pread may return fewer than
    requested."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


@functools.lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------- prefetch


class Prefetcher:
    """Threads that download shards into the cache before they are needed.

    `request` sets the list of shards in the order in which they will be needed. None of them is evicted for another.
    Faults are ignored here, because the reader of the shard encounters and reports them.
    """

    def __init__(self, threads: int):
        self.requested: list[RemoteShard] = []
        self.busy: set[RemoteShard] = set()
        self.change, self.closed = threading.Condition(), False
        self.threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def request(self, shards: list[RemoteShard]) -> None:
        with self.change:
            if shards != self.requested:
                self.requested = shards
                self.change.notify_all()

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()
        for thread in self.threads:
            thread.join(2.0)  # a thread that waits for a server ends later by itself

    def _run(self) -> None:
        while shard := self._next():
            fault = True
            try:
                os.close(
                    shard_cache.fetch(
                        shard, {s.name for s in self.requested}, lambda: self.closed or shard not in self.requested
                    )
                )
                fault = False
            except (OSError, UsageError, CacheFull):
                pass
            with self.change:
                self.busy.discard(shard)
                if fault and not self.closed:
                    self.change.wait(1.0)

    def _next(self) -> RemoteShard | None:
        with self.change:
            while not self.closed:
                for shard in self.requested:
                    if shard not in self.busy and not (shard_cache.folder() / shard.name).exists():
                        self.busy.add(shard)
                        return shard
                self.change.wait(5.0)  # a requested shard may be evicted meanwhile
            return None
