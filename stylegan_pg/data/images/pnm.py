"""A reader of portable anymaps (PBM, PGM, PPM) in plain and raw form. Pillow takes a second for a million samples in
most of these formats, and minutes in some."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from PIL import Image

_MAX_HEADER = 1 << 16
_GAP = rb"(?:[ \t\n\v\f\r]|#[^\n\r]*[\n\r])+"
_SIZE = re.compile(rb"P([1-6])" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})")
_WHITE = re.compile(_GAP + rb"(\d{1,5})")
_COMMENT = re.compile(rb"#[^\n\r]*")


class Head(NamedTuple):
    """The header of an anymap.

    Attributes:
        kind: The number 1 to 6 of the format.
        width, height: The size in pixels.
        white: The value of the brightest sample.
        at: The offset of the first sample in bytes.
    """

    kind: int
    width: int
    height: int
    white: int
    at: int


def head(data: bytes) -> Head:
    """Parse the header of an anymap. Raises ValueError if it is damaged."""
    start = data[:_MAX_HEADER]
    size = _SIZE.match(start)
    if not size:
        raise ValueError("its header contains no size")
    kind, end, white = int(size[1]), size.end(), 1
    if kind not in (1, 4):
        found = _WHITE.match(start, end)
        if not found or not 0 < int(found[1]) < 65536:
            raise ValueError("its header contains no largest sample from 1 to 65535")
        white, end = int(found[1]), found.end()
    if not int(size[2]) or not int(size[3]):
        raise ValueError("has no pixels")
    return Head(kind, int(size[2]), int(size[3]), white, end + 1)


def read(data: bytes, head: Head) -> Image.Image:
    """Read an anymap. The mode of the result is L, RGB or, for grey with more than 8 bits, I;16; white is 255 or 65535.
    Raises ValueError if the data is truncated or damaged."""
    bands = 3 if head.kind in (3, 6) else 1
    shape = (head.height, head.width, 3) if bands == 3 else (head.height, head.width)
    samples = head.height * head.width * bands
    if head.kind == 4:
        row = -(-head.width // 8)
        packed = _raw(data, head, head.height * row, "u1").reshape(head.height, row)
        return Image.fromarray((1 - np.unpackbits(packed, axis=1, count=head.width)) * np.uint8(255))
    if head.kind > 4:
        values = np.minimum(_raw(data, head, samples, "u1" if head.white < 256 else ">u2"), head.white)
    else:
        values = _plain(data[head.at : head.at + 16 * samples + _MAX_HEADER], samples, one_digit=head.kind == 1)
        if len(values) < samples or values.min() < 0 or values.max() > head.white:
            raise ValueError(f"does not contain {samples} samples from 0 to {head.white}")
    values = values.reshape(shape)
    if head.kind == 1:
        return Image.fromarray((1 - values).astype(np.uint8) * np.uint8(255))
    white = 65535 if head.white > 255 and bands == 1 else 255
    target = np.uint16 if white > 255 else np.uint8
    if head.white != white:
        values = np.rint(np.arange(head.white + 1) / head.white * white).astype(target)[values]
    return Image.fromarray(values.astype(target))


def _raw(data: bytes, head: Head, count: int, dtype: str) -> np.ndarray:
    there = data[head.at : head.at + count * np.dtype(dtype).itemsize]
    if len(there) < count * np.dtype(dtype).itemsize:
        raise ValueError("is truncated")
    return np.frombuffer(there, dtype)


def _plain(text: bytes, samples: int, one_digit: bool) -> np.ndarray:
    text = _COMMENT.sub(b"", text)
    if one_digit:  # samples of one digit need no separators
        return np.frombuffer(text.translate(None, b" \t\n\v\f\r"), np.uint8)[:samples].astype(np.int32) - ord("0")
    if re.search(rb"[^0-9 \t\n\v\f\r]|\d{10}", text):
        raise ValueError("contains text that is not a sample")
    return np.fromstring(text.strip(), np.int32, sep=" ")[:samples]  # count= would fill in values for missing samples
