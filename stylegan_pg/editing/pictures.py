"""Pictures of any kind and size as targets of a generator's size."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from stylegan_pg.data.images import to_srgb
from stylegan_pg.data.images.headers import BadPicture
from stylegan_pg.data.images.open_image import opened
from stylegan_pg.data.pack.pyramid import ORIENTATIONS
from stylegan_pg.data.pack.source_files import PICTURES
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import open_regular, printable

log = logging.getLogger(__name__)

CROPS = ("none", "center")
MOST_PICTURES = 10_000
MOST_BYTES = 3 << 27  # of one encoded picture
RESERVED = frozenset({"progress"})  # of the figure beside the pairs of pictures
LONGEST_NAME = 80  # characters of a name that files are named by


class Picture(NamedTuple):
    """A picture to read: its file, and a name that no other one has, which is fit to be part of a file's name."""

    path: Path
    name: str


def listed(paths: Sequence[Path]) -> list[Picture]:
    """The pictures of files and folders (searched recursively, in the order of names), each with a name of its own.

    In folders, files with other suffixes than those of pictures are left out, and hidden ones.

    Raises:
        UsageError: a path does not exist, there are no pictures, or too many.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(_below(path))
            if not found:
                raise UsageError(f"{printable(path)} holds no pictures ({', '.join(sorted(PICTURES))})")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"{printable(path)}: no such picture; give a file, or a folder of pictures")
        if len(files) > MOST_PICTURES:
            raise UsageError(f"these are more than {MOST_PICTURES} pictures: give fewer at a time")
    used = set(RESERVED)
    return [Picture(path, _own_name(path, used)) for path in dict.fromkeys(files)]


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(root, name)
            if path.suffix.lower() in PICTURES and not name.startswith(".") and path.is_file():
                yield path


def _own_name(path: Path, used: set[str]) -> str:
    """The stem of a file, with a number where another one has it already, also if only on systems that ignore case."""
    plain = "".join(c if c.isprintable() and c not in '/\\:*?"<>|#' else "_" for c in path.stem)
    stem = name = plain[:LONGEST_NAME].rstrip(". ") or "picture"
    again = 1
    while name.casefold() in used:
        again += 1
        name = f"{stem}.{again}"
    used.add(name.casefold())
    return name


def read(pictures: Sequence[Picture], G: Any, crop: str = "none") -> Iterator[tuple[int, torch.Tensor]]:
    """Read pictures in the channels and at the size of a generator, as `pixels_of` does.

    Yields:
        The place of a picture in the sequence, and its pixels, uint8 [C, H, W]. What cannot be read is left out with a
        warning.

    Raises:
        UsageError: none of them can be read, or `crop` is unknown.
    """
    if crop not in CROPS:
        raise UsageError(f"crop {printable(repr(crop), 60)} is unknown: choose {', '.join(CROPS)}")
    faults = []
    for i, picture in enumerate(pictures):
        try:
            pixels = pixels_of(picture.path, (G.img_size[0], G.img_size[1]), G.img_channels, crop)
        except (OSError, BadPicture) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            faults.append(f"{printable(picture.path)} {printable(reason)}")
            if len(pictures) > 1:
                log.warning(f"left out: {faults[-1]}")
            continue
        yield i, pixels
    if len(faults) == len(pictures):
        raise UsageError(faults[0] if len(faults) == 1 else "none of the pictures can be used")


def pixels_of(path: Path, size: tuple[int, int], channels: int, crop: str = "none") -> torch.Tensor:
    """Read one picture as uint8 [channels, *size]: turned upright, scaled with a Lanczos filter, and with crop "center"
    cut to its largest central part of this shape. Smaller ones are enlarged.

    Raises:
        BadPicture: the picture is damaged, too large, of no known format, or with crop "none" of another shape.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise BadPicture(f"has more than {MOST_BYTES} bytes")
    with opened(data, path.name) as picture:
        upright = to_srgb.load(picture, data, channels)
        orientation = to_srgb.orientation_of(picture)  # after it was loaded, which turns TIFFs itself
    if orientation in ORIENTATIONS:
        upright = upright.transpose(ORIENTATIONS[orientation])
    (rows, columns), (height, width) = size, (upright.height, upright.width)
    scale = min(height / rows, width / columns)
    down, across = min(rows * scale, height), min(columns * scale, width)
    if crop == "none" and (height - down >= 1 or width - across >= 1):
        raise BadPicture(
            f"is {width}x{height}, and the generator's pictures are {columns}x{rows}: give --crop center, or a picture "
            "cut like those of the dataset"
        )
    top, left = (height - down) / 2, (width - across) / 2
    if (height, width) != size:
        box = (left, top, left + across, top + down)
        upright = upright.resize((columns, rows), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(upright).reshape(*size, channels)).permute(2, 0, 1).contiguous()
