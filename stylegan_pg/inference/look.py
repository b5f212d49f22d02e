"""The options of how a generator's images are made, checked: truncation, noise and the batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import LARGEST_PSI
from stylegan_pg.inference.sampling import NOISE, PSI
from stylegan_pg.untrusted import printable


@dataclass(frozen=True)
class Look:
    """How images are made.

    psi, cutoff: Truncation, see Generator.styles; 1 and None for generators without ws.
    noise: const, random or none. Random noise is a function of `seed` and the number of the image.
    batch: Images that are generated together.
    """

    psi: float = 1.0
    cutoff: int | None = None
    noise: str = "const"
    batch: int = 16
    seed: int = 0


def look_for(
    G: Any,
    *,
    psi: float | None = None,
    cutoff: int | None = None,
    noise: str = "const",
    batch: int = 16,
    seed: int = 0,
) -> Look:
    """Check these options for a generator, and return them. psi=None is 0.7, or 1 for a generator without ws.

    Raises:
        UsageError: One of them is not possible, or not with this generator.
    """
    has_ws = hasattr(G, "styles")
    psi = (PSI if has_ws else 1.0) if psi is None else psi
    if noise not in NOISE:
        raise UsageError(f"noise {printable(repr(noise))} is not possible: {', '.join(NOISE)}")
    if not abs(psi) <= LARGEST_PSI:
        raise UsageError(f"psi={psi} is not possible: give a number near 0 to 1, 0.7 for example")
    if psi != 1 and not has_ws:
        raise UsageError(f"psi={psi}: this generator has no ws, so there is nothing to truncate; take psi=1")
    if cutoff is not None and not has_ws:
        raise UsageError(f"--cutoff {cutoff}: this generator has no ws to truncate")
    if cutoff is not None and not 0 <= cutoff <= G.num_ws:
        raise UsageError(f"--cutoff {cutoff} is not one of 0 to {G.num_ws}, the number of this generator's layers")
    if batch < 1:
        raise UsageError(f"batch={batch}: give 1 or more images at a time")
    return Look(psi, cutoff, noise, batch, seed)
