"""A run as the page shows it: status, curves of stats.jsonl and metrics.jsonl, the newest grid."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from stylegan_pg.checkpoint.names import in_order
from stylegan_pg.errors import UsageError
from stylegan_pg.explorer.library import NotFoundError, Source, nimg_of
from stylegan_pg.monitoring import status
from stylegan_pg.untrusted import open_regular, printable

POINTS = 400  # of a curve that is sent
MOST_SERIES = 64  # curves of one file
MOST_ROWS = 100_000  # lines that are kept; every other one is dropped beyond
CHUNK = 1 << 24  # bytes that are read at once
NO_CURVES = {"nimg", "resolution", "batch", "images", "seconds"}
LARGEST_GRID = 64 << 20  # bytes


class Tail:
    """The numbers in a growing .jsonl file, of which only what was added is read. A run that is continued replaces the
    file by a shorter one, which is read from its beginning."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.version = ""  # changes with the content
        self._file: tuple[int, int] | None = None
        self._at = 0

    def read(self) -> None:
        """Read what was added. A file that does not exist or cannot be read has no rows."""
        try:
            file = open_regular(self.path)
        except OSError:
            self.rows, self.version, self._file = [], "", None
            return
        with file:
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._at:
                self.rows, self._file, self._at = [], (found.st_dev, found.st_ino), 0
            file.seek(self._at)
            while chunk := file.read(CHUNK):
                end = chunk.rfind(b"\n") + 1
                if not end:  # an incomplete line, or one of that length, which is skipped
                    self._at += len(chunk) if len(chunk) == CHUNK else 0
                    if len(chunk) < CHUNK:
                        break
                    continue
                for line in chunk[:end].splitlines():
                    self._add(line)
                self._at += end
                file.seek(self._at)
                if len(chunk) < CHUNK:
                    break
        self.version = f"{self._file[1] if self._file else 0}-{self._at}"

    def _add(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        nimg = row.get("nimg") if isinstance(row, dict) else None
        if not isinstance(nimg, int) or isinstance(nimg, bool) or not 0 <= nimg < 1 << 53:
            return
        numbers = {k: v for k, v in row.items() if _is_curve(k, v)}
        self.rows.append((nimg, numbers))
        if len(self.rows) > MOST_ROWS:
            del self.rows[1:-1:2]

    def curves(self, points: int = POINTS) -> dict[str, list[list[float]]]:
        """{name: [[kimg, value], ...]} with at most about `points` points each. A point stands for the mean of the
        values around it."""
        series: dict[str, list[tuple[int, float]]] = {}
        for nimg, numbers in self.rows:
            for name, value in numbers.items():
                if name in series or len(series) < MOST_SERIES:
                    series.setdefault(name, []).append((nimg, value))
        return {name: _thinned(values, points) for name, values in series.items()}


def _is_curve(name: Any, value: Any) -> bool:
    if name in NO_CURVES or isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return len(name) <= 100 and abs(value) < 1e30 and math.isfinite(value)


def _thinned(values: list[tuple[int, float]], points: int) -> list[list[float]]:
    """Means of groups of equal size."""
    group = -(-len(values) // points)
    found = []
    for i in range(0, len(values), group):
        some = values[i : i + group]
        found.append([sum(n for n, _ in some) / len(some) / 1000, sum(v for _, v in some) / len(some)])
    return found


class Progress:
    """What is known of one run. It is used by one thread at a time."""

    def __init__(self, source: Source):
        self.source = source
        self.stats = Tail(source.path / "stats.jsonl")
        self.metrics = Tail(source.path / "metrics.jsonl")

    def read(self, version: str = "") -> dict[str, Any]:
        """The run's state as JSON values: `status` (see monitoring.status.collect, without paths), `snapshots`, `grid`
        (its name for `grid_file` and its nimg, or None), and `curves`, `metrics` unless they are those of `version`."""
        self.stats.read()
        self.metrics.read()
        now = f"{self.stats.version}/{self.metrics.version}"
        newest = self._grids()
        found: dict[str, Any] = {
            "version": now,
            "status": self._status(),
            "snapshots": listed(self.source),
            "grid": {"name": newest[-1].name, "nimg": nimg_of(newest[-1])} if newest else None,
        }
        if now != version:
            found |= {"curves": self.stats.curves(), "metrics": self.metrics.curves()}
        return found

    def _status(self) -> dict[str, Any]:
        try:
            facts = status.collect(self.source.path)
        except (UsageError, OSError) as error:
            return {"state": "unknown", "problem": printable(error)}
        kept = ("state", "silent_sec", "nimg", "end", "phase", "alpha", "img_per_sec", "eta_sec", "starts", "faults")
        return {name: facts[name] for name in kept} | {"ranks": len(facts["ranks"])}

    def _grids(self) -> list[Path]:
        return in_order((self.source.path / "samples").glob("fakes-*.png"))

    def grid_file(self, name: str) -> bytes:
        """The bytes of a grid of this run.

        Raises:
            NotFoundError: there is no grid of that name.
        """
        path = next((p for p in self._grids() if p.name == name), None)
        root = self.source.path.resolve()
        if path is not None and path.resolve().is_relative_to(root):
            try:
                with open_regular(path) as file:
                    content = file.read(LARGEST_GRID + 1)
            except OSError:
                content = b""
            if content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) <= LARGEST_GRID:
                return content
        raise NotFoundError("there is no such grid")


def listed(source: Source) -> list[dict[str, Any]]:
    """The snapshots of a source as JSON values."""
    return [{"name": s.name, "nimg": s.nimg, "best": s.best} for s in source.snapshots()]
