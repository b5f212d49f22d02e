"""Atomic file writes, removal of leftover temporary files, the cache folder, and the limit of open files.

A file is written under a temporary name `.NAME.RANDOM.tmp` in the same folder, and locked meanwhile. The operating
system releases the lock when the writing process dies, so a temporary file without a lock is a leftover.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import resource
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stylegan_pg.errors import UsageError

ABANDONED_SEC = 3600.0  # on file systems without locks, a file that was not modified for this time is a leftover
MAX_OPEN_FILES = 65536
TOO_MANY_OPEN = "this process has reached its limit of open files: run `ulimit -n 4096` before the command"


@contextlib.contextmanager
def atomic_write(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Write a file atomically. The block writes to a temporary file, which replaces `path` when the block ends.

    If the block fails, `path` is unchanged and no temporary file remains. The folder must exist.

    Args:
        path: The file.
        sync: Whether the bytes are flushed to the disk before `path` is replaced.

    Raises:
        OSError: for example when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _locked(temporary) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:  # KeyboardInterrupt is included; it is raised again
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _locked(path: Path) -> BinaryIO:
    while True:
        file = open(path, "wb")  # noqa: SIM115 - the caller closes it
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed it before it was locked


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove the temporary files of killed processes from a folder, but not from its subfolders. Files in use remain.

    With `name`, only those that would have become the file of that name are removed.

    This must not be called for a folder in which the same process is writing a file: POSIX locks belong to a process,
    so the process would mistake its own temporary file for a leftover.
    """
    for path in folder.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 8}.tmp" if name else ".*.tmp"):
        with contextlib.suppress(OSError):  # there is no permission to remove it, or it no longer exists
            if path.is_symlink():
                path.unlink()
                continue
            with open(path, "r+b") as file:
                if _is_leftover(file):
                    path.unlink()


def _is_leftover(file: BinaryIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two is raised depends on the system
        return False
    except OSError:
        return time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED_SEC
    return True


def cache_folder() -> Path:
    """Return the cache folder: $STYLEGAN_PG_CACHE if set, otherwise a folder in the user's cache. If it is not
    writable, return a private temporary folder.

    Raises:
        PermissionError: if other users can write to the temporary folder. The message says what to do.
    """
    chosen, caches = os.environ.get("STYLEGAN_PG_CACHE"), os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home directory
        folder = Path(chosen) if chosen else Path(caches or Path.home() / ".cache") / "stylegan_pg"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    folder = Path(tempfile.gettempdir()) / f"stylegan_pg-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        # Compiled kernels are loaded from this folder, so other users must not be able to write to it.
        raise PermissionError(f"{folder} could be written by others: set STYLEGAN_PG_CACHE to a folder of your own")
    return folder


def allow_open_files(needed: int) -> None:
    """Raise this process's limit of open files as far as permitted.

    Raises:
        UsageError: if the limit remains below `needed` files.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    higher = MAX_OPEN_FILES if most == resource.RLIM_INFINITY else min(most, MAX_OPEN_FILES)
    if limit != resource.RLIM_INFINITY and limit < higher:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (higher, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UsageError(
            f"this process may open {limit} files (ulimit -n) but needs up to {needed}: run `ulimit -n 4096` before "
            "the command; if this is refused, the machine's administrator must raise the limit "
            "(/etc/security/limits.conf, LimitNOFILE= of a service, --ulimit nofile= of a container)"
        )
