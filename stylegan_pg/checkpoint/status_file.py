"""status.json in a run's folder: how far the run has come and how it fares, for people and programs that watch it.

Rank 0 of a run writes it (monitoring/status_writer.py). `stylegan-pg status` and the next start of the run read it.
Runs of earlier versions have none.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stylegan_pg import files
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import is_number, read_json
from stylegan_pg.version import __version__

FILE = "status.json"
FORMAT = 1
STATES = ("training", "stopped", "done", "failed")
SHOWN_FAULTS = 5  # the number of last faults that are stored with their texts
LONGEST_FAULT = 4000  # characters
MOST = 1e15  # above every time, speed and count that a run can have
_REMEDY = "a run that trains writes it again at its next tick"


@dataclass(frozen=True)
class Status:
    """What status.json holds beside `format` and `stylegan_pg`. Times are seconds since 1970."""

    state: str = "training"  # one of STATES
    nimg: int = 0  # images shown to D
    end: int = 0  # nimg at which the run is complete
    phase: str = ""  # such as "16x16 fade"
    alpha: float | None = None  # of a fade
    img_per_sec: float | None = None  # over all ranks, since the last tick
    started: float = 0.0  # time of the newest start
    updated: float = 0.0  # time at which this was written
    starts: int | None = 0  # None: unknown, as earlier versions did not count them
    faults: int = 0  # warnings and errors in the log
    last_faults: list[str] = field(default_factory=list)  # the last of them, with their times
    checkpoint: int | None = None  # nimg of the newest checkpoint that was written or read
    restarted: str = ""  # digest of the configuration for which --restart moved earlier outputs aside
    ranks: list[dict[str, Any]] = field(default_factory=list)  # see StepClock.take


def write(run: Path, status: Status) -> None:
    """Write status.json atomically. Raises OSError."""
    content = {"format": FORMAT, "stylegan_pg": __version__, **dataclasses.asdict(status)}
    with files.atomic_write(run / FILE) as file:
        file.write(json.dumps(content, indent=1).encode())


def read(run: Path) -> Status:
    """Read and check status.json.

    Raises:
        OSError: it does not exist or cannot be read; UsageError: it holds something else, or is of a later version.
    """
    path = run / FILE
    content = read_json(path, _REMEDY)
    given = content.get("format") if isinstance(content, dict) else None
    if not is_number(given, FORMAT, FORMAT):
        later = " (that of a later version)" if is_number(given, FORMAT + 1) else ""
        raise UsageError(f"{path} is no status of format {FORMAT}{later}: {_REMEDY}")
    known = {name: content[name] for name in _CHECKS if name in content}
    wrong = [name for name, value in known.items() if not _CHECKS[name](value)]
    if wrong := wrong + sorted({"state", "nimg"} - known.keys()):
        raise UsageError(f"{path} has no possible value for {', '.join(wrong)}: {_REMEDY}")
    return Status(**known)


def read_ranks(path: Path) -> list[dict[str, Any]]:
    """Read the ranks in ranks.json, which earlier versions wrote in place of status.json.

    Raises:
        OSError: it does not exist or cannot be read; UsageError: it holds something else.
    """
    content = read_json(path, "the file of an earlier version, which may be deleted")
    ranks = content.get("ranks") if isinstance(content, dict) else None
    if not isinstance(ranks, list) or not are_ranks(ranks):
        raise UsageError(f"{path} does not describe ranks: it is a file of an earlier version, which may be deleted")
    return ranks


def are_ranks(value: Any) -> bool:
    """Whether this is a list of descriptions of ranks."""
    return isinstance(value, list) and all(map(_is_rank, value))


def _is_rank(rank: Any) -> bool:
    return (
        isinstance(rank, dict)
        and isinstance(rank.get("host"), str)
        and isinstance(rank.get("device"), str)
        and isinstance(rank.get("pid"), int)
        and all(is_number(rank.get(key), 0, MOST) for key in ("img_per_sec", "own_sec_per_img", "busy"))
        and all(is_number(rank.get(key, 0), 0, 1) for key in ("queued", "idle"))  # earlier versions did not write them
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value, 0, MOST)


def _are_faults(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= SHOWN_FAULTS and all(isinstance(text, str) for text in value)


def _is_measure(value: Any) -> bool:
    return is_number(value, 0, MOST)


_CHECKS = {
    "state": lambda value: value in STATES,
    "nimg": _is_count,
    "end": _is_count,
    "phase": lambda value: isinstance(value, str),
    "alpha": lambda value: value is None or is_number(value, 0, 1),
    "img_per_sec": lambda value: value is None or _is_measure(value),
    "started": _is_measure,
    "updated": _is_measure,
    "starts": lambda value: value is None or _is_count(value),
    "faults": _is_count,
    "last_faults": _are_faults,
    "checkpoint": lambda value: value is None or _is_count(value),
    "restarted": lambda value: isinstance(value, str),
    "ranks": are_ranks,
}
