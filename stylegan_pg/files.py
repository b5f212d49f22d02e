"""Files that are there whole or not at all, and what is left of them where a writer was killed.

A file is written beside its place, under a name `.NAME.WORD.tmp`, and locked meanwhile: the system drops the lock when
the writer dies, so that what nobody holds any more is a leftover.
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

ABANDONED_SEC = 3600.0  # without a change, where the file system has no locks: a leftover
MOST_OPEN_FILES = 65536
TOO_MANY_OPEN = "this process may not open so many files: `ulimit -n 4096` before the command allows more"


@contextlib.contextmanager
def whole(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when the block ends, at once; if the block fails, `path` is
    as it was, and nothing else is left. The folder must be there.

    Args:
        sync: have the bytes on the disk before they take that place.

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
        file.close()  # swept away between the two lines above


def sweep(folder: Path) -> None:
    """Remove what killed writers have left in a folder (not in those below it); what somebody writes just now stays.

    Not for a folder into which this very process is writing: locks do not tell its own files apart.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):  # not ours to remove, or gone by itself
            if path.is_symlink():
                path.unlink()
                continue
            with open(path, "r+b") as file:
                if _is_left(file):
                    path.unlink()


def _is_left(file: BinaryIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # as systems say it
        return False
    except OSError:
        return time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED_SEC
    return True


def cache_folder() -> Path:
    """$STYLEGAN_PG_CACHE, else the user's cache; a private temporary folder where that cannot be written.

    Raises:
        PermissionError: where others could write there, too; the message says what to do.
    """
    chosen, caches = os.environ.get("STYLEGAN_PG_CACHE"), os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(OSError, RuntimeError):  # which a user without a home is
        folder = Path(chosen) if chosen else Path(caches or Path.home() / ".cache") / "stylegan_pg"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder.resolve()
    folder = Path(tempfile.gettempdir()) / f"stylegan_pg-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        # Loading a library is running it: never one that somebody else could have put there.
        raise PermissionError(f"{folder} could be written by others: set STYLEGAN_PG_CACHE to a folder of your own")
    return folder


def allow_open_files(needed: int) -> None:
    """Raise this process's limit as far as that is allowed without asking.

    Raises:
        UsageError: if it may still not have as many as `needed` open.
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
