"""Reading out of shards wherever they are; remote ones come through a cache that the processes of a node share.

The folder holds whole shards under KEY-NAME, what has come of others under KEY-NAME.SIZE.part, and facts about each in
KEY-NAME.json. Who fetches holds a lock (flock) on the .part, which the kernel lets go when the process is killed; the
next one goes on where it ended. Who reads holds a shared lock on the shard, so that what is in use is not evicted; the
rest goes by last use when the limit is reached. A shard gets its final name when it is complete, verified, and on disk.
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
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from stylegan_pg.data import remote
from stylegan_pg.data.remote import CHUNK, Fault, Passing, Patience
from stylegan_pg.errors import UsageError

OPEN_FILES, HELD = 64, 4  # files that a process keeps open: plain ones, and ones of the cache, which pins them
AGREEING = 3  # equal copies with a wrong checksum, after which that is what the server has
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BYPASS = 10.0  # seconds for which a shard that found no room is read in pieces before it is tried again


@dataclasses.dataclass(frozen=True)
class Settings:
    """folder: "" for the default; limit: bytes of the cache, 0 keeps nothing; patience: seconds that faults which may
    pass are tried again, without any progress in between."""

    folder: str = ""
    limit: int = 100 << 30
    patience: float = 600.0


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to read from: size in bytes and SHA-256 where known; tag tells versions without them apart."""

    url: str
    size: int | None = None
    sha256: str | None = None
    tag: str = ""

    @property
    def name(self) -> str:
        """Of its file in the cache."""
        key = hashlib.sha256(json.dumps([self.url, self.size, self.sha256, self.tag]).encode()).hexdigest()[:24]
        tail = remote.shown(self.url).rstrip("/").rpartition("/")[2] if "://" in self.url else "pipe"
        return f"{key}-{''.join(c for c in tail if c.isalnum() or c in '._-')[-40:]}"


class _NoRoom(Exception):  # noqa: N818 - an event
    pass


_settings = Settings()


def configure(settings: Settings) -> None:
    """For this process and those forked from it."""
    global _settings
    _settings = settings


def settings() -> Settings:
    return _settings


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Another patience for a while."""
    before = settings()
    configure(dataclasses.replace(before, patience=seconds))
    try:
        yield
    finally:
        configure(before)


def folder() -> Path:
    """Where shards are kept.

    Raises:
        UsageError: where it cannot be made.
    """
    return _folder(_settings.folder)


@functools.lru_cache(maxsize=8)
def _folder(chosen: str) -> Path:
    if not chosen:
        from stylegan_pg.ops.build import cache_folder  # which imports torch

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


# ---------------------------------------------------------------------------------------------------------- reading


def read(
    url: str, offset: int, length: int, *, size: int | None = None, sha256: str | None = None, tag: str = ""
) -> bytes:
    """`length` bytes at `offset` of a shard, fewer only where it ends; a remote shard is fetched first, as a whole.

    Raises OSError (remote.Passing, remote.Lasting) when it could not be read for the configured patience; plain files
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
    if _settings.limit and _bypassed.get(shard, 0.0) < time.monotonic():
        try:
            return _pread(_held(shard, str(folder())).fd, length, offset)
        except _NoRoom:
            _bypassed[shard] = time.monotonic() + BYPASS
    return remote.read_url(url, offset, offset + length, _settings.patience)


def local_path(url: str, size: int | None = None, sha256: str | None = None, tag: str = "") -> str:
    """The path of a shard on this machine, fetched first where it is remote; it may be evicted after other reads.

    Raises as `read`; remote.Passing where the cache has no room for it.
    """
    if not remote.is_remote(url):
        return remote.file_path(url)
    shard = Shard(url, size, sha256, tag)
    try:
        _held(shard, str(folder()))
    except _NoRoom:
        raise Passing(f"{remote.shown(url)}: no room for it in {folder()}") from None
    return str(folder() / shard.name)


def doubt(url: str, *, size: int | None = None, sha256: str | None = None, tag: str = "") -> None:
    """Bytes of a shard were found to be wrong: the next `read` takes them from the source again, unless they are known
    to be what the source has."""
    if not remote.is_remote(url):
        _plain.cache_clear()
        return
    shard = Shard(url, size, sha256, tag)
    path = folder() / shard.name
    held = [held for held in (_held(shard, str(folder())),) if not _settings.limit or held] if path.exists() else []
    inode = os.fstat(held[0].fd).st_ino if held else None
    _held.cache_clear()
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if status.st_ino != inode:
            return  # somebody else has fetched it anew
        facts, key = _facts(path), (status.st_ino, status.st_mtime_ns)
        if facts.get("sure") and (key in _intact or _digest_of(path) == facts.get("sha256")):
            _intact.add(key)
            return
        _write_facts(path, {"url": remote.shown(url), "doubted": facts.get("sha256")})
        os.unlink(path)


class _File:
    """A file descriptor that closes when the last user lets go, so that forgetting it is thread-safe."""

    def __init__(self, fd: int):
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


# One cache per process. A fork shares the descriptors harmlessly: pread leaves the file position alone.
@functools.lru_cache(maxsize=OPEN_FILES)
def _plain(path: str) -> _File:
    return _File(os.open(path, os.O_RDONLY))


@functools.lru_cache(maxsize=HELD)
def _held(shard: Shard, _: str) -> _File:
    return _File(_fetched(shard))


_bypassed: dict[Shard, float] = {}
_intact: set[tuple[int, int]] = set()  # (inode, time of change) of files whose checksum was seen to be right


def _pread(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file (one pread may return less than asked)."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data


# --------------------------------------------------------------------------------------------------------- fetching


def _fetched(shard: Shard, spare: Collection[str] = (), stop: Callable[[], bool] = lambda: False) -> int:
    """A descriptor of the whole shard in the cache, with a shared lock on it; fetched now where nobody has.

    Files named in `spare` are not evicted for it. Raises _NoRoom, Fault.
    """
    path = folder() / shard.name
    part, waiting, seen = path.with_name(f"{path.name}.{shard.size or 0}.part"), Patience(_settings.patience), -1
    while not stop():
        if (fd := _open_whole(path)) is not None:
            return fd
        fd = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(part).st_ino == os.fstat(fd).st_ino and not path.exists():
                    _download(shard, path, part, fd, spare, stop, waiting)
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    return os.dup(fd)  # shares the lock
            if path.exists():
                part.unlink(missing_ok=True)  # made in vain, a moment after another process had finished
        except BlockingIOError:
            if (size := os.fstat(fd).st_size) != seen:
                seen = size
                waiting.progress()
            about = f"{remote.shown(shard.url)}: another process is fetching it, without progress for"
            waiting.wait(Passing(f"{about} {_settings.patience:g} s"), longest=0.2)
        finally:
            os.close(fd)
    raise Passing(f"{remote.shown(shard.url)}: given up")


def _open_whole(path: Path) -> int | None:
    """A descriptor with a shared lock, which counts as a use; None if the file is not (or no longer) there."""
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
    """Bring the locked .part to its end, verify it and give it its name."""
    about, wrong = remote.shown(shard.url), []
    try:
        _make_room(path.parent, spare)
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
            waiting.wait(fault)
        os.fsync(fd)
        doubted = _facts(path).get("doubted")
        sure = digest in (shard.sha256, doubted) or bool(wrong)
        _write_facts(path, {"url": about, "sha256": digest, "sure": sure})
        os.rename(part, path)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        _say_once(f"warning: {path.parent} has no room for {about} ({error.strerror}); it is read in pieces meanwhile")
        part.unlink(missing_ok=True)
        raise _NoRoom from None
    except _NoRoom:
        _say_once(
            f"warning: data.cache_gib={_settings.limit / (1 << 30):g} leaves no room for {about} beside what is in use; "
            "it is read in pieces meanwhile: raise the limit, or make data.window or data.prefetch_shards smaller"
        )
        part.unlink(missing_ok=True)
        raise


def _transfer(
    shard: Shard, part: Path, fd: int, spare: Collection[str], stop: Callable[[], bool], waiting: Patience
) -> str:
    """Append to the .part what is missing; returns the SHA-256 of all of it."""
    digest, have = hashlib.sha256(), 0
    while data := os.pread(fd, CHUNK, have):
        digest.update(data)
        have += len(data)
    if have == shard.size:
        return digest.hexdigest()
    with remote.open_url(shard.url, have) as stream:
        while data := stream.read(CHUNK):
            try:
                _write(fd, data, have)
            except OSError as error:
                os.ftruncate(fd, have)
                if error.errno not in NO_SPACE or not _make_room(part.parent, spare, everything=True):
                    raise
                _write(fd, data, have)
            digest.update(data)
            have += len(data)
            waiting.progress()
            if shard.size is None:
                _make_room(part.parent, spare)
            elif have > shard.size:
                break
            if stop():
                raise Passing(f"{remote.shown(shard.url)}: given up")
    return digest.hexdigest()


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _facts(path: Path) -> dict:
    try:
        return json.loads(Path(f"{path}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _write_facts(path: Path, facts: dict) -> None:
    temporary = Path(f"{path}.json.{os.getpid()}-{threading.get_ident()}.tmp")
    temporary.write_text(json.dumps(facts), "utf-8")
    os.replace(temporary, f"{path}.json")


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while data := file.read(CHUNK):
            digest.update(data)
        return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- eviction


def _make_room(path: Path, spare: Collection[str] = (), everything: bool = False) -> bool:
    """Evict, by last use, what nobody has open until the cache is within its limit, what is being fetched counted as
    whole; or everything that nobody has open. Returns whether anything went; raises _NoRoom where the limit is not met.
    """
    with open(path / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        total, files = 0, []
        for entry in os.scandir(path):
            if entry.name.endswith((".json", ".lock")):
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
        for mine in (True, False):  # twice: this process lets go of its own files only where it must
            for _, size, name in sorted(files):
                if total <= limit:
                    break
                if name not in spare and _evict(path / name):
                    total -= size
            if mine and total > limit and not everything:
                files = [f for f in files if (path / f[2]).exists()]
                _held.cache_clear()
        if total > _settings.limit:
            raise _NoRoom
        return total < before


def _evict(path: Path) -> bool:
    """Whether the file is gone; not if a process reads or fetches it."""
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
                    _fetched(shard, {s.name for s in self.wanted}, lambda: self.closed or shard not in self.wanted)
                )
                fault = False
            except (OSError, UsageError, _NoRoom):
                pass
            with self.change:
                self.busy.discard(shard)
                if fault and not self.closed:
                    self.change.wait(1.0)

    def _next(self) -> Shard | None:
        with self.change:
            while not self.closed:
                for shard in self.wanted:
                    if shard not in self.busy and not (folder() / shard.name).exists():
                        self.busy.add(shard)
                        return shard
                self.change.wait(5.0)  # something may have been evicted
            return None
