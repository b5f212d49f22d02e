"""Encoded JPEG, PNG or WebP -> uint8 pixels: strict, deterministic to the byte, and never a picture of another shape.

Sizes and channels are read from the header and refused before anything is decoded, so a small file that says it holds
a huge picture costs nothing.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
from PIL import Image

from stylegan_pg.data import tones
from stylegan_pg.data.raster import MOST_PIXELS, BadPicture, check_jpeg, check_pixels, kind_of, opened
from stylegan_pg.data.tones import MODES

SQUARE = (4, 4)  # the base of r x r pictures
_JPEG = b"\xff\xd8\xff"


def size_at(resolution: int, base: Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels at a resolution, for a base of (rows, columns) at resolution 4.

    As schedule.size_at, which comes with the configuration and so takes its time to import.
    """
    return base[0] * resolution // 4, base[1] * resolution // 4


def header(data: bytes) -> tuple[int, int, int]:
    """Height, width and channels of an encoded picture, without decoding it. Raises BadPicture."""
    if data[:3] == _JPEG:
        height, width, coded = _jpeg_header(data)
        return height, width, {"GRAY": 1, "CMYK": 4, "YCCK": 4}.get(coded, 3)
    with _opened(data) as picture:
        return picture.height, picture.width, {"L": 1, "RGBA": 4}.get(picture.mode, 3)


def decode(data: bytes, size: tuple[int, int], channels: int, out: np.ndarray | None = None) -> np.ndarray:
    """-> uint8 [channels, *size], size = (height, width); in memory a pixel's channels lie together, in `out` (uint8
    [*size, channels], C-contiguous) where that is given.

    Raises BadPicture for bytes that do not decode cleanly, and for another size or another number of channels.
    """
    if data[:3] == _JPEG:
        pixels = _decode_jpeg(data, channels, size, out=out)
    else:
        pixels = _into(out, np.asarray(_load(data, channels, size)).reshape(*size, channels))
    return pixels.reshape(*size, channels).transpose(2, 0, 1)


def _into(out: np.ndarray | None, pixels: np.ndarray) -> np.ndarray:
    if out is None:
        return pixels
    np.copyto(out, pixels)
    return out


def decode_to_fit(data: bytes, size: tuple[int, int], channels: int, out: np.ndarray | None = None) -> np.ndarray:
    """-> uint8 [channels, *size], as `decode`: the largest central part of that shape, made smaller where it is larger.

    A JPEG is decoded at the smallest scale (in eighths) that is large enough; the rest is Lanczos resampling.

    Raises BadPicture as `decode`, and for a picture that is too small or has more than MOST_PIXELS.
    """
    picture = _reduced_jpeg(data, size, channels) if data[:3] == _JPEG else _load(data, channels, None, size)
    (height, width), (rows, columns) = size, (picture.height, picture.width)
    if (rows, columns) != size:
        down, across = _part(rows, columns, size)
        top, left = (rows - down) / 2, (columns - across) / 2
        box = (left, top, left + across, top + down)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return _into(out, np.asarray(picture).reshape(*size, channels)).transpose(2, 0, 1)


def _part(rows: int, columns: int, size: tuple[int, int]) -> tuple[float, float]:
    """The largest part with the shape of `size` of a picture: rows and columns, not rounded."""
    scale = min(rows / size[0], columns / size[1])
    return size[0] * scale, size[1] * scale


def _check_size(rows: int, columns: int, exact: tuple[int, int] | None, least: tuple[int, int] | None) -> None:
    if exact and (rows, columns) != exact:
        raise BadPicture(f"is {rows}x{columns}, not {exact[0]}x{exact[1]} (rows x columns)", "size")
    if least and (rows < least[0] or columns < least[1]):
        raise BadPicture(f"is {rows}x{columns}, smaller than {least[0]}x{least[1]} (rows x columns)", "size")
    if rows * columns > MOST_PIXELS:
        raise BadPicture(f"is {rows}x{columns} (rows x columns) and has more than {MOST_PIXELS} pixels", "size")


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    try:
        height, width, coded, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadPicture(f"does not decode: {error}") from error
    return int(str(height)), int(str(width)), coded.upper()


def _decode_jpeg(
    data: bytes,
    channels: int,
    exact: tuple[int, int] | None,
    least: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """uint8 [H, W, channels]. Strict mode raises for garbled data that other decoders pass silently."""
    height, width, coded = _jpeg_header(data)
    _check_size(height, width, exact, least)
    if coded in ("CMYK", "YCCK") or channels != (1 if coded == "GRAY" else 3):
        raise BadPicture(f"its colour space is {coded}, which does not give {channels} channels", "channels")
    # The part that is used must be large enough after scaling, hence more of the picture than `least`.
    need = (0, 0)
    if least:
        down, across = _part(height, width, least)
        need = math.ceil(least[0] * height / down), math.ceil(least[1] * width / across)
    try:
        return simplejpeg.decode_jpeg(
            data,
            colorspace="GRAY" if channels == 1 else "RGB",
            min_height=need[0],
            min_width=need[1],
            buffer=out,
            strict=True,
        )
    except ValueError as error:
        raise BadPicture(str(error)) from error


def _reduced_jpeg(data: bytes, size: tuple[int, int], channels: int) -> Image.Image:
    pixels = _decode_jpeg(data, channels, None, size)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture(f"has more than {MOST_PIXELS} pixels: {error}", "size") from error
    except Exception as error:  # broken data makes Pillow raise nearly anything
        raise BadPicture(f"does not decode: {error}") from error


def _load(
    data: bytes, channels: int, exact: tuple[int, int] | None, least: tuple[int, int] | None = None
) -> Image.Image:
    """A PNG or WebP with the mode of `channels`."""
    with _opened(data) as picture:
        _check_size(picture.height, picture.width, exact, least)
        try:
            picture.load()
            # WebP knows no grey, and drops an alpha that is opaque everywhere.
            if picture.format == "WEBP" and channels != 3:
                picture = picture.convert(MODES[channels])
        except MemoryError:
            raise
        except Exception as error:  # broken data, as in _opened
            raise BadPicture(f"does not decode: {error}") from error
        if picture.mode != MODES[channels]:
            raise BadPicture(f"its mode is {picture.mode}, not {MODES[channels]}", "channels")
        return picture
