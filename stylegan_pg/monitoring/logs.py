"""Handlers of this package's log records: the console, and the file log.txt in a run's folder.

Modules log to `logging.getLogger(__name__)`. Warnings and errors are shown with "warning: " and "error: " in front,
other records as they are. Only rank 0's records are handled. A call can change this by its argument `extra`:

- `{"all_ranks": True}`: the record of any rank is handled;
- CONSOLE_ONLY, FILE_ONLY: the record goes to one of the handlers only.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stylegan_pg.distributed import launcher
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring import console

ROOT = "stylegan_pg"  # the logger above all loggers of this package
CONSOLE_ONLY = {"only": "console"}
FILE_ONLY = {"only": "file"}
TIME = "%Y-%m-%d %H:%M:%S"
_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}

log = logging.getLogger(__name__)


def text_of(record: logging.LogRecord) -> str:
    """The line or lines that a record is shown as."""
    return _PREFIXES.get(record.levelno, "") + record.getMessage()


class Addressed(logging.Filter):
    """Passes what is meant for the handler of this name ("console", "file"), of rank 0 or of a record for all ranks."""

    def filter(self, record: logging.LogRecord) -> bool:
        meant = getattr(record, "only", self.name) == self.name
        return meant and (getattr(record, "all_ranks", False) or _is_rank_0())


def _is_rank_0() -> bool:
    """By the process group. Before it exists and after it has ended, the launcher's variables decide."""
    dist = sys.modules.get("stylegan_pg.distributed.process_group")  # imports torch, which may not be needed
    if dist is not None and dist.is_joined():
        return dist.is_main()
    try:
        return launcher.place().rank == 0
    except UsageError:  # which the command reports itself
        return True


class ConsoleHandler(logging.Handler):
    """Writes to standard error, above a progress bar if there is one."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.addFilter(Addressed("console"))

    def emit(self, record: logging.LogRecord) -> None:
        text = text_of(record)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the console was closed
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def to_console() -> Iterator[None]:
    """Show the package's records on the console within this block. Nothing changes if they are shown already, or if the
    program that uses the package handles them in a way of its own."""
    logger = logging.getLogger(ROOT)
    if any(not isinstance(handler, (LogFile, logging.NullHandler)) for handler in logger.handlers):
        yield
        return
    handler, level, propagate = ConsoleHandler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or handlers of the root logger show everything a second time
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class LogFile(logging.Handler):
    """Writes to log.txt in a run's folder, with the time in front of each record. Records wait until `open` names the
    folder. A fault in writing (a full disk) is shown once on the console and never raised."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.addFilter(Addressed("file"))
        self.path: Path | None = None
        self.waiting: list[str] = []
        self.lost: Callable[[], str] = str
        self.faults: set[str] = set()  # those that were shown
        logger = logging.getLogger(ROOT)
        logger.addHandler(self)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)

    def open(self, run: Path, lost: Callable[[], str] = str) -> None:
        """Write to RUN/log.txt from now on, but not while `lost` gives a reason why the folder is not the run's."""
        self.path, self.lost = run / "log.txt", lost
        waiting, self.waiting = self.waiting, []
        for line in waiting:
            self._append(line)

    def emit(self, record: logging.LogRecord) -> None:
        self._line(text_of(record))
        self.check_console()

    def check_console(self) -> None:
        """Write into the file, once, that the console takes no more output."""
        if self.path and (lost := console.lost()):
            self._line(f"the console is gone ({'; '.join(lost)}); training goes on, and is logged here alone")

    def _line(self, text: str) -> None:
        line = f"{time.strftime(TIME)} {text}"
        if self.path:
            self._append(line)
        else:
            self.waiting.append(line)

    def _append(self, line: str) -> None:
        assert self.path is not None
        if self.lost():
            return
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except (OSError, ValueError) as error:
            if str(error) not in self.faults:
                self.faults.add(str(error))
                log.warning(f"could not write to the log ({error}); training goes on", extra=CONSOLE_ONLY)

    def close(self) -> None:
        logging.getLogger(ROOT).removeHandler(self)
        super().close()
