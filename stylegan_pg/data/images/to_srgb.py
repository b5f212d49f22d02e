"""A picture of any kind -> 8-bit sRGB (or grey) of the mode that is asked for: see data/picture.py for what is done.

What a picture says of its tones decides, and never a name: profiles are judged by what they make of colours. What is
not defined, or cannot be known, is refused by name.
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
_AT_ONCE = 1 << 24  # pixels that are converted at a time, so that a large picture is not there several times
_ALIKE = 3  # levels of 255 by which a profile may differ from sRGB and be taken for it
_PLAIN_GAMMA = (0.43, 0.48)  # exponents in PNGs that stand for sRGB's curve
_DIM = 4095  # of 65535: a picture that gets no brighter holds 12 bits in 16, or next to nothing
_HDR = {16: "PQ", 18: "HLG"}  # transfer functions (ITU-T H.273)
_MOST_EXIF = 1 << 16  # bytes of Exif data in a text of a PNG


def load(
    picture: Image.Image, data: bytes, channels: int, decided: list[str] | None = None, managed: bool = True
) -> Image.Image:
    """Decode an opened picture to the mode of `channels`; its orientation is left alone, and its profile or gamma too
    unless `managed`.

    `decided` takes in what was decided that the picture's owner may not expect.

    Raises BadPicture, and what decoders do.
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
    """EXIF's, 1 where there is none or it cannot be read. A TIFF's is 1 once it is loaded: Pillow turns it itself."""
    try:
        check_directory(picture.info.get("exif", b"").removeprefix(b"Exif\0\0"))
        if len(picture.info.get("Raw profile type exif", "")) > 2 * _MOST_EXIF:
            return 1
        return int(picture.getexif().get(0x0112, 1))
    except MemoryError:
        raise
    except Exception:  # a broken EXIF block says nothing about the picture
        return 1


def _check_strictly(data: bytes) -> None:
    """ValueError for garbled JPEG data, which Pillow passes silently."""
    try:
        coded = simplejpeg.decode_jpeg_header(data)[2].upper()
    except ValueError:
        return  # a rare chroma sampling that Pillow knows, or something that Pillow refuses too
    space = "CMYK" if coded in ("CMYK", "YCCK") else "GRAY"
    simplejpeg.decode_jpeg(data, colorspace=space, min_height=1, min_width=1, strict=True)  # at an eighth, to be quick


def check_kind(picture: Image.Image, data: bytes) -> None:
    """BadPicture for kinds that are not defined, or that decoders get wrong."""
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
    """What makes the mode of `channels` of (a part of) a loaded picture."""
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
    """Bits of a sample in the file, where that matters."""
    if picture.format == "PNG" and len(data) > 24:
        return data[24]
    if picture.format == "TIFF":
        return max(getattr(picture, "tag_v2", {}).get(258, (1,)))
    return 8


def _to_8_bits(picture: Image.Image, data: bytes) -> _Conversion:
    """Of 16-bit grey (also held in 32-bit integers), with an alpha where one value is transparent."""
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    low, high = int(values.min()), int(values.max())
    bits = tags.get(258, (16,))[0]
    white = 4095 if bits == 12 else 65535
    if low < 0 or high > white:
        raise BadPicture(f"samples from {low} to {high} do not fit 16 bits: convert it to 8 or 16 bits")
    inverted = picture.format == "TIFF" and tags.get(262) == 0  # which Pillow leaves to us
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
    """Of samples that use a sixteenth of 16 bits: what the file says white is. Raises BadPicture where it says nothing,
    as the picture would be next to black, which is hardly what it is."""
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
    """The same of colours, of which Pillow has kept the high bytes."""
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
    """The mode after, and the steps of, bringing colours to sRGB by the embedded profile or a PNG's gamma."""
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
    """What brings pictures of `mode` (L, RGB, RGBA, CMYK) to sRGB; None where it would hardly change a colour. Raises
    what lcms does for profiles that are damaged or of another kind."""
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
