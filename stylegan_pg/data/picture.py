"""One picture: its bytes -> the encoded levels of the pyramid.

What happens to a picture, in this order:

* It is decoded strictly: a JPEG with garbled data counts as unreadable. Of animations and multi-page files the first
  frame is taken.
* 16-bit grey is scaled to 8 bits (65535 -> 255, rounded, never clipped; 12-bit TIFF by 4095), 16-bit RGB by its high
  byte. Floating-point pictures have no defined range and are unreadable. Palettes become RGB, CMYK becomes RGB.
* Colours are brought to sRGB by the embedded ICC profile (RGB and CMYK pictures); a profile that says sRGB, belongs to
  a grey picture or cannot be applied is ignored. CMYK without a profile is converted by the plain formula.
* Transparency (alpha or a transparent palette entry) is composited over white, unless channels = 4 keeps it.
* channels = 1 takes the luma (ITU-R 601), channels = 3 repeats grey, channels = 4 adds an opaque alpha.
* The EXIF orientation is applied.
* Pictures get the shape of `base`, a square unless it says otherwise: crop = "center" takes the largest central part
  of that shape, to the nearest pixel; crop = "pad" adds what is missing, equally on both sides, white, or transparent
  for channels = 4; crop = "none" counts pictures of another shape as unreadable.
* One resize with `filter` makes the top level, base[0] r / 4 rows of base[1] r / 4 pixels at resolution r; smaller
  pictures are enlarged, and counted in the report. The lower levels are exact means of 2^k x 2^k pixels of the top
  level before its compression, rounded once, halves up; of RGBA pixels the colours are weighted by their opacity, so
  that what is transparent does not bleed into what is not (and are 0 where nothing is opaque).
* Levels up to resolution 32 are lossless PNG; JPEG is written without chroma subsampling.
"""

import functools
import io
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

from stylegan_pg.data.decode import MODES, SQUARE, size_at
from stylegan_pg.data.reading import Gone, Unreadable, digest_of, read_listed
from stylegan_pg.data.sources import File

LOSSLESS_UP_TO = 32  # the resolution; a PNG is hardly larger there, and JPEG blocks would be most of the picture
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
_ORIENTATIONS = {  # EXIF value -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Recipe:
    """The checked options; together with SOURCE they decide every byte."""

    resolution: int
    lowest: int
    format: str
    quality: int
    crop: str
    filter: str
    channels: int
    shard_size: int  # bytes
    base: tuple[int, int] = SQUARE

    @property
    def resolutions(self) -> list[int]:
        return [1 << k for k in range(self.lowest.bit_length() - 1, self.resolution.bit_length())]

    def format_at(self, resolution: int) -> str:
        return "png" if resolution <= LOSSLESS_UP_TO else self.format


class Result(NamedTuple):
    images: list[bytes]  # encoded, from the lowest to the highest resolution; none where unreadable
    reason: str  # why it is unreadable
    upscaled: bool
    digest: str = ""  # of the picture's own bytes, as far as they were read
    gone: bool = False  # the file was listed, and is no longer there


def make(picture: File, recipe: Recipe) -> Result:
    """Read one picture and encode it at every resolution. Raises RunError where SOURCE cannot be read just now."""
    try:
        data = read_listed(picture)
    except Unreadable as error:
        return Result([], str(error), False, gone=isinstance(error, Gone))
    return _made(data, recipe)._replace(digest=digest_of(data))


def _made(data: bytes, recipe: Recipe) -> Result:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shaped = _shaped(_load(data, recipe.channels), recipe.base, recipe.crop)
    except MemoryError:
        raise
    except UnidentifiedImageError:  # its text holds an address in memory
        return Result([], "not a picture of a known format", False)
    except Exception as error:  # broken data makes Pillow raise nearly anything
        return Result([], str(error) or type(error).__name__, False)
    height, width = size_at(recipe.resolution, recipe.base)
    top = np.asarray(shaped.resize((width, height), FILTERS[recipe.filter])).reshape(height, width, recipe.channels)
    levels = zip(recipe.resolutions, pyramid(top, len(recipe.resolutions)), strict=True)
    images = [_encode(level, recipe.format_at(resolution), recipe.quality) for resolution, level in levels]
    return Result(images, "", shaped.width < width or shaped.height < height)


def pyramid(top: np.ndarray, levels: int) -> list[np.ndarray]:
    """uint8 [H, W, C] -> so many uint8 levels, each twice the size of the one before and the last one `top`: means of
    2^k x 2^k of its pixels, halves rounded up; colours weighted by the opacity if C is 4."""
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
    """[H, W, C] -> [H / 2, W / 2, C], of 2x2 each."""
    rows = np.add(x[0::2], x[1::2], dtype=wide)
    return np.add(rows[:, 0::2], rows[:, 1::2], dtype=wide)


def _rounded(sums: np.ndarray, shift: int) -> np.ndarray:
    """Over 2^shift, halves up."""
    return (sums + sums.dtype.type(1 << (shift - 1))) >> sums.dtype.type(shift)


def _load(data: bytes, channels: int) -> Image.Image:
    """Decode to the mode of `channels`, upright."""
    _check_jpeg(data)
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        try:
            orientation = picture.getexif().get(0x0112)  # after load, which turns TIFFs itself
        except Exception:  # a broken EXIF block says nothing about the picture
            orientation = None
        upright = _to_mode(picture, channels)
    if orientation in _ORIENTATIONS:
        upright = upright.transpose(_ORIENTATIONS[orientation])
    return upright


def _check_jpeg(data: bytes) -> None:
    """ValueError for garbled JPEG data, which Pillow passes silently."""
    if data[:3] != b"\xff\xd8\xff":
        return
    try:
        coded = simplejpeg.decode_jpeg_header(data)[2].upper()
    except ValueError:
        return  # a rare chroma sampling that Pillow knows, or something that Pillow refuses too
    simplejpeg.decode_jpeg(data, colorspace="CMYK" if coded in ("CMYK", "YCCK") else "GRAY", strict=True)


def _to_mode(picture: Image.Image, channels: int) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point samples have no defined range: convert it to 8 or 16 bits")
    if picture.mode.startswith("I"):
        return _from_16_bits(picture).convert(MODES[channels])
    profile = picture.info.get("icc_profile")
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        profile = None if picture.mode == "LA" else profile
        picture = picture.convert("RGBA")
    elif picture.mode not in ("1", "L", "CMYK"):
        picture = picture.convert("RGB")
    if profile and picture.mode in ("RGB", "RGBA", "CMYK"):
        picture = _to_srgb(picture, profile)
    if picture.mode == "RGBA" and channels != 4:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert(MODES[channels])


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey (also held in 32-bit integers) -> 8-bit."""
    values = np.asarray(picture).astype(np.int64)
    bits = getattr(picture, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample
    white = 4095 if bits == 12 else 65535
    if values.min() < 0 or values.max() > white:
        raise ValueError(
            f"samples from {values.min()} to {values.max()} do not fit 16 bits: convert it to 8 or 16 bits"
        )
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))


def _to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(embedded).lower():
            return picture
        return ImageCms.profileToProfile(picture, embedded, _srgb(), outputMode=mode) or picture
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _shaped(picture: Image.Image, base: tuple[int, int], crop: str) -> Image.Image:
    """Cropped or padded to the shape of `base`, (rows, columns)."""
    (width, height), (rows, columns) = picture.size, base
    wide, high = width * rows, height * columns  # equal where the shape fits
    if crop == "pad":
        across = max(width, round(high / rows))
        down = max(height, round(wide / columns))
        canvas = Image.new(picture.mode, (across, down), "#ffffff00" if picture.mode == "RGBA" else "white")
        canvas.paste(picture, ((across - width) // 2, (down - height) // 2))
        return canvas
    across = min(width, max(1, round(high / rows)))
    down = min(height, max(1, round(wide / columns)))
    if crop == "none" and (across, down) != picture.size:
        shape = "square" if rows == columns else f"{columns} wide for {rows} high"
        raise ValueError(f"is {width}x{height} (width x height), not {shape}, and crop = none")
    left, top = (width - across) // 2, (height - down) // 2
    return picture.crop((left, top, left + across, top + down))


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
