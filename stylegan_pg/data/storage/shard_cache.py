"""The shard cache: a folder on a node's disk into which its processes download remote shards. If it is full, the least
recently used shards are evicted.

A complete shard is named KEY-NAME, a partly downloaded shard KEY-NAME.SIZE.part, and KEY-NAME.json contains facts about
either. A process that downloads a shard holds an exclusive lock (flock) on the .part file. The kernel releases the lock
when the process is killed, and the next process continues the download. A process that reads a shard holds a shared
lock on it, so shards in use are not evicted. A shard gets its final name when it is complete, verified and flushed to
disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from stylegan_pg.data.storage import remote
from stylegan_pg.data.storage.byte_stream import CHUNK
from stylegan_pg.data.storage.retry import Fault, Retries, TransientFault
from stylegan_pg.errors import UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.urls import shown

EQUAL_COPIES = 3  # after this many equal downloads with a wrong checksum, the shard is accepted as it is
_CACHE_NAME = re.compile(r"[0-9a-f]{24}-")  # the names of the cache's files begin with this pattern
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """The settings of the shard cache.

    Attributes:
        folder: The folder of the cache; "" for the default.
        limit: The largest size of the cache in bytes; 0 for no cache.
        patience: Seconds without progress after which retries of transient faults end.
    """

    folder: str = ""
    limit: int = 100 << 30
    patience: float = 600.0


@dataclasses.dataclass(frozen=True)
class RemoteShard:
    """A file to read: its URL, its size in bytes and SHA-256 if known, and a tag that distinguishes its versions."""

    url: str
    size: int | None = None
    sha256: str | None = None
    tag: str = ""

    @property
    def name(self) -> str:
        """The name of the shard's file in the cache."""
        key = hashlib.sha256(json.dumps([self.url, self.size, self.sha256, self.tag]).encode()).hexdigest()[:24]
        tail = shown(self.url).rstrip("/").rpartition("/")[2] if "://" in self.url else "pipe"
        return f"{key}-{''.join(c for c in tail if c.isalnum() or c in '._-')[-40:]}"


class CacheFull(Exception):  # noqa: N818 - it names an event
    """A shard does not fit into the cache at present. The message states reason and remedy."""


_settings = CacheSettings()
release_callbacks: list[Callable[[], None]] = []  # functions that close unused files; called when the cache is full


def configure(settings: CacheSettings) -> None:
    """Set the settings of this process, and of processes that it forks later."""
    global _settings
    _settings = settings


def settings() -> CacheSettings:
    return _settings


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Use another `CacheSettings.patience` within the block."""
    before = settings()
    configure(dataclasses.replace(before, patience=seconds))
    try:
        yield
    finally:
        configure(before)


def folder() -> Path:
    """Return the folder of the cache. It is created if necessary.

    Raises:
        UsageError: if it cannot be created.
    """
    return _folder(_settings.folder)


@functools.lru_cache(maxsize=8)
def _folder(chosen: str) -> Path:
    if not chosen:
        chosen = str(cache_folder() / "shards")
    path = Path(chosen).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with open(path / ".lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        raise UsageError(
            f"data.cache_dir={path} cannot be used ({error}): choose a folder on a disk of this machine, or "
            "data.cache_gib=0 to cache nothing"
        ) from None
    return path


# --------------------------------------------------------------------------------------------------------- download


def fetch(shard: RemoteShard, protected: Collection[str] = (), stop: Callable[[], bool] = lambda: False) -> int:
    """Download a shard into the cache unless it is there, and return a file descriptor with a shared lock on its file.

    Args:
        shard: The shard.
        protected: The names of files that must not be evicted for it.
        stop: A function that is called regularly and returns whether to give up.

    Raises:
        CacheFull: if the shard does not fit into the cache.
        Fault: if the shard cannot be downloaded.
    """
    path = folder() / shard.name
    part, retries, seen = path.with_name(f"{path.name}.{shard.size or 0}.part"), Retries(_settings.patience), -1
    while not stop():
        if (fd := _open_complete(path)) is not None:
            return fd
        fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same_file(fd, part):
                continue  # another process has just completed or evicted the shard
            if path.exists():
                part.unlink()  # another process has completed the shard
                continue
            _download(shard, path, part, fd, protected, stop, retries)
            fcntl.flock(fd, fcntl.LOCK_SH)
            return os.dup(fd)  # the duplicate shares the lock
        except BlockingIOError:
            if (size := os.fstat(fd).st_size) != seen:
                seen = size
                retries.progress()
            slow = f"{shown(shard.url)}: another process is downloading it, but receives no data"
            retries.wait(TransientFault(facts_of(path).get("fault", slow)), longest=0.2)
        finally:
            os.close(fd)
    raise TransientFault(f"{shown(shard.url)}: the download was cancelled")


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def _open_complete(path: Path) -> int | None:
    """Return a file descriptor with a shared lock, or None if the file does not exist (any longer). This counts as a
    use of the shard."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # a process that evicts the file holds an exclusive lock for a short time
        status = os.fstat(fd)
        if status.st_nlink:
            os.utime(fd, ns=(time.time_ns(), status.st_mtime_ns))
            return os.dup(fd)
        return None
    finally:
        os.close(fd)


def _download(
    shard: RemoteShard,
    path: Path,
    part: Path,
    fd: int,
    protected: Collection[str],
    stop: Callable[[], bool],
    retries: Retries,
) -> None:
    """Complete the locked .part file, verify it, and rename it to `path`."""
    about, wrong = shown(shard.url), []
    try:
        evict(path.parent, protected)
        while True:
            fault: Fault
            try:
                digest = _transfer(shard, part, fd, protected, stop, retries)
                size = os.fstat(fd).st_size
                if shard.size is not None and size != shard.size:
                    fault = Fault(
                        f"{about} has {size} bytes, {shard.size} were expected: the file changed after it was indexed"
                    )
                elif shard.sha256 and digest != shard.sha256:
                    wrong.append(digest)
                    if wrong.count(digest) == EQUAL_COPIES:  # the checksums of the samples identify the damaged ones
                        break
                    fault = TransientFault(f"{about}: its checksum differs from the checksum in the index")
                else:
                    break
                os.ftruncate(fd, 0)
            except Fault as error:
                fault = error
            if stop():
                raise fault
            write_facts(path, facts_of(path) | {"fault": str(fault)})  # for processes that wait for this download
            retries.wait(fault)
        os.fsync(fd)
        # "sure": downloading again would give the same bytes. "doubted": the checksum of a file reported as damaged.
        sure = digest in (shard.sha256, facts_of(path).get("doubted")) or bool(wrong)
        write_facts(path, {"url": about, "sha256": digest, "sure": sure})
        os.rename(part, path)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        part.unlink(missing_ok=True)
        raise CacheFull(
            f"the disk of {path.parent} has no space for {about} ({error.strerror}): free space on that disk"
        ) from None
    except CacheFull:
        part.unlink(missing_ok=True)
        raise CacheFull(
            f"data.cache_gib={_settings.limit / (1 << 30):g} leaves no space for {about} beside the shards in use: "
            "increase it, or decrease data.window or data.prefetch_shards"
        ) from None


def _transfer(
    shard: RemoteShard, part: Path, fd: int, protected: Collection[str], stop: Callable[[], bool], retries: Retries
) -> str:
    """Append the missing bytes to the .part file. Return the SHA-256 of the whole file."""
    digest, have = hashlib.sha256(), 0
    while data := os.pread(fd, CHUNK, have):
        digest.update(data)
        have += len(data)
    if have == shard.size:
        return digest.hexdigest()
    with remote.open_url(shard.url, have, patience=_settings.patience) as stream:
        while data := stream.read1(CHUNK):
            try:
                _write(fd, data, have)
            except OSError as error:
                os.ftruncate(fd, have)
                if error.errno not in NO_SPACE or not evict(part.parent, protected, everything=True):
                    raise
                _write(fd, data, have)
            digest.update(data)
            have += len(data)
            if have > retries.furthest:  # bytes that are downloaded again do not count as progress
                new, retries.furthest = have - retries.furthest, have
                retries.arrived(new, shown(shard.url))
            if shard.size is None:
                evict(part.parent, protected)
            elif have > shard.size:
                break
            if stop():
                raise TransientFault(f"{shown(shard.url)}: the download was cancelled")
    return digest.hexdigest()


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def facts_of(path: Path) -> dict:
    try:
        return json.loads(Path(f"{path}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def write_facts(path: Path, facts: dict) -> None:
    temporary = Path(f"{path}.json.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(facts), "utf-8")
    os.replace(temporary, f"{path}.json")


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(CHUNK):
            digest.update(data)
        return digest.hexdigest()


# --------------------------------------------------------------------------------------------------------- eviction


def evict(path: Path, protected: Collection[str] = (), everything: bool = False) -> bool:
    """Evict shards that no process has open, the least recently used first, until the cache is within its limit. Files
    that are being downloaded count with their full size.

    Args:
        path: The folder of the cache.
        protected: The names of files that are not evicted.
        everything: Whether to evict all shards that no process has open.

    Returns:
        Whether anything was evicted.

    Raises:
        CacheFull: if the limit cannot be met.
    """
    with open(path / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total, files = 0, []
        for entry in os.scandir(path):
            # Other files in the folder do not belong to the cache. They are neither counted nor removed.
            if entry.name.endswith(".json") or not _CACHE_NAME.match(entry.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(".tmp"):
                    if status.st_mtime < time.time() - 3600:
                        os.unlink(entry.path)
                    continue
                promised = entry.name.split(".")[-2] if entry.name.endswith(".part") else ""
                size = max(status.st_size, int(promised) if promised.isdigit() else 0)
                total += size
                files.append((status.st_atime_ns, size, entry.name))
        before, limit = total, -1 if everything else _settings.limit
        for attempt in range(2):
            for _, size, name in sorted(files):
                if total > limit and name not in protected and _evict(path / name):
                    total -= size
            if total <= limit or attempt:
                break
            files = [file for file in files if (path / file[2]).exists()]
            for release in release_callbacks:  # closes files that this process has open but is not reading
                release()
        if total > _settings.limit:
            raise CacheFull
        return total < before


def _evict(path: Path) -> bool:
    """Remove a file unless a process reads or downloads it. Return whether it no longer exists."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        if not path.name.endswith(".part"):
            Path(f"{path}.json").unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
