"""Evaluation during training: the metrics that a configuration names, and which snapshot is the best so far."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.config import Config
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.base import Tools
from stylegan_pg.metrics.evaluate import Evaluator, better, reasons
from stylegan_pg.metrics.gather import Networks
from stylegan_pg.metrics.registry import parse
from stylegan_pg.ops import pool
from stylegan_pg.untrusted import is_number, json_lines


class Periodic:
    """Measures the metrics that a configuration names on a generator that grows.

    Raises:
        UsageError: if a metric does not exist.
    """

    def __init__(self, config: Config, index: DatasetIndex):
        self.config, self.index, self.resolution = config.metrics, index, config.resolution
        self.condition = config.data.condition
        self.wanted = bool(self.config.every_kimg or self.config.at_snapshots)
        self.metrics = [parse(name, images=self.config.images) for name in self.config.names]
        self.best = parse(self.config.best, images=self.config.images) if self.config.best else None
        if self.best and self.best.name not in [m.name for m in self.metrics]:
            raise UsageError(f"metrics.best={self.best.name} is none of metrics.names={self.config.names}")
        self.missing: list[str] = []  # why some could not be measured the last time
        self.evaluator: Evaluator | None = None  # of one resolution at a time: what it knows of real images is large

    @cached_property
    def unfit(self) -> dict[str, str]:
        """{metric's name: why} of metrics that can never be measured in this run, as there are too few images or they
        are too small."""
        found = {}
        for metric in self.metrics if self.wanted else []:
            try:
                metric.check_count(self.index.count, "the dataset")
                metric.check_size(self.index.size_at(self.resolution))
            except UsageError as error:
                found[metric.name] = str(error)
        return found

    def remarks(self, device: torch.device) -> list[str]:
        """Return what can be said of the metrics before training: which will never be measured, and which networks
        cannot be loaded yet."""
        if not self.wanted:
            return []
        never = [f"metrics.names: {reason}; it is not measured in this run" for reason in self.unfit.values()]
        networks, missing = Networks(self._tools(device, batch=1)), {}
        for metric in self.metrics:
            if metric.network and metric.name not in self.unfit:
                try:
                    networks.of(metric.network)
                except Exception as error:  # a user's extractor can raise anything
                    missing[metric.name] = error
        return never + [f"metrics.names: not measured as long as it is so: {reason}" for reason in reasons(missing)]

    def _tools(self, device: torch.device, batch: int) -> Tools:
        how = self.config
        return Tools(device, tuple(how.weights), how.extractor, how.precision, batch=batch)

    def measure(self, G: Any, resolution: int, device: torch.device, alpha: float) -> dict[str, float]:
        """Return {name: value} on all ranks, which must all call this. Metrics that are unfit, or need larger images,
        are left out.

        Raises:
            UsageError, RunError and others: on all ranks, if anything goes wrong on one.
        """
        size = self.index.size_at(resolution)
        large = [m for m in self.metrics if min(size) >= m.least_side]
        metrics = [m for m in large if m.name not in self.unfit]
        if not metrics:
            return {}
        if self.evaluator is None or self.evaluator.resolution != resolution:
            tools = self._tools(device, batch=max(1, min(32, 2**20 // (size[0] * size[1]))))
            self.evaluator = None  # before the next one takes its memory
            with dist.together():
                self.evaluator = Evaluator(self.index, resolution, metrics, tools, condition=self.condition)
        assert self.evaluator is not None
        try:
            values = self.evaluator(G, alpha=alpha)
        finally:
            pool.clear()  # of sizes that training does not use
        self.missing = reasons(self.evaluator.missing)
        return values

    def is_best(self, log: Path, values: dict[str, float]) -> bool:
        """Return whether these values, the last line of a metrics.jsonl, are the best of their resolution."""
        able = [m for m in self.metrics if m.name not in self.unfit]
        wanted = self.best or next(iter(able or self.metrics))
        name = next((n for n in values if re.fullmatch(re.escape(wanted.name + wanted.headline) + r"(@.*)?", n)), None)
        rows = [row for _, row in json_lines(log) if "resolution" in row]
        if name is None or not rows:
            return False
        last = rows[-1]["resolution"]
        before = [row[name] for row in rows[:-1] if is_number(row.get(name)) and row["resolution"] == last]
        return better(wanted, values[name], before)
