"""How a run is doing, from its folder alone: also on another machine, and while it trains.

Training leaves `ranks.json` there at each tick: how fast each process is, and what part of its time it computes itself
rather than waiting for the others.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stylegan_pg import files
from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases, shortfall
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import is_number, json_lines, printable, read_json, text_lines

_T = TypeVar("_T")
MOST_LOG = 1 << 26  # bytes of a log that are looked at, its last ones
FILE = "ranks.json"
SLOW = 1.25  # times the median of the ranks' seconds per image: a straggler
SILENT = 3.0  # ticks without a sign of life, and a minute: hanging or dead


class Pace:
    """This process's clock, which runs during steps, not while outputs are made."""

    def __init__(self, device: str):
        self.device = device
        self.seconds, self.images = 0.0, 0
        self.since: float | None = None

    def go(self) -> None:
        self.since = time.perf_counter()
        dist.waiting.go()

    def pause(self, images: int) -> None:
        """After a step on so many images of this rank."""
        if self.since:
            self.seconds += time.perf_counter() - self.since
            self.images += images
        self.since = None
        dist.waiting.pause()

    def take(self) -> dict[str, Any]:
        """Since the last time: images per second, and seconds of its own work per image, without waiting for others."""
        seconds, images = self.seconds, self.images
        own = max(seconds - dist.waiting.take(), 0.0)
        self.seconds, self.images = 0.0, 0
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": self.device,
            "img_per_sec": round(images / seconds, 3) if seconds else 0.0,
            "own_sec_per_img": own / images if images else 0.0,
            "busy": round(own / seconds, 4) if seconds else 0.0,
        }


def write(run: Path, nimg: int, ranks: list[dict[str, Any]]) -> None:
    """Atomically; raises OSError."""
    with files.atomic_write(run / FILE) as file:
        file.write(json.dumps({"nimg": nimg, "time": time.time(), "ranks": ranks}).encode())


def stragglers(ranks: list[dict[str, Any]]) -> list[int]:
    """Ranks that take clearly longer for an image than the others do; those without images count for nothing."""
    own = {i: r["own_sec_per_img"] for i, r in enumerate(ranks) if r["own_sec_per_img"] > 0}
    usual = statistics.median_low(own.values()) if own else 0.0
    return [i for i, seconds in own.items() if seconds > SLOW * usual]


def collect(run: Path) -> dict[str, Any]:
    """What a run's folder says; values are None where it says nothing yet.

    Raises:
        UsageError: if it is no run's folder.
    """
    if not (run / "config.yaml").exists():
        raise UsageError(f"{run} is no run's folder (no config.yaml): give the folder that run= names")
    config = load_config(str(run / "config.yaml"), [])
    now, end = time.time(), phases(config)[-1].end
    damaged: list[str] = []
    lines = _read(damaged, lambda: [row for _, row in json_lines(run / "stats.jsonl", last=MOST_LOG)], [])
    log = _read(damaged, lambda: list(text_lines(run / "log.txt", last=MOST_LOG)), [])
    ranks = _read(damaged, lambda: _ranks(run / FILE), [])
    last = lines[-1] if lines else {}
    newest = next(filter(Path.is_file, checkpoint.found(run / "checkpoints")), None)
    signs = [p.stat().st_mtime for p in (run / "log.txt", run / FILE, run / "stats.jsonl") if p.exists()]
    silent = _age(signs, now)
    rates = [rate for line in lines[-5:] if (rate := _number(line.get("img_per_sec")) or 0.0) > 1e-6]
    rate = statistics.median(rates) if rates else None
    nimg = last.get("nimg", 0)
    faults = [line for line in log if " warning: " in line or " error: " in line]
    return {
        "run": str(run),
        "state": _state(log, nimg >= end, silent, config.output.tick_kimg * 1000 / rate if rate else 0.0),
        "silent_sec": silent,
        "nimg": nimg,
        "end": end,
        "shortfall": shortfall(config) or None,
        "phase": last["phase"] if isinstance(last.get("phase"), str) else None,
        "alpha": _number(last.get("alpha")),
        "img_per_sec": rate,
        "eta_sec": (end - nimg) / rate if rate else None,
        "ranks": ranks,
        "stragglers": stragglers(ranks),
        "checkpoint": str(newest) if newest else None,
        "checkpoint_nimg": int(newest.stem) if newest else None,
        "checkpoint_age_sec": _age([newest.stat().st_mtime], now) if newest else None,
        "starts": sum(" continuing from " in line for line in log) + 1 if log else 0,
        "faults": len(faults),
        "last_faults": faults[-5:],
        "damaged": damaged,
    }


def _age(times: list[float], now: float) -> float | None:
    """Seconds since the latest of these times. One that has not come yet, as before the clock was set back, or where a
    file server's is ahead, says nothing beside others."""
    ages = [now - time for time in times]
    return min((age for age in ages if age >= 0), default=0.0) if ages else None


def _state(log: list[str], done: bool, silent: float | None, tick_sec: float) -> str:
    said = [line.split(" ", 2)[-1] for line in log]
    end = next((text for text in reversed(said) if not text.startswith("the checkpoint at ")), "")
    if end.startswith("done") or (done and not end.startswith("error")):
        return "done"
    for word, state in (("stopped", "stopped, to be continued"), ("error", "failed")):
        if end.startswith(word):
            return state
    if silent is None:
        return "not started"
    return "silent: killed, or hanging" if silent > SILENT * tick_sec + 60 else "training"


def _read(damaged: list[str], read: Callable[[], _T], otherwise: _T) -> _T:
    """What `read` gives; where it cannot, that is told in `damaged`."""
    try:
        return read()
    except FileNotFoundError:
        return otherwise
    except (OSError, UsageError) as error:
        damaged.append(printable(error))
        return otherwise


def _ranks(path: Path) -> list[dict[str, Any]]:
    """What `write` wrote of each rank. Raises OSError, and UsageError for anything else."""
    remedy = "training writes it again at its next tick"
    told = read_json(path, remedy)
    ranks = told.get("ranks") if isinstance(told, dict) else None
    if not isinstance(ranks, list) or not all(map(_is_rank, ranks)):
        raise UsageError(f"{path} does not tell of ranks: {remedy}")
    return ranks


def _is_rank(rank: Any) -> bool:
    return (
        isinstance(rank, dict)
        and isinstance(rank.get("host"), str)
        and isinstance(rank.get("device"), str)
        and isinstance(rank.get("pid"), int)
        and all(_number(rank.get(key)) is not None for key in ("img_per_sec", "own_sec_per_img", "busy"))
    )


def _number(value: Any) -> float | None:
    """`value`, if it is a number of 0 or more that can be reckoned with."""
    return value if is_number(value, 0, 1e15) else None


def render(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
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
        out.append(f"rank {i:<6} {where:<28} {speed}{slow}")
    out.append(f"starts      {facts['starts']}")
    out.append(f"faults      {facts['faults']}" + (", the last of them:" if facts["faults"] else ""))
    out += [f"  {printable(line)}" for line in facts["last_faults"]]
    return "\n".join([*out, *(f"damaged     {line}" for line in facts["damaged"])])


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
