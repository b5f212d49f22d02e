"""Keeps status.json in a run's folder up to date while the run trains."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stylegan_pg.checkpoint import status_file
from stylegan_pg.checkpoint.status_file import Status
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring.logs import ROOT, TIME, Addressed, text_of

log = logging.getLogger(__name__)


class StatusWriter(logging.Handler):
    """Writes status.json at every `update` and with every warning or error that goes to the log. Until `open` is
    called, and on all ranks but rank 0, it writes nothing. A fault in writing costs one warning."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.addFilter(Addressed("file"))
        self.run: Path | None = None
        self.lost: Callable[[], str] = str
        self.status = Status()
        self.failed = False  # the warning was given
        logging.getLogger(ROOT).addHandler(self)

    def open(self, run: Path, nimg: int, end: int, lost: Callable[[], str] = str) -> None:
        """Continue the status that an earlier start has left in the folder, if there is one.

        Args:
            nimg: where the run starts or continues.
            end: nimg at which it is complete.
            lost: gives the reason why the folder is not the run's any more, "" while it is.
        """
        before = _left(run)
        self.run, self.lost = run, lost
        self.update(
            nimg=nimg,
            end=end,
            started=time.time(),
            starts=None if before.starts is None else before.starts + 1,
            faults=before.faults + self.status.faults,
            last_faults=[*before.last_faults, *self.status.last_faults][-status_file.SHOWN_FAULTS :],
            checkpoint=nimg or before.checkpoint,
            restarted=before.restarted,
        )

    def move(self, place: Path) -> None:
        """Write into the folder at its new place from now on."""
        self.run, self.lost = place, str

    def update(self, **changes: Any) -> None:
        """Change fields of Status and write the file. None as the number of a checkpoint changes nothing."""
        self.acquire()
        try:
            if changes.get("checkpoint", 0) is None:
                del changes["checkpoint"]
            self.status = dataclasses.replace(self.status, **changes)
            self._write()
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{time.strftime(TIME)} {text_of(record)}"[: status_file.LONGEST_FAULT]
        last = [*self.status.last_faults, line][-status_file.SHOWN_FAULTS :]
        self.update(faults=self.status.faults + 1, last_faults=last)

    def _write(self) -> None:
        if self.run is None or self.lost():
            return
        self.status = dataclasses.replace(self.status, updated=max(time.time(), 0.0))
        try:
            status_file.write(self.run, self.status)
        except (OSError, ValueError) as error:
            if not self.failed:
                self.failed = True
                log.warning(f"could not write {status_file.FILE} ({error}); training goes on")

    def close(self) -> None:
        logging.getLogger(ROOT).removeHandler(self)
        super().close()


def _left(run: Path) -> Status:
    """The status that an earlier start has left."""
    try:
        return status_file.read(run)
    except FileNotFoundError:  # a new run, or one of an earlier version, which did not count starts
        return Status(starts=None if (run / "log.txt").exists() else 0)
    except (OSError, UsageError) as error:
        log.warning(f"{error}; its counts begin anew")
        return Status(starts=None)
