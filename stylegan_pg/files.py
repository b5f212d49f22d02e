"""Atomic file writes, removal of the leftovers of killed writers, the cache folder, and the limit of open files.

A file is written under a temporary name `.NAME.WORD.tmp` in the same folder and locked meanwhile. The operating system
releases the lock when the writer dies, so a temporary file that nobody has locked is a leftover.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from stylegan_pg.errors import UsageError

ABANDONED_SEC = 3600.0  # without a modification, after which a file is a leftover if the file system has no locks
MOST_OPEN_FILES = 65536
TOO_MANY_OPEN = "this process may not open so many files: `ulimit -n 4096` before the command allows more"


@contextlib.contextmanager
def whole(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """Write a file atomically: what the block writes replaces `path` when the block ends.

    If the block fails, `path` is unchanged and no temporary file remains. The folder must exist.

    Args:
        sync: flush the bytes to the disk before `path` is replaced.

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
    except BaseException:  # also Ctrl-C: it is raised again
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
        file.close()  # another process swept it away before it was locked


def sweep(folder: Path) -> None:
    """Remove temporary files of killed writers from a folder (not from its subfolders); files in use are kept.

    This must not be called for a folder into which the same process is writing: POSIX locks belong to a process, so
    it would take its own files for leftovers.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # no permission to remove it, or it is already gone
            if path.is_symlink():
                path.unlink()
                continue
            with open(path, "r+b") as file:
                if _is_left(file):
                    path.unlink()


def _is_left(file: BinaryIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # systems differ in which one they raise
        return False
    except OSError:
        return time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED_SEC
    return True


def cache_folder() -> Path:
    """The cache folder: $STYLEGAN_PG_CACHE, else the user's cache; a private temporary folder if that is not writable.

    Raises:
        PermissionError: if other users could write to the temporary folder; the message says what to do.
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
        # Compiled kernels are loaded from here, so nobody else may be able to write to it.
        raise PermissionError(f"{folder} could be written by others: set STYLEGAN_PG_CACHE to a folder of your own")
    return folder


def allow_open_files(needed: int) -> None:
    """Raise this process's limit of open files as far as it is allowed to.

    Raises:
        UsageError: if the limit is still below `needed` files.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    higher = MOST_OPEN_FILES if most == resource.RLIM_INFINITY else min(most, MOST_OPEN_FILES)
    if limit != resource.RLIM_INFINITY and limit < higher:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (higher, most))
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise UsageError(
            f"this process may have {limit} files open (ulimit -n), and needs up to {needed}: run `ulimit -n 4096` "
            "before the command; where that is refused, the machine's administrator raises the limit "
            "(/etc/security/limits.conf, LimitNOFILE= of a service, --ulimit nofile= of a container)"
        )
