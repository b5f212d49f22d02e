"""Checks of picture headers, before a decoder reads them. They refuse headers that would make a decoder use far more
memory or time than the number of pixels justifies. The headers are parsed here, within limits.
"""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Callable, Iterator

MAX_PIXELS = 89_478_485  # pixels of a picture; beyond this number Pillow warns of decompression bombs
_SCANS = 24  # scans that a JPEG of any size may have, which is more than usual
_SCANNED = 1 << 31  # pixels in all scans of a JPEG with more scans; decoding them takes seconds
MANY_SCANS = 8 * _SCANNED  # if bytes times pixels of a JPEG are fewer, it cannot have too many scans
_CHUNKS = 200_000  # chunks of a PNG
_RUNS = 8 << 20  # bytes of a run-length encoded BMP, whose runs Pillow decodes one by one
_ENTRIES = 4096  # entries of a directory in a TIFF or in Exif data
_STRIPS = 1 << 18  # strips or tiles of a TIFF
_TILE = 1 << 24  # pixels of a tile of a TIFF
_BLOCKS = 1 << 21  # code blocks of a JPEG 2000 picture, each of which needs half a kilobyte
_LAYERED = 1 << 27  # layers times code blocks of a JPEG 2000 picture


class BadPicture(ValueError):  # noqa: N818 - it names what is wrong
    """The bytes are not a valid picture of the expected form. The attribute `kind` is "decode", "size" or
    "channels"."""

    def __init__(self, reason: str, kind: str = "decode"):
        super().__init__(reason)
        self.kind = kind


def reraise_resource_error(error: Exception) -> None:
    """Raise a decoder's error again if its cause is the limit of open files of this process instead of the picture.
    This can happen because decoders are loaded at their first use."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error


def check_pixels(rows: int, columns: int, most: int) -> None:
    """Raise BadPicture for more than `most` pixels."""
    if rows * columns > most:
        raise BadPicture(f"is {rows}x{columns} (rows x columns) and has more than {most} pixels", "size")


def check_jpeg(data: bytes, most_pixels: int = MAX_PIXELS) -> None:
    """Check a JPEG.

    Raises:
        BadPicture: if it has so many scans (passes over the picture) that decoding would take minutes, if it is
            progressive with four components and more than half of `most_pixels`, or if its Exif data fails
            `check_directory`.
    """
    size, progressive, components, exif, at = (0, 0), False, 0, b"", 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return  # the decoder reports this damage
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
    # Scans of four components at full size take three times as long as the scans of a photograph.
    check_pixels(*size, most_pixels // 2 if progressive and components > 3 else most_pixels)
    check_directory(exif)


def _check_scans(data: bytes, at: int, size: tuple[int, int]) -> None:
    most = max(_SCANS, _SCANNED // max(size[0] * size[1], 1))
    if (len(data) - at) // 8 <= most:
        return
    scans = 0
    for marker in re.finditer(rb"\xff[\xda\xd9]", data[at:]):  # these markers cannot occur within a scan
        if marker[0] == b"\xff\xd9":
            break
        scans += 1
    if scans > most:
        raise BadPicture(f"is {size[0]}x{size[1]} (rows x columns) in {scans} scans, more than {most}: save it again")


def _check_png(data: bytes, most_pixels: int) -> None:
    for number, _ in enumerate(png_chunks(data)):
        if number == _CHUNKS:
            raise BadPicture(f"has more than {_CHUNKS} chunks: save it again")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset of the content, length of the content) of each chunk of a PNG."""
    at = 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, length
        at += 12 + length


def _check_tiff(data: bytes, most_pixels: int) -> None:
    entries = check_directory(data)
    if entries.get(322, 0) * entries.get(323, 0) > _TILE:
        raise BadPicture(f"has tiles of {entries[322]}x{entries[323]} pixels, more than {_TILE}: save it again")


def check_directory(data: bytes) -> dict[int, int]:
    """Read the first directory of a TIFF or of Exif data. Return {tag: value} of the tags that contain one integer.

    Raises:
        BadPicture: if its entries refer to more bytes in total than is plausible for the file.
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
        raise BadPicture(f"has a directory of {number} entries, more than {_ENTRIES}: save it again")
    at += struct.calcsize(counted)
    values, asked = {}, 0
    for place in range(at, min(at + number * entry.size, len(data) - entry.size + 1), entry.size):
        tag, kind, count, value = entry.unpack_from(data, place)
        asked += count * {2: 1, 3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}.get(kind, 1)
        if tag in (273, 279, 324, 325) and count > _STRIPS:
            raise BadPicture(f"has {count} strips or tiles, more than {_STRIPS}: save it again")
        if count == 1 and kind in (3, 4, 16):
            values[tag] = struct.unpack_from(order + {3: "H", 4: "I", 16: "Q"}[kind], value.ljust(8, b"\0"))[0]
    if asked > 2 * len(data) + (1 << 16):
        raise BadPicture(f"has a directory that refers to {asked} bytes in a file of {len(data)}: save it again")
    return values


def _check_bmp(data: bytes, most_pixels: int) -> None:
    if data[30:31] in (b"\1", b"\2") and len(data) > _RUNS:
        raise BadPicture(f"is run-length encoded and has {len(data)} bytes, more than {_RUNS}: save it as PNG")


def _check_jpeg2000(data: bytes, most_pixels: int) -> None:
    """Check the size and the number of code blocks in the codestream of a JPEG 2000 file. The boxes around the
    codestream may state wrong values."""
    at = _codestream(data)
    try:
        _, _, _, right, bottom, left, top, wide, high, first, second, components = struct.unpack_from(
            ">HHHIIIIIIIIH", data, at + 2
        )
        if not (right > left and bottom > top and wide and high and 1 <= components <= 4):
            raise BadPicture("does not decode: its header is invalid")
        pixels = (right - left) * (bottom - top)
        check_pixels(bottom - top, right - left, most_pixels)
        tiles = -(-(right - first) // wide) * -(-(bottom - second) // high)
        for layers, blocks in _blocks(data, at + 2, min(pixels, wide * high)):
            if components * tiles * blocks > _BLOCKS or layers * components * blocks > _LAYERED:
                raise BadPicture(f"has {components * tiles * blocks} code blocks in {layers} layers: save it again")
    except struct.error:
        raise BadPicture("does not decode: its header is truncated") from None


def _codestream(data: bytes) -> int:
    """Return the offset of the codestream within the boxes of a JP2 file."""
    at = 0
    if data[:4] != b"\xff\x4f\xff\x51":
        while data[at + 4 : at + 8] != b"jp2c":
            length = int.from_bytes(data[at : at + 4], "big")
            if length == 1:
                length = int.from_bytes(data[at + 8 : at + 16], "big")
            if length < 8 or at + length > len(data):
                raise BadPicture("does not decode: it contains no codestream")
            at += length
        at += 16 if data[at : at + 4] == b"\0\0\0\1" else 8
    return at


def _blocks(data: bytes, at: int, pixels: int) -> Iterator[tuple[int, int]]:
    """Yield (layers, precincts and code blocks of a tile's component) for each coding style in the headers of the
    codestream and of its tiles. The markers begin at offset `at`. Raises struct.error for truncated data."""
    layers, end = 1, 0  # `end` is the end of the current tile-part
    while at + 2 <= len(data):
        marker = struct.unpack_from(">H", data, at)[0]
        if marker == 0xFF93:  # the data of the tile-part follow
            if end <= at:  # the last tile-part may omit its length
                return
            at = end
        elif marker == 0xFFD9:
            return
        else:
            if marker == 0xFF90:
                end = at + struct.unpack_from(">6xI", data, at)[0]
            size = struct.unpack_from(">H", data, at + 2)[0]
            if marker in (0xFF52, 0xFF53):
                content = data[at + 4 : at + 2 + size]
                if marker == 0xFF52:
                    layers = struct.unpack_from(">H", content, 2)[0]
                own, style = content[1 if marker == 0xFF53 else 0] & 1, content[2 if marker == 0xFF53 else 5 :]
                levels, across, down = struct.unpack_from("BBB", style)
                precincts = style[5 : 6 + levels] if own else b"\xff" * (levels + 1)
                blocks = pixels >> ((across & 15) + (down & 15) + 4)
                for level, exponents in enumerate(precincts):
                    blocks += (pixels >> 2 * (levels - level)) >> ((exponents & 15) + (exponents >> 4))
                yield layers, blocks + levels + 1
            at += 2 + max(size, 2)


CHECKS: dict[str, Callable[[bytes, int], None]] = {
    "JPEG": check_jpeg,
    "PNG": _check_png,
    "BMP": _check_bmp,
    "TIFF": _check_tiff,
    "JPEG2000": _check_jpeg2000,
}
