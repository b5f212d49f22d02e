"""The fields of a sample besides its picture and its class: vectors, texts, arrays, further pictures and masks.

A dataset says which fields it has (`DatasetIndex.fields`, by name). The values of a vector stand in the table of
samples itself, because conditions for generated images are drawn from all of them. Every other value is a member of the
sample's tar and is read when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KINDS = ("vector", "text", "array", "image", "mask")
RESERVED = ("image", "class")  # names of the fields that every dataset, or every labelled one, has


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


class Members(NamedTuple):
    """The members of the samples' tars that hold one field, in the order of the samples.

    offset, size: int64 [samples], bytes within the sample's tar; size 0 where a sample has no such member (texts only).
    crc32: uint32 [samples], 0 in foreign tars.
    """

    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
