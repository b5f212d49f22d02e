"""What `stylegan-pg sample` does: it generates images by seed and class, and writes them to one or more files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylegan_pg.checkpoint.snapshot import choose_device, load_snapshot
from stylegan_pg.data.asked_conditions import ask_for
from stylegan_pg.data.classes import class_names, conditions_at, file_names, parse_classes, parse_numbers
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.images import name_rows, save_image, tile
from stylegan_pg.inference.arithmetic import condition_of, latent_arithmetic, parse, picture_of
from stylegan_pg.inference.generate import LARGEST_PSI, images_of, interpolation, latents, writing
from stylegan_pg.inference.latent_files import Moved, parse_directions
from stylegan_pg.inference.saved import sample_saved
from stylegan_pg.inference.texts import makes_texts, sample_texts
from stylegan_pg.untrusted import printable

MOST_ROWS = 100  # classes in one picture
MAX_PIXELS = 1 << 28  # of one picture
NOISE = ("const", "random", "none")
PSI = 0.7


class Asked(NamedTuple):
    """The options of the command."""

    seeds: str | None  # None: 0-63, of a class grid 0-7
    psi: float | None  # None: PSI, or 1 for a generator without ws, which has nothing to truncate
    cutoff: int | None
    labels: str | None
    grid: bool
    class_grid: bool
    columns: int
    interpolate: int
    noise: str
    batch: int
    conditions: tuple[str, ...] = ()  # of vectors, see asked_conditions.vector_of
    ws: Path | None = None  # a file of latents, instead of seeds
    directions: tuple[str, ...] = ()  # FILE, FILE#NAME or FILE#NUMBER
    strengths: tuple[float, ...] = (1.0,)
    arithmetic: str | None = None  # groups of seeds with signs, see arithmetic.parse

    @property
    def of_pictures(self) -> list[str]:
        """Those that were given and mean nothing for texts."""
        options = {"--psi": self.psi not in (None, 1.0), "--cutoff": self.cutoff is not None, "--grid": self.grid}
        options |= {"--class-grid": self.class_grid, "--columns": self.columns, "--interpolate": self.interpolate}
        options |= {"--ws": self.ws, "--direction": self.directions, "--strength": self.strengths != (1.0,)}
        options |= {"--arithmetic": self.arithmetic}
        return [name for name, given in options.items() if given]


def sample(snapshot: Path, out: Path | None, *, device: str, **asked: Any) -> Iterator[str]:
    """Write a snapshot's images for the seeds into a folder; yields a line for each file written.

    With `ws`, the images of a file of latents take the place of those of seeds; `directions` move the ws of all.

    One PNG per seed, or with `grid` one picture of all, or with `class_grid` one with a row for each class and a column
    for each seed, or with `interpolate` a strip from seed to seed, or with `arithmetic` the image of a sum of latents
    and a picture of what it is made of; see Asked. Greyscale and RGBA generators give greyscale and RGBA files. A
    generator of texts writes one file with a line for each seed.

    Args:
        snapshot: a file.
        out: a folder; None for one beside the snapshot, NAME-pictures.

    Raises:
        UsageError: seeds, labels, noise, device or file are invalid, or the folder cannot be written.
        RunError: the disk is full, memory is short, or the generator has diverged.
    """
    wanted = Asked(**asked)
    numbers = _checked(wanted)
    chosen = choose_device(device)
    G = load_snapshot(snapshot, chosen)
    folder = snapshot.parent / f"{snapshot.stem}-pictures" if out is None else out
    if makes_texts(G):
        with enough_memory(wanted.batch):
            pairs = paired(numbers, parse_classes(G, wanted.labels), wanted.labels is not None)
            yield from sample_texts(G, folder, pairs, wanted.batch, wanted.of_pictures)
        return
    if G.img_channels not in (1, 3, 4):
        raise UsageError(f"{snapshot} makes points, not pictures: use it from Python, stylegan_pg.load_snapshot")
    if wanted.cutoff is not None and not hasattr(G, "num_ws"):
        raise UsageError(f"--cutoff {wanted.cutoff}: the generator of {printable(snapshot)} has no ws to truncate")
    if wanted.cutoff is not None and wanted.cutoff > G.num_ws:
        raise UsageError(f"--cutoff {wanted.cutoff} goes beyond the {G.num_ws} layers of {printable(snapshot)}")
    if wanted.directions:
        G = Moved(G, parse_directions(wanted.directions, wanted.strengths, G))
    if wanted.conditions:
        ask_for(G, wanted.conditions)
    with enough_memory(wanted.batch):
        if wanted.ws is not None:
            how = {"psi": 1.0 if wanted.psi is None else wanted.psi, "cutoff": wanted.cutoff, "noise": wanted.noise}
            frames = {"grid": wanted.grid, "interpolate": wanted.interpolate, "columns": wanted.columns}
            yield from sample_saved(G, wanted.ws, folder, batch=wanted.batch, **frames, **how)
        elif wanted.arithmetic is not None:
            yield from _calculate(G, folder, wanted)
        else:
            yield from _write(G, snapshot, folder, numbers, wanted)


def _checked(wanted: Asked) -> list[int]:
    """Check that the options fit together, and return the seeds."""
    modes = {"--grid": wanted.grid, "--class-grid": wanted.class_grid, "--interpolate": wanted.interpolate}
    chosen = [name for name, given in modes.items() if given]
    if wanted.noise not in NOISE:
        raise UsageError(f"noise {printable(repr(wanted.noise))} is not possible: {', '.join(NOISE)}")
    if wanted.psi is not None and not abs(wanted.psi) <= LARGEST_PSI:
        raise UsageError(f"psi={wanted.psi} is not possible: give a number near 0 to 1, 0.7 for example")
    if wanted.class_grid and (wanted.interpolate or wanted.columns):
        raise UsageError("--class-grid has a row per class and a column per seed: no --interpolate or --columns")
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} make different pictures: give one of them")
    if wanted.columns and not chosen:
        raise UsageError("--columns is of a picture of all: give --grid or --interpolate with it")
    if wanted.strengths != (1.0,) and not wanted.directions:
        raise UsageError("--strength is of a direction: give --direction FILE with it")
    chosen_ones = wanted.labels is not None or wanted.conditions
    if wanted.ws is not None and (wanted.seeds is not None or chosen_ones or wanted.class_grid):
        raise UsageError("--ws renders what a file holds: no --seeds, --labels, --condition or --class-grid beside it")
    if wanted.labels is not None and wanted.conditions:
        raise UsageError("--labels chooses classes or examples, --condition describes vectors: give one of them")
    if wanted.arithmetic is not None:
        if chosen or wanted.seeds is not None or wanted.ws is not None or wanted.directions:
            raise UsageError(
                "--arithmetic names its own seeds and pictures: no --seeds, --ws, --direction, --grid, --class-grid or "
                "--interpolate beside it"
            )
        parse(wanted.arithmetic)
        return []
    if wanted.seeds is None:
        return list(range(8 if wanted.class_grid else 64))
    numbers = parse_numbers(wanted.seeds)
    latents([max(numbers)], 1)  # refuses those that are too large
    if wanted.interpolate and len(numbers) < 2:
        raise UsageError(f"--interpolate goes from seed to seed, and --seeds {wanted.seeds} is one: give two or more")
    return numbers


def _calculate(G: Any, out: Path, wanted: Asked) -> Iterator[str]:
    """Write the image of a sum of latents, and a picture of the groups of seeds that it is made of."""
    groups = parse(wanted.arithmetic or "")
    rows, columns = len(groups) + 1, max(len(group.seeds) for group in groups) + 1
    if rows * columns * G.img_size[0] * G.img_size[1] > MAX_PIXELS:
        raise UsageError(f"--arithmetic: the picture of the operands would have more than {MAX_PIXELS} pixels")
    psi = (PSI if hasattr(G, "styles") else 1.0) if wanted.psi is None else wanted.psi
    how = {"psi": psi, "cutoff": wanted.cutoff, "noise": wanted.noise, "batch": wanted.batch}
    result = latent_arithmetic(G, groups, condition_of(G, wanted.labels), **how)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    picture, names = picture_of(result)
    for image, name in ((result.image[0], "arithmetic"), (name_rows(picture, names), "arithmetic-operands")):
        with writing(out):
            save_image(image, out / f"{name}.png")
        yield str(out / f"{name}.png")


def _write(G: Any, snapshot: Path, out: Path, numbers: list[int], wanted: Asked) -> Iterator[str]:
    psi = (PSI if hasattr(G, "styles") else 1.0) if wanted.psi is None else wanted.psi
    how = {"psi": psi, "cutoff": wanted.cutoff, "noise": wanted.noise}
    batch, names = wanted.batch, class_names(G)
    classes = parse_classes(G, wanted.labels)
    if wanted.class_grid:
        _check_class_grid(snapshot, classes)
        pairs = [(seed, k) for k in classes for seed in numbers]
        columns, path = len(numbers), out / "classes.png"
    else:
        pairs = paired(numbers, classes, wanted.labels is not None or bool(wanted.conditions))
        columns, path = wanted.columns or math.ceil(math.sqrt(len(pairs))), out / "grid.png"
    if not (wanted.grid or wanted.class_grid or wanted.interpolate):
        yield from _single_files(G, out, pairs, batch, how)
        return
    if wanted.interpolate:
        frames = (len(pairs) - 1) * wanted.interpolate + 1
        columns, path = wanted.columns or frames, out / "interpolation.png"
    else:
        frames = len(pairs)
    columns = min(columns, frames)
    height, width = -(-frames // columns) * G.img_size[0], columns * G.img_size[1]
    if height * width > MAX_PIXELS:
        raise UsageError(
            f"one picture of {frames} images would have {width}x{height} pixels, more than {MAX_PIXELS}: give fewer "
            "seeds, classes or frames"
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    z, c = _inputs(G, pairs)
    if wanted.interpolate:
        images = interpolation(G, [seed for seed, _ in pairs], wanted.interpolate, c, batch=batch, **how)
    else:
        images = torch.cat(list(images_of(G, z, c, batch=batch, **how)))
    picture = tile(images, columns)
    if wanted.class_grid:
        picture = name_rows(picture, [names[k] for k in classes])
    with writing(out):
        save_image(picture, path)
    yield str(path)


def _check_class_grid(snapshot: Path, classes: Sequence[int]) -> None:
    if not classes:
        raise UsageError(f"--class-grid: {printable(snapshot)} is unconditional; --grid shows what it makes")
    if len(classes) > MOST_ROWS:
        raise UsageError(
            f"--class-grid of {len(classes)} classes has more than {MOST_ROWS} rows: choose with --labels, such as "
            f"--labels '#0-{MOST_ROWS - 1}'"
        )


def paired(seeds: Sequence[int], classes: Sequence[int], chosen: bool) -> list[tuple[int, int]]:
    """Pairs of seed and class (-1 without classes). The shorter list is repeated; if the classes were not chosen by the
    user, there are as many pairs as seeds."""
    if not classes:
        return [(seed, -1) for seed in seeds]
    count = max(len(seeds), len(classes)) if chosen else len(seeds)
    return [(seeds[i % len(seeds)], classes[i % len(classes)]) for i in range(count)]


def _inputs(G: Any, pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
    z = latents([seed for seed, _ in pairs], G.z_dim)
    return z, conditions_at(G, [k for _, k in pairs]) if G.c_dim else None


def _single_files(
    G: Any, out: Path, pairs: Sequence[tuple[int, int]], batch: int, how: dict[str, Any]
) -> Iterator[str]:
    """Write seed000005.png, or seed000005-CLASS.png for a generator with classes; repeated requests get a number."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    classes, used = file_names(class_names(G)), set()
    for first in range(0, len(pairs), batch):
        some = pairs[first : first + batch]
        z, c = _inputs(G, some)
        (images,) = images_of(G, z, c, batch=batch, **how)
        for (seed, k), image in zip(some, images, strict=True):
            name = stem = f"seed{seed:06d}" + (f"-{classes[k]}" if G.c_dim else "")
            again = 1
            while name in used:
                again += 1
                name = f"{stem}.{again}"
            used.add(name)
            path = out / f"{name}.png"
            with writing(out):
                save_image(image, path)
            yield str(path)


@contextlib.contextmanager
def enough_memory(batch: int) -> Iterator[None]:
    """Turn a lack of memory within the block into a RunError that says what to do."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise RunError(f"there is not enough memory for --batch {batch}: give a smaller one, or fewer images") from None
