"""Evaluation during training: which metrics, against which resolution, and which snapshot is the best so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.config import Config
from stylegan_pg.data.index import DatasetIndex
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.evaluate import Evaluator, Tools
from stylegan_pg.metrics.protocol import parse

LARGER_IS_BETTER = ("is", "pr")


class Periodic:
    """The metrics that a configuration asks for, of a generator that grows.

    Raises:
        UsageError: for metrics that do not exist.
    """

    def __init__(self, config: Config, index: DatasetIndex):
        self.config, self.index = config.metrics, index
        self.protocols = [parse(name, images=self.config.images) for name in self.config.names]
        self.best = parse(self.config.best, images=self.config.images) if self.config.best else None
        if self.best and self.best.name not in [p.name for p in self.protocols]:
            raise UsageError(f"metrics.best={self.best.name} is none of metrics.names={self.config.names}")
        self.evaluator: Evaluator | None = None  # of one resolution at a time: what it knows of real images is large

    def measure(self, G: Any, resolution: int, device: torch.device, alpha: float) -> dict[str, float]:
        """{metric: value}, on all ranks; without those that need larger images. A collective call.

        Raises:
            UsageError, RunError and others: on all ranks, whatever went wrong on one.
        """
        protocols = [p for p in self.protocols if p.kind != "swd" or resolution >= 8]
        if not protocols:
            return {}
        if self.evaluator is None or self.evaluator.resolution != resolution:
            how, batch = self.config, max(1, min(32, 2**20 // resolution**2))
            tools = Tools(device, tuple(how.weights), how.extractor, how.precision, batch=batch)
            self.evaluator = Evaluator(self.index, resolution, protocols, tools)
        return self.evaluator(G, alpha=alpha)

    def is_best(self, log: Path, values: dict[str, float]) -> bool:
        """Whether the last line of a metrics.jsonl, with these values, is the best of its resolution."""
        wanted = self.best or self.protocols[0]
        name = next((n for n in values if n.startswith(wanted.name) and "_std" not in n), None)
        name = wanted.name if wanted.name in values else name
        if name is None or not log.exists():
            return False
        rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        known = [row[name] for row in rows if name in row and row["resolution"] == rows[-1]["resolution"]]
        better = max if wanted.kind in LARGER_IS_BETTER else min
        return values[name] == better([*known, values[name]]) and known[:-1].count(values[name]) == 0
