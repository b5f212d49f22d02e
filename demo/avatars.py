"""Draw and pack avatars of several styles with everything that is known about them.

Each picture has a class (its style), a vector of named attributes, captions that name them, a mask of the parts of the
face, and a line drawing of its edges. All of them come from the same drawing, so they are true: the mask and the edges
are the same face drawn with a flat colour for each element. Nine of ten pictures are packed as OUT/train, the others as
OUT/held-out. The drawings are by the artists named in OUT/CREDITS.txt, combined by DiceBear; nothing is downloaded. The
same seed gives the same pictures. Usage: python demo/avatars.py OUT --size 64 --count 5000
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from avatar_styles import (
    ATTRIBUTES,
    COLOURS,
    LICENCES,
    PARTS,
    STYLES,
    Face,
    Flat,
    credit,
    definition,
    face_of,
    options_of,
)
from PIL import Image

DEFAULT_STYLES = (*STYLES,)
HELD_OUT = 10  # every tenth picture
COLOURS_OF_PARTS = (  # in the contact sheet
    (255, 255, 255), (245, 205, 170), (120, 70, 40), (70, 120, 200), (20, 20, 20), (150, 100, 40), (210, 50, 60),
    (60, 200, 190),
)  # fmt: skip
WORDINGS = (
    "avatar in the style {style} with {length} {hair} hair, {skin} skin and {mouth}, {eyewear}{dress}, on a "
    "{background} background",
    "portrait of a person with {skin} skin and {length} {hair} hair, {eyewear}",
    "a face with {mouth} and {hair} hair{dress}, in front of a {background} background",
    "someone {eyewear}{dress}: {length} hair, {skin} skin, {mouth}",
)


class Drawing(NamedTuple):
    """A picture RGB, its mask of values 0 to len(PARTS) - 1, and its edges, grey, black on white: Pillow images."""

    picture: Image.Image
    parts: Image.Image
    edges: Image.Image


@functools.cache
def _styles(name: str) -> tuple[Any, Any, np.ndarray]:
    """A style as it is, and with flat colours, whose numbers have these parts."""
    from dicebear import Style

    flat = Flat(name)
    return Style(definition(name)), Style(flat.definition), np.array(flat.parts, np.uint8)


def _rendered(style: Any, options: dict[str, Any], side: int) -> np.ndarray:
    """A drawing as uint8 [side, side, 3]."""
    import resvg_py
    from dicebear import Avatar

    svg = Avatar(style, options).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return np.array(Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGB"))


def draw(face: Face, seed: str, size: int) -> Drawing:
    """Draw a face, its parts and its edges from larger drawings, whose pixels are exactly of one element each."""
    shown, flat, part_of = _styles(face.style)
    options, scale = options_of(face, seed), 4 if size <= 256 else 2
    picture = Image.fromarray(_rendered(shown, options, size * scale)).reduce(scale)
    colours = _rendered(flat, {**options, "backgroundColor": ["000000"]}, size * scale).astype(np.int64)
    element = colours @ [1 << 16, 1 << 8, 1]
    counts = np.stack([_shrunk(part_of[element] == part, scale) for part in range(len(PARTS))])
    parts = Image.fromarray(counts.argmax(axis=0).astype(np.uint8))
    lines = _shrunk(_boundaries(element, scale // 2), scale)
    return Drawing(picture, parts, Image.fromarray(np.uint8(255 * (1 - lines.clip(max=0.75) / 0.75))))


def _shrunk(there: np.ndarray, scale: int) -> np.ndarray:
    """The share of each block of scale x scale pixels that is true."""
    rows, columns = there.shape
    return there.reshape(rows // scale, scale, columns // scale, scale).mean(axis=(1, 3))


def _boundaries(element: np.ndarray, width: int) -> np.ndarray:
    """Where elements meet, as lines of `width` pixels on either side."""
    lines = np.zeros(element.shape, bool)
    for axis in (0, 1):
        for step in range(1, width + 1):
            for shift in (step, -step):
                differs = np.roll(element, shift, axis) != element
                border = [slice(None), slice(None)]
                border[axis] = slice(0, step) if shift > 0 else slice(-step, None)
                differs[tuple(border)] = False  # where the other side of the picture would be the neighbour
                lines |= differs
    return lines


def captions_of(face: Face, seed: str) -> list[str]:
    """Sentences that name some or all attributes of a face, in random order."""
    words = {
        "style": face.style,
        "length": "long" if face.long_hair else "short",
        "hair": face.hair,
        "skin": face.skin,
        "mouth": "an open mouth" if face.mouth_open else "a closed mouth",
        "eyewear": "with glasses" if face.glasses else "without glasses",
        "dress": f", in {face.clothes} clothes" if face.clothes else "",
        "background": face.background,
    }
    texts = [wording.format(**words) for wording in WORDINGS]
    random.Random(f"captions of {seed} in {face.style}").shuffle(texts)
    return texts


class Task(NamedTuple):
    """A picture to be drawn: its number, its style, the seed of all, and where its files belong."""

    number: int
    style: str
    seed: str
    size: int
    folder: Path

    @property
    def own_seed(self) -> str:
        return f"{self.seed}-{self.number}"

    @property
    def name(self) -> str:
        return f"{self.style}/{self.number:06d}.png"

    @property
    def face(self) -> Face:
        return face_of(self.style, self.own_seed)


def _write(task: Task) -> None:
    """Draw a picture, unless its files are complete; the one that is written last says that they are."""
    places = {kind: task.folder / kind / task.name for kind in ("parts", "edges", "picture")}
    if places["picture"].exists():
        return
    drawing = draw(task.face, task.own_seed, task.size)
    for kind, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        getattr(drawing, kind).save(temporary, format="PNG")
        temporary.replace(path)


def pack_avatars(
    out: Path,
    size: int,
    count: int,
    styles: Sequence[str] = DEFAULT_STYLES,
    *,
    seed: str = "0",
    workers: int | None = 1,
    progress: bool = False,
) -> None:
    """Write OUT/train and OUT/held-out, unless they exist already, and OUT/sheet.png, CREDITS.txt and parts.json.

    Their fields: the class is the style; vector `attributes` (ATTRIBUTES), text `caption`, of several lines, mask
    `parts` (PARTS), and grey pictures `edges`. A killed run leaves only complete files, and continues.

    Args:
        size: pixels of a side, a power of two. count: pictures, of all styles in turn. styles: some of STYLES.
        workers: processes; None: one for each core.

    Raises:
        UsageError: a style is not known, count is below 1, or OUT holds pictures that were drawn otherwise.
    """
    from stylegan_pg.errors import UsageError

    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise UsageError(f"styles = {', '.join(unknown) or 'none'}: give some of {', '.join(STYLES)}")
    if count < 1:
        raise UsageError(f"count = {count}: give 1 or more")
    assert all(definition(style)["meta"]["license"]["name"] in LICENCES for style in styles)
    out.mkdir(parents=True, exist_ok=True)
    drawn = [repr(STYLES[style]) for style in styles]
    note = out / ".options"
    how = json.dumps([size, count, [*styles], seed, drawn, COLOURS, ATTRIBUTES, PARTS, WORDINGS])
    if note.is_file() and note.read_text("utf-8") != how:
        raise UsageError(f"{out} holds avatars that were drawn otherwise: remove it, or give another folder")
    note.write_text(how, "utf-8")
    tasks: dict[str, list[Task]] = {part: [] for part in ("train", "held-out")}
    for number in range(count):
        part = "held-out" if number % HELD_OUT == HELD_OUT - 1 else "train"
        style = styles[(number + number // HELD_OUT) % len(styles)]
        tasks[part].append(Task(number, style, seed, size, out / "pictures" / part))
    for part, some in tasks.items():
        if some and not (out / part / "index.json").exists():
            _pack_part(out, part, some, workers, progress)
    (out / "CREDITS.txt").write_text("".join(f"{style}: {credit(style)}\n" for style in styles), "utf-8")
    (out / "parts.json").write_text(json.dumps(PARTS), "utf-8")
    _sheet([face_of(style, f"{seed}-{i}") for style in styles for i in range(4)], seed).save(out / "sheet.png")


def _pack_part(out: Path, part: str, tasks: list[Task], workers: int | None, progress: bool) -> None:
    from tqdm import tqdm

    from stylegan_pg import pack

    bar = tqdm(total=len(tasks), desc=f"avatars, {part}", unit="img", disable=not progress)
    with bar:
        if workers == 1:
            for task in tasks:
                _write(task)
                bar.update()
        else:
            with ProcessPoolExecutor(workers) as pool:
                for _ in pool.map(_write, tasks, chunksize=20):
                    bar.update()
    folder, new = tasks[0].folder, out / f"{part}.{os.getpid()}.new"
    rows = [[task.name, *task.face.vector] for task in tasks]
    _csv(new.with_suffix(".attributes.csv"), [["path", *ATTRIBUTES], *rows])
    _csv(new.with_suffix(".styles.csv"), [["path", "style"], *([task.name, task.style] for task in tasks)])
    captions = {task.name: captions_of(task.face, task.own_seed) for task in tasks}
    new.with_suffix(".captions.json").write_text(json.dumps(captions), "utf-8")
    pack(folder / "picture", new, resolution=tasks[0].size, format="png", filter="box", labels=new.with_suffix(
        ".styles.csv"), vector={"attributes": new.with_suffix(".attributes.csv")}, captions=new.with_suffix(
        ".captions.json"), mask={"parts": folder / "parts"}, pair={"edges:1": folder / "edges"}, workers=workers,
        progress=False)  # fmt: skip
    if (out / part / "index.json").exists():  # another process was faster
        shutil.rmtree(new)
    else:
        shutil.rmtree(out / part, ignore_errors=True)  # which a killed run may have left
        new.rename(out / part)
    for spare in out.glob(f"{new.stem}.*"):
        spare.unlink()


def _csv(path: Path, rows: list[list[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def _sheet(faces: Sequence[Face], seed: str, side: int = 96) -> Image.Image:
    """Four pictures of each style in a row, each with its parts and its edges."""
    sheet = Image.new("RGB", (4 * 3 * side, len(faces) // 4 * side))
    for i, face in enumerate(faces):
        drawing = draw(face, f"{seed}-{i % 4}", side)
        parts = Image.fromarray(np.array(COLOURS_OF_PARTS, np.uint8)[np.array(drawing.parts)])
        for k, picture in enumerate((drawing.picture, parts, drawing.edges)):
            sheet.paste(picture.convert("RGB"), ((i % 4 * 3 + k) * side, i // 4 * side))
    return sheet


def main() -> None:
    from stylegan_pg.errors import UsageError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=64, help="a power of two, 16 or more")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--styles", nargs="+", default=[*DEFAULT_STYLES], metavar="STYLE", help=", ".join(STYLES))
    parser.add_argument("--seed", default="0", help="seed of the avatars")
    parser.add_argument("--workers", type=int, default=None, help="processes; all cores by default")
    args = parser.parse_args()
    try:
        how = {"seed": args.seed, "workers": args.workers, "progress": True}
        pack_avatars(args.out, args.size, args.count, args.styles, **how)
    except UsageError as error:
        sys.exit(f"error: {error}")
    print((args.out / "CREDITS.txt").read_text("utf-8"), end="")


if __name__ == "__main__":
    main()
