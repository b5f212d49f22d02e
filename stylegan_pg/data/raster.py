"""Opening pictures that anybody may have made.

Only the raster formats of this list are read, told by a file's content and never by its name (but for TGA, which has no
mark of its own), each by its own decoder: nothing that interprets drawings or starts a program is ever asked. What a
small file could cost in memory and time is looked at in its headers, before anything is decoded.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image

from stylegan_pg.data import pnm
from stylegan_pg.untrusted import printable

MOST_PIXELS = 89_478_485  # of a picture to be made smaller; from there on Pillow too speaks of decompression bombs
HUNGRY = {"WEBP": 3, "AVIF": 3, "JPEG2000": 3, "PNM": 3}  # their decoders hold several copies: so much fewer pixels
_SCANS = 12  # of a JPEG of any size, which is what is usual, and
_SCANNED = 1 << 31  # so many pixels in all scans together, which takes seconds
MANY_SCANS = 8 * _SCANNED  # bytes times pixels of a JPEG, below which its scans cannot be too many
_CHUNKS = 200_000  # of a PNG
_ENTRIES = 4096  # of a directory of TIFF's kind
_STRIPS = 1 << 18  # of a TIFF
_TILE = 1 << 24  # pixels of a TIFF's tile
_TILES = 1 << 16  # of a JPEG 2000 picture
_JPEG = b"\xff\xd8\xff"

_MARKS = (
    (_JPEG, "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    *((mark, "TIFF") for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *((b"P%d%c" % (kind, space), "PNM") for kind in range(1, 7) for space in b" \t\n\r#"),
)
_FOREIGN = (  # what people have under the names of pictures, in small letters
    (b"%!ps", "a PostScript drawing"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript drawing"),
    (b"%pdf", "a PDF document"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML text"),
    (b"<!doctype", "a web page, as a failed download leaves it"),
    (b"<html", "a web page, as a failed download leaves it"),
    (b"version https://git-lfs", "a pointer to a file that git lfs has not fetched"),
    (b"8bps", "a Photoshop document"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cjxl ", "a JPEG XL picture"),
    (b"\0\0\1\0", "an icon"),
    (b"pk\3\4", "a zip"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"pf", "a floating-point picture (PFM)"),
)


class BadPicture(ValueError):  # noqa: N818 - it names the thing
    """Bytes that are not the picture they should be; `kind` is "decode", "size" or "channels"."""

    def __init__(self, reason: str, kind: str = "decode"):
        super().__init__(reason)
        self.kind = kind


def kind_of(data: bytes, name: str = "") -> str:
    """The format of an encoded picture: Pillow's name for it, or "PNM". Raises BadPicture, which names what it is."""
    for mark, kind in _MARKS:
        if data.startswith(mark):
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
        raise BadPicture("begins with nothing but zero bytes" if data else "is empty")
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, what in _FOREIGN:
        if start.startswith(mark):
            raise BadPicture(f"is {what}, which is not read: convert it to PNG or JPEG")
    raise BadPicture("not a picture of a known format")


@contextlib.contextmanager
def opened(data: bytes, name: str = "", most_pixels: int = MOST_PIXELS) -> Iterator[Image.Image]:
    """A picture whose headers have been looked at and whose pixels have not been decoded yet; to be decoded within the
    `with`, as what the decoder raises is turned into what is said here.

    Raises:
        BadPicture: another format than the list's, damaged data, more than `most_pixels` pixels (or their part that
            HUNGRY allows), headers that ask for much more than they should.
        MemoryError: there is not the memory that the picture needs, whatever its decoder says of it.
    """
    kind = kind_of(data, name)
    pixels = 1 << 20
    try:
        if kind in _CHECKS:
            _CHECKS[kind](data, most_pixels)
        with _open(data, kind, most_pixels // HUNGRY.get(kind, 1)) as picture:
            pixels = picture.width * picture.height
            yield picture
    except (MemoryError, BadPicture):
        raise
    except Exception as error:  # broken data makes decoders raise nearly anything
        check_memory(pixels)
        raise BadPicture(f"does not decode: {printable(str(error) or type(error).__name__)}") from error


def check_memory(pixels: int) -> None:
    """Raises MemoryError where there is none to decode so many pixels, of which decoders say all sorts of things."""
    np.empty(16 * pixels, np.uint8)


def check_pixels(rows: int, columns: int, most: int) -> None:
    """Raises BadPicture for more than `most` pixels."""
    if rows * columns > most:
        raise BadPicture(f"is {rows}x{columns} (rows x columns) and has more than {most} pixels", "size")


def _open(data: bytes, kind: str, most_pixels: int) -> Image.Image:
    if kind == "PNM":
        head = pnm.head(data)
        check_pixels(head.height, head.width, most_pixels)
        return pnm.read(data, head)
    try:
        picture = Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise BadPicture(f"has more than {most_pixels} pixels: {error}", "size") from error
    except Image.UnidentifiedImageError:  # its text holds an address in memory
        raise BadPicture(f"is a {kind} that cannot be read: {_why(data, kind)}") from None
    check_pixels(picture.height, picture.width, most_pixels)
    return picture


def _why(data: bytes, kind: str) -> str:
    """What the decoder said, which Pillow keeps to itself."""
    try:
        Image.OPEN[kind][0](io.BytesIO(data), "")
    except Exception as error:  # any of them is the answer
        return printable(str(error) or type(error).__name__)
    return "its header is damaged"


# ---------------------------------------------------------------------------------- headers that ask for too much


def check_jpeg(data: bytes, most_pixels: int = MOST_PIXELS) -> None:
    """Raises BadPicture for a JPEG of so many scans, each of which is a pass over the picture, that it would take
    minutes, and for Exif data that would."""
    size, progressive, components, exif, at = (0, 0), False, 0, b"", 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return  # the decoder says so
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in (0x01, *range(0xD0, 0xD9)):
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        content = data[at + 4 : at + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(content) >= 6:
            size, components = struct.unpack(">xHHB", content[:6])[:2], content[5]
            progressive |= marker & 3 == 2
        elif marker == 0xE1 and content[:6] == b"Exif\0\0":
            exif += content[6:]
        elif marker == 0xDA:
            if progressive or content[:1] != bytes([components]):
                _check_scans(data, at, size)
            break
        at += 2 + max(length, 2)
    check_pixels(*size, most_pixels)
    check_directory(exif)


def _check_scans(data: bytes, at: int, size: tuple[int, int]) -> None:
    most = max(_SCANS, _SCANNED // max(size[0] * size[1], 1))
    if (len(data) - at) // 8 <= most:
        return
    scans = 0
    for marker in re.finditer(rb"\xff[\xda\xd9]", data[at:]):  # neither occurs within a scan
        if marker[0] == b"\xff\xd9":
            break
        scans += 1
    if scans > most:
        raise BadPicture(f"is {size[0]}x{size[1]} (rows x columns) in {scans} scans, more than {most}: save it anew")


def _check_png(data: bytes, most_pixels: int) -> None:
    for number, _ in enumerate(png_chunks(data)):
        if number == _CHUNKS:
            raise BadPicture(f"has more than {_CHUNKS} chunks: save it anew")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The chunks of a PNG: name, where its content begins, and how long it is."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, length
        at += 12 + length


def _check_tiff(data: bytes, most_pixels: int) -> None:
    entries = check_directory(data)
    if entries.get(322, 0) * entries.get(323, 0) > _TILE:
        raise BadPicture(f"has tiles of {entries[322]}x{entries[323]} pixels, more than {_TILE}: save it anew")


def check_directory(data: bytes) -> dict[int, int]:
    """The first directory of a TIFF, or of Exif data: the values of its tags that hold one whole number.

    Raises BadPicture for one whose entries ask for more bytes than the file has, again and again.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2], "")
    if not order or len(data) < 16:
        return {}
    big = data[2:4] in (b"+\0", b"\0+")
    at = struct.unpack_from(order + "Q", data, 8)[0] if big else struct.unpack_from(order + "I", data, 4)[0]
    entry, counted = (struct.Struct(order + "HHQ8s"), "Q") if big else (struct.Struct(order + "HHI4s"), "H")
    try:
        number = struct.unpack_from(order + counted, data, at)[0]
    except struct.error:
        return {}
    if number > _ENTRIES:
        raise BadPicture(f"has a directory of {number} entries, more than {_ENTRIES}: save it anew")
    at += struct.calcsize(counted)
    values, asked = {}, 0
    for place in range(at, min(at + number * entry.size, len(data) - entry.size + 1), entry.size):
        tag, kind, count, value = entry.unpack_from(data, place)
        asked += count * {2: 1, 3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}.get(kind, 1)
        if tag in (273, 279, 324, 325) and count > _STRIPS:
            raise BadPicture(f"has {count} strips or tiles, more than {_STRIPS}: save it anew")
        if count == 1 and kind in (3, 4, 16):
            values[tag] = struct.unpack_from(order + {3: "H", 4: "I", 16: "Q"}[kind], value.ljust(8, b"\0"))[0]
    if asked > 2 * len(data) + (1 << 16):
        raise BadPicture(f"has a directory that asks for {asked} bytes in a file of {len(data)}: save it anew")
    return values


def _check_jpeg2000(data: bytes, most_pixels: int) -> None:
    """The codestream says itself how large it is, whatever the file around it says."""
    at = 0
    if data[:4] != b"\xff\x4f\xff\x51":
        while data[at + 4 : at + 8] != b"jp2c":
            length = int.from_bytes(data[at : at + 4], "big")
            if length == 1:
                length = int.from_bytes(data[at + 8 : at + 16], "big")
            if length < 8 or at + length > len(data):
                raise BadPicture("does not decode: it holds no codestream")
            at += length
        at += 16 if data[at : at + 4] == b"\0\0\0\1" else 8
    try:
        _, _, _, width, height, left, top, tile_width, tile_height = struct.unpack_from(">HHHIIIIII", data, at + 2)
        tile_left, tile_top, components = struct.unpack_from(">IIH", data, at + 32)
    except struct.error:
        raise BadPicture("does not decode: its header is cut") from None
    if not tile_width or not tile_height or components > 4:
        raise BadPicture(f"does not decode: tiles of {tile_width}x{tile_height}, {components} components")
    check_pixels(max(height - top, 0), max(width - left, 0), most_pixels)
    tiles = -(-(width - tile_left) // tile_width) * -(-(height - tile_top) // tile_height)
    if tiles > _TILES:
        raise BadPicture(f"has {tiles} tiles, more than {_TILES}: save it anew")


_CHECKS = {"JPEG": check_jpeg, "PNG": _check_png, "TIFF": _check_tiff, "JPEG2000": _check_jpeg2000}
