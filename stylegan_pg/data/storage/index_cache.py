"""A cache of arrays on disk, such as parsed indexes: .npz files in the user's cache folder, named by hashes of keys.

A damaged file is computed again, and a file that cannot be written is skipped; neither is an error.
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

VERSION = 5  # to be increased when the computed arrays change
KEEP_SEC = 30 * 24 * 3600  # since the last use

Arrays = dict[str, np.ndarray]


def kept(key: str, make: Callable[[], Arrays], fits: Callable[[Arrays], bool] = lambda _: True) -> Arrays:
    """Return the cached arrays of a key, or compute and cache them.

    Args:
        key: everything that the arrays depend on.
        make: computes the arrays; one process of a node calls it while the others wait. Its exceptions pass through.
        fits: whether cached arrays are usable.
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
    """The arrays of a file, verified by the checksums within it; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        with contextlib.suppress(OSError):
            os.utime(path)
        return arrays
    except Exception:  # a damaged file can fail in any way, and costs only time
        return None


def _save(path: Path, arrays: Arrays) -> None:
    with files.whole(path) as file:
        np.savez(file, allow_pickle=False, **arrays)
    for old in path.parent.iterdir():  # unused for a long time, or left by killed processes
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEEP_SEC:
                old.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """A lock among the processes of a node, released by the system if its holder dies; without effect on file systems
    without locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)
        yield
