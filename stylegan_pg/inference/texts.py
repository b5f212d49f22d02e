"""Texts of generators that make characters instead of pictures: one line for each seed, in samples.txt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg import files
from stylegan_pg.data.classes import conditions_at
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import finite, latents, writing
from stylegan_pg.networks.chars import to_texts
from stylegan_pg.untrusted import printable

FILE = "samples.txt"


def makes_texts(G: Any) -> bool:
    """Whether a generator makes characters."""
    return hasattr(G, "alphabet")


@torch.no_grad()
def texts_of(G: Any, z: torch.Tensor, c: torch.Tensor | None = None, *, batch: int = 64) -> list[str]:
    """The texts of latents z [N, z_dim] and conditions c [N, c_dim].

    Raises:
        RunError: the probabilities are not finite.
    """
    place = next(G.parameters())
    found = []
    for i in range(0, len(z), batch):
        given = [t[i : i + batch].to(place.device, place.dtype) for t in (z, c) if t is not None]
        found += to_texts(finite(G(*given)), G.alphabet)
    return found


def sample_texts(
    G: Any, out: Path, pairs: Sequence[tuple[int, int]], batch: int, refused: Sequence[str]
) -> Iterator[str]:
    """Write OUT/samples.txt with a line for each pair of seed and class; yields its path.

    Args:
        refused: options that were given and are of pictures.

    Raises:
        UsageError: there are such options, or the folder cannot be written.
    """
    if refused:
        raise UsageError(
            f"{' and '.join(refused)}: this generator makes texts, which are written to {FILE}, one a line"
        )
    z = latents([seed for seed, _ in pairs], G.z_dim)
    lines = texts_of(G, z, conditions_at(G, [k for _, k in pairs]) if G.c_dim else None, batch=batch)
    path = out / FILE
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    yield str(path)


def refuse_texts(G: Any, what: str, named: object) -> None:
    """
    Raises:
        UsageError: `what`, such as "metrics", needs pictures, and this generator makes texts.
    """
    if makes_texts(G):
        raise UsageError(
            f"{printable(named)} makes texts, not pictures, so there are no {what} of it: `stylegan-pg sample` writes "
            "its texts, and from Python G.texts(z) returns them"
        )
