"""All rows of benchmarks/systems.py by name."""

from __future__ import annotations

from rows import anime, codes, denoising, energies, improved, labelled, points, wasserstein
from rows.trial import Row

MODULES = (points, wasserstein, improved, labelled, codes, energies, denoising, anime)
ROWS: dict[str, Row] = {row.name: row for module in MODULES for row in module.ROWS}
