"""What `stylegan-pg directions` does: it finds directions in w, shows them, and writes them to a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stylegan_pg.checkpoint.snapshot import choose_device, load_snapshot
from stylegan_pg.data.classes import class_names, conditions_at, file_names, parse_classes, parse_numbers
from stylegan_pg.editing import directions as finding
from stylegan_pg.errors import UsageError
from stylegan_pg.images import save_image, tile
from stylegan_pg.inference.generate import LARGEST_PSI, images_of, latents, writing
from stylegan_pg.inference.latent_files import Directions, Moved, save_directions
from stylegan_pg.inference.sampling import enough_memory
from stylegan_pg.untrusted import printable

METHODS = ("factorize", "pca", "classes", "scorer")
FILE = "directions.safetensors"
COLUMNS = 7  # of a strip; the one in the middle is unchanged
MOST_SEEDS = 64
SAMPLES, SCORED = 10_000, 2_000


def find_directions(
    snapshot: Path,
    out: Path | None,
    *,
    device: str,
    method: str,
    count: int,
    layers: str | None,
    labels: str | None,
    scorer: str,
    samples: int | None,
    seeds: str,
    strength: float,
    psi: float,
    batch: int,
    seed: int,
) -> Iterator[str]:
    """Find directions and write them; yields lines with what was found and written.

    The folder gets FILE, and for each direction a strip NUMBER-NAME.png: a row for each seed, with strengths from
    -`strength` to `strength`.

    Raises:
        UsageError: options or snapshot are invalid, the generator has no w, or the folder cannot be written.
        RunError: the disk is full, memory is short, or the generator has diverged.
    """
    if method not in METHODS:
        raise UsageError(f"method {printable(repr(method), 60)} is unknown: choose {', '.join(METHODS)}")
    if (method == "scorer") != bool(scorer):
        raise UsageError("--method scorer and --scorer package.module:function belong together")
    if not abs(psi) <= LARGEST_PSI:
        raise UsageError(f"psi={psi} is not possible: give a number near 0 to 1, 0.7 for example")
    numbers = parse_numbers(seeds)
    if len(numbers) > MOST_SEEDS:
        raise UsageError(f"--seeds are the rows of the strips: give at most {MOST_SEEDS}")
    latents([max(numbers)], 1)  # refuses those that are too large
    G = load_snapshot(snapshot, choose_device(device))
    finding.check_w(G)
    if G.img_channels not in (1, 3, 4):
        raise UsageError(f"{printable(snapshot)} makes points, not pictures")
    ranges = finding.parse_layers(layers, G.num_ws)
    classes = parse_classes(G, labels)
    function = finding.load_scorer(scorer, next(G.parameters()).device) if scorer else None
    drawn = finding.sampled_w(G, samples or (SCORED if scorer else SAMPLES), seed, classes)
    folder = snapshot.parent / f"{snapshot.stem}-directions" if out is None else out
    with enough_memory(batch):
        if method == "factorize":
            found = finding.factorized(G, ranges, count, drawn)
        elif method == "pca":
            found = finding.principal(G, ranges, count, drawn)
        elif method == "classes":
            pair = (classes[0], classes[1]) if labels is not None and len(classes) == 2 else None
            found = finding.between_classes(G, ranges, drawn, class_names(G), pair)
        else:
            assert function is not None
            scores = _scores(G, drawn.w, function, scorer, batch)
            found, correlation = finding.scored(G, ranges, drawn, scores, scorer.rpartition(":")[2])
            yield f"correlation of the prediction with scores of other samples: {correlation:.3f}"
        facts = {"method": method, "snapshot": printable(snapshot.name), "samples": len(drawn.w), "seed": seed}
        save_directions(
            folder / FILE, Directions(found.names, found.vectors, found.scales, found.layers, facts | found.facts)
        )
        yield str(folder / FILE)
        yield from _strips(G, found, folder, numbers, classes, strength, psi, batch)


def _scores(G: Any, w: torch.Tensor, function: Any, name: str, batch: int) -> torch.Tensor:
    parts = []
    with tqdm(total=len(w), unit="img", desc="scores", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for part in finding.scores_of(G, w, function, name, batch):
            parts.append(part)
            bar.update(len(part))
    return torch.cat(parts)


def strip(
    G: Any,
    step: torch.Tensor,
    seeds: Sequence[int],
    c: torch.Tensor | None,
    *,
    strength: float,
    psi: float,
    batch: int,
    columns: int = COLUMNS,
) -> torch.Tensor:
    """One picture, uint8 [C, rows H, columns W]: a row for each seed, moved by -strength to strength times `step`.

    Args:
        step: [num_ws, w_dim], see Directions.step.
        c: conditions of the seeds, [n, c_dim] or None.
    """
    z, moved = latents(seeds, G.z_dim), []
    for k in range(columns):
        at = Moved(G, step * (strength * (2 * k / (columns - 1) - 1)))
        moved.append(torch.cat(list(images_of(at, z, c, batch=batch, psi=psi))))
    images = torch.stack(moved, dim=1)  # [rows, columns, C, H, W]
    return tile(images.flatten(0, 1), columns)


def _strips(
    G: Any,
    found: Directions,
    folder: Path,
    seeds: Sequence[int],
    classes: Sequence[int],
    strength: float,
    psi: float,
    batch: int,
) -> Iterator[str]:
    c = conditions_at(G, [classes[i % len(classes)] for i in range(len(seeds))]) if G.c_dim else None
    names = file_names(found.names)
    bar = tqdm(total=len(names), unit="strip", dynamic_ncols=True, disable=not sys.stderr.isatty(), leave=False)
    with bar:
        for i, name in enumerate(names):
            step = found.step(i, G.num_ws)
            picture = strip(G, step, seeds, c, strength=strength, psi=psi, batch=batch)
            path = folder / f"{i:02d}-{name.replace(' ', '-')}.png"
            with writing(folder):
                save_image(picture, path)
            bar.update()
            yield str(path)
