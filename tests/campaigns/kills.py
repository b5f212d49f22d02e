"""SIGKILL at random instants: `python tests/campaigns/kills.py [KILLS]`, 50 by default, about half a minute each.

A tiny growing run, with a checkpoint and a snapshot after every second step, is started and killed (with its loader's
processes) again and again, half of the times at an instant drawn at random, half of them as soon as the next file is
half written. Each start must continue from a valid state, and each run that gets to its end leaves what an undisturbed
one leaves: weights, EMA, optimisers, logs and pictures, bit for bit. CI runs six such kills (tests/test_faults.py).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

from stylegan_pg import load_snapshot
from stylegan_pg.checkpoint import checkpoint

OFTEN = {"output__snapshot_kimg": 0.016, "checkpoint__every_kimg": 0.016}
KINDS = ("random", "checkpoints", "snapshots", "random")


def unfinished(run: Path, folder: str) -> list[Path]:
    return [p for p in (run / folder).glob(".*") if p.is_file()] if (run / folder).exists() else []


def kill_once(args: list[str], run: Path, kind: str, dice: random.Random) -> str:
    """Start and kill a run. Return what was hit: "random", "checkpoints" or "snapshots" (an incomplete file was left
    there), or "done" if the run ended before."""
    left = {p for folder in ("checkpoints", "snapshots") for p in unfinished(run, folder)}
    process = harness.start(args, start_new_session=True)
    seen, until = harness.lines_of(run), None
    while process.poll() is None:
        if until is None and harness.lines_of(run) > seen:  # the run has made steps
            until = time.time() + dice.random() * 1.5
        if kind == "random" and until and time.time() > until:
            break
        if kind != "random" and until and [p for p in unfinished(run, kind) if p not in left]:
            break
        time.sleep(0.0002 if until and kind != "random" else 0.005)
    if process.poll() is not None:
        harness.finish(process)
        return "done"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    hit = [f for f in ("checkpoints", "snapshots") if any(p not in left for p in unfinished(run, f))]
    return hit[0] if hit else "random"


def valid(run: Path) -> None:
    """Check that every file with a final name is complete."""
    for path in checkpoint.found(run / "checkpoints"):
        checkpoint.read(path)
    for path in (run / "snapshots").glob("[!.]*.safetensors"):
        load_snapshot(path)


def campaign(base: Path, data: Path, kills: int, seed: int = 0) -> Counter[str]:
    """Return how many kills hit which kind of file."""
    whole = base / "whole"
    harness.finish(harness.start(harness.arguments(whole, data, **OFTEN)))
    dice, hits, number = random.Random(seed), Counter(), 0
    while sum(hits.values()) < kills:
        run, done = base / f"run{number}", False
        args, number = harness.arguments(run, data, **OFTEN), number + 1
        while not done and sum(hits.values()) < kills:
            hit = kill_once(args, run, KINDS[sum(hits.values()) % len(KINDS)], dice)
            done = hit == "done"
            if not done:
                hits[hit] += 1
            valid(run)
            print(f"{sum(hits.values())} of {kills}: {hit}", flush=True)
        if not done:
            harness.finish(harness.start(args))
        harness.assert_same_run(run, whole)
    return hits


def main() -> None:
    from measuring import packed

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "real").mkdir()
        _, data = packed(base / "real", 96)
        print(dict(campaign(base, data, int(sys.argv[1]) if len(sys.argv) > 1 else 50)))


if __name__ == "__main__":
    main()
