"""All rows of benchmarks/systems.py by name."""

from __future__ import annotations

from rows import denoising, energies, points
from rows.trial import Row

ROWS: dict[str, Row] = {row.name: row for module in (points, energies, denoising) for row in module.ROWS}
