"""How fast each rank computes, and which ranks hold the others up."""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from typing import Any

import torch

from stylegan_pg import processors
from stylegan_pg.distributed import process_group as dist

IDLE = 0.25  # share of the time for which a device waits for its host, from which on that is reported
SLOW = 1.25  # times the median of the ranks' seconds per image: a straggler
QUEUED = 0.25  # share of the time for which a rank's threads wait for processors, from which on that is reported
LASTING = 60.0  # seconds of training before a shortage of processors is reported

log = logging.getLogger(__name__)


class IdleDevice:
    """How much of the time a GPU waits for its host to start the next operation: the share of moments, several in each
    step, at which it had finished all operations that were started."""

    def __init__(self, device: torch.device):
        self.device = device
        self.looks = self.idle = 0

    def look(self) -> None:
        """Look whether the device has nothing to do. The host does not wait for it."""
        if self.device.type == "cuda":
            self.looks += 1
            self.idle += torch.cuda.current_stream(self.device).query()

    def take(self) -> float:
        """The share since the last call; 0 for a CPU, which is its own host."""
        share = self.idle / self.looks if self.looks else 0.0
        self.looks = self.idle = 0
        return share


class StepClock:
    """This process's clock, which runs during training steps only, not while outputs are written."""

    def __init__(self, device: str, idle: IdleDevice | None = None):
        self.device, self.idle = device, idle
        self.seconds, self.images = 0.0, 0
        self.since: float | None = None
        self.queue = processors.ProcessorQueue()

    def go(self) -> None:
        self.since = time.perf_counter()
        dist.waiting.go()

    def pause(self, images: int) -> None:
        """Stop after a step on so many images of this rank."""
        if self.since:
            self.seconds += time.perf_counter() - self.since
            self.images += images
        self.since = None
        dist.waiting.pause()

    def take(self) -> dict[str, Any]:
        """Describe this rank and its speed since the last call: images per second; seconds of its own work per image,
        without waiting for other ranks; the share of its own work in the time; the share of the time in which its
        threads could run but waited for a processor; and that in which its device waited for it."""
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
            "queued": round(self.queue.take(), 4),
            "idle": round(self.idle.take(), 4) if self.idle else 0.0,
        }


def stragglers(ranks: list[dict[str, Any]]) -> list[int]:
    """The ranks that take clearly longer for an image than the others; ranks without images are not compared."""
    own = {i: r["own_sec_per_img"] for i, r in enumerate(ranks) if r["own_sec_per_img"] > 0}
    usual = statistics.median_low(own.values()) if own else 0.0
    return [i for i, seconds in own.items() if seconds > SLOW * usual]


class Shortage:
    """Notes once, in runs that last, that threads wait much of their time for a processor, or devices for a host."""

    def __init__(self) -> None:
        self.since, self.noted = time.monotonic(), False

    def look(self, ranks: list[dict[str, Any]]) -> None:
        """Look at what StepClock.take has described of all ranks."""
        if self.noted or time.monotonic() - self.since < LASTING:
            return
        if text := shortage(ranks):
            self.noted = True
            log.info(f"note: {text}")


def shortage(ranks: list[dict[str, Any]]) -> str:
    """Which rank's threads wait more than the share QUEUED of their time for a processor, or whose device more than the
    share IDLE for its host, and what helps; "" if none do."""
    return _queued(ranks) or _idle(ranks)


def _idle(ranks: list[dict[str, Any]]) -> str:
    worst = max(range(len(ranks)), key=lambda i: ranks[i].get("idle", 0.0), default=0)
    if not ranks or ranks[worst].get("idle", 0.0) <= IDLE:
        return ""
    return (
        f"the device of rank {worst} waits {100 * ranks[worst]['idle']:.0f} % of its time for the host: "
        "train.graphs=auto, a larger train.micro_batch or more images for each device will help"
    )


def _queued(ranks: list[dict[str, Any]]) -> str:
    some = {i: r["queued"] for i, r in enumerate(ranks) if r.get("queued", 0.0) > QUEUED}
    if not some:
        return ""
    worst = max(some, key=lambda i: some[i])
    passive = "" if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" else "OMP_WAIT_POLICY=passive, "
    return (
        f"the threads of rank {worst} wait {100 * some[worst]:.0f} % of their time for a processor, because other "
        f"processes use the same ones: {passive}a smaller OMP_NUM_THREADS or fewer data.workers will help"
    )
