"""A disk cache of arrays, such as parsed indexes. It consists of .npz files in the user's cache folder, which are named
by hashes of keys.

The arrays of a damaged file are computed again. If a file cannot be written, nothing is cached. Neither is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from stylegan_pg import files
from stylegan_pg.files import cache_folder

VERSION = 7  # it must be increased when the computed arrays change
KEEP_SEC = 30 * 24 * 3600  # files that were not used for this time are removed

Arrays = dict[str, np.ndarray]


def cached(key: str, make: Callable[[], Arrays], fits: Callable[[Arrays], bool] = lambda _: True) -> Arrays:
    """Return the cached arrays of a key, or compute and cache them.

    Args:
        key: A text that contains everything on which the arrays depend.
        make: A function that computes the arrays. Only one process of a node calls it at a time; the others wait. Its
            exceptions are passed on.
        fits: A function that returns whether cached arrays are usable.
    """
    path = cache_folder() / "indexes" / f"{hashlib.sha256(f'{VERSION} {key}'.encode()).hexdigest()[:40]}.npz"
    found = _load(path)
    if found is not None and fits(found):
        return found
    with _lock(path.with_suffix(".lock")):
        found = _load(path)  # another process may have been faster
        if found is not None and fits(found):
            return found
        arrays = make()
        with contextlib.suppress(OSError):
            _save(path, arrays)
    return arrays


def _load(path: Path) -> Arrays | None:
    """Return the arrays of a file, verified by its checksums, or None if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        with contextlib.suppress(OSError):
            os.utime(path)
        return arrays
    except Exception:  # a damaged file can cause any error; the arrays are then computed again
        return None


def _save(path: Path, arrays: Arrays) -> None:
    with files.atomic_write(path) as file:
        np.savez(file, allow_pickle=False, **arrays)
    for old in path.parent.iterdir():  # removes files that were unused for a long time, or left by killed processes
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEEP_SEC:
                old.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """A lock among the processes of a node. The system releases it if its holder dies. It has no effect on file systems
    without locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)
        yield
