"""From a generator to pictures: latents by seed, grids, rows of classes, interpolations."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylegan_pg.data.classes import one_hot
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.networks import accepted
from stylegan_pg.untrusted import printable

# What no other folder would mend: a disk that is full, or gone.
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
LARGEST_PSI = 1000.0  # far beyond what gives pictures


def latents(seeds: Sequence[int], z_dim: int) -> torch.Tensor:
    """z [N, z_dim] float32 for seeds of 0 to 2^32 - 1, the ones that the public StyleGAN tools draw for them."""
    try:
        rows = [np.random.RandomState(seed).randn(1, z_dim) for seed in seeds]
    except ValueError as error:
        raise UsageError(f"seeds lie between 0 and 4294967295: {error}") from None
    return torch.from_numpy(np.concatenate(rows)).float()


def finite(images: torch.Tensor) -> torch.Tensor:
    """The same images; raises RunError for ones with NaN or infinity in them, which would be seen as colours."""
    if not images.isfinite().all():
        raise RunError(
            "the generator makes images that are not finite (NaN or infinity): its weights have diverged, or psi is "
            "too large; take an earlier snapshot, or psi between 0 and 1"
        )
    return images


@torch.no_grad()
def images_of(
    G: Any, z: torch.Tensor, c: torch.Tensor | None = None, *, batch: int = 32, **how: Any
) -> Iterator[torch.Tensor]:
    """uint8 batches [n, C, H, W] on the CPU for latents z [N, z_dim] and conditions c [N, c_dim].

    Each image depends on its own latent only; `how` goes to the generator, as far as it knows such arguments (psi,
    cutoff, alpha, noise).

    Raises:
        RunError: for images that are not finite, of which none would be left but black; UsageError: for a psi other
            than 1 where the generator has no ws.
    """
    known = accepted(G, **how)
    if "psi" not in known and how.get("psi", 1.0) != 1.0:
        raise UsageError(f"psi={how['psi']}: this generator has no ws, so there is nothing to truncate; take psi=1")
    device = next(G.parameters()).device
    dtype = next(G.parameters()).dtype
    for i in range(0, len(z), batch):
        given = [] if c is None else [c[i : i + batch].to(device, dtype)]
        yield to_uint8(finite(G(z[i : i + batch].to(device, dtype), *given, **known))).cpu()


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """What cannot be written into a folder that somebody named, as one message.

    Raises:
        RunError: for a disk that is full or faulty; UsageError: for a folder that cannot be written to.
    """
    try:
        yield
    except OSError as error:
        fault = RunError if error.errno in OUTSIDE else UsageError
        raise fault(f"{printable(out)} cannot be written: {printable(error)}") from None


@torch.no_grad()
def interpolation(
    G: Any,
    seeds: Sequence[int],
    steps: int,
    c: torch.Tensor | None = None,
    *,
    psi: float = 1.0,
    cutoff: int | None = None,
    noise: str = "const",
    batch: int = 32,
) -> torch.Tensor:
    """uint8 [N, C, H, W]: `steps` images from each seed towards the next, linearly in w, and the last seed itself."""
    device, dtype = next(G.parameters()).device, next(G.parameters()).dtype
    z = latents(seeds, G.z_dim).to(device, dtype)
    ws = G.styles(z, None if c is None else c.to(device, dtype), psi=psi, cutoff=cutoff)
    path = [torch.lerp(a, b, t / steps) for a, b in itertools.pairwise(ws) for t in range(steps)]
    alpha = getattr(G, "description", {}).get("alpha", 1.0)
    frames = torch.stack([*path, ws[-1]]).split(batch)
    return torch.cat([to_uint8(finite(G.synthesis(f, alpha=alpha, noise=noise))).cpu() for f in frames])


def class_rows(classes: Sequence[int], rows: int) -> list[int]:
    """The class of each row of a grid: one after the other, again and again; of more classes than rows some that are
    evenly spread."""
    n = len(classes)
    return [classes[i % n] if n <= rows else classes[i * n // rows] for i in range(rows)]


def grid_inputs(
    G: Any, columns: int, rows: int, classes: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z [rows columns, z_dim] and c [rows columns, c_dim] or None of a run's sample grid, always the same ones.

    With `classes` (those that the dataset has pictures of) each row shows one of them, as `class_rows` says, and all
    of them the same latents; rows that repeat a class go on with others.
    """
    if not classes:
        return latents(range(columns * rows), G.z_dim), None
    seeds = [row // len(classes) * columns + column for row in range(rows) for column in range(columns)]
    chosen = [k for k in class_rows(classes, rows) for _ in range(columns)]
    return latents(seeds, G.z_dim), one_hot(chosen, G.c_dim)


def grid_ordinals(labels: np.ndarray, columns: int, rows: int, classes: Sequence[int] = ()) -> list[int]:
    """Which real images lie beside `grid_inputs`: places in a dataset whose classes are `labels` [count], evenly spread
    over all of it, or over each row's class."""
    if not classes:
        return [i * len(labels) // (columns * rows) for i in range(columns * rows)]
    chosen, turns = class_rows(classes, rows), -(-rows // len(classes))
    result = []
    for row, k in enumerate(chosen):
        there, first = np.flatnonzero(labels == k), row // len(classes) * columns
        result += [int(there[(first + i) * len(there) // (turns * columns)]) for i in range(columns)]
    return result
