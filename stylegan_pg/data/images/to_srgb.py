"""Conversion of pictures of any kind to 8-bit sRGB or grey; pack/pyramid.py describes all steps.

Colour profiles are judged by how they map colours, never by their names. A picture whose tones are undefined or unknown
is refused, and the message says why.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from stylegan_pg.data.images.headers import BadPicture, check_directory, png_chunks

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow mode
_AT_ONCE = 1 << 24  # pixels that are converted at a time, to limit the memory for copies
_ALIKE = 3  # levels of 255 by which a profile may differ from sRGB and still count as sRGB
_PLAIN_GAMMA = (0.43, 0.48)  # range of exponents in PNGs that mean sRGB's curve
_DIM = 4095  # of 65535: a picture without brighter samples holds 12 bits in 16, or is almost black
_HDR = {16: "PQ", 18: "HLG"}  # transfer functions (ITU-T H.273)
_MOST_EXIF = 1 << 16  # bytes of Exif data in a text of a PNG


def load(
    picture: Image.Image, data: bytes, channels: int, decided: list[str] | None = None, managed: bool = True
) -> Image.Image:
    """Decode an opened picture to the mode of `channels`, without applying its orientation.

    Decisions that the picture's owner may not expect are appended to `decided` as texts. The profile or gamma is
    applied only if `managed`.

    Raises:
        BadPicture: the picture is refused. Exceptions of decoders pass through.
    """
    decided = [] if decided is None else decided
    check_kind(picture, data)
    if picture.format in ("JPEG", "MPO"):
        _check_strictly(data)
    if getattr(picture, "is_animated", False) and picture.format not in ("JPEG", "MPO"):
        decided.append("holds several frames or pages, of which the first was taken")
    picture.load()
    convert = _conversion(picture, data, channels, decided, managed)
    if picture.width * picture.height <= _AT_ONCE or picture.mode == MODES[channels]:
        return convert(picture)
    result, rows = Image.new(MODES[channels], picture.size), max(_AT_ONCE // picture.width, 1)
    for top in range(0, picture.height, rows):
        bottom = min(top + rows, picture.height)
        result.paste(convert(picture.crop((0, top, picture.width, bottom))), (0, top))
    return result


def orientation_of(picture: Image.Image) -> int:
    """The EXIF orientation, 1 if it is missing or unreadable. It is 1 for a loaded TIFF, which Pillow rotates
    itself."""
    try:
        check_directory(picture.info.get("exif", b"").removeprefix(b"Exif\0\0"))
        if len(picture.info.get("Raw profile type exif", "")) > 2 * _MOST_EXIF:
            return 1
        return int(picture.getexif().get(0x0112, 1))
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block does not make the picture bad
        return 1


def _check_strictly(data: bytes) -> None:
    """Raise ValueError for damaged JPEG data, which Pillow accepts silently."""
    try:
        coded = simplejpeg.decode_jpeg_header(data)[2].upper()
    except ValueError:
        return  # a rare chroma sampling that Pillow knows, or something that Pillow refuses too
    space = "CMYK" if coded in ("CMYK", "YCCK") else "GRAY"
    simplejpeg.decode_jpeg(data, colorspace=space, min_height=1, min_width=1, strict=True)  # at an eighth, to be quick


def check_kind(picture: Image.Image, data: bytes) -> None:
    """Raise BadPicture for kinds that are undefined, or that decoders handle wrongly."""
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        bits, formats = max(tags.get(258, (1,))), set(tags.get(339, (1,)))
        if 2 in formats and bits < 32:
            raise BadPicture("signed samples have no defined range: convert it to unsigned ones")
        if tags.get(284, 1) == 2 and bits > 8 and tags.get(277, 1) > 1:
            raise BadPicture(f"{bits} bits a sample in separate planes: save it with interleaved samples, or as PNG")
        if tags.get(262) == 6 and tags.get(259, 1) == 1 and tags.get(277, 1) > 1:
            raise BadPicture("YCbCr samples without compression: save it as RGB")
    elif picture.format == "PNG":
        for kind, at, length in png_chunks(data):
            if kind == b"cICP" and length == 4:
                _check_transfer(data[at + 1])
            elif kind == b"IDAT":
                break
    elif picture.format == "AVIF":
        at = data.find(b"colrnclx")
        if at >= 0:
            _check_transfer(int.from_bytes(data[at + 10 : at + 12], "big"))
    if picture.mode == "F":
        raise BadPicture("floating-point samples have no defined range: convert it to 8 or 16 bits")


def _check_transfer(number: int) -> None:
    if number in _HDR:
        raise BadPicture(f"high dynamic range ({_HDR[number]}) has no one look on a plain screen: convert it to sRGB")


# -------------------------------------------------------------------------------------------------- pixel by pixel

_Conversion = Callable[[Image.Image], Image.Image]


def _conversion(picture: Image.Image, data: bytes, channels: int, decided: list[str], managed: bool) -> _Conversion:
    """The function that converts (a part of) a loaded picture to the mode of `channels`."""
    steps: list[_Conversion] = []
    mode, transparent = picture.mode, picture.info.get("transparency")
    if mode.startswith("I"):
        steps.append(_to_8_bits(picture, data))
        mode = "LA" if transparent is not None else "L"
    else:
        if depth(picture, data) > 8:
            _check_brightness(picture, transparent)
        elif mode == "L" and isinstance(transparent, int) and depth(picture, data) < 8:  # left as in the file
            transparent *= 255 // ((1 << depth(picture, data)) - 1)
            picture.info["transparency"] = transparent
        steps += {"La": [_to("LA")], "RGBa": [_to("RGBA")], "LAB": [_from_lab]}.get(mode, [])
        mode = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}.get(mode, mode)
    if mode in ("LA", "PA", "RGBA") or (transparent is not None and picture.mode[0] != "I"):
        grey = mode in ("LA", "L", "1")
        steps.append(_to("RGBA"))
        mode = "RGBA"
    else:
        grey = mode in ("1", "L")
        if mode not in ("1", "L", "CMYK"):
            steps.append(_to("RGB"))
            mode = "RGB"
    if managed:
        mode, colours = _managed(picture, mode, grey, decided)
        steps += colours
    if mode == "RGBA" and channels != 4:
        steps.append(_over_white)
    steps.append(_to(MODES[channels]))
    return lambda part: functools.reduce(lambda x, step: step(x), steps, part)


def _to(mode: str) -> _Conversion:
    return lambda part: part if part.mode == mode else part.convert(mode)


def _over_white(part: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", part.size, "white"), part).convert("RGB")


def depth(picture: Image.Image, data: bytes) -> int:
    """The bits of a sample in the file, for formats in which this matters."""
    if picture.format == "PNG" and len(data) > 24:
        return data[24]
    if picture.format == "TIFF":
        return max(getattr(picture, "tag_v2", {}).get(258, (1,)))
    return 8


def _to_8_bits(picture: Image.Image, data: bytes) -> _Conversion:
    """The conversion of 16-bit grey (also held in 32-bit integers) to 8 bits, with alpha if one value is
    transparent."""
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    low, high = int(values.min()), int(values.max())
    bits = tags.get(258, (16,))[0]
    white = 4095 if bits == 12 else 65535
    if low < 0 or high > white:
        raise BadPicture(f"samples from {low} to {high} do not fit 16 bits: convert it to 8 or 16 bits")
    inverted = picture.format == "TIFF" and tags.get(262) == 0  # Pillow does not invert these
    if white > _DIM and picture.format in ("TIFF", "PNG") and 0 < high <= _DIM:
        white = _stated_white(picture, data, high)
    transparent = picture.info.get("transparency")

    def convert(part: Image.Image) -> Image.Image:
        samples = np.asarray(part).astype(np.int64)
        light = white - samples if inverted else samples
        grey = Image.fromarray(((light * 255 + white // 2) // white).astype(np.uint8))
        if transparent is not None:
            grey.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
        return grey

    return convert


def _stated_white(picture: Image.Image, data: bytes, high: int) -> int:
    """The value of white in 16-bit samples of which only the lowest 12 bits are used, as the file states it.

    Raises:
        BadPicture: the file does not state it; taken as 16 bits, the picture would be almost black.
    """
    stated = getattr(picture, "tag_v2", {}).get(281, 0)  # MaxSampleValue
    stated = stated[0] if isinstance(stated, tuple) and stated else stated
    for kind, at, length in png_chunks(data) if picture.format == "PNG" else ():
        if kind == b"sBIT" and length:
            stated = (1 << data[at]) - 1
    if stated in (1023, 4095) and high <= stated:
        return int(stated)
    raise BadPicture(
        f"its brightest sample is {high} of 65535, as of 10 or 12 bits in 16: scale the samples to all 16 bits, or "
        "convert it to 8"
    )


def _check_brightness(picture: Image.Image, transparent: object) -> None:
    """The same check for colour pictures, of which Pillow keeps the high bytes only."""
    if isinstance(transparent, tuple):
        raise BadPicture("a transparent colour of 16 bits: give it an alpha channel, or convert it to 8 bits")
    if picture.mode not in ("RGB", "RGBA", "CMYK"):
        return
    bands = picture.getextrema()[:3]
    high = max(int(band[1]) for band in bands)  # type: ignore[index]  # of several bands
    if 0 < high <= _DIM >> 8 and picture.mode != "CMYK":
        raise BadPicture(
            f"its brightest sample is below {(high + 1) << 8} of 65535, as of 10 or 12 bits in 16: scale the samples "
            "to all 16 bits, or convert it to 8"
        )


# ---------------------------------------------------------------------------------------------------------- colours


def _managed(picture: Image.Image, mode: str, grey: bool, decided: list[str]) -> tuple[str, list[_Conversion]]:
    """The steps that convert colours to sRGB by the embedded profile or a PNG's gamma, and the mode after them."""
    profile = picture.info.get("icc_profile")
    if profile:
        try:
            return _by_profile(bytes(profile), mode, grey)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            decided.append("has a colour profile that is damaged or of another kind of picture: it was ignored")
            return mode, []
    gamma = picture.info.get("gamma") if picture.format == "PNG" and "srgb" not in picture.info else None
    if gamma and not _PLAIN_GAMMA[0] <= gamma <= _PLAIN_GAMMA[1] and mode in ("L", "RGB", "RGBA"):
        light = (np.arange(256) / 255) ** (1 / gamma)
        srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        table = np.rint(srgb * 255).astype(int).tolist()
        table = table * {"L": 1}.get(mode, 3) + (list(range(256)) if mode == "RGBA" else [])
        return mode, [lambda part: part.point(table)]
    return mode, []


def _by_profile(profile: bytes, mode: str, grey: bool) -> tuple[str, list[_Conversion]]:
    space = ImageCms.core.profile_frombytes(profile).xcolor_space.strip()
    if space == "GRAY" and grey:
        transform = _to_srgb(profile, "L")
        return (mode, []) if transform is None else ("RGBA" if mode == "RGBA" else "RGB", [_of_grey(transform)])
    if space != {"CMYK": "CMYK"}.get(mode, "RGB"):
        raise ValueError(f"a profile of {space} in a picture of {mode}")
    start = "RGB" if mode in ("1", "L") else mode
    transform = _to_srgb(profile, start)
    return (mode, []) if transform is None else ("RGBA" if start == "RGBA" else "RGB", [_to(start), transform])


def _of_grey(transform: _Conversion) -> _Conversion:
    def convert(part: Image.Image) -> Image.Image:
        colours = transform(part.convert("L"))
        if part.mode == "RGBA":
            colours.putalpha(part.getchannel("A"))
        return colours

    return convert


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> _Conversion | None:
    """The conversion of pictures of `mode` (L, RGB, RGBA, CMYK) from a profile to sRGB; None if it would hardly change
    colours. Exceptions of lcms, for damaged or unsuitable profiles, pass through."""
    embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    exact = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE  # lcms takes few points of a grey curve
    target = "RGBA" if mode == "RGBA" else "RGB"
    convert = _applied(ImageCms.buildTransform(embedded, _srgb(), mode, target, flags=exact))
    if mode == "CMYK":
        return convert
    steps = np.arange(256, dtype=np.uint8)
    if mode == "L":
        probe = Image.fromarray(steps[None])
    else:
        some = steps[::17]
        colours = np.stack(np.meshgrid(some, some, some, indexing="ij"), -1).reshape(-1, 3)
        probe = Image.fromarray(np.concatenate([colours, np.stack([steps] * 3, -1)])[None]).convert(mode)
    change = np.asarray(convert(probe).convert("RGB")).astype(int) - np.asarray(probe.convert("RGB"))
    return convert if np.abs(change).max() > _ALIKE else None


def _applied(transform: ImageCms.ImageCmsTransform) -> _Conversion:
    return lambda part: ImageCms.applyTransform(part, transform) or part


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _from_lab(part: Image.Image) -> Image.Image:
    return _lab()(part)


@functools.cache
def _lab() -> _Conversion:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return _applied(ImageCms.buildTransform(lab, _srgb(), "LAB", "RGB"))
