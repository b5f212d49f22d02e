"""Accumulators: what is kept of a set of images that is looked at block by block, on several ranks.

The parts of different ranks and blocks merge exactly, so results do not depend on how the images were shared out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch


class Accumulator(ABC):
    """Gathers what a metric observes of one set of images.

    Class attributes:
        statistic: A word for what it accumulates, which is part of the names of cached statistics.
        lasting: Whether `state` and `from_state` can keep it on disk.
    """

    statistic: ClassVar[str]
    lasting: ClassVar[bool] = False

    @abstractmethod
    def add(self, values: torch.Tensor, first: int = 0) -> None:
        """Take in what a metric observed of the images with numbers from `first` on."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take in another accumulator of the same class, which has seen another part of the same set of images."""

    @abstractmethod
    def result(self) -> Any:
        """Return what Metric.compute is given once all images have been taken in."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors from which `from_state` makes an equal accumulator."""
        raise NotImplementedError(f"a {type(self).__name__} is not kept on disk")

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Accumulator:
        """Return the accumulator whose `state` these tensors are.

        Raises:
            ValueError, KeyError: if they are no such state.
        """
        raise NotImplementedError(f"a {cls.__name__} is not kept on disk")


class Rows(Accumulator):
    """Keeps values [n, ...] as they are. The result is one tensor, in the order of the images."""

    statistic, lasting = "rows", True

    def __init__(self):
        self.parts: dict[int, torch.Tensor] = {}

    def add(self, values: torch.Tensor, first: int = 0) -> None:
        self.parts[first] = values

    def merge(self, other: Rows) -> None:
        self.parts |= other.parts

    def result(self) -> torch.Tensor:
        return torch.cat([self.parts[first] for first in sorted(self.parts)])

    def state(self) -> dict[str, torch.Tensor]:
        return {"rows": self.result()}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Rows:
        self = cls()
        self.add(state["rows"])
        return self


class Moments(Accumulator):
    """Count, mean and covariance of rows [d] in float64. Up to d rows are kept as they are; more are summed up as their
    sum [d] and second moment [d, d], so memory is d^2 numbers at most.

    Any number of ranks and any batches give the same moments up to the rounding of float64.

    Args:
        d: The width of the rows; by default that of the first ones.
    """

    statistic, lasting = "moments", True

    def __init__(self, d: int | None = None):
        self.width, self.count = d, 0
        self.rows: list[torch.Tensor] | None = []
        self.total = self.second = torch.empty(0, dtype=torch.float64)  # once there are more rows

    @property
    def d(self) -> int:
        """The width of the rows, which is known once there are any."""
        assert self.width is not None
        return self.width

    def add(self, values: torch.Tensor, first: int = 0) -> None:
        """Take in rows [n, d] of any float type; their order does not matter."""
        if not len(values):
            return
        self.width = self.width or values.shape[1]
        self.count += len(values)
        if self.rows is not None and self.count <= self.d:
            self.rows.append(values.detach().cpu().double())
            return
        self._condense()
        self._accumulate(values.detach().cpu().double())

    def _condense(self) -> None:
        if self.rows is not None:
            rows, self.rows = self.rows, None
            self.total = torch.zeros(self.d, dtype=torch.float64)
            self.second = torch.zeros(self.d, self.d, dtype=torch.float64)
            for part in rows:
                self._accumulate(part)

    def _accumulate(self, x: torch.Tensor) -> None:
        self.total += x.sum(dim=0)
        self.second.addmm_(x.t(), x)

    def merge(self, other: Moments) -> None:
        self.width = self.width or other.width
        if other.rows is not None:
            for part in other.rows:
                self.add(part)
        else:
            self._condense()
            self.total += other.total
            self.second += other.second
            self.count += other.count

    def result(self) -> Moments:
        assert self.count
        return self

    def mean(self) -> torch.Tensor:
        """Return the mean of the rows, float64 [d]."""
        total = self.total if self.rows is None else torch.cat(self.rows).sum(dim=0)
        return total / self.count

    def centred(self) -> torch.Tensor | None:
        """Return rows A [n, d] of which A^T A is the covariance, or None if there are too many to be kept."""
        if self.rows is None:
            return None
        rows = torch.cat(self.rows)
        return (rows - rows.sum(dim=0) / self.count).div_(math.sqrt(max(self.count - 1, 1)))

    def covariance(self) -> torch.Tensor:
        """Return the unbiased covariance of the rows, float64 [d, d]."""
        rows = self.centred()
        if rows is not None:
            return rows.t() @ rows
        mean = self.mean()
        n = max(self.count - 1, 1)
        return torch.addr(self.second, mean, mean, beta=1 / n, alpha=-self.count / n)

    def state(self) -> dict[str, torch.Tensor]:
        count = torch.tensor([self.count, self.d])
        if self.rows is not None:
            return {"count": count, "rows": torch.cat([torch.empty(0, self.d, dtype=torch.float64), *self.rows])}
        return {"count": count, "total": self.total, "second": self.second}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Moments:
        count, d = (int(n) for n in state["count"])
        self = cls(d)
        self.count = count
        if "rows" in state:
            self.rows = [state["rows"].double()]
            fits = state["rows"].shape == (count, d)
        else:
            self.rows, self.total, self.second = None, state["total"].double(), state["second"].double()
            fits = self.total.shape == (d,) and self.second.shape == (d, d)
        if not fits or count < 1:
            raise ValueError(f"{count} rows of {d} features do not fit their tensors")
        return self
