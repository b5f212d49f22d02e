"""Safe opening of untrusted pictures.

Only the raster formats of a list are read, each by its own decoder, so no code runs that interprets drawings or starts
programs. The format is recognised by the content and never by the name, except for TGA, which has no signature. Before
anything is decoded, headers.py checks that the headers do not cause excessive use of memory or time.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from stylegan_pg.data.images import pnm
from stylegan_pg.data.images.headers import CHECKS, MAX_PIXELS, BadPicture, check_pixels, reraise_resource_error
from stylegan_pg.untrusted import printable

# {format: factor of the largest number of pixels}. JPEGs can be decoded at a fraction of their size. The other decoders
# in this table hold several copies of the pixels, and plain text is slow to parse.
PIXEL_FACTORS = {"JPEG": 2.0, "WEBP": 1 / 2, "AVIF": 1 / 2, "JPEG2000": 1 / 2, "plain PNM": 1 / 16}

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    *((signature, "TIFF") for signature in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((b"P%d%c" % (kind, space), "plain PNM") for kind in (1, 2, 3) for space in b" \t\n\r#"),
    *((b"P%d%c" % (kind, space), "PNM") for kind in (4, 5, 6) for space in b" \t\n\r#"),
)
_UNSUPPORTED = (  # other formats that occur in files with the names of pictures; the signatures are in lower case
    (b"%!ps", "a PostScript drawing"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript drawing"),
    (b"%pdf", "a PDF document"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML text"),
    (b"<!doctype", "a web page, probably from a failed download"),
    (b"<html", "a web page, probably from a failed download"),
    (b"version https://git-lfs", "a pointer to a file that git lfs has not downloaded"),
    (b"8bps", "a Photoshop document"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL picture"),
    (b"\0\0\1\0", "an icon"),
    (b"pk\3\4", "a zip"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"pf", "a floating-point picture (PFM)"),
)


def kind_of(data: bytes, name: str = "") -> str:
    """Return the format of an encoded picture: Pillow's name of the format, "PNM" or "plain PNM".

    Raises:
        BadPicture: if the format is not supported. The message names it if it is known.
    """
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 512)]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        raise BadPicture("is a HEIC picture or a video: convert it to JPEG or PNG")
    if name.lower().endswith(".tga") or data[-18:-2] == b"TRUEVISION-XFILE":
        return "TGA"
    if not any(data[:4096]):
        raise BadPicture("begins with zero bytes only" if data else "is empty")
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, what in _UNSUPPORTED:
        if start.startswith(signature):
            raise BadPicture(f"is {what}, which is not supported: convert it to PNG or JPEG")
    raise BadPicture("is not a picture of a supported format")


@contextlib.contextmanager
def opened(data: bytes, name: str = "", most_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Check the headers of a picture and open it. The caller decodes the pixels within the `with` block, in which
    exceptions of the decoder are converted.

    Raises:
        BadPicture: if the format is not supported, the data is damaged, there are more than `most_pixels` pixels (times
            PIXEL_FACTORS), or decoding would use excessive resources.
        MemoryError: if there is not enough memory for the picture.
    """
    kind = kind_of(data, name)
    most, pixels = int(most_pixels * PIXEL_FACTORS.get(kind, 1)), 1 << 20
    try:
        if kind in CHECKS:
            CHECKS[kind](data, most)
        with _open(data, kind, most) as picture:
            pixels = picture.width * picture.height
            yield picture
    except (MemoryError, BadPicture):
        raise
    except Exception as error:  # damaged data can cause many kinds of exceptions in decoders
        reraise_resource_error(error)
        check_memory(pixels)
        raise BadPicture(f"does not decode: {printable(str(error) or type(error).__name__)}") from error


def check_memory(pixels: int) -> None:
    """Raise MemoryError if there is not enough memory to decode this number of pixels. Decoders report lack of memory
    in many different ways."""
    np.empty(16 * pixels, np.uint8)


def _open(data: bytes, kind: str, most_pixels: int) -> Image.Image:
    if kind.endswith("PNM"):
        head = pnm.head(data)
        check_pixels(head.height, head.width, most_pixels)
        return pnm.read(data, head)
    try:
        picture = Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise BadPicture(f"has more than {most_pixels} pixels: {error}", "size") from error
    except Image.UnidentifiedImageError:  # the text of this exception contains a memory address
        raise BadPicture(f"is a {kind} that cannot be read: {_why(data, kind)}") from None
    check_pixels(picture.height, picture.width, most_pixels)
    return picture


def _why(data: bytes, kind: str) -> str:
    """Return the message of the decoder, which Pillow does not pass on."""
    try:
        Image.OPEN[kind][0](io.BytesIO(data), "")
    except Exception as error:  # whatever it is, its text is the result
        return printable(str(error) or type(error).__name__)
    return "its header is damaged"
