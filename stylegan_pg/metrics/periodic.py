"""Evaluation during training: which metrics, against which resolution, and which snapshot is the best so far."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from stylegan_pg import dist
from stylegan_pg.config import Config
from stylegan_pg.data.index import DatasetIndex
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.evaluate import Evaluator, better
from stylegan_pg.metrics.gather import Tools
from stylegan_pg.metrics.protocol import LEAST_SIDE, parse
from stylegan_pg.ops import pool
from stylegan_pg.untrusted import is_number, json_lines


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
        self.missing: list[str] = []  # why some could not be measured the last time
        self.evaluator: Evaluator | None = None  # of one resolution at a time: what it knows of real images is large

    def measure(self, G: Any, resolution: int, device: torch.device, alpha: float) -> dict[str, float]:
        """{metric: value}, on all ranks; without those that need larger images. A collective call.

        Raises:
            UsageError, RunError and others: on all ranks, whatever went wrong on one.
        """
        size = self.index.size_at(resolution)
        protocols = [p for p in self.protocols if min(size) >= LEAST_SIDE.get(p.kind, 1)]
        if not protocols:
            return {}
        if self.evaluator is None or self.evaluator.resolution != resolution:
            how, batch = self.config, max(1, min(32, 2**20 // (size[0] * size[1])))
            tools = Tools(device, tuple(how.weights), how.extractor, how.precision, batch=batch)
            self.evaluator = None  # before the next one takes its memory
            with dist.together():
                self.evaluator = Evaluator(self.index, resolution, protocols, tools)
        assert self.evaluator is not None
        try:
            values = self.evaluator(G, alpha=alpha)
        finally:
            pool.clear()  # of sizes that training does not use
        self.missing = list(dict.fromkeys(self.evaluator.missing.values()))
        return values

    def is_best(self, log: Path, values: dict[str, float]) -> bool:
        """Whether these values, the last of a metrics.jsonl, are the best of their resolution."""
        wanted = self.best or self.protocols[0]
        name = next((n for n in values if re.fullmatch(re.escape(wanted.name) + r"(_precision)?(@.*)?", n)), None)
        rows = [row for _, row in json_lines(log) if "resolution" in row]
        if name is None or not rows:
            return False
        last = rows[-1]["resolution"]
        before = [row[name] for row in rows[:-1] if is_number(row.get(name)) and row["resolution"] == last]
        return better(wanted.kind, values[name], before)
