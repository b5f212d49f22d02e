"""The encoding of one picture or mask: from its bytes to the encoded levels of the pyramid.

A picture is processed in this order:

* Its header is checked. A format that is not in open_image.py's list, more than `max_pixels` pixels (JPEG twice, WebP,
  AVIF and JPEG 2000 half of that), or a header that asks for excessive memory or time make it unreadable. JPEGs of more
  than 89 million pixels are decoded at the half, quarter or eighth of their size that is large enough.
* It is decoded strictly: a JPEG with garbled data counts as unreadable. Of animations and multi-page files the first
  frame is taken, and the report says so.
* Samples become 8 bits: 16-bit grey is scaled (65535 -> 255, rounded, never clipped; 12-bit TIFF by 4095; where white
  is zero, inverted), 16-bit RGB by its high byte. What is floating-point, signed, of high dynamic range, or so dark as
  12 bits in 16 are, is unreadable. Palettes become RGB, CMYK becomes RGB.
* Colours are converted to sRGB by the embedded ICC profile, or by the gamma that a PNG gives. A profile that changes no
  colour by more than 3 levels counts as sRGB whatever its name. One that is damaged or for another kind of picture is
  ignored and reported. CMYK without a profile is converted by the plain formula.
* Transparency (alpha or a transparent colour) is composited over white, unless channels = 4 keeps it.
* channels = 1 takes the luma (ITU-R 601), channels = 3 repeats grey, channels = 4 adds an opaque alpha.
* The EXIF orientation is applied.
* Pictures get the shape of `base`, a square unless it says otherwise: crop = "center" takes the largest central part
  of that shape, to the nearest pixel; crop = "pad" adds what is missing, equally on both sides, white, or transparent
  for channels = 4; crop = "none" counts pictures of another shape as unreadable.
* One resize with `filter` makes the top level, base[0] r / 4 rows of base[1] r / 4 pixels at resolution r; smaller
  pictures are enlarged, and counted in the report. (Where padding would make more than 89 million pixels, the picture
  is resized before it is padded.) The lower levels are exact means of 2^k x 2^k pixels of the top level before its
  compression, rounded once, halves up; of RGBA pixels the colours are weighted by their opacity, so that what is
  transparent does not bleed into what is not (and are 0 where nothing is opaque).
* Levels up to resolution 32 are lossless PNG; JPEG is written without chroma subsampling.

A mask keeps its values: of a pixel at any resolution, that of the nearest pixel of the cropped mask.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from stylegan_pg.data.images import to_srgb
from stylegan_pg.data.images.decode import SQUARE, mask_values, size_at
from stylegan_pg.data.images.headers import MAX_PIXELS
from stylegan_pg.data.images.open_image import opened

LOSSLESS_UP_TO = 32  # the resolution; a PNG is hardly larger there, and JPEG blocks would be most of the picture
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
ORIENTATIONS = {  # EXIF value -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PackOptions:
    """The validated options; with SOURCE they determine every byte of the dataset."""

    resolution: int
    lowest: int
    format: str
    quality: int
    crop: str
    filter: str
    channels: int
    shard_size: int  # bytes
    base: tuple[int, int] = SQUARE
    max_pixels: int = MAX_PIXELS

    @property
    def resolutions(self) -> list[int]:
        return [1 << k for k in range(self.lowest.bit_length() - 1, self.resolution.bit_length())]

    def format_at(self, resolution: int) -> str:
        return "png" if resolution <= LOSSLESS_UP_TO else self.format


class Levels(NamedTuple):
    """A picture at every resolution: encoded, from the lowest to the highest; its width and height, upright and before
    it was cropped; whether it was enlarged."""

    images: list[bytes]
    size: tuple[int, int]
    upscaled: bool


def picture_levels(data: bytes, name: str, recipe: PackOptions, channels: int, decided: list[str]) -> Levels:
    """Encode a picture at every resolution.

    Args:
        data: the file's content; name: its path, which tells some formats.
        channels: 1, 3 or 4.
        decided: receives what the picture's owner may not expect.

    Raises:
        BadPicture: it does not decode, or is too large. ValueError: it has another shape, and crop is "none".
        MemoryError: there is not enough memory.
    """
    with _pillow_allows(recipe.max_pixels):
        shaped, size = _shaped(data, name, recipe, channels, decided)
    height, width = size_at(recipe.resolution, recipe.base)
    top = np.asarray(shaped.resize((width, height), FILTERS[recipe.filter])).reshape(height, width, channels)
    levels = zip(recipe.resolutions, pyramid(top, len(recipe.resolutions)), strict=True)
    images = [_encode(level, recipe.format_at(resolution), recipe.quality) for resolution, level in levels]
    return Levels(images, size, shaped.width < width or shaped.height < height)


def mask_levels(data: bytes, name: str, recipe: PackOptions) -> Levels:
    """Encode a mask at every resolution: its values, cropped or padded (with 0) as a picture, and scaled to the nearest
    one, as PNGs of one channel. Raises as picture_levels."""
    with _pillow_allows(recipe.max_pixels):
        values = mask_values(data, name, recipe.max_pixels)
    fitted = _fitted(values, recipe, recipe.crop, Image.Resampling.NEAREST, 0)
    sizes = [size_at(resolution, recipe.base) for resolution in recipe.resolutions]
    levels = [fitted.resize((width, height), Image.Resampling.NEAREST) for height, width in sizes]
    height, width = sizes[-1]
    images = [_encode(np.asarray(level)[:, :, None], "png", recipe.quality) for level in levels]
    return Levels(images, values.size, fitted.width < width or fitted.height < height)


@contextlib.contextmanager
def _pillow_allows(most_pixels: int) -> Iterator[None]:
    """Set Pillow's own limit of pixels within the block; open_image.py has already checked the size."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, most_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def pyramid(top: np.ndarray, levels: int) -> list[np.ndarray]:
    """The `levels` levels of a pyramid, uint8, each twice the size of the one before; the last one is `top` [H, W, C].

    A level holds the means of 2^k x 2^k pixels of `top`, halves rounded up; if C is 4, colours are weighted by opacity.
    """
    result = [top]
    sums = top
    if top.shape[2] == 4:
        alpha = top[:, :, 3:].astype(np.uint64)
        sums = np.concatenate([top[:, :, :3] * alpha, alpha], axis=2)
    for k in range(1, levels):
        if top.shape[2] == 4:
            sums = _sums(sums, np.uint64)
            alpha = np.maximum(sums[:, :, 3:], 1)
            means = np.concatenate([sums[:, :, :3] // alpha, _rounded(sums[:, :, 3:], 2 * k)], axis=2)
            means[:, :, :3] += sums[:, :, :3] % alpha * 2 >= alpha
        else:
            sums = _sums(sums, np.uint16 if k < 5 else np.uint32)  # 16 x 16 pixels of 255 and the half fit 16 bits
            means = _rounded(sums, 2 * k)
        result.insert(0, means.astype(np.uint8))
    return result


def _sums(x: np.ndarray, wide: type[np.unsignedinteger]) -> np.ndarray:
    """Sums over 2x2 pixels, [H, W, C] -> [H / 2, W / 2, C]."""
    rows = np.add(x[0::2], x[1::2], dtype=wide)
    return np.add(rows[:, 0::2], rows[:, 1::2], dtype=wide)


def _rounded(sums: np.ndarray, shift: int) -> np.ndarray:
    """sums / 2^shift, halves rounded up."""
    return (sums + sums.dtype.type(1 << (shift - 1))) >> sums.dtype.type(shift)


def _shaped(
    data: bytes, name: str, recipe: PackOptions, channels: int, decided: list[str]
) -> tuple[Image.Image, tuple[int, int]]:
    """A picture in the mode of `channels`, upright, with the shape of the base, and its width and height before. Raises
    as open_image.opened; ValueError for another shape if crop is "none"."""
    rows, columns = size_at(recipe.resolution, recipe.base)
    final, crop = (columns, rows), recipe.crop
    with opened(data, name, recipe.max_pixels) as picture:
        if picture.format in ("JPEG", "MPO") and picture.width * picture.height > MAX_PIXELS:
            across, down = picture.size
            turned = to_srgb.orientation_of(picture) > 4
            shape = _shape((down, across) if turned else (across, down), recipe.base, crop)
            less = min(shape[0] / final[0], shape[1] / final[1])
            picture.draft(None, (math.ceil(picture.width / less), math.ceil(picture.height / less)))
            crop = "center" if crop == "none" else crop  # it had the shape, to the pixel
        upright = to_srgb.load(picture, data, channels, decided)
        orientation = to_srgb.orientation_of(picture)  # after it was loaded, which turns TIFFs itself
    if orientation in ORIENTATIONS:
        upright = upright.transpose(ORIENTATIONS[orientation])
    fill = "#ffffff00" if upright.mode == "RGBA" else "white"
    return _fitted(upright, recipe, crop, FILTERS[recipe.filter], fill), upright.size


def _fitted(
    upright: Image.Image, recipe: PackOptions, crop: str, resampling: Image.Resampling, fill: str | int
) -> Image.Image:
    """A picture cropped or padded to the shape of the base. Raises ValueError for another shape if crop is "none"."""
    rows, columns = size_at(recipe.resolution, recipe.base)
    final = (columns, rows)
    shape = _shape(upright.size, recipe.base, crop)
    if recipe.crop == "pad" and shape[0] * shape[1] > MAX_PIXELS:
        less = min(final[0] / shape[0], final[1] / shape[1])
        smaller = max(1, round(upright.width * less)), max(1, round(upright.height * less))
        upright, shape = upright.resize(smaller, resampling), final
    if shape == upright.size:
        return upright
    (across, down), (width, height) = shape, upright.size
    if recipe.crop == "pad":
        canvas = Image.new(upright.mode, shape, fill)
        canvas.paste(upright, ((across - width) // 2, (down - height) // 2))
        return canvas
    left, top = (width - across) // 2, (height - down) // 2
    return upright.crop((left, top, left + across, top + down))


def _shape(size: tuple[int, int], base: tuple[int, int], crop: str) -> tuple[int, int]:
    """Width and height to which a picture of `size` is cropped or padded, for a base of (rows, columns)."""
    (width, height), (rows, columns) = size, base
    wide, high = width * rows, height * columns  # equal where the shape fits
    if crop == "pad":
        return max(width, round(high / rows)), max(height, round(wide / columns))
    across = min(width, max(1, round(high / rows)))
    down = min(height, max(1, round(wide / columns)))
    if crop == "none" and (across, down) != size:
        shape = "square" if rows == columns else f"{columns} wide for {rows} high"
        raise ValueError(f"is {width}x{height} (width x height), not {shape}, and crop = none")
    return across, down


def _encode(pixels: np.ndarray, format: str, quality: int) -> bytes:
    pixels = np.ascontiguousarray(pixels)
    grey = pixels.shape[2] == 1
    if format == "jpg":
        sampling = "GRAY" if grey else "444"
        return simplejpeg.encode_jpeg(pixels, quality, "GRAY" if grey else "RGB", sampling)
    buffer = io.BytesIO()
    options = {"quality": quality, "exact": True} if format == "webp" else {}
    Image.fromarray(pixels[:, :, 0] if grey else pixels).save(buffer, format, **options)
    return buffer.getvalue()
