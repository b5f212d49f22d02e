"""Arrays worth keeping between runs, such as parsed indexes: .npz files in the user's cache, named after all that they
depend on. What is damaged or cannot be written costs time and nothing else."""

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

VERSION = 5  # grows when what is computed changes
KEEP_SEC = 30 * 24 * 3600  # since the last use

Arrays = dict[str, np.ndarray]


def kept(key: str, make: Callable[[], Arrays], fits: Callable[[Arrays], bool] = lambda _: True) -> Arrays:
    """The arrays under `key`, made and kept where there are none that are whole and `fit`.

    One process of a node makes them; the others wait. Raises what `make` raises.
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
    """All of a file, checked against the checksums that a zip has; None where it is missing or damaged."""
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
    for old in path.parent.iterdir():  # of datasets that are gone, and what killed processes left
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEEP_SEC:
                old.unlink()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of a node at a time, and dropped by the system when it dies; nothing where there are no
    locks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)
        yield
