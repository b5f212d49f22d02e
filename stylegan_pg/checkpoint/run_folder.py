"""The folder of a run, locked by one process for its lifetime."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from pathlib import Path

from stylegan_pg import files
from stylegan_pg.config import Config
from stylegan_pg.config.plain import to_yaml
from stylegan_pg.errors import UsageError

PARTS = ("checkpoints", "snapshots", "averages", "samples")
LEAVING_SEC = 10.0  # to wait for a process that holds the lock and may be about to end


class RunFolder:
    """The run's folder at `path`; rank 0 creates and locks it."""

    def __init__(self, path: Path):
        self.path = path
        self.folder: int | None = None  # file descriptor of the folder, open until the process ends
        self.lock: int | None = None  # file descriptor of the lock file in it, likewise

    def claim(self) -> None:
        """Create the folder, lock it against other processes, and remove temporary files of killed ones.

        Raises:
            UsageError: another process trains there, or the path cannot be used as a folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._lock(LEAVING_SEC)
        except OSError as error:
            raise UsageError(f"run={self.path} cannot be used as the run's folder: {error}") from None
        for folder in (self.path, *(self.path / name for name in PARTS)):
            files.remove_leftovers(folder)

    def _lock(self, patience: float) -> None:
        self.lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):  # systems differ in which one they raise
                if time.monotonic() > end:
                    raise UsageError(
                        f"another process is training in {self.path}: stop it, or take another run=FOLDER"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a file system without locks
                    return
                raise

    def sign(self) -> str:
        """Write a random word into the lock file and return it; other nodes see the same folder if they find it."""
        assert self.lock is not None, "claim the folder first"
        word = secrets.token_hex(16)
        with contextlib.suppress(OSError):  # on a full disk, for example, the others do not find it
            os.pwrite(self.lock, word.encode(), 0)
            os.fsync(self.lock)
        return word

    def is_signed(self, word: str) -> bool:
        """Whether the lock file contains the word. Must not be called by the process that holds the lock."""
        try:
            return (self.path / ".lock").read_text("utf-8", errors="replace") == word
        except OSError:
            return False

    def place(self) -> Path | None:
        """The present path of the folder, which may have been moved; None if it was deleted or its path is unknown."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                name = Path(os.readlink(f"/proc/self/fd/{self.folder}"))
                return name if _is_at(name, self.folder) else None
        return None

    def lost(self) -> str:
        """The reason why this process must not write into the folder any more, "" if it may."""
        if self.folder is None or self.lock is None:
            return ""
        if not _is_at(self.path, self.folder):
            where = self.place()
            return (
                f"the run's folder {self.path} was moved away or deleted during training"
                + (f" (it is {where} now)" if where else "")
                + "; nothing more is written: to continue from its last checkpoint, move it back, or name its new "
                "place as run=FOLDER, and run the same command again"
            )
        if not _is_at(self.path / ".lock", self.lock):  # deleted, so another process may have locked a new one
            os.close(self.lock)
            try:
                self._lock(0.0)
            except (UsageError, OSError) as error:
                return str(error)
        return ""

    def keep(self, config: Config) -> None:
        """Write config.yaml. Raises OSError if the folder cannot be written."""
        with files.atomic_write(self.path / "config.yaml") as file:
            file.write(to_yaml(config).encode())


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file or folder still has that name. This is assumed while its file server does not answer."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return os.path.samestat(found, os.fstat(descriptor))
