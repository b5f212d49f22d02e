"""Accumulators gather statistics of a set of images that several ranks process block by block.

Accumulators of different ranks and blocks merge exactly, so results do not depend on how the images were distributed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch


class Accumulator(ABC):
    """Accumulates the values that a metric observes in one set of images.

    Class attributes:
        statistic: The name of the accumulated statistic, which is part of the keys of cached statistics.
        cacheable: Whether the class implements `state` and `from_state`, so that it can be cached on disk.
    """

    statistic: ClassVar[str]
    cacheable: ClassVar[bool] = False

    @abstractmethod
    def add(self, values: torch.Tensor, first: int = 0) -> None:
        """Add values [n, ...] of the images with the numbers `first` to `first + n - 1`."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Add the contents of another accumulator of the same class that received other images of the same set."""

    @abstractmethod
    def result(self) -> Any:
        """Return the argument of Metric.compute. It is called after all images have been added."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors from which `from_state` builds an equal accumulator."""
        raise NotImplementedError(f"{type(self).__name__} cannot be cached on disk")

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Accumulator:
        """Build an accumulator from the tensors that `state` returned.

        Raises:
            ValueError, KeyError: if the tensors do not fit this class.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be cached on disk")


class Rows(Accumulator):
    """Stores all values [n, ...] unchanged. The result is one tensor in the order of the images."""

    statistic, cacheable = "rows", True

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
    """Count, mean and covariance of rows [d] in float64. Up to d rows are stored unchanged; beyond that only their sum
    [d] and second moment [d, d] are stored. Memory is therefore at most d^2 numbers.

    The moments do not depend on the number of ranks or on the batch size, except for the rounding of float64.

    Args:
        d: The width of the rows. By default it is taken from the first rows.
    """

    statistic, cacheable = "moments", True

    def __init__(self, d: int | None = None):
        self.width, self.count = d, 0
        self.rows: list[torch.Tensor] | None = []
        self.total = self.second = torch.empty(0, dtype=torch.float64)  # used once there are more than d rows

    @property
    def d(self) -> int:
        """The width of the rows. It is known after the first rows have been added."""
        assert self.width is not None
        return self.width

    def add(self, values: torch.Tensor, first: int = 0) -> None:
        """Add rows [n, d] of any float type. Their order does not matter."""
        if not len(values):
            return
        self.width = self.width or values.shape[1]
        self.count += len(values)
        if self.rows is not None and self.count <= self.d:
            self.rows.append(values.detach().cpu().double())
            return
        self._replace_rows_by_sums()
        self._accumulate(values.detach().cpu().double())

    def _replace_rows_by_sums(self) -> None:
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
            self._replace_rows_by_sums()
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
        """Return rows A [n, d] such that A^T A is the covariance, or None if only the sums are stored."""
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
