"""Images from a generator: latents by seed, sample grids, rows of classes, interpolations."""

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

# Errors that choosing another folder would not solve: a full or missing disk.
OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
LARGEST_PSI = 1000.0  # far beyond useful values


def latents(seeds: Sequence[int], z_dim: int) -> torch.Tensor:
    """Latents z [N, z_dim] (float32) for seeds in [0, 2^32), equal to those of the public StyleGAN tools."""
    try:
        rows = [np.random.RandomState(seed).randn(1, z_dim) for seed in seeds]
    except ValueError as error:
        raise UsageError(f"seeds lie between 0 and 4294967295: {error}") from None
    return torch.from_numpy(np.concatenate(rows)).float()


def finite(images: torch.Tensor) -> torch.Tensor:
    """Return the images; raise RunError if they contain NaN or infinity, which would be converted to colours."""
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
    """Generate images for latents z [N, z_dim] and conditions c [N, c_dim]; yields uint8 batches [n, C, H, W] on the
    CPU.

    Each image depends on its own latent only. `how` holds keyword arguments of the generator (psi, cutoff, alpha,
    noise); those that it does not accept are dropped.

    Raises:
        RunError: the images are not finite. UsageError: psi is not 1, and the generator has no ws.
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
    """Turn errors of writing into a folder, within the block, into one message.

    Raises:
        RunError: the disk is full or faulty. UsageError: the folder cannot be written to.
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
    """Interpolate linearly in w: `steps` images from each seed towards the next, and the last seed; uint8 [N, C, H,
    W]. A generator without w is interpolated in z, on the great circles between directions of latents.

    Raises:
        UsageError: psi is not 1, and the generator has no ws.
    """
    device, dtype = next(G.parameters()).device, next(G.parameters()).dtype
    z = latents(seeds, G.z_dim).to(device, dtype)
    if not hasattr(G, "styles"):
        t = torch.arange(steps, device=device, dtype=dtype)[:, None] / steps
        path = [between(a, b, t) for a, b in itertools.pairwise(z)]
        rows = None
        if c is not None:
            mixed = [torch.lerp(a, b, t) for a, b in itertools.pairwise(c.to(device, dtype))]
            rows = torch.cat([*mixed, c[-1:].to(device, dtype)])
        return torch.cat(list(images_of(G, torch.cat([*path, z[-1:]]), rows, batch=batch, psi=psi)))
    ws = G.styles(z, None if c is None else c.to(device, dtype), psi=psi, cutoff=cutoff)
    path = [torch.lerp(a, b, t / steps) for a, b in itertools.pairwise(ws) for t in range(steps)]
    alpha = getattr(G, "description", {}).get("alpha", 1.0)
    frames = torch.stack([*path, ws[-1]]).split(batch)
    return torch.cat([to_uint8(finite(G.synthesis(f, alpha=alpha, noise=noise))).cpu() for f in frames])


def between(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Latents [n, d] between a and b (each [d] or [n, d]), at t [n, 1] in [0, 1]: on the great circle between their
    directions, with lengths in between. Components of linear mixtures would have a smaller variance than those of
    latents."""
    lengths = [v.norm(dim=-1, keepdim=True).clamp(min=1e-12) for v in (a, b)]
    u, v = a / lengths[0], b / lengths[1]
    cosine = (u * v).sum(dim=-1, keepdim=True)
    across = v - cosine * u
    angle = t * cosine.clamp(-1, 1).acos()
    direction = u * angle.cos() + across / across.norm(dim=-1, keepdim=True).clamp(min=1e-12) * angle.sin()
    return direction * torch.lerp(lengths[0], lengths[1], t)


def class_rows(classes: Sequence[int], rows: int) -> list[int]:
    """The class of each row of a grid: all classes in turn, repeated; if there are more classes than rows, an evenly
    spaced selection."""
    n = len(classes)
    return [classes[i % n] if n <= rows else classes[i * n // rows] for i in range(rows)]


def grid_inputs(
    G: Any, columns: int, rows: int, classes: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The fixed inputs of a run's sample grid: z [rows * columns, z_dim], and c [rows * columns, c_dim] or None.

    With `classes` (those that occur in the dataset) each row shows one class (see `class_rows`), and all classes use
    the same latents; a row that repeats a class uses the next ones.
    """
    if not classes:
        return latents(range(columns * rows), G.z_dim), None
    seeds = [row // len(classes) * columns + column for row in range(rows) for column in range(columns)]
    chosen = [k for k in class_rows(classes, rows) for _ in range(columns)]
    return latents(seeds, G.z_dim), one_hot(chosen, G.c_dim)


def grid_ordinals(labels: np.ndarray, columns: int, rows: int, classes: Sequence[int] = ()) -> list[int]:
    """The ordinals of the real images for a grid that corresponds to `grid_inputs`, evenly spaced in the dataset or,
    with `classes`, among the images of each row's class. `labels` [count] are the classes of the dataset's images."""
    if not classes:
        return [i * len(labels) // (columns * rows) for i in range(columns * rows)]
    chosen, turns = class_rows(classes, rows), -(-rows // len(classes))
    result = []
    for row, k in enumerate(chosen):
        there, first = np.flatnonzero(labels == k), row // len(classes) * columns
        result += [int(there[(first + i) * len(there) // (turns * columns)]) for i in range(columns)]
    return result
