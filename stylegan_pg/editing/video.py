"""Videos of walks: a grid of cells, each of which walks smoothly through its keyframes and returns to the first, with
style mixing of two walks on request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.data.classes import conditions_at, parse_classes, parse_numbers
from stylegan_pg.editing import encoding, walks
from stylegan_pg.editing.interpolate import MOST_FRAMES, default_path
from stylegan_pg.editing.mix import mixed, parse_layers
from stylegan_pg.editing.rendering import (
    has_layers,
    images_of_latents,
    images_of_styles,
    pictured,
    styles_of_latents,
)
from stylegan_pg.errors import UsageError
from stylegan_pg.images import tile
from stylegan_pg.inference.generate import latents
from stylegan_pg.inference.look import Look, look_for
from stylegan_pg.inference.sampling import MAX_PIXELS, enough_memory
from stylegan_pg.untrusted import printable

WALKS = ("spline", "gaussian")
KEYFRAME_SEC = 2.0  # from each keyframe to the next, by default
FEWEST_KEYFRAMES = 3
MOST_CELLS = 1024
MOST_SEEDS = 1 << 32


def parse_grid(text: str) -> tuple[int, int]:
    """'3x2' -> (3, 2), columns and rows. Raises UsageError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text.strip(), re.ASCII)
    if not found or int(found[1]) * int(found[2]) > MOST_CELLS:
        raise UsageError(f"grid {printable(repr(text))}: give columns x rows, such as 3x2, at most {MOST_CELLS} cells")
    return int(found[1]), int(found[2])


def video(
    G: Any,
    keys: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    columns: int = 1,
    rows: int = 1,
    frames: int,
    walk: str = "spline",
    layers: Sequence[int] | None = None,
    look: Look | None = None,
) -> Iterator[torch.Tensor]:
    """Generate the frames of a grid of closed walks; yields uint8 images [C, rows H, columns W].

    Args:
        keys: Latents [walks, keyframes, z_dim] of each walk's keyframes; see `number_of_walks`.
        c: Conditions [walks, keyframes, c_dim] of a conditional generator.
        frames: The number of all frames. The last one comes one step before the first.
        walk: "spline": the periodic cubic spline through the keyframes' styles or, for a generator without a w for
            each layer, through their latents, scaled to the variance of latents. "gaussian": latents smoothed over time
            by a Gaussian filter, which do not pass through the keyframes (walks.filtered_weights).
        layers: With numbers of layers, styles are mixed: the cell in row i and column j takes these layers from walk
            rows + j, and the others from walk i. Without, cell number k, counted row by row, shows walk k.
        look: Options; None for look_for(G).

    Raises:
        UsageError: An option is not possible. RunError: the images are not finite.
    """
    look = look or look_for(G)
    if walk not in WALKS:
        raise UsageError(f"walk {printable(repr(walk))} is not possible: {', '.join(WALKS)}")
    if not 1 <= frames <= MOST_FRAMES:
        raise UsageError(f"frames={frames}: give 1 to {MOST_FRAMES}")
    if len(keys) != number_of_walks(columns, rows, layers):
        raise UsageError(f"{len(keys)} walks for {columns}x{rows} cells: {number_of_walks(columns, rows, layers)} fit")
    walks.check_keys(walks.CUBIC, keys.shape[1])
    return _frames(G, keys, c, columns, rows, frames, walk, layers, look)


def number_of_walks(columns: int, rows: int, layers: Sequence[int] | None) -> int:
    """One walk for each cell or, with style mixing, one for each row and each column."""
    return columns * rows if layers is None else columns + rows


def _frames(
    G: Any,
    keys: torch.Tensor,
    c: torch.Tensor | None,
    columns: int,
    rows: int,
    frames: int,
    walk: str,
    layers: Sequence[int] | None,
    look: Look,
) -> Iterator[torch.Tensor]:
    """Generate. Each chunk of frames is computed when it is due, so memory does not grow with the frames."""
    (count, keyframes), cells = keys.shape[:2], columns * rows
    in_w = walk == "spline" and has_layers(G)
    path = keys
    if in_w:
        ws = styles_of_latents(G, keys.flatten(0, 1), None if c is None else c.flatten(0, 1), look).cpu()
        path = ws.unflatten(0, (count, keyframes))
    flat = path.flatten(2).double()
    chunk = max(1, look.batch // cells)
    for first in range(0, frames, chunk):
        at = walks.positions(frames, keyframes, True, first, min(first + chunk, frames))
        spline = walks.weights(at, keyframes, walks.CUBIC, True)
        mixture = spline if in_w else walks.normalised(spline)
        if walk == "gaussian":
            mixture = walks.filtered_weights(at, keyframes)
        x = torch.einsum("nk,wkd->nwd", mixture, flat).float().unflatten(2, path.shape[2:])  # [n, walks, ...]
        conditions = None
        if c is not None and not in_w:
            conditions = torch.einsum("nk,wkd->nwd", walks.weights(at, keyframes, "smooth", True), c.double()).float()
        if not in_w and layers is not None:  # latents become styles, which are then mixed
            rest = None if conditions is None else conditions.flatten(0, 1)
            x = styles_of_latents(G, x.flatten(0, 1), rest, look).unflatten(0, x.shape[:2])
        if layers is not None:
            x = mixed(x[:, :rows, None], x[:, None, rows:], layers).flatten(1, 2)
        if in_w or layers is not None:
            batches = images_of_styles(G, x.flatten(0, 1), look, first * cells)
        else:
            rest = None if conditions is None else conditions.flatten(0, 1)
            batches = images_of_latents(G, x.flatten(0, 1), rest, look, first * cells)
        for images in torch.cat(list(batches)).split(cells):
            yield tile(images, columns)


def walk_latents(seeds: Sequence[int], count: int, keyframes: int, z_dim: int) -> torch.Tensor:
    """Latents [count, keyframes, z_dim] of walks.

    One seed is the first of consecutive ones, which go to the keyframes of the first walk, then to those of the second,
    and so on. Several seeds are taken in the same way, and repeated; if they are not more than the keyframes of one
    walk, each walk begins one seed later than the one before.

    Raises:
        UsageError: Seeds are not in [0, 2^32).
    """
    total = count * keyframes
    if len(seeds) == 1:
        if seeds[0] + total > MOST_SEEDS:
            raise UsageError(f"seeds {seeds[0]} to {seeds[0] + total - 1} are needed: they lie below {MOST_SEEDS}")
        chosen = list(range(seeds[0], seeds[0] + total))
    else:
        step = keyframes if len(seeds) > keyframes else 1
        chosen = [seeds[(w * step + k) % len(seeds)] for w in range(count) for k in range(keyframes)]
    return latents(chosen, z_dim).unflatten(0, (count, keyframes))


def walk_conditions(G: Any, labels: str | None, count: int, keyframes: int, by: str = "walk") -> torch.Tensor | None:
    """Conditions [count, keyframes, c_dim] of walks, None for an unconditional generator.

    Args:
        labels: Classes, see classes.parse_classes; they are repeated. None: all classes.
        by: "walk": each walk keeps its class. "keyframe": a walk's keyframes have the classes in turn.

    Raises:
        UsageError: The generator does not know a label, or `by` is not possible.
    """
    if by not in ("walk", "keyframe"):
        raise UsageError(f"labels by {printable(repr(by))} is not possible: walk, keyframe")
    classes = parse_classes(G, labels)
    if not classes:
        return None
    numbers = [(w if by == "walk" else k) % len(classes) for w in range(count) for k in range(keyframes)]
    return conditions_at(G, [classes[i] for i in numbers]).unflatten(0, (count, keyframes))


def video_command(
    snapshot: Path,
    out: Path | None,
    *,
    grid: str,
    seconds: float,
    fps: float,
    keyframes: int | None,
    seeds: str,
    labels: str | None,
    labels_by: str,
    walk: str,
    mix: str | None,
    format: str | None,
    scale: int,
    psi: float | None,
    cutoff: int | None,
    noise: str,
    batch: int,
    device: str,
    progress: bool = True,
) -> Path:
    """What `stylegan-pg video` does; returns the path of the file or folder. It has round(seconds * fps) frames.

    Args:
        out: By default NAME-video beside the snapshot, with the suffix of `format`, which is mp4 if none is given.
        keyframes: Of each walk; by default one for every 2 seconds, at least 3, or as many as several seeds suffice
            for.
        mix: Layers that are mixed, see mix.parse_layers.

    Raises:
        UsageError: An option is invalid, PyAV is missing, or the file cannot be written. RunError: the disk is full,
            memory is short, or the generator has diverged.
    """
    columns, rows = parse_grid(grid)
    numbers = parse_numbers(seeds)
    latents([max(numbers)], 1)  # refuses those that are too large
    to = encoding.target(default_path(snapshot, "video", format) if out is None else out, format, fps=fps, scale=scale)
    if not 0 < seconds * fps < MOST_FRAMES:
        raise UsageError(f"seconds={seconds}: give a time above 0, of at most {MOST_FRAMES} frames")
    frames = max(1, round(seconds * fps))
    if to.format == "strip":
        raise UsageError("a strip shows single frames: use `stylegan-pg interpolate`, or write a folder of frames")
    G = pictured(snapshot, device)
    look = look_for(G, psi=psi, cutoff=cutoff, noise=noise, batch=batch)
    layers = None if mix is None else parse_layers(G, mix)
    count = number_of_walks(columns, rows, layers)
    size = rows * G.img_size[0], columns * G.img_size[1]
    if size[0] * size[1] * scale**2 > MAX_PIXELS:
        raise UsageError(
            f"frames of {size[1] * scale}x{size[0] * scale} pixels are too large: give a smaller grid or --scale"
        )
    if keyframes is None:
        enough = len(numbers) // count if len(numbers) > 1 else round(seconds / KEYFRAME_SEC)
        keyframes = max(min(enough, walks.MOST_CUBIC, walks.MOST_KEYS // count), FEWEST_KEYFRAMES)
    if not 1 <= keyframes <= walks.MOST_CUBIC or keyframes * count > walks.MOST_KEYS:
        raise UsageError(
            f"{keyframes} keyframes of {count} walks: give at most {walks.MOST_CUBIC} of each, and {walks.MOST_KEYS} "
            "of all"
        )
    keys = walk_latents(numbers, count, keyframes, G.z_dim)
    c = walk_conditions(G, labels, count, keyframes, labels_by)
    with enough_memory(batch):
        shown = video(G, keys, c, columns=columns, rows=rows, frames=frames, walk=walk, layers=layers, look=look)
        return encoding.write(shown, frames, size, to, progress=progress)
