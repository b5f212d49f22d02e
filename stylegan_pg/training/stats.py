"""Sums of a training step over the global batch: statistics of images, and tensors such as the mean of w."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from stylegan_pg.distributed import process_group as dist


class Totals(NamedTuple):
    """Sums over all ranks, equal on each of them."""

    stats: dict[str, tuple[float, int]]  # name -> (sum, number of images), of those that are finite
    bad: list[str]  # names of those that are not
    tensors: dict[str, torch.Tensor]
    flag: bool  # whether any rank raised its flag


class StepStats:
    """Sums of this rank, on its device. One all-reduce per step, and one for each tensor, sums them over the ranks."""

    def __init__(self):
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}  # of several values together, float64 [names]
        self.counts: dict[str, int] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def expect(self, count: int, *names: str) -> None:
        """Announce statistics that are summed over `count` images of the global batch. All ranks must do so, also those
        without images."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + count

    def expect_tensors(self, zeros: Mapping[str, torch.Tensor]) -> None:
        """Announce tensors to be summed. All ranks must do so."""
        self.tensors |= zeros

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add values [n] of images of this rank; names that were not announced are ignored."""
        names = tuple(name for name in values if name in self.counts)
        if names:
            sums = torch.stack([values[name].detach() for name in names]).sum(dim=1, dtype=torch.float64)
            self.sums[names] = self.sums[names] + sums if names in self.sums else sums

    def add_tensor(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = self.tensors[name] + value

    def copy(self) -> StepStats:
        """A copy of these sums, to which a step can return."""
        other = StepStats()
        other.sums, other.counts, other.tensors = dict(self.sums), dict(self.counts), dict(self.tensors)
        return other

    def reduce(self, device: torch.device, flag: bool) -> Totals:
        """Sum over the ranks. A collective call."""
        sums: dict[str, torch.Tensor] = {}
        for names, vector in self.sums.items():
            for name, total in zip(names, vector.unbind(), strict=True):
                sums[name] = sums[name] + total if name in sums else total
        zero, raised = torch.tensor([0.0, float(flag)], dtype=torch.float64, device=device)
        vector = torch.stack([*(sums.get(name, zero) for name in self.counts), raised])
        values = dist.all_reduce(vector).tolist()
        stats = {n: (total, count) for (n, count), total in zip(self.counts.items(), values[:-1], strict=True)}
        bad = [name for name, (total, _) in stats.items() if not math.isfinite(total)]
        tensors = {name: dist.all_reduce(t) for name, t in self.tensors.items()}
        return Totals({name: v for name, v in stats.items() if name not in bad}, bad, tensors, values[-1] > 0)
