"""From a generator to pictures: latents by seed, grids, rows of classes, interpolations, files."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from stylegan_pg import files
from stylegan_pg.data.stream import one_hot
from stylegan_pg.errors import UsageError
from stylegan_pg.snapshot import load_snapshot

MOST_NUMBERS = 1_000_000  # that one text may stand for
MOST_ROWS = 100  # classes in one picture
LEAST_HEIGHT = 16  # pixels of a row with its class's name beside it


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
    """uint8 batches [n, C, H, W] on the CPU for latents z [N, z_dim] and conditions c [N, c_dim].

    Each image depends on its own latent only; `how` goes to the generator (psi, cutoff, alpha, noise).
    """
    device = next(G.parameters()).device
    dtype = next(G.parameters()).dtype
    for i in range(0, len(z), batch):
        condition = None if c is None else c[i : i + batch].to(device, dtype)
        yield to_uint8(G(z[i : i + batch].to(device, dtype), condition, **how)).cpu()


def over_white(images: torch.Tensor) -> torch.Tensor:
    """RGBA images [N, 4, H, W] of 0 to 255 as people see them, [N, 3, H, W] over white (uint8 rounded); others as they
    are."""
    if images.shape[1] != 4:
        return images
    wide = images.int() if images.dtype == torch.uint8 else images
    colour, alpha = wide[:, :3], wide[:, 3:].clamp(0, 255)
    if images.dtype == torch.uint8:
        return torch.div(colour * alpha + 255 * (255 - alpha) + 127, 255, rounding_mode="floor").to(torch.uint8)
    return 255 + (colour - 255) * (alpha / 255)


def to_pil(image: torch.Tensor | np.ndarray) -> Image.Image:
    """uint8 [C, H, W], C = 1, 3 or 4 -> a Pillow image of mode L, RGB or RGBA."""
    array = np.asarray(image).transpose(1, 2, 0)
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array))


def tile(images: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 [N, C, H, W] -> one image [C, rows H, columns W], row by row; the last row is filled up with black."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    full = torch.cat([images, images.new_zeros([rows * columns - n, c, h, w])])
    return full.reshape(rows, columns, c, h, w).permute(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)


def save_image(image: torch.Tensor, path: Path) -> None:
    """Write uint8 [C, H, W] as PNG (grey, RGB or RGBA, as C says), by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as file:
        to_pil(image).save(file, format="PNG")


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
    return torch.cat([to_uint8(G.synthesis(f, alpha=alpha, noise=noise)).cpu() for f in frames])


def class_names(G: Any) -> list[str]:
    """What a conditional generator's classes are called: by their numbers where nothing else is known."""
    known = list(getattr(G, "description", {}).get("label_names") or [])
    return [known[i] if i < len(known) else str(i) for i in range(G.c_dim)]


def parse_classes(G: Any, labels: str | None) -> list[int]:
    """Numbers of classes from a text such as '3', '0-9' or 'cat,dog', all of them without a text; [] for an
    unconditional generator.

    Raises:
        UsageError: for labels on an unconditional generator, or ones it does not know, naming those it knows.
    """
    if not G.c_dim:
        if labels is not None:
            raise UsageError("this generator is unconditional: leave --labels away")
        return []
    if labels is None:
        return list(range(G.c_dim))
    names = class_names(G)
    known = f"{G.c_dim} classes ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"
    parts = [part.strip() for part in labels.split(",")]
    unknown = [part for part in parts if part not in names]
    if not unknown:
        return [names.index(part) for part in parts]
    try:
        numbers = parse_numbers(labels)
    except UsageError as error:
        known_ones = set(parts) - set(unknown)
        fault = f"{unknown[0]!r} is unknown" if known_ones else str(error)
        raise UsageError(f"--labels: {fault}; or name some of its {known}") from None
    if max(numbers) >= G.c_dim:
        raise UsageError(f"label {max(numbers)} is not one of the {known}")
    return numbers


def labels_to_c(G: Any, labels: str | None, count: int) -> torch.Tensor | None:
    """Conditions [count, c_dim] from a text as `parse_classes` reads it (repeated until there are `count`).

    Without a text, a conditional generator goes through its classes in turn.

    Raises:
        UsageError: as parse_classes.
    """
    numbers = parse_classes(G, labels)
    return one_hot([numbers[i % len(numbers)] for i in range(count)], G.c_dim) if numbers else None


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


def name_rows(picture: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """uint8 [C, H, W] of len(names) rows of equal height -> [C, k H, margin + k W] with each row's name at its left,
    black on white; k enlarges rows too low for a line of text, pixel by pixel."""
    channels, height, _ = picture.shape
    k = -(-LEAST_HEIGHT * len(names) // height)
    picture = picture.repeat_interleave(k, dim=1).repeat_interleave(k, dim=2)
    row = k * height // len(names)
    size = min(max(row // 8, 12), 40)
    names = [name if len(name) <= 32 else f"{name[:31]}\u2026" for name in names]
    font = _font(size)
    margin = math.ceil(max(font.getlength(name) for name in names)) + size
    strip = Image.new("L", (margin, picture.shape[1]), "white")
    draw = ImageDraw.Draw(strip)
    for i, name in enumerate(names):
        draw.text((margin - size // 2, i * row + row // 2), name, fill="black", font=font, anchor="rm")
    text = torch.from_numpy(np.array(strip)).expand(channels, -1, -1).clone()
    text[3:] = 255  # opaque
    return torch.cat([text, picture], dim=2)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # whose font knows more scripts than Pillow's

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


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

    One PNG per seed, or with `grid` one picture of all, or with `class_grid` one with a row for each class and a column
    for each seed, or with `interpolate` a strip from seed to seed; see _sample for what `how` holds. Greyscale and RGBA
    generators give greyscale and RGBA files.

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
    class_grid: bool,
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
    if class_grid and (interpolate or columns):
        raise UsageError("--class-grid has a row per class and a column per seed: no --interpolate or --columns")
    numbers = parse_numbers(seeds)
    G = load_snapshot(snapshot, choose_device(device))
    if G.img_channels not in (1, 3, 4):
        raise UsageError(f"{snapshot} makes points, not pictures: use it from Python, stylegan_pg.load_snapshot")
    how = {"psi": psi, "cutoff": cutoff, "noise": noise}
    if class_grid:
        classes = parse_classes(G, labels)
        if not classes:
            raise UsageError(f"--class-grid: {snapshot} is unconditional; --grid shows what it makes")
        if len(classes) > MOST_ROWS:
            raise UsageError(
                f"--class-grid of {len(classes)} classes has more than {MOST_ROWS} rows: choose with --labels, such as "
                f"--labels 0-{MOST_ROWS - 1}"
            )
        z, c = latents(numbers * len(classes), G.z_dim), one_hot([k for k in classes for _ in numbers], G.c_dim)
        images = torch.cat(list(images_of(G, z, c, batch=batch, **how)))
        path = out / "classes.png"
        save_image(name_rows(tile(images, len(numbers)), [class_names(G)[k] for k in classes]), path)
        yield str(path)
        return
    c = labels_to_c(G, labels, len(numbers))
    out.mkdir(parents=True, exist_ok=True)
    if interpolate:
        frames = interpolation(G, numbers, interpolate, c, psi=psi, cutoff=cutoff, noise=noise, batch=batch)
        path = out / "interpolation.png"
        save_image(tile(frames, columns or len(frames)), path)
        yield str(path)
        return
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
