"""How a run is doing, from its folder alone: also on another machine, and while it trains."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stylegan_pg.checkpoint import checkpoint, status_file
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.checkpoint.status_file import MOST, Status
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases, shortfall
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring.step_clock import IDLE, QUEUED, stragglers
from stylegan_pg.untrusted import is_number, json_lines, printable

_T = TypeVar("_T")
MOST_LOG = 1 << 26  # bytes at the end of stats.jsonl that are read
SILENT = 3.0  # ticks, and a minute, without a change in the folder, after which a run counts as hanging or killed
SIGNS = (status_file.FILE, "stats.jsonl", "log.txt", "ranks.json")  # files that a run changes while it lives
STATES = {"stopped": "stopped, to be continued", "done": "done", "failed": "failed"}


def collect(run: Path) -> dict[str, Any]:
    """Collect the state of a run from its folder. Unknown values are None. The starts and faults of a run of an earlier
    version, whose folder holds no status.json, are unknown.

    Raises:
        UsageError: if it is no run's folder.
    """
    if not (run / "config.yaml").exists():
        raise UsageError(f"{run} is no run's folder (no config.yaml): give the folder that run= names")
    config = load_config(str(run / "config.yaml"), [])
    now, end = time.time(), phases(config)[-1].end
    damaged: list[str] = []
    lines = _read(damaged, lambda: [row for _, row in json_lines(run / "stats.jsonl", last=MOST_LOG)], [])
    found = _read(damaged, lambda: status_file.read(run), None)
    status = found or _earlier(damaged, run, lines[-1] if lines else {})
    newest = next(filter(Path.is_file, checkpoint.found(run / "checkpoints")), None)
    silent = _age([(run / name).stat().st_mtime for name in SIGNS if (run / name).exists()], now)
    rate = _rate(lines) or status.img_per_sec
    tick_sec = config.output.tick_kimg * 1000 / rate if rate else 0.0
    return {
        "run": str(run),
        "state": _state(status, end, silent, tick_sec),
        "silent_sec": silent,
        "nimg": status.nimg,
        "end": end,
        "shortfall": shortfall(config) or None,
        "phase": status.phase or None,
        "alpha": status.alpha,
        "img_per_sec": rate,
        "eta_sec": (end - status.nimg) / rate if rate else None,
        "ranks": status.ranks,
        "stragglers": stragglers(status.ranks),
        "checkpoint": str(newest) if newest else None,
        "checkpoint_nimg": int(newest.stem) if newest else None,
        "checkpoint_age_sec": _age([newest.stat().st_mtime], now) if newest else None,
        "started": status.started or None,
        "updated": status.updated or None,
        "starts": status.starts,
        "faults": status.faults if found else None,
        "last_faults": status.last_faults,
        "damaged": damaged,
    }


def _earlier(damaged: list[str], run: Path, last: dict[str, Any]) -> Status:
    """The status of a run without status.json, from the last line of stats.jsonl and from ranks.json."""
    known: dict[str, Any] = {"phase": last["phase"]} if isinstance(last.get("phase"), str) else {}
    known["alpha"] = last["alpha"] if is_number(last.get("alpha"), 0, 1) else None
    ranks = _read(damaged, lambda: status_file.read_ranks(run / "ranks.json"), [])
    return Status(nimg=last.get("nimg", 0), starts=None, ranks=ranks, **known)


def _rate(lines: list[dict[str, Any]]) -> float | None:
    """The median of the last images per second."""
    rates = [line["img_per_sec"] for line in lines[-5:] if is_number(line.get("img_per_sec"), 1e-6, MOST)]
    return statistics.median(rates) if rates else None


def _age(times: list[float], now: float) -> float | None:
    """Seconds since the latest of these times. Times in the future, which occur if the clock was set back or a file
    server's clock is ahead, are ignored if there are others."""
    ages = [now - time for time in times]
    return min((age for age in ages if age >= 0), default=0.0) if ages else None


def _state(status: Status, end: int, silent: float | None, tick_sec: float) -> str:
    """The state in words. A run whose state is "training" may have been killed, and is called silent if its folder has
    not changed for long."""
    if status.state in STATES:
        return STATES[status.state]
    if not status.updated and end <= status.nimg:  # of an earlier version
        return "done"
    if silent is None:
        return "not started"
    return "silent: killed, or hanging" if silent > SILENT * tick_sec + 60 else "training"


def _read(damaged: list[str], read: Callable[[], _T], otherwise: _T) -> _T:
    """What `read` returns; `otherwise` if the file does not exist or, with a message in `damaged`, cannot be used."""
    try:
        return read()
    except FileNotFoundError:
        return otherwise
    except (OSError, UsageError) as error:
        damaged.append(printable(error))
        return otherwise


def render(facts: dict[str, Any]) -> str:
    """Format what `collect` returned, as text of several lines."""
    done = 100 * facts["nimg"] / facts["end"]
    ago = "" if facts["silent_sec"] is None else f", last sign of life {duration(facts['silent_sec'])} ago"
    out = [
        f"{facts['run']}: {facts['state']}{ago}",
        f"progress    {kimg(facts['nimg'])} of {kimg(facts['end'])} kimg ({done:.1f} %)",
    ]
    if facts["shortfall"]:
        out.append(f"falls short {facts['shortfall']}")
    if facts["phase"]:
        alpha = "" if facts["alpha"] is None else f", alpha {facts['alpha']:.2f}"
        out.append(f"phase       {printable(facts['phase'], 80)}{alpha}")
    if facts["img_per_sec"]:
        left = "" if facts["state"] == "done" else f", {duration(facts['eta_sec'])} to go"
        out.append(f"speed       {facts['img_per_sec']:.1f} img/s{left}")
    if facts["checkpoint"]:
        age, at = duration(facts["checkpoint_age_sec"]), kimg(facts["checkpoint_nimg"])
        out.append(f"checkpoint  {facts['checkpoint']}, at {at} kimg, {age} ago")
    else:
        out.append("checkpoint  none yet")
    for i, rank in enumerate(facts["ranks"]):
        slow = "  STRAGGLER" if i in facts["stragglers"] else ""
        where = f"{printable(rank['host'], 60)}:{rank['pid']} {printable(rank['device'], 20)}"
        speed = f"{rank['img_per_sec']:8.1f} img/s  busy {100 * rank['busy']:3.0f} %"
        if rank.get("queued", 0) > QUEUED:
            speed += f"  waits {100 * rank['queued']:.0f} % of its time for processors"
        if rank.get("idle", 0) > IDLE:
            speed += f"  its device waits {100 * rank['idle']:.0f} % of the time for the host"
        out.append(f"rank {i:<6} {where:<28} {speed}{slow}")
    if facts["starts"] is not None:
        out.append(f"starts      {facts['starts']}")
    if facts["faults"] is not None:
        out.append(f"faults      {facts['faults']}" + (", the last of them:" if facts["faults"] else ""))
    out += [f"  {printable(line)}" for line in facts["last_faults"]]
    return "\n".join([*out, *(f"damaged     {line}" for line in facts["damaged"])])


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
