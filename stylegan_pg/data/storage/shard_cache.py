"""The shard cache: a folder on a node's disk into which its processes fetch remote shards, with eviction by last use.

A complete shard is named KEY-NAME, a partly fetched one KEY-NAME.SIZE.part, and KEY-NAME.json holds facts about either.
A process that fetches holds a lock (flock) on the .part file. The kernel releases it when the process is killed, and
the next process continues where it stopped. A process that reads holds a shared lock on the shard, so shards in use are
not evicted. A shard gets its final name when it is complete, verified and flushed to disk.
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
from stylegan_pg.data.storage.retry import Fault, Passing, Patience
from stylegan_pg.errors import UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.urls import shown

AGREEING = 3  # equal copies with a wrong checksum, after which the server's content is taken to be like that
_OURS = re.compile(r"[0-9a-f]{24}-")  # the beginning of the names of files in the cache
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Settings:
    """folder: of the cache, "" for the default. limit: bytes of the cache, 0 for no cache. patience: seconds without
    progress for which passing faults are retried."""

    folder: str = ""
    limit: int = 100 << 30
    patience: float = 600.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to read from: its URL, size in bytes and SHA-256 if known, and a tag that distinguishes its versions."""

    url: str
    size: int | None = None
    sha256: str | None = None
    tag: str = ""

    @property
    def name(self) -> str:
        """The name of its file in the cache."""
        key = hashlib.sha256(json.dumps([self.url, self.size, self.sha256, self.tag]).encode()).hexdigest()[:24]
        tail = shown(self.url).rstrip("/").rpartition("/")[2] if "://" in self.url else "pipe"
        return f"{key}-{''.join(c for c in tail if c.isalnum() or c in '._-')[-40:]}"


class NoRoom(Exception):  # noqa: N818 - an event
    """A shard does not fit into the cache at present; the message gives reason and remedy."""


_settings = Settings()
releases: list[Callable[[], None]] = []  # called when the cache is full


def configure(settings: Settings) -> None:
    """Set the settings of this process and of those forked from it."""
    global _settings
    _settings = settings


def settings() -> Settings:
    return _settings


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Use another patience within the block."""
    before = settings()
    configure(dataclasses.replace(before, patience=seconds))
    try:
        yield
    finally:
        configure(before)


def folder() -> Path:
    """The folder of the cache, which is created if necessary.

    Raises:
        UsageError: it cannot be created.
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
            f"data.cache_dir={path} cannot be used ({error}): give a folder on a disk of this machine, or "
            "data.cache_gib=0 to keep nothing"
        ) from None
    return path


# --------------------------------------------------------------------------------------------------------- fetching


def fetched(shard: Shard, spare: Collection[str] = (), stop: Callable[[], bool] = lambda: False) -> int:
    """Fetch a shard into the cache if it is not there, and return a file descriptor that holds a shared lock on it.

    Args:
        shard: to fetch.
        spare: names of files that must not be evicted for it.
        stop: asked regularly whether to give up.

    Raises:
        NoRoom: the cache has no room for it. Fault: it cannot be fetched.
    """
    path = folder() / shard.name
    part, waiting, seen = path.with_name(f"{path.name}.{shard.size or 0}.part"), Patience(_settings.patience), -1
    while not stop():
        if (fd := _open_whole(path)) is not None:
            return fd
        fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(fd, part):
                continue  # another process has finished, or evicted it, a moment ago
            if path.exists():
                part.unlink()  # made in vain
                continue
            _download(shard, path, part, fd, spare, stop, waiting)
            fcntl.flock(fd, fcntl.LOCK_SH)
            return os.dup(fd)  # shares the lock
        except BlockingIOError:
            if (size := os.fstat(fd).st_size) != seen:
                seen = size
                waiting.progress()
            slow = f"{shown(shard.url)}: another process is fetching it and gets nothing"
            waiting.wait(Passing(facts_of(path).get("fault", slow)), longest=0.2)
        finally:
            os.close(fd)
    raise Passing(f"{shown(shard.url)}: given up")


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False


def _open_whole(path: Path) -> int | None:
    """A file descriptor with a shared lock, which counts as a use; None if the file does not exist (any more)."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)  # held exclusively for a moment only, by who evicts it
        status = os.fstat(fd)
        if status.st_nlink:
            os.utime(fd, ns=(time.time_ns(), status.st_mtime_ns))
            return os.dup(fd)
        return None
    finally:
        os.close(fd)


def _download(
    shard: Shard,
    path: Path,
    part: Path,
    fd: int,
    spare: Collection[str],
    stop: Callable[[], bool],
    waiting: Patience,
) -> None:
    """Complete the locked .part file, verify it and rename it."""
    about, wrong = shown(shard.url), []
    try:
        make_room(path.parent, spare)
        while True:
            fault: Fault
            try:
                digest = _transfer(shard, part, fd, spare, stop, waiting)
                size = os.fstat(fd).st_size
                if shard.size is not None and size != shard.size:
                    fault = Fault(
                        f"{about} has {size} bytes where {shard.size} were expected: it is not what was indexed"
                    )
                elif shard.sha256 and digest != shard.sha256:
                    wrong.append(digest)
                    if wrong.count(digest) == AGREEING:  # the samples' own checksums say which of it is good
                        break
                    fault = Passing(f"{about}: its checksum is not the index's")
                else:
                    break
                os.ftruncate(fd, 0)
            except Fault as error:
                fault = error
            if stop():
                raise fault
            write_facts(path, facts_of(path) | {"fault": str(fault)})  # for those who wait for this
            waiting.wait(fault)
        os.fsync(fd)
        doubted = facts_of(path).get("doubted")
        sure = digest in (shard.sha256, doubted) or bool(wrong)
        write_facts(path, {"url": about, "sha256": digest, "sure": sure})
        os.rename(part, path)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        part.unlink(missing_ok=True)
        raise NoRoom(f"{path.parent} has no room for {about} ({error.strerror}): make room on that disk") from None
    except NoRoom:
        part.unlink(missing_ok=True)
        raise NoRoom(
            f"data.cache_gib={_settings.limit / (1 << 30):g} leaves no room for {about} beside what is in use: "
            "raise it, or make data.window or data.prefetch_shards smaller"
        ) from None


def _transfer(
    shard: Shard, part: Path, fd: int, spare: Collection[str], stop: Callable[[], bool], waiting: Patience
) -> str:
    """Append the missing bytes to the .part file; returns the SHA-256 of the whole file."""
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
                if error.errno not in NO_SPACE or not make_room(part.parent, spare, everything=True):
                    raise
                _write(fd, data, have)
            digest.update(data)
            have += len(data)
            if have > waiting.furthest:  # what comes again is no progress
                new, waiting.furthest = have - waiting.furthest, have
                waiting.arrived(new, shown(shard.url))
            if shard.size is None:
                make_room(part.parent, spare)
            elif have > shard.size:
                break
            if stop():
                raise Passing(f"{shown(shard.url)}: given up")
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


def make_room(path: Path, spare: Collection[str] = (), everything: bool = False) -> bool:
    """Evict shards that no process has open, by last use, until the cache is within its limit.

    Args:
        path: the file that needs room; files being fetched count with their full size.
        spare: names of files that are kept.
        everything: evict all shards that no process has open.

    Returns:
        Whether anything was evicted.

    Raises:
        NoRoom: the limit cannot be met.
    """
    with open(path / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total, files = 0, []
        for entry in os.scandir(path):
            # Other files in the folder belong to somebody else: they are neither counted nor removed.
            if entry.name.endswith(".json") or not _OURS.match(entry.name):
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
                if total > limit and name not in spare and _evict(path / name):
                    total -= size
            if total <= limit or attempt:
                break
            files = [file for file in files if (path / file[2]).exists()]
            for let_go in releases:  # what this process has open, but is not reading just now
                let_go()
        if total > _settings.limit:
            raise NoRoom
        return total < before


def _evict(path: Path) -> bool:
    """Remove a file unless a process reads or fetches it; returns whether it is gone."""
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
