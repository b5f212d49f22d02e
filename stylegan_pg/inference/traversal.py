"""Latents that differ in their codes only, of generators that InfoGAN has trained.

Saved with latent_files.save_latents, `stylegan-pg sample --ws FILE --grid --columns N` renders them.
"""

from __future__ import annotations

from typing import Any

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import latents
from stylegan_pg.inference.latent_files import Latents

FARTHEST = 0.95  # of continuous codes, which are between -1 and 1


def traversal(G: Any, *, seed: int = 0, category: int = 0, continuous: int = 0, columns: int = 10) -> Latents:
    """The latents of a seed with all categories of a categorical code, and with values of a continuous code from -0.95
    to 0.95: a row of `columns` latents for each category, one after another.

    Args:
        G: a generator with codes, such as load_snapshot returns.
        category, continuous: numbers of the codes, from 0 on. Without codes of one of these kinds, there is one row, or
            one column.

    Raises:
        UsageError: the generator has no codes, or none of these numbers.
    """
    law = getattr(G, "law", None)
    if law is None or not (law.categories or law.continuous):
        raise UsageError("the generator has no codes: those of a run with system.name=infogan have")
    if law.categories and not 0 <= category < len(law.categories):
        raise UsageError(f"there is no categorical code {category}: there are {len(law.categories)}, from 0 on")
    if law.continuous and not 0 <= continuous < law.continuous:
        raise UsageError(f"there is no continuous code {continuous}: there are {law.continuous}, from 0 on")
    rows = law.categories[category] if law.categories else 1
    columns = columns if law.continuous else 1
    z = latents([seed], G.z_dim).repeat(rows * columns, 1)
    row, column = torch.arange(rows).repeat_interleave(columns), torch.linspace(-FARTHEST, FARTHEST, columns)
    z = law.with_codes(
        z,
        {category: row} if law.categories else {},
        {continuous: column.repeat(rows)} if law.continuous else {},
    )
    return Latents([f"row{i // columns:03d}-{i % columns:03d}" for i in range(rows * columns)], z=z)
