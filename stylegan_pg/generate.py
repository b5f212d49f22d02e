"""From a generator to pictures: latents by seed, grids, interpolations, files."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stylegan_pg.errors import UsageError
from stylegan_pg.snapshot import load_snapshot

MOST_NUMBERS = 1_000_000  # that one text may stand for


def parse_numbers(text: str) -> list[int]:
    """'0-3,8' -> [0, 1, 2, 3, 8].

    Raises:
        UsageError: if the text is no list of numbers and ranges.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise UsageError(f"{text!r} is no list of numbers: write for example 0-63 or 1,5,9")
        if last - first >= MOST_NUMBERS - len(numbers):
            raise UsageError(f"{text!r} stands for more than {MOST_NUMBERS} numbers: give fewer at a time")
        numbers += range(first, last + 1)
    return numbers


def latents(seeds: Sequence[int], z_dim: int) -> torch.Tensor:
    """z [N, z_dim] float32 for seeds of 0 to 2^32 - 1, the ones that the public StyleGAN tools draw for them."""
    try:
        rows = [np.random.RandomState(seed).randn(1, z_dim) for seed in seeds]
    except ValueError as error:
        raise UsageError(f"seeds lie between 0 and 4294967295: {error}") from None
    return torch.from_numpy(np.concatenate(rows)).float()


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float -> uint8 [N, C, H, W], rounded and clipped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def images_of(
    G: Any, z: torch.Tensor, c: torch.Tensor | None = None, *, batch: int = 32, **how: Any
) -> Iterator[torch.Tensor]:
    """uint8 batches [n, C, R, R] on the CPU for latents z [N, z_dim] and conditions c [N, c_dim].

    Each image depends on its own latent only; `how` goes to the generator (psi, cutoff, alpha, noise).
    """
    device = next(G.parameters()).device
    dtype = next(G.parameters()).dtype
    for i in range(0, len(z), batch):
        condition = None if c is None else c[i : i + batch].to(device, dtype)
        yield to_uint8(G(z[i : i + batch].to(device, dtype), condition, **how)).cpu()


def to_pil(image: torch.Tensor | np.ndarray) -> Image.Image:
    """uint8 [C, H, W], C = 1, 3 or 4 -> a Pillow image."""
    array = np.asarray(image).transpose(1, 2, 0)
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))


def tile(images: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 [N, C, H, W] -> one image [C, rows H, columns W], row by row; the last row is filled up with black."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    full = torch.cat([images, images.new_zeros([rows * columns - n, c, h, w])])
    return full.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def save_image(image: torch.Tensor, path: Path) -> None:
    """Write uint8 [C, H, W] as PNG, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    to_pil(image).save(temporary, format="PNG")
    temporary.replace(path)


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
    """uint8 [N, C, R, R]: `steps` images from each seed towards the next, linearly in w, and the last seed itself."""
    device, dtype = next(G.parameters()).device, next(G.parameters()).dtype
    z = latents(seeds, G.z_dim).to(device, dtype)
    ws = G.styles(z, None if c is None else c.to(device, dtype), psi=psi, cutoff=cutoff)
    path = [torch.lerp(a, b, t / steps) for a, b in itertools.pairwise(ws) for t in range(steps)]
    alpha = getattr(G, "description", {}).get("alpha", 1.0)
    frames = torch.stack([*path, ws[-1]]).split(batch)
    return torch.cat([to_uint8(G.synthesis(f, alpha=alpha, noise=noise)).cpu() for f in frames])


def labels_to_c(G: Any, labels: str | None, count: int) -> torch.Tensor | None:
    """Conditions [count, c_dim] from a text such as '3', '0-9' or 'cat,dog' (repeated until there are `count`).

    Without a text, a conditional generator goes through its classes in turn.

    Raises:
        UsageError: for labels on an unconditional generator, or ones it does not know.
    """
    c_dim: int = G.c_dim
    if not c_dim:
        if labels is not None:
            raise UsageError("this generator is unconditional: leave --labels away")
        return None
    names = list(getattr(G, "description", {}).get("label_names") or [])
    if labels is None:
        numbers = list(range(c_dim))
    elif all(part.strip() in names for part in labels.split(",")):
        numbers = [names.index(part.strip()) for part in labels.split(",")]
    else:
        some = f" ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''})" if names else ""
        try:
            numbers = parse_numbers(labels)
        except UsageError as error:
            known = f"; or name some of its {c_dim} classes{some}" if names else ""
            raise UsageError(f"--labels: {error}{known}") from None
    if max(numbers) >= c_dim:
        raise UsageError(f"label {max(numbers)} is not one of the {c_dim} classes{some}")
    chosen = torch.tensor([numbers[i % len(numbers)] for i in range(count)])
    return torch.nn.functional.one_hot(chosen, c_dim).float()


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda -> a device; UsageError for anything else and for CUDA where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not possible: auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device cuda: torch finds no CUDA device; use auto or cpu")
    return torch.device(name)


def sample(snapshot: Path, out: Path, **how: Any) -> Iterator[str]:
    """Write a snapshot's images for the seeds into a folder; yields a line for each file written.

    One PNG per seed, or with `grid` one picture of all, or with `interpolate` a strip from seed to seed; see _sample
    for what `how` holds.

    Raises:
        UsageError: for seeds, labels, noise, devices or files that are not to be had, and folders not to be written.
    """
    try:
        yield from _sample(snapshot, out, **how)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error}") from None


def _sample(
    snapshot: Path,
    out: Path,
    *,
    seeds: str,
    psi: float,
    cutoff: int | None,
    labels: str | None,
    grid: bool,
    columns: int,
    interpolate: int,
    noise: str,
    batch: int,
    device: str,
) -> Iterator[str]:
    if noise not in ("const", "random", "none"):
        raise UsageError(f"noise {noise!r} is not possible: const, random or none")
    if not math.isfinite(psi):
        raise UsageError(f"psi={psi} is not possible: it must be a finite number, 0.7 for example")
    numbers = parse_numbers(seeds)
    G = load_snapshot(snapshot, choose_device(device))
    c = labels_to_c(G, labels, len(numbers))
    out.mkdir(parents=True, exist_ok=True)
    if interpolate:
        frames = interpolation(G, numbers, interpolate, c, psi=psi, cutoff=cutoff, noise=noise, batch=batch)
        path = out / "interpolation.png"
        save_image(tile(frames, columns or len(frames)), path)
        yield str(path)
        return
    how = {"psi": psi, "cutoff": cutoff, "noise": noise}
    if grid:
        images = torch.cat(list(images_of(G, latents(numbers, G.z_dim), c, batch=batch, **how)))
        path = out / "grid.png"
        save_image(tile(images, columns or math.ceil(math.sqrt(len(images)))), path)
        yield str(path)
        return
    for i in range(0, len(numbers), batch):
        some = numbers[i : i + batch]
        condition = None if c is None else c[i : i + batch]
        (images,) = images_of(G, latents(some, G.z_dim), condition, batch=batch, **how)
        for seed, image in zip(some, images, strict=True):
            path = out / f"seed{seed:06d}.png"
            save_image(image, path)
            yield str(path)
