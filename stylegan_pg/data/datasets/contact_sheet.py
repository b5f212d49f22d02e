"""A sheet of a dataset's pictures, with what lies on them (pairs and masks) beside each."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from PIL import Image

from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.table import CorruptSample, SampleTable
from stylegan_pg.data.images.decode import MODES
from stylegan_pg.errors import UsageError

TILES, TILE = (10, 6), 96  # columns and rows, and the most pixels of a picture's sides


def spread(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced ordinals below `count`."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


def contact_sheet(index: DatasetIndex, path: Path) -> None:
    """Write a PNG with evenly spaced pictures of the dataset, each followed by its pairs and its masks, whose values
    have a colour each; what cannot be read stays white.

    Raises:
        UsageError: the file cannot be written.
    """
    fitting = [r for r in index.resolutions if max(index.size_at(r)) <= TILE]
    table = index.table(max(fitting, default=min(index.resolutions)))
    further = [name for name, field in table.fields.items() if field.is_picture]
    across = max(TILES[0] // (1 + len(further)), 1)
    (height, width), rows = table.image_size, TILES[1]
    chosen = spread(len(table), across * rows)
    sheet = np.full(
        [rows * height, across * (1 + len(further)) * width, 3 if further else table.channels], 255, np.uint8
    )
    for place, ordinal in enumerate(chosen):
        row, column = divmod(place, across)
        for part, name in enumerate(["", *further]):
            left = (column * (1 + len(further)) + part) * width
            with contextlib.suppress(CorruptSample):
                pixels = _pixels(table, ordinal, name)
                sheet[row * height : (row + 1) * height, left : left + width] = _rgb(pixels) if further else pixels
    used = sheet[: -(-len(chosen) // across) * height]
    channels = used.shape[2]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(used[:, :, 0] if channels == 1 else used, MODES[channels]).save(path, "PNG")
    except (OSError, KeyError) as error:
        raise UsageError(f"{path} cannot be written: {error}") from None


def _pixels(table: SampleTable, ordinal: int, name: str) -> np.ndarray:
    """uint8 [H, W, C] of a sample's picture (no name), or of what a field holds."""
    pixels = np.asarray(table.value(name, ordinal) if name else table.image(ordinal)).transpose(1, 2, 0)
    return _coloured(pixels[:, :, 0]) if name and table.fields[name].kind == "mask" else pixels


def _coloured(values: np.ndarray) -> np.ndarray:
    """A colour for each value of a mask: black for 0, and such as are easily told apart for those that follow."""
    each = np.arange(256, dtype=np.uint32)
    hues = ((each * 0x9E3779B1) >> 8 & 0xFFFFFF)[:, None] >> np.array([16, 8, 0], np.uint32) & 0xFF
    colours = np.where(each[:, None] == 0, 0, 64 + hues * 3 // 4).astype(np.uint8)
    return colours[values]


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of pixels of 1, 3 or 4 channels; transparent ones are white."""
    if pixels.shape[2] < 4:
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    alpha = pixels[:, :, 3:].astype(np.uint32)
    return ((pixels[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
