"""Strict and deterministic decoding of pictures to uint8 pixels of a given shape.

`decode` reads pictures that this program has packed: JPEG, PNG or WebP with exactly the expected size and channels.
`decode_to_fit` reads pictures of other programs. `decode_mask` reads masks.

Size and channels are read from the header and checked before anything is decoded, so a small file whose header states
a huge size uses no memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from stylegan_pg.data.images import to_srgb
from stylegan_pg.data.images.headers import (
    MANY_SCANS,
    MAX_PIXELS,
    BadPicture,
    check_jpeg,
    check_pixels,
    reraise_resource_error,
)
from stylegan_pg.data.images.open_image import check_memory, kind_of, opened
from stylegan_pg.data.images.to_srgb import MODES

SQUARE = (4, 4)  # the base grid (rows, columns) of square pictures
_JPEG = b"\xff\xd8\xff"
_CMYK = ("CMYK", "YCCK")


def size_at(resolution: int, base: Sequence[int]) -> tuple[int, int]:
    """Return (height, width) in pixels at a resolution, given the base (rows, columns) at resolution 4.

    This is the same as schedule.size_at, whose module is slow to import.
    """
    return base[0] * resolution // 4, base[1] * resolution // 4


def lies_on(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether pictures of these widths and heights show the same part of the world: one is the other scaled, to the
    nearest pixel. Pictures of the same width, or the same height, must have the same size."""
    if one[0] == other[0] or one[1] == other[1]:
        return one == other
    larger = max(one, other)
    return 2 * abs(one[0] * other[1] - other[0] * one[1]) <= larger[0] + larger[1]


class Header(NamedTuple):
    """The header of a picture.

    Attributes:
        height, width: The size in pixels.
        channels: The channels after decoding: 1 for grey, 4 with alpha, otherwise 3.
        kind: A description such as "palette PNG".
    """

    height: int
    width: int
    channels: int
    kind: str


def header(data: bytes) -> Header:
    """Read the header of an encoded picture. Raises BadPicture if it is invalid."""
    with opened(data) as picture:
        to_srgb.check_kind(picture, data)
        mode, depth, format = picture.mode, to_srgb.depth(picture, data), kind_of(data)
        if format == "PNG" and data[25] == 4:  # grey and alpha; Pillow reads some of these as RGBA
            mode = "LA"
        words = {"1": "1-bit", "L": "grey", "LA": "grey and alpha", "La": "grey and alpha", "P": "palette"}
        word = "grey" if mode[0] == "I" else words.get(mode, mode)
        channels = 1 if word in ("1-bit", "grey") else 4 if mode in ("LA", "La", "RGBA") else 3
        return Header(picture.height, picture.width, channels, f"{depth}-bit " * (depth > 8) + f"{word} {format}")


def decode(data: bytes, size: tuple[int, int], channels: int, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a picture of exactly this size and number of channels.

    Args:
        data: A JPEG, PNG or WebP file.
        size: The expected (height, width).
        channels: The expected number of channels: 1, 3 or 4.
        out: C-contiguous memory for the result, uint8 [*size, channels]; None to allocate it.

    Returns:
        uint8 [channels, *size], a view in which the channels of a pixel are adjacent in memory.

    Raises:
        BadPicture: if the bytes are damaged, or the size or the number of channels is different.
    """
    if data[:3] == _JPEG:
        pixels = _decode_jpeg(data, channels, size, out)
    else:
        pixels = _into(out, np.asarray(_load(data, channels, size)).reshape(*size, channels))
    return pixels.reshape(*size, channels).transpose(2, 0, 1)


def _into(out: np.ndarray | None, pixels: np.ndarray) -> np.ndarray:
    if out is None:
        return pixels
    np.copyto(out, pixels)
    return out


def decode_to_fit(data: bytes, size: tuple[int, int], channels: int, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a picture of any size. Its largest central part with the aspect ratio of `size` is scaled down to `size`.

    A JPEG is decoded at the smallest scale (in eighths) that is large enough, and then resampled with a Lanczos filter.
    Other channels, bit depths and palettes are converted to `channels` in the same way as when packing (to_srgb.py).
    Arguments and result are those of `decode`.

    Raises:
        BadPicture: if the bytes are damaged, or the picture is too small or has more than MAX_PIXELS pixels.
        MemoryError: if there is not enough memory.
    """
    picture = _reduced_jpeg(data, size, channels) if data[:3] == _JPEG else None
    if picture is None:
        picture = _converted(data, size, channels)
    (height, width), (rows, columns) = size, (picture.height, picture.width)
    if (rows, columns) != size:
        down, across = _part(rows, columns, size)
        top, left = (rows - down) / 2, (columns - across) / 2
        box = (left, top, left + across, top + down)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return _into(out, np.asarray(picture).reshape(*size, channels)).transpose(2, 0, 1)


def decode_mask(data: bytes, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """Decode a mask, whose pixels are whole numbers from 0 to 255: the values of a grey picture, the indices of a
    palette (not its colours), or 0 and 1 of a picture of one bit.

    A mask of another size is cropped as `decode_to_fit` crops the picture, and scaled to the nearest value, also up.

    Args:
        data: a PNG, or another format of open_image.py that loses nothing.
        size: (height, width).
        out: memory for the result, uint8 [*size, 1], C-contiguous.

    Returns:
        uint8 [1, *size].

    Raises:
        BadPicture: the bytes do not decode, or the picture has colours or values above 255.
    """
    values = mask_values(data)
    if (values.height, values.width) != size:
        down, across = _part(values.height, values.width, size)
        top, left = (values.height - down) / 2, (values.width - across) / 2
        box = (left, top, left + across, top + down)
        values = values.resize((size[1], size[0]), Image.Resampling.NEAREST, box=box)
    return _into(out, np.asarray(values).reshape(*size, 1)).transpose(2, 0, 1)


def mask_values(data: bytes, name: str = "", most_pixels: int = MAX_PIXELS) -> Image.Image:
    """The values of a mask (see `decode_mask`) at its own size, as a picture of mode L. Raises BadPicture."""
    with opened(data, name, most_pixels) as picture:
        if picture.mode not in ("L", "P", "1"):
            raise BadPicture(f"its mode is {picture.mode}: a mask is a grey or a palette picture", "channels")
        return Image.fromarray(np.asarray(picture).astype(np.uint8))


def _part(rows: int, columns: int, size: tuple[int, int]) -> tuple[float, float]:
    """Return rows and columns (not rounded) of the largest part of a picture with the aspect ratio of `size`."""
    scale = min(rows / size[0], columns / size[1])
    return size[0] * scale, size[1] * scale


def _need(rows: int, columns: int, least: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest rows and columns to which a picture may be reduced such that the used part is at least
    `least`."""
    down, across = _part(rows, columns, least)
    return math.ceil(least[0] * rows / down), math.ceil(least[1] * columns / across)


def _check_size(rows: int, columns: int, exact: tuple[int, int] | None, least: tuple[int, int] | None) -> None:
    if exact and (rows, columns) != exact:
        raise BadPicture(f"is {rows}x{columns}, not {exact[0]}x{exact[1]} (rows x columns)", "size")
    if least and (rows < least[0] or columns < least[1]):
        raise BadPicture(f"is {rows}x{columns}, smaller than {least[0]}x{least[1]} (rows x columns)", "size")
    check_pixels(rows, columns, MAX_PIXELS)


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    try:
        height, width, coded, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadPicture(f"does not decode: {error}") from error
    return int(str(height)), int(str(width)), coded.upper()


def _decode_jpeg(data: bytes, channels: int, size: tuple[int, int], out: np.ndarray | None) -> np.ndarray:
    """Decode a JPEG of exactly `size`. Return uint8 [*size, channels]."""
    height, width, coded = _jpeg_header(data)
    _check_size(height, width, size, None)
    if coded in _CMYK or channels != (1 if coded == "GRAY" else 3):
        raise BadPicture(f"its colour space is {coded}, which does not give {channels} channels", "channels")
    return _strictly(data, channels, (height, width), (0, 0), out)


def _strictly(
    data: bytes, channels: int, size: tuple[int, int], need: tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
    """Decode a JPEG of `size` at the smallest scale that gives at least `need`. Return uint8 [H, W, channels]. Strict
    mode raises an error for damaged data, which other decoders accept silently."""
    pixels = size[0] * size[1]
    if pixels * len(data) > MANY_SCANS:
        check_jpeg(data)
    try:
        space = "GRAY" if channels == 1 else "RGB"
        return simplejpeg.decode_jpeg(data, space, min_height=need[0], min_width=need[1], buffer=out, strict=True)
    except ValueError as error:
        check_memory(pixels)
        raise BadPicture(str(error)) from error


def _reduced_jpeg(data: bytes, least: tuple[int, int], channels: int) -> Image.Image | None:
    """Decode a JPEG at a reduced scale. Return None if the decoder cannot convert its colour space to `channels`."""
    height, width, coded = _jpeg_header(data)
    _check_size(height, width, None, least)
    if coded in _CMYK or channels == 4:
        return None
    pixels = _strictly(data, channels, (height, width), _need(height, width, least))
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def _converted(data: bytes, least: tuple[int, int], channels: int) -> Image.Image:
    """Decode a picture of any supported kind and convert it to `channels`. The colour profiles of grey, RGB and RGBA
    pictures are ignored."""
    with opened(data) as picture:
        _check_size(picture.height, picture.width, None, least)
        if picture.format in ("JPEG", "MPO"):
            rows, columns = _need(picture.height, picture.width, least)
            picture.draft(None, (columns, rows))
        return to_srgb.load(picture, data, channels, managed=picture.mode not in MODES.values())


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture(f"has more than {MAX_PIXELS} pixels: {error}", "size") from error
    except Exception as error:  # damaged data can cause many kinds of exceptions in Pillow
        reraise_resource_error(error)
        raise BadPicture(f"does not decode: {error}") from error


def _load(data: bytes, channels: int, size: tuple[int, int]) -> Image.Image:
    """Load a PNG or WebP of `size` in the mode of `channels`."""
    with _opened(data) as picture:
        _check_size(picture.height, picture.width, size, None)
        try:
            picture.load()
            # WebP has no grey pictures, and omits an alpha channel that is opaque everywhere.
            if picture.format == "WEBP" and channels != 3:
                picture = picture.convert(MODES[channels])
        except MemoryError:
            raise
        except Exception as error:  # damaged data, as in _opened
            reraise_resource_error(error)
            raise BadPicture(f"does not decode: {error}") from error
        if picture.mode != MODES[channels]:
            raise BadPicture(f"its mode is {picture.mode}, not {MODES[channels]}", "channels")
        return picture
