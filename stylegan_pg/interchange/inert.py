"""The inert records that the names in model files stand for while they are read (names.py). None of them can do
anything; code that a file carries with it (`module_src`) is not even kept.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import torch

from stylegan_pg.interchange.pickles import Buildable, Refused

MOST_DIMENSIONS = 8
MOST_ELEMENTS = 1 << 40


@dataclass(eq=False)
class Module(Buildable):
    """A module of some network: what the file calls its class, and its attributes by name."""

    shown: str
    state: dict[str, Any] = field(default_factory=dict)

    def build(self, state: Any) -> None:
        if type(state) is tuple and len(state) == 2 and state[0] is not None:  # (attributes, slots)
            state = state[0]
        if type(state) is not dict or self.state:
            raise Refused(f"gives a {self.shown} a state that is no table")
        self.state = state


@dataclass(frozen=True, eq=False)
class StorageType:
    """A class of storages, of numbers of one dtype."""

    dtype: torch.dtype


@dataclass(eq=False)
class Storage:
    """Numbers in a row. `data` is a view of the file; None until it is known where they are."""

    dtype: torch.dtype
    count: int
    data: memoryview | None = None


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that is not made yet, see torch_files.materialize."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class ArrayType(Buildable):
    """numpy's dtype: its kind, such as f8, and its order of bytes."""

    kind: str
    order: str = "<"

    def build(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise Refused("holds a numpy dtype with an unknown order of bytes")
        self.order = "<" if order in ("|", "=") else order


@dataclass(eq=False)
class Array(Buildable):
    """A numpy array of numbers; small ones can be read by `values`."""

    type: ArrayType | None = None
    shape: tuple[int, ...] = ()
    data: bytes | memoryview = b""

    def build(self, state: Any) -> None:
        _, shape, kind, columns_first, data = state
        self.fill(shape, kind, data)
        if columns_first and len(self.shape) > 1:
            self.data = b""  # nothing in a model's description is a matrix

    def fill(self, shape: Any, kind: Any, data: Any) -> None:
        if type(kind) is not ArrayType or not is_octets(data):
            raise Refused("holds a numpy array of something other than numbers")
        self.type, self.shape, self.data = kind, sizes_of(shape), data

    def values(self, most: int = 64) -> list[int | float] | None:
        """The numbers in a row; None if there are more than `most`, or their kind has no equal in Python."""
        form = FORMS.get(self.type.kind) if self.type else None
        if self.type is None or form is None or not 0 < len(self.data) <= 8 * most:
            return None
        size = struct.calcsize(form)
        count = len(self.data) // size
        return list(struct.unpack(f"{self.type.order}{count}{form}", self.data[: count * size]))


FORMS = {"f8": "d", "f4": "f", "f2": "e", "b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H"}
FORMS |= {"i4": "i", "u4": "I", "i8": "q", "u8": "Q"}


def is_octets(data: Any) -> bool:
    return isinstance(data, bytes | memoryview)


def sizes_of(values: Any) -> tuple[int, ...]:
    """A shape or strides: few whole numbers that are not negative."""
    if type(values) is int:
        values = (values,)
    if type(values) not in (tuple, list) or len(values) > MOST_DIMENSIONS:
        raise Refused("holds a tensor or array whose shape is none")
    if not all(type(v) is int and 0 <= v <= MOST_ELEMENTS for v in values):
        raise Refused("declares a tensor or array with a size below 0 or beyond all bounds")
    return tuple(values)


@dataclass(frozen=True)
class Opaque:
    """A name that is only ever an argument or an attribute: a class of tensors, a memory format."""

    name: str
