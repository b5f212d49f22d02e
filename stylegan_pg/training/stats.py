"""Sums of a training step over the global batch: statistics of images, and tensors such as the mean of w."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from stylegan_pg.distributed import process_group as dist


class StepStats:
    """Sums of this rank over the updates of a step, on its device."""

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
        self.tensors |= {name: torch.zeros_like(t) for name, t in zeros.items()}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add values [n] of images of this rank; names that were not announced are ignored."""
        names = tuple(name for name in values if name in self.counts)
        if names:
            sums = torch.stack([values[name].detach() for name in names]).sum(dim=1, dtype=torch.float64)
            self.sums[names] = self.sums[names] + sums if names in self.sums else sums

    def add_tensor(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = self.tensors[name] + value

    def join(self, other: StepStats) -> None:
        """Add the sums of a later update."""
        for names, sums in other.sums.items():
            self.sums[names] = self.sums[names] + sums if names in self.sums else sums
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.tensors |= other.tensors

    def vector(self, device: torch.device, *further: float) -> torch.Tensor:
        """The sums of statistics over all ranks, in the order of `counts`, and those of further numbers, float64. A
        collective call."""
        sums: dict[str, torch.Tensor] = {}
        for names, vector in self.sums.items():
            for name, total in zip(names, vector.unbind(), strict=True):
                sums[name] = sums[name] + total if name in sums else total
        zero = torch.zeros([], dtype=torch.float64, device=device)
        return dist.all_reduce(torch.stack([*(sums.get(n, zero) for n in self.counts), *(zero + x for x in further)]))

    def totals(self, values: Sequence[float]) -> tuple[dict[str, tuple[float, int]], list[str]]:
        """{name: (sum, images)} of `vector`, as the host has read it, and the names of sums that are not finite, which
        are left out."""
        stats = {name: (total, count) for (name, count), total in zip(self.counts.items(), values, strict=True)}
        bad = [name for name, (total, _) in stats.items() if not math.isfinite(total)]
        return {name: both for name, both in stats.items() if name not in bad}, bad
