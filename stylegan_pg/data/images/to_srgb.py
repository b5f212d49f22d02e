"""Conversion of pictures of any kind to 8-bit sRGB or grey. pack/pyramid.py describes all steps.

Colour profiles are compared by how they map colours, not by their names. A picture whose tones are undefined is refused
with a reason.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from stylegan_pg.data.images.headers import BadPicture, check_directory, png_chunks

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # {channels: Pillow's mode}
_PIXELS_AT_ONCE = 1 << 24  # pixels that are converted at once, which limits the memory for copies
_TOLERANCE = 3  # a profile that differs from sRGB by at most this number of levels (of 255) counts as sRGB
_SRGB_GAMMA = (0.43, 0.48)  # the range of exponents in PNGs that stand for the curve of sRGB
_MAX_DARK = 4095  # a 16-bit picture without brighter samples is almost black, or contains 12-bit samples
_HDR = {16: "PQ", 18: "HLG"}  # transfer functions (ITU-T H.273)
_MAX_EXIF = 1 << 16  # bytes of Exif data in a text chunk of a PNG


def load(
    picture: Image.Image, data: bytes, channels: int, remarks: list[str] | None = None, managed: bool = True
) -> Image.Image:
    """Decode an opened picture to the mode of `channels`. Its orientation is not applied.

    Args:
        picture: The opened picture.
        data: The bytes of its file.
        channels: 1, 3 or 4.
        remarks: A list to which remarks are appended about decisions that the user may not expect.
        managed: Whether the picture's colour profile or gamma is applied.

    Raises:
        BadPicture: if the picture is refused. Exceptions of decoders are passed on.
    """
    remarks = [] if remarks is None else remarks
    check_kind(picture, data)
    if picture.format in ("JPEG", "MPO"):
        _check_strictly(data)
    if getattr(picture, "is_animated", False) and picture.format not in ("JPEG", "MPO"):
        remarks.append("has several frames or pages, of which only the first is used")
    picture.load()
    convert = _conversion(picture, data, channels, remarks, managed)
    if picture.width * picture.height <= _PIXELS_AT_ONCE or picture.mode == MODES[channels]:
        return convert(picture)
    result, rows = Image.new(MODES[channels], picture.size), max(_PIXELS_AT_ONCE // picture.width, 1)
    for top in range(0, picture.height, rows):
        bottom = min(top + rows, picture.height)
        result.paste(convert(picture.crop((0, top, picture.width, bottom))), (0, top))
    return result


def orientation_of(picture: Image.Image) -> int:
    """Return the EXIF orientation, or 1 if it is missing or unreadable. It is 1 for a loaded TIFF, because Pillow has
    already rotated it."""
    try:
        check_directory(picture.info.get("exif", b"").removeprefix(b"Exif\0\0"))
        if len(picture.info.get("Raw profile type exif", "")) > 2 * _MAX_EXIF:
            return 1
        return int(picture.getexif().get(0x0112, 1))
    except MemoryError:
        raise
    except Exception:  # a picture with damaged EXIF data is still usable
        return 1


def _check_strictly(data: bytes) -> None:
    """Raise ValueError for damaged JPEG data, which Pillow would accept silently."""
    try:
        coded = simplejpeg.decode_jpeg_header(data)[2].upper()
    except ValueError:
        return  # it has a rare chroma subsampling that Pillow supports, or Pillow refuses it as well
    space = "CMYK" if coded in ("CMYK", "YCCK") else "GRAY"
    # The smallest size selects the scale 1/8, which is fast.
    simplejpeg.decode_jpeg(data, colorspace=space, min_height=1, min_width=1, strict=True)


def check_kind(picture: Image.Image, data: bytes) -> None:
    """Raise BadPicture for kinds of pictures whose tones are undefined, or that decoders read incorrectly."""
    if picture.format == "TIFF":
        tags = getattr(picture, "tag_v2", {})
        bits, formats = max(tags.get(258, (1,))), set(tags.get(339, (1,)))
        if 2 in formats and bits < 32:
            raise BadPicture("signed samples have no defined range: convert it to unsigned samples")
        if tags.get(284, 1) == 2 and bits > 8 and tags.get(277, 1) > 1:
            raise BadPicture(
                f"samples of {bits} bits in separate planes are not supported: save it with interleaved samples, or as "
                "PNG"
            )
        if tags.get(262) == 6 and tags.get(259, 1) == 1 and tags.get(277, 1) > 1:
            raise BadPicture("YCbCr samples without compression are not supported: save it as RGB")
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
        raise BadPicture(
            f"high dynamic range ({_HDR[number]}) has no unique standard-range rendering: convert it to sRGB"
        )


# -------------------------------------------------------------------------------------------------- pixel by pixel

_Conversion = Callable[[Image.Image], Image.Image]


def _conversion(picture: Image.Image, data: bytes, channels: int, remarks: list[str], managed: bool) -> _Conversion:
    """Return a function that converts a loaded picture, or a part of it, to the mode of `channels`."""
    steps: list[_Conversion] = []
    mode, transparent = picture.mode, picture.info.get("transparency")
    if mode.startswith("I"):
        steps.append(_to_8_bits(picture, data))
        mode = "LA" if transparent is not None else "L"
    else:
        if depth(picture, data) > 8:
            _check_brightness(picture, transparent)
        elif mode == "L" and isinstance(transparent, int) and depth(picture, data) < 8:  # Pillow did not scale it
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
        mode, colours = _managed(picture, mode, grey, remarks)
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
    """Return the number of bits of a sample in a PNG or TIFF file, and 8 for other formats."""
    if picture.format == "PNG" and len(data) > 24:
        return data[24]
    if picture.format == "TIFF":
        return max(getattr(picture, "tag_v2", {}).get(258, (1,)))
    return 8


def _to_8_bits(picture: Image.Image, data: bytes) -> _Conversion:
    """Return a function that converts 16-bit grey (possibly stored in 32-bit integers) to 8 bits, with alpha if one
    value is transparent."""
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    low, high = int(values.min()), int(values.max())
    bits = tags.get(258, (16,))[0]
    white = 4095 if bits == 12 else 65535
    if low < 0 or high > white:
        raise BadPicture(f"samples from {low} to {high} do not fit into 16 bits: convert it to 8 or 16 bits")
    inverted = picture.format == "TIFF" and tags.get(262) == 0  # Pillow does not invert these
    if white > _MAX_DARK and picture.format in ("TIFF", "PNG") and 0 < high <= _MAX_DARK:
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
    """Return the value of white that a file with 16-bit samples states, if only the lowest 12 bits are used.

    Raises:
        BadPicture: if the file does not state it. As 16-bit samples, the picture would be almost black.
    """
    stated = getattr(picture, "tag_v2", {}).get(281, 0)  # MaxSampleValue
    stated = stated[0] if isinstance(stated, tuple) and stated else stated
    for kind, at, length in png_chunks(data) if picture.format == "PNG" else ():
        if kind == b"sBIT" and length:
            stated = (1 << data[at]) - 1
    if stated in (1023, 4095) and high <= stated:
        return int(stated)
    raise BadPicture(
        f"its brightest sample is {high} of 65535, as if it had 10 or 12 bits stored in 16: scale the samples to 16 "
        "bits, or convert it to 8 bits"
    )


def _check_brightness(picture: Image.Image, transparent: object) -> None:
    """Apply the check of _stated_white to a colour picture, of which Pillow keeps only the high bytes of samples."""
    if isinstance(transparent, tuple):
        raise BadPicture(
            "a transparent colour of 16 bits is not supported: save it with an alpha channel, or convert it to 8 bits"
        )
    if picture.mode not in ("RGB", "RGBA", "CMYK"):
        return
    bands = picture.getextrema()[:3]
    high = max(int(band[1]) for band in bands)  # type: ignore[index]  # of several bands
    if 0 < high <= _MAX_DARK >> 8 and picture.mode != "CMYK":
        raise BadPicture(
            f"its brightest sample is below {(high + 1) << 8} of 65535, as if it had 10 or 12 bits stored in 16: scale "
            "the samples to 16 bits, or convert it to 8 bits"
        )


# ---------------------------------------------------------------------------------------------------------- colours


def _managed(picture: Image.Image, mode: str, grey: bool, remarks: list[str]) -> tuple[str, list[_Conversion]]:
    """Return the mode after the conversion to sRGB, and the steps of the conversion. They use the embedded profile or
    the gamma of a PNG."""
    profile = picture.info.get("icc_profile")
    if profile:
        try:
            return _by_profile(bytes(profile), mode, grey)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            remarks.append("has a colour profile that is damaged or for another kind of picture; it is ignored")
            return mode, []
    gamma = picture.info.get("gamma") if picture.format == "PNG" and "srgb" not in picture.info else None
    if gamma and not _SRGB_GAMMA[0] <= gamma <= _SRGB_GAMMA[1] and mode in ("L", "RGB", "RGBA"):
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
        raise ValueError(f"a {mode} picture has a {space} profile")
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
    """Return the conversion of pictures of `mode` (L, RGB, RGBA, CMYK) from a profile to sRGB, or None if it would
    change colours by at most _TOLERANCE. Exceptions of lcms about damaged or unsuitable profiles are passed on."""
    embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    # With its optimisation, lcms would use only a few points of a grey curve.
    exact = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
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
    return convert if np.abs(change).max() > _TOLERANCE else None


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
