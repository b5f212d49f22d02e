"""What one training step observes: sums of named quantities over the ranks, and what was not finite."""

from __future__ import annotations

import math

import torch

from stylegan_pg.distributed import process_group as dist


class Observed:
    """Sums on the device; one all-reduce per step brings them to the host."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def expect(self, count: int, *names: str) -> None:
        """These are being summed over `count` images of the global batch, on all ranks, also on one without a share
        of it."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + count

    def add(self, **values: torch.Tensor) -> None:
        """Values [n] of images of this rank; what nobody expects is left out."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double().sum()

    def so_far(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """For `back_to`, which forgets what was added since."""
        return dict(self.sums), dict(self.counts)

    def back_to(self, before: tuple[dict[str, torch.Tensor], dict[str, int]]) -> None:
        self.sums, self.counts = dict(before[0]), dict(before[1])

    def reduce(self, device: torch.device, flag: bool) -> tuple[dict[str, tuple[float, int]], list[str], bool]:
        """{name: (sum, count)} over all ranks of what is finite, the names of what is not, and whether any rank
        raised its `flag`. Starts afresh."""
        zero = torch.zeros([], dtype=torch.float64, device=device)
        vector = torch.stack([*(self.sums.get(name, zero) for name in self.counts), zero + flag])
        values = dist.all_reduce(vector).tolist()
        stats = {n: (total, count) for (n, count), total in zip(self.counts.items(), values[:-1], strict=True)}
        self.sums, self.counts = {}, {}
        bad = [name for name, (total, _) in stats.items() if not math.isfinite(total)]
        return {name: v for name, v in stats.items() if name not in bad}, bad, values[-1] > 0
