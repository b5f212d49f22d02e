"""Files and folders that appear at their place only when they are complete and have been checked.

They are made in a hidden folder beside it, `.NAME.RANDOM.export`, which is locked meanwhile. A folder without a lock is
what a killed process has left, and the next export to the same name removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

_LOCK = ".lock"


@contextlib.contextmanager
def making(out: Path) -> Iterator[Path]:
    """Make a file or a folder: the block writes to the path that it is given, and `out` is replaced when it ends.

    If the block fails, `out` is as it was. A folder that is not empty is not replaced.

    Raises:
        UsageError: `out` is a folder that is not empty, or a folder where a file is made.
        OSError: for example when the disk is full.
    """
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"--out {printable(out)} is a folder with content: remove it, or give another")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    folder = out.with_name(f".{out.name}.{secrets.token_hex(4)}.export")
    folder.mkdir()
    try:
        with open(folder / _LOCK, "wb") as lock:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            inside = folder / out.name
            yield inside
            _flush(inside)
            if inside.is_dir() and out.is_dir():
                out.rmdir()  # it is empty
            elif out.is_dir():
                raise UsageError(f"--out {printable(out)} is a folder: give the name of a file")
            os.replace(inside, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def _remove_leftovers(out: Path) -> None:
    for folder in out.parent.glob(f".{_escaped(out.name)}.????????.export"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or not folder.is_dir():
                continue
            with open(folder / _LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
