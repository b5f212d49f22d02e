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
from pathlib import Path
from typing import Any

from stylegan_pg import checkpoint, dist, files
from stylegan_pg.errors import UsageError
from stylegan_pg.schedule import phases, shortfall
from stylegan_pg.settings import load_config

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
    with files.whole(run / FILE) as file:
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
    lines = _json_lines(run / "stats.jsonl")
    last = lines[-1] if lines else {}
    try:
        told = json.loads((run / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        told = {"ranks": [], "time": None}
    log = (run / "log.txt").read_text("utf-8", errors="replace").splitlines() if (run / "log.txt").exists() else []
    newest = next(iter(checkpoint.found(run / "checkpoints")), None)
    signs = [p.stat().st_mtime for p in (run / "log.txt", run / FILE, run / "stats.jsonl") if p.exists()]
    silent = now - max(signs) if signs else None
    rates = [line["img_per_sec"] for line in lines[-5:] if line.get("img_per_sec")]
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
        "phase": last.get("phase"),
        "alpha": last.get("alpha"),
        "img_per_sec": rate,
        "eta_sec": (end - nimg) / rate if rate else None,
        "ranks": told["ranks"],
        "stragglers": stragglers(told["ranks"]),
        "checkpoint": str(newest) if newest else None,
        "checkpoint_nimg": int(newest.stem) if newest else None,
        "checkpoint_age_sec": now - newest.stat().st_mtime if newest else None,
        "starts": sum(" continuing from " in line for line in log) + 1 if log else 0,
        "faults": len(faults),
        "last_faults": faults[-5:],
    }


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


def _json_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # being written, or cut off by a kill
            continue
    return lines


def render(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    done = 100 * facts["nimg"] / facts["end"]
    ago = "" if facts["silent_sec"] is None else f", last sign of life {duration(facts['silent_sec'])} ago"
    out = [
        f"{facts['run']}: {facts['state']}{ago}",
        f"progress    {facts['nimg'] / 1000:.1f} of {facts['end'] / 1000:.1f} kimg ({done:.1f} %)",
    ]
    if facts["shortfall"]:
        out.append(f"falls short {facts['shortfall']}")
    if facts["phase"]:
        out.append(f"phase       {facts['phase']}, alpha {facts['alpha']:.2f}")
    if facts["img_per_sec"]:
        left = "" if facts["state"] == "done" else f", {duration(facts['eta_sec'])} to go"
        out.append(f"speed       {facts['img_per_sec']:.1f} img/s{left}")
    if facts["checkpoint"]:
        age, at = duration(facts["checkpoint_age_sec"]), facts["checkpoint_nimg"] / 1000
        out.append(f"checkpoint  {facts['checkpoint']}, at {at:.1f} kimg, {age} ago")
    else:
        out.append("checkpoint  none yet")
    for i, rank in enumerate(facts["ranks"]):
        slow = "  STRAGGLER" if i in facts["stragglers"] else ""
        where = f"{rank['host']}:{rank['pid']} {rank['device']}"
        speed = f"{rank['img_per_sec']:8.1f} img/s  busy {100 * (rank['busy'] or 0):3.0f} %"
        out.append(f"rank {i:<6} {where:<28} {speed}{slow}")
    out.append(f"starts      {facts['starts']}")
    out.append(f"faults      {facts['faults']}" + (", the last of them:" if facts["faults"] else ""))
    return "\n".join([*out, *(f"  {line}" for line in facts["last_faults"])])


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
