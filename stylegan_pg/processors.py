"""The number of processors that this process may use, the number of idle ones, and the way in which threads wait.

OpenMP's threads spin at the end of each parallel loop until the slowest one arrives. On idle processors, this is the
fastest way to wait. If other processes need the same processors, a spinning thread may prevent the thread that it waits
for from running, and training takes several times as long. In this case, threads should sleep
(OMP_WAIT_POLICY=passive).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")  # the root of /proc and /sys; tests replace it
CHOSEN_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each of these determines how threads wait
SPARE = 0.3  # threads sleep while they wait if this many more processors would be needed than are idle
SHORTEST = 0.05  # seconds over which idle processors are counted; the kernel counts in hundredths


def limit(root: Path = ROOT) -> float:
    """Return the number of processors that this process may use: those of its affinity mask, or fewer if a control
    group (version 1 or 2) has a quota, which may be a fraction."""
    return min([float(len(_allowed())), *_quotas(root)])


def count(root: Path = ROOT) -> int:
    """Return `limit` in whole processors, at least 1, as a number of worker processes."""
    return max(int(limit(root)), 1)


def _allowed() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return list(range(os.cpu_count() or 1))


def _quotas(root: Path) -> list[float]:
    """Return the quotas of the control groups of this process and of their parents."""
    found = []
    for folder in _control_groups(root):
        with contextlib.suppress(OSError, ValueError, IndexError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text("ascii").split()[:2]
            found.append(int(quota) / int(period))  # "max", which means no limit, raises ValueError
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = int((folder / "cpu.cfs_quota_us").read_text("ascii"))
            period = int((folder / "cpu.cfs_period_us").read_text("ascii"))
            found += [quota / period] if quota > 0 else []  # -1 means no limit
    return [quota for quota in found if quota > 0]


def _control_groups(root: Path) -> list[Path]:
    """Return the folders of this process's control groups and of their parents. Within a container, the path in
    /proc/self/cgroup may not exist; the limits of the container are then in the top folder."""
    top = root / "sys/fs/cgroup"
    found = [top, top / "cpu", top / "cpu,cpuacct"]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            place = (top / controllers if controllers else top) / path.lstrip("/")
            found += [folder for folder in (place, *place.parents) if folder.is_relative_to(top)]
    return list(dict.fromkeys(found))


class Snapshot(NamedTuple):
    """Times in seconds: the wall clock, the time that all processes have used of the allowed processors, and the time
    that this process has used."""

    wall: float
    busy: float | None
    own: float


def snapshot(root: Path = ROOT) -> Snapshot:
    """Return the current times. `busy` is None if the kernel does not provide it."""
    busy: float | None = None
    with contextlib.suppress(OSError, ValueError):
        names, busy = {f"cpu{i}" for i in _allowed()}, 0.0
        for line in (root / "proc/stat").read_text("ascii").splitlines():
            name, *ticks = line.split()
            if name in names:  # user, nice, system, idle, iowait, irq, softirq, steal
                busy += (sum(map(int, ticks[:8])) - int(ticks[3]) - int(ticks[4])) / os.sysconf("SC_CLK_TCK")
    return Snapshot(time.monotonic(), busy, time.process_time())


def idle(since: Snapshot, now: Snapshot) -> float | None:
    """Return the number of allowed processors that other processes left idle between two snapshots, or None if it is
    unknown."""
    seconds = now.wall - since.wall
    if since.busy is None or now.busy is None or seconds < SHORTEST:
        return None
    others = (now.busy - since.busy - (now.own - since.own)) / seconds
    return max(len(_allowed()) - max(others, 0.0), 0.0)


reason = ""  # the reason why `choose_waiting` made this process's threads sleep while they wait


def choose_waiting(since: Snapshot, environment: MutableMapping[str, str] = os.environ, root: Path = ROOT) -> str:
    """Set OMP_NUM_THREADS to the quota if it is below the number of allowed processors, and OMP_WAIT_POLICY to passive
    if threads will share processors. This has an effect only before PyTorch is imported. Settings of the user are not
    changed.

    Returns:
        The reason why threads sleep while they wait, or "".
    """
    if "torch" in sys.modules:
        return ""
    most = limit(root)
    if most < len(_allowed()):
        environment.setdefault("OMP_NUM_THREADS", str(max(int(most), 1)))
    if any(environment.get(name) for name in CHOSEN_BY_USER):
        return ""
    threads, ranks = (_number(environment.get(name)) for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"))
    global reason
    time.sleep(max(since.wall + SHORTEST - time.monotonic(), 0.0))  # imports may have been faster
    reason = _reason(threads or count(root), ranks or 1, most, idle(since, snapshot(root)))
    if reason:
        environment["OMP_WAIT_POLICY"] = "passive"
    return reason


def _reason(threads: int, ranks: int, most: float, free: float | None) -> str:
    if threads == 1:  # a single thread never waits
        return ""
    if threads * ranks > math.ceil(most):
        return f"{threads * ranks} threads share {most:g} processors"
    # Several ranks start at the same time, and each of them would count the others as competing processes.
    if ranks == 1 and free is not None and free < threads - SPARE:
        return f"other processes leave {free:.1f} processors for {threads} threads"
    return ""


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


class ProcessorQueue:
    """Measures the share of time in which this process's threads are ready to run but wait for a processor."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.before = self._clocks()

    def _clocks(self) -> dict[str, tuple[int, int]]:
        """Return {thread: (nanoseconds in which it ran, nanoseconds in which it waited for a processor)}."""
        found = {}
        for file in (self.root / "proc/self/task").glob("*/schedstat"):
            with contextlib.suppress(OSError, ValueError):  # the thread may have ended
                run, wait = file.read_text("ascii").split()[:2]
                found[file.parent.name] = int(run), int(wait)
        return found

    def take(self) -> float:
        """Return the share, from 0 to 1, since the last call; 0 if the kernel does not provide it."""
        now, run, wait = self._clocks(), 0, 0
        for thread, (ran, waited) in now.items():
            ran_before, waited_before = self.before.get(thread, (0, 0))
            run, wait = run + ran - ran_before, wait + waited - waited_before
        self.before = now
        return wait / (run + wait) if wait > 0 and run >= 0 else 0.0


if __name__ == "__main__":  # for launch scripts
    print(count())
