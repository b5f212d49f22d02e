"""Figures of numbers: metrics over training and over truncation, and what a configuration schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stylegan_pg import files
from stylegan_pg.untrusted import is_number, json_lines, printable

MOST_AXES = 64
NOT_METRICS = ("nimg", "resolution", "images", "psi", "seconds", "width", "residual")


def _figure(x: str, label: str, rows: Sequence[dict[str, Any]], names: Sequence[str], marker: str = ".") -> Figure:
    """A figure with axes for each name, in which the rows that contain it are drawn over `x`."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * lines), layout="constrained")
    for axes, name in zip(figure.subplots(lines, columns, squeeze=False).flat, names, strict=False):
        points = [(row[x], row[name]) for row in rows if is_number(row.get(name))]
        axes.plot(*zip(*points, strict=True), marker=marker)
        axes.set_title(printable(name, 60), fontsize=10, parse_math=False)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(names) :]:
        axes.set_visible(False)
    return figure


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    found: dict[str, None] = {}
    for row in rows:
        numbers = (name for name, value in row.items() if isinstance(value, float) and is_number(value))
        found |= dict.fromkeys(name for name in numbers if name not in NOT_METRICS and not name.endswith("_kimg"))
    return list(found)[:MOST_AXES]


def curves(log: Path) -> Figure | None:
    """Draw every metric of a run's metrics.jsonl over kimg; None if there are none yet.

    Raises:
        OSError: where the log cannot be read.
    """
    rows = [row | {"kimg": row["nimg"] / 1000} for _, row in json_lines(log)]
    names = [name for name in _names(rows) if name != "kimg"]
    return _figure("kimg", "images shown (thousands)", rows, names) if names else None


def draw_curves(log: Path, path: Path) -> None:
    """Write `curves` to a PNG file.

    Raises:
        OSError: where files cannot be read or written.
    """
    if figure := curves(log):
        _save(figure, path)


def draw_lines(rows: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """Draw numbers over "kimg" into a PNG file, each in axes of its own.

    Raises:
        OSError: where the file cannot be written.
    """
    _save(_figure("kimg", "images shown (thousands)", rows, names, marker=""), path)


def draw_sweep(rows: Sequence[dict[str, Any]], path: Path, x: str = "psi", label: str = "truncation psi") -> None:
    """Draw every metric over the truncation psi, or another number of the rows, into a PNG file.

    Raises:
        OSError: where the file cannot be written.
    """
    if names := _names(rows):
        _save(_figure(x, label, rows, names), path)
