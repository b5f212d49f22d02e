"""Reading .npy files of numbers, of which nothing is believed: no pickled objects, and no memory for what is not there.

NumPy's own reader takes memory for as many numbers as a file's header claims. Here the header is read first, and the
claim is compared with the bytes that follow.
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from stylegan_pg.data.datasets.fields import DTYPES, MAX_DIMENSIONS

HEADER_BYTES = 4096  # within which the header of a plain array ends


class BadArray(ValueError):  # noqa: N818 - it names the thing
    """The bytes are no .npy file of numbers; the message says why, as the end of a sentence."""


class ArrayHeader(NamedTuple):
    """What a header says: shape; plain name of the dtype ("int64"); the dtype with its byte order; order in memory. And
    the position at which the numbers begin."""

    shape: tuple[int, ...]
    name: str
    dtype: np.dtype
    is_fortran: bool
    start: int


def array_header(data: bytes) -> ArrayHeader:
    """Read the header of a .npy file, of which the first HEADER_BYTES suffice.

    Raises:
        BadArray: it is none, or not one of numbers in one of DTYPES and up to MAX_DIMENSIONS dimensions.
    """
    file = io.BytesIO(data[:HEADER_BYTES])
    try:
        version = npy.read_magic(file)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise BadArray(f"is a .npy file of version {version[0]}.{version[1]}")
        shape, is_fortran, dtype = readers[version](file)
    except BadArray:
        raise
    except Exception as error:  # a damaged header makes NumPy's parser raise many kinds of exceptions
        raise BadArray(f"is no .npy file ({type(error).__name__})") from None
    if dtype.name not in DTYPES:
        raise BadArray(f"holds {dtype.name}, no plain numbers")
    if len(shape) > MAX_DIMENSIONS or any(side < 0 for side in shape):
        raise BadArray(f"has the shape {list(shape)[: MAX_DIMENSIONS + 1]}")
    return ArrayHeader(tuple(map(int, shape)), dtype.name, dtype, is_fortran, file.tell())


def read_array(data: bytes) -> np.ndarray:
    """The array of a .npy file, in the machine's byte order.

    Raises:
        BadArray: as array_header, and if there are more or fewer bytes than its shape needs.
    """
    head = array_header(data)
    needed = math.prod(head.shape) * head.dtype.itemsize
    if len(data) - head.start != needed:
        raise BadArray(f"has {len(data) - head.start} bytes of numbers, where its shape needs {needed}")
    flat = np.frombuffer(data, head.dtype, offset=head.start) if needed else np.zeros([0], head.dtype)
    return flat.reshape(head.shape, order="F" if head.is_fortran else "C").astype(head.name, order="C")


def written_array(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
