"""All rows of benchmarks/systems.py by name."""

from __future__ import annotations

from rows import points, wasserstein
from rows.trial import Row

ROWS: dict[str, Row] = {row.name: row for module in (points, wasserstein) for row in module.ROWS}
