"""The fields of a sample besides its picture and its class: vectors, texts, arrays, further pictures and masks.

A dataset says which fields it has (`DatasetIndex.fields`, by name). The values of a vector stand in the table of
samples itself, because conditions for generated images are drawn from all of them. Every other value is a member of the
sample's tar and is read when it is needed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("vector", "text", "array", "image", "mask")
RESERVED = ("image", "class")  # names of the fields that every dataset, or every labelled one, has
CAPTION = "caption"  # the text whose member is KEY.txt
VECTOR = "labels"  # labels that are vectors
DTYPES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
)

MAX_FIELDS = 64  # of a dataset
MAX_ENTRIES = 4096  # of a vector
MAX_TEXT = 1 << 20  # bytes of a text
MAX_ARRAY = 1 << 30  # bytes of an array
MAX_DIMENSIONS = 8  # of an array
MAX_VALUES = 256  # of a mask
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}", re.ASCII)


@dataclass(frozen=True)
class Field:
    """What a field holds.

    kind: one of KINDS.
        - vector: float32 [size], such as a regression target, an embedding, or the zeros and ones of several labels.
        - text: a caption in UTF-8, "" where a sample has none.
        - array: numbers of one shape and dtype, such as tokens.
        - image: a second picture, uint8 [channels, height, width], of the same size as the first one.
        - mask: whole numbers 0 to 255 for each pixel, uint8 [1, height, width], which are scaled without mixing them.
    size: length of a vector, else 0.
    channels: 1, 3 or 4 for an image, 1 for a mask, else 0.
    shape, dtype: of an array (dtype as NumPy spells it: "int64"), else () and "".
    names: the names of a vector's entries or of a mask's values, () where there are none.
    """

    kind: str
    size: int = 0
    channels: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    names: tuple[str, ...] = ()

    @property
    def is_picture(self) -> bool:
        """Whether it lies on the picture's pixels, and is flipped with it."""
        return self.kind in ("image", "mask")

    @property
    def bytes(self) -> int:
        """The bytes of an array's numbers."""
        return math.prod(self.shape) * np.dtype(self.dtype or "bool").itemsize

    def __str__(self) -> str:
        """A few words for messages, such as "vector of 40" or "image, RGB"."""
        if self.kind == "vector":
            return f"vector of {self.size}"
        if self.kind == "array":
            return f"array of {self.dtype} {list(self.shape)}"
        if self.kind == "image":
            return f"image, {({1: 'grey', 3: 'RGB', 4: 'RGBA'})[self.channels]}"
        return self.kind


class Members(NamedTuple):
    """The members of the samples' tars that hold one field, in the order of the samples.

    offset, size: int64 [samples], bytes within the sample's tar; size 0 where a sample has no such member (texts only).
    crc32: uint32 [samples], 0 in foreign tars.
    """

    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray


def is_field_name(name: object) -> bool:
    """Whether a field may be named so: a letter and up to 31 letters, digits and "_", and none of RESERVED."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and name.lower() not in RESERVED


def member_suffix(name: str, field: Field, picture: str) -> str:
    """What follows "KEY." in the name of the member that holds a field, such as "txt", "B.jpg" or "labels.npy".

    picture: the suffix of pictures at the resolution at hand.
    """
    ending = {"text": "txt", "vector": "npy", "array": "npy", "image": picture, "mask": "png"}[field.kind]
    return ending if (name, field.kind) == (CAPTION, "text") else f"{name}.{ending}"
