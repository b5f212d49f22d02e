"""The options of packing that say how pictures are encoded, checked and converted."""

import re
from collections.abc import Sequence

from stylegan_pg.data.images.decode import MODES, size_at
from stylegan_pg.data.images.headers import MAX_PIXELS
from stylegan_pg.data.pack.pyramid import FILTERS, PackOptions
from stylegan_pg.data.pack.selection import Wanted
from stylegan_pg.errors import UsageError

LONGEST = 8192  # pixels of a side


def recipe_of(resolution, lowest, format, quality, crop, base, filter, channels, shard_size, max_pixels) -> PackOptions:
    for name, value in {"resolution": resolution, "lowest": lowest}.items():
        if not 4 <= value <= 4096 or value & (value - 1):
            raise UsageError(f"{name} = {value}: give a power of two from 4 to 4096")
    if lowest > resolution:
        raise UsageError(f"lowest = {lowest} is above resolution = {resolution}: lower the one or raise the other")
    choices = {"format": (format, ("jpg", "png", "webp")), "crop": (crop, ("center", "pad", "none"))}
    choices |= {"filter": (filter, tuple(FILTERS)), "channels": (channels, tuple(MODES))}
    for name, (value, known) in choices.items():
        if value not in known:
            raise UsageError(f"{name} = {value}: give one of {', '.join(map(str, known))}")
    if format == "jpg" and channels == 4:
        raise UsageError("format = jpg has no alpha channel: take png or webp for channels = 4")
    if not 1 <= quality <= 100:
        raise UsageError(f"quality = {quality}: give a number from 1 to 100")
    if max_pixels < 1:
        raise UsageError(f"max_pixels = {max_pixels}: give the most pixels of a picture, such as {MAX_PIXELS}")
    size, shape = _bytes(shard_size), _base(base, resolution)
    return PackOptions(resolution, lowest, format, quality, crop, filter, channels, size, shape, max_pixels)


def checked(wanted: Wanted) -> Wanted:
    """The options that say what to pack, unchanged. Raises UsageError if one is invalid."""
    for name, value, known in (
        ("unlabelled", wanted.unlabelled, ("skip", "keep", "refuse")),
        ("unpaired", wanted.unpaired, ("skip", "refuse")),
    ):
        if value not in known:
            raise UsageError(f"{name} = {value}: give one of {', '.join(known)}")
    if wanted.max_images is not None and wanted.max_images < 1:
        raise UsageError(f"max_images = {wanted.max_images}: give 1 or more, or leave it away for all")
    return wanted


def parse_base(text: str) -> tuple[int, int]:
    """ "4x6" -> (4, 6). Raises UsageError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", text, re.ASCII)
    if not match:
        raise UsageError(f"base = {text}: give rows and columns at resolution 4, such as 4x6")
    return int(match[1]), int(match[2])


def _base(base: str | Sequence[int], resolution: int) -> tuple[int, int]:
    text = base if isinstance(base, str) else "x".join(map(str, base))
    rows, columns = parse_base(text)
    height, width = size_at(resolution, (rows, columns))
    if max(height, width) > LONGEST:
        raise UsageError(
            f"base = {text} gives {height} rows and {width} columns at resolution {resolution}: with at most {LONGEST} "
            "of each, choose a smaller base or resolution"
        )
    return rows, columns


def _bytes(size: str | int) -> int:
    """ "256MB" -> 256_000_000, "1MiB" -> 1_048_576."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)?\s*", str(size), re.IGNORECASE)
    number = 0
    if match:
        digits, prefix, binary = match.groups(default="")
        number = int(float(digits) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
    if number <= 0:
        raise UsageError(f"shard_size = {size}: give bytes, such as 256MB, 1GB or 64MiB")
    return number
