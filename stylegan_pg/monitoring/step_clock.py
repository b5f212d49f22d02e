"""How fast each rank computes, and which ranks hold the others up."""

from __future__ import annotations

import os
import socket
import statistics
import time
from typing import Any

from stylegan_pg.distributed import process_group as dist

SLOW = 1.25  # times the median of the ranks' seconds per image: a straggler


class StepClock:
    """This process's clock, which runs during training steps only, not while outputs are written."""

    def __init__(self, device: str):
        self.device = device
        self.seconds, self.images = 0.0, 0
        self.since: float | None = None

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
        without waiting for other ranks; and the share of its own work in the time."""
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


def stragglers(ranks: list[dict[str, Any]]) -> list[int]:
    """The ranks that take clearly longer for an image than the others; ranks without images are not compared."""
    own = {i: r["own_sec_per_img"] for i, r in enumerate(ranks) if r["own_sec_per_img"] > 0}
    usual = statistics.median_low(own.values()) if own else 0.0
    return [i for i, seconds in own.items() if seconds > SLOW * usual]
