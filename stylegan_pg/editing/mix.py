"""Style mixing: pictures that take the styles of some layers from one seed and those of the others from another
(Karras et al. 2019, section 3.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stylegan_pg.data.classes import parse_numbers
from stylegan_pg.editing.rendering import (
    conditions_for_seeds,
    has_layers,
    images_of_styles,
    pictured,
    styles_of_seeds,
)
from stylegan_pg.errors import UsageError
from stylegan_pg.images import save_image
from stylegan_pg.inference.generate import latents, writing
from stylegan_pg.inference.look import Look, look_for
from stylegan_pg.inference.sampling import MAX_PIXELS, enough_memory
from stylegan_pg.untrusted import printable

GROUPS = ("coarse", "middle", "fine")
MIDDLE, FINE = 16, 64  # resolutions at which the groups of a growing network begin (Karras et al. 2019)


def layer_groups(G: Any) -> dict[str, list[int]]:
    """The numbers of a generator's layers by the names coarse, middle and fine; {} if it has fewer than three.

    In StyleGAN and StyleGAN2, of 64 pixels or more, coarse layers are those at 4 and 8 pixels, middle ones those at 16
    and 32, and fine ones those above. Other generators' layers are divided into three parts of nearly equal size.
    """
    if not has_layers(G) or G.num_ws < len(GROUPS):
        return {}
    resolutions = getattr(G.synthesis, "resolutions", [])
    if len(resolutions) * 2 == G.num_ws and max(resolutions) >= FINE:
        ends = [sum(2 for r in resolutions if r < limit) for limit in (MIDDLE, FINE)]
    else:
        ends = [round(G.num_ws * part / 3) for part in (1, 2)]
    bounds = [0, *ends, G.num_ws]
    return {name: list(range(bounds[i], bounds[i + 1])) for i, name in enumerate(GROUPS)}


def parse_layers(G: Any, text: str) -> list[int]:
    """'0-3,8' or 'coarse,middle' -> the numbers of layers in rising order, each once.

    Raises:
        UsageError: The generator has no ws of its layers, or not these layers.
    """
    if not has_layers(G):
        raise UsageError(
            f"this generator ({G.description['network'] if hasattr(G, 'description') else type(G).__name__}) has no "
            "styles to mix: style mixing needs a w for each layer, as StyleGAN, StyleGAN2 and StyleGAN3 have it"
        )
    groups, chosen = layer_groups(G), set()
    known = f"the layers 0 to {G.num_ws - 1}, or {', '.join(GROUPS)}" if groups else f"the layers 0 to {G.num_ws - 1}"
    for part in text.split(","):
        name = part.strip().lower()
        if name in groups:
            chosen.update(groups[name])
            continue
        if not re.fullmatch(r"\d+(-\d+)?", name, re.ASCII):
            raise UsageError(f"layers {printable(repr(text))}: {printable(repr(part))} is none of {known}")
        numbers = parse_numbers(name)
        if max(numbers) >= G.num_ws:
            raise UsageError(f"layers {printable(repr(text))}: there is no layer {max(numbers)}; give {known}")
        chosen.update(numbers)
    return sorted(chosen)


def mixed(ws: torch.Tensor, others: torch.Tensor, layers: Sequence[int]) -> torch.Tensor:
    """Styles [..., num_ws, w_dim] that are `others` in these layers and `ws` in the remaining ones (broadcast)."""
    taken = torch.zeros(ws.shape[-2], 1, dtype=torch.bool, device=ws.device)
    taken[list(layers)] = True
    return torch.where(taken, others, ws)


def mix(
    G: Any,
    rows: torch.Tensor,
    columns: torch.Tensor,
    layers: Sequence[int],
    look: Look,
) -> Iterator[torch.Tensor]:
    """Generate the mixtures of all pairs of styles, row by row; yields uint8 images [C, H, W].

    Args:
        rows: Styles [R, num_ws, w_dim], of all layers but `layers`.
        columns: Styles [K, num_ws, w_dim], of `layers`.
        layers: Numbers of layers.
        look: Options; the styles are not truncated again.
    """
    for i, row in enumerate(rows):
        for images in images_of_styles(G, mixed(row, columns, layers), look, first=i * len(columns)):
            yield from images


def mixing_matrix(
    G: Any,
    rows: Sequence[int],
    columns: Sequence[int],
    layers: Sequence[int],
    *,
    row_conditions: torch.Tensor | None = None,
    column_conditions: torch.Tensor | None = None,
    look: Look,
    progress: bool = False,
) -> torch.Tensor:
    """Generate the matrix of mixtures as one picture, uint8 [C, (R + 1) H, (K + 1) W].

    The first column shows the pictures of the seeds `rows`, the first row those of the seeds `columns`, and the corner
    is white. The mixtures take the styles of `layers` from their column's seed, and the others from their row's.

    Args:
        row_conditions, column_conditions: [R, c_dim] and [K, c_dim], of a conditional generator.

    Raises:
        RunError: The images are not finite.
    """
    height, width = G.img_size
    picture = torch.full([G.img_channels, (len(rows) + 1) * height, (len(columns) + 1) * width], 255, dtype=torch.uint8)
    left = styles_of_seeds(G, rows, row_conditions, look)
    top = styles_of_seeds(G, columns, column_conditions, look)
    places = [(0, j + 1) for j in range(len(columns))] + [(i + 1, 0) for i in range(len(rows))]
    places += [(i + 1, j + 1) for i in range(len(rows)) for j in range(len(columns))]

    def images() -> Iterator[torch.Tensor]:
        for ws in (top, left):
            for some in images_of_styles(G, ws, look):
                yield from some
        yield from mix(G, left, top, layers, look)

    bar = tqdm(images(), total=len(places), unit="img", desc="mixing", disable=not progress)
    for (i, j), image in zip(places, bar, strict=True):
        picture[:, i * height : (i + 1) * height, j * width : (j + 1) * width] = image
    return picture


def mix_command(
    snapshot: Path,
    out: Path | None,
    *,
    rows: str,
    columns: str,
    layers: str,
    row_labels: str | None = None,
    column_labels: str | None = None,
    psi: float | None,
    cutoff: int | None,
    noise: str,
    batch: int,
    device: str,
    progress: bool = True,
) -> Path:
    """What `stylegan-pg mix` does; returns the path of the picture, which is written to `out` (PNG).

    Args:
        out: By default NAME-mix.png beside the snapshot.
        rows, columns: Seeds, such as "0-3,8".
        layers: See parse_layers.
        row_labels, column_labels: Classes, see classes.parse_classes; seeds and classes are paired as `sample` does.

    Raises:
        UsageError: An option is invalid, or the picture cannot be written. RunError: the disk is full, memory is
            short, or the generator has diverged.
    """
    seeds = [parse_numbers(rows), parse_numbers(columns)]
    for some in seeds:
        latents([max(some)], 1)  # refuses those that are too large
    path = snapshot.parent / f"{snapshot.stem}-mix.png" if out is None else out
    if path.suffix.lower() != ".png":
        raise UsageError(f"{printable(path)}: the picture is a PNG file: give a name that ends with .png")
    G = pictured(snapshot, device)
    look = look_for(G, psi=psi, cutoff=cutoff, noise=noise, batch=batch)
    chosen = parse_layers(G, layers)
    row_seeds, row_conditions, _ = conditions_for_seeds(G, seeds[0], row_labels)
    column_seeds, column_conditions, _ = conditions_for_seeds(G, seeds[1], column_labels)
    height, width = (len(row_seeds) + 1) * G.img_size[0], (len(column_seeds) + 1) * G.img_size[1]
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"a matrix of {len(row_seeds)} x {len(column_seeds)} images would have {width}x{height} pixels, more than "
            f"{MAX_PIXELS}: give fewer seeds"
        )
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with enough_memory(batch):
        picture = mixing_matrix(
            G,
            row_seeds,
            column_seeds,
            chosen,
            row_conditions=row_conditions,
            column_conditions=column_conditions,
            look=look,
            progress=progress,
        )
    with writing(path):
        save_image(picture, path)
    return path
