"""Evaluation during training: it measures the configured metrics and decides which snapshot is the best so far."""

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
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.evaluate import Evaluator, better, reasons
from stylegan_pg.metrics.gather import Networks
from stylegan_pg.metrics.registry import parse
from stylegan_pg.ops import pool
from stylegan_pg.untrusted import is_number, json_lines


class Periodic:
    """Measures the configured metrics on a growing generator.

    Raises:
        UsageError: if a metric is unknown.
    """

    def __init__(self, config: Config, index: DatasetIndex):
        self.config, self.index, self.resolution = config.metrics, index, config.resolution
        self.condition = config.data.condition
        self.enabled = bool(self.config.every_kimg or self.config.at_snapshots)
        self.metrics = [parse(name, images=self.config.images) for name in self.config.names]
        self.best = parse(self.config.best, images=self.config.images) if self.config.best else None
        if self.best and self.best.name not in [m.name for m in self.metrics]:
            raise UsageError(
                f"metrics.best={self.best.name} is not among metrics.names={self.config.names}: add it there"
            )
        self.missing: list[str] = []  # reasons why metrics could not be measured the last time
        self.evaluator: Evaluator | None = None  # for one resolution only, because statistics of real images are large

    @cached_property
    def unmeasurable(self) -> dict[str, str]:
        """{metric's name: reason} of metrics that can never be measured in this run, because the dataset has too few
        images or the images are too small."""
        found = {}
        for metric in self.metrics if self.enabled else []:
            try:
                metric.check_count(self.index.count, "the dataset")
                metric.check_size(self.index.size_at(self.resolution))
            except UsageError as error:
                found[metric.name] = str(error)
        return found

    def remarks(self, device: torch.device) -> list[str]:
        """Return warnings to show before training: metrics that will never be measured, and networks that cannot be
        loaded yet."""
        if not self.enabled:
            return []
        never = [f"metrics.names: {reason}; it is not measured in this run" for reason in self.unmeasurable.values()]
        networks, missing = Networks(self._settings(device, batch=1)), {}
        for metric in self.metrics:
            if metric.network and metric.name not in self.unmeasurable:
                try:
                    networks.get(metric.network)
                except Exception as error:  # a user's extractor can raise anything
                    missing[metric.name] = error
        return never + [f"metrics.names: not measured until this is resolved: {reason}" for reason in reasons(missing)]

    def _settings(self, device: torch.device, batch: int) -> Settings:
        config = self.config
        return Settings(device, tuple(config.weights), config.extractor, config.precision, batch=batch)

    def measure(self, G: Any, resolution: int, device: torch.device, alpha: float) -> dict[str, float]:
        """Return {name: value} on all ranks, which must all call this. Metrics that cannot be measured in this run or
        that need larger images are omitted.

        Raises:
            UsageError, RunError and others: on all ranks, if a rank fails.
        """
        size = self.index.size_at(resolution)
        large = [m for m in self.metrics if min(size) >= m.min_side]
        metrics = [m for m in large if m.name not in self.unmeasurable]
        if not metrics:
            return {}
        if self.evaluator is None or self.evaluator.resolution != resolution:
            settings = self._settings(device, batch=max(1, min(32, 2**20 // (size[0] * size[1]))))
            self.evaluator = None  # frees memory before the next evaluator needs it
            with dist.together():
                self.evaluator = Evaluator(self.index, resolution, metrics, settings, condition=self.condition)
        assert self.evaluator is not None
        try:
            values = self.evaluator(G, alpha=alpha)
        finally:
            pool.clear()  # frees buffers of sizes that training does not use
        self.missing = reasons(self.evaluator.missing)
        return values

    def is_best(self, log: Path, values: dict[str, float]) -> bool:
        """Return whether these values are the best of their resolution so far.

        Args:
            log: The file metrics.jsonl, whose last line contains `values`.
            values: The values {name: value} of the newest measurement.
        """
        able = [m for m in self.metrics if m.name not in self.unmeasurable]
        wanted = self.best or next(iter(able or self.metrics))
        name = next(
            (n for n in values if re.fullmatch(re.escape(wanted.name + wanted.ranked_value) + r"(@.*)?", n)), None
        )
        rows = [row for _, row in json_lines(log) if "resolution" in row]
        if name is None or not rows:
            return False
        last = rows[-1]["resolution"]
        before = [row[name] for row in rows[:-1] if is_number(row.get(name)) and row["resolution"] == last]
        return better(wanted, values[name], before)
