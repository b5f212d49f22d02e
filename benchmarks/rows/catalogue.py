"""All rows of benchmarks/systems.py by name."""

from __future__ import annotations

from rows import improved, points
from rows.trial import Row

ROWS: dict[str, Row] = {row.name: row for module in (points, improved) for row in module.ROWS}
