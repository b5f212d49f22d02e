"""Labels that are vectors: numbers for each picture, or the names of several labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stylegan_pg.data.datasets.fields import MAX_ENTRIES, Field
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import is_number, printable

_LARGEST = float(np.finfo(np.float32).max)

Vector = tuple[float, ...]


def as_vectors(values: Sequence[Any], origin: str, names: Sequence[str] = ()) -> tuple[Field, list[Vector | None]]:
    """Interpret labels of which some are lists: lists of numbers of one length become vectors, and lists of names
    become zeros and ones, one for each name that occurs, in sorted order.

    Args:
        values: lists, or None where a picture has no label.
        origin: where the labels come from, for messages.
        names: the names of a vector's entries, if they are known.

    Returns:
        The field, and each picture's numbers, which are float32.

    Raises:
        UsageError: lists of several lengths, numbers beside lists, NaN and infinity; the message begins with `origin`.
    """
    given = [value for value in values if value is not None]
    odd = next((value for value in given if not isinstance(value, list | tuple)), None)
    if odd is not None:
        raise UsageError(
            f"{origin} has vectors and other labels, such as {printable(repr(odd), 60)}: give a list of numbers, or of "
            "names, for each picture"
        )
    if all(isinstance(one, str) for value in given for one in value):
        return _several(values, origin)
    sizes = sorted({len(value) for value in given})
    if len(sizes) > 1 or not 1 <= sizes[0] <= MAX_ENTRIES:
        raise UsageError(
            f"{origin} has vectors of {' and '.join(map(str, sizes[:3]))} numbers: give each picture as many, at "
            f"most {MAX_ENTRIES}"
        )
    rows = [None if value is None else tuple(_number(one, origin) for one in value) for value in values]
    return Field("vector", sizes[0], names=tuple(names)), rows


def _several(values: Sequence[Any], origin: str) -> tuple[Field, list[Vector | None]]:
    """Zeros and ones for lists of names."""
    names = sorted({name.strip() for value in values if value is not None for name in value})
    if not 1 <= len(names) <= MAX_ENTRIES or "" in names:
        raise UsageError(f"{origin} has lists of {len(names)} names: from 1 to {MAX_ENTRIES} are known, none is empty")
    place = {name: i for i, name in enumerate(names)}
    rows: list[Vector | None] = []
    for value in values:
        there = set() if value is None else {place[name.strip()] for name in value}
        rows.append(None if value is None else tuple(float(i in there) for i in range(len(names))))
    return Field("vector", len(names), names=tuple(names)), rows


def _number(value: Any, origin: str) -> float:
    if not isinstance(value, bool) and not is_number(value, -_LARGEST, _LARGEST):
        raise UsageError(
            f"{origin} has a vector with {printable(repr(value), 60)}: give finite numbers (of 32 bits) only"
        )
    return float(np.float32(value))


def shortest(value: float) -> float:
    """The number with the shortest decimal form that is the same float32, such as 0.1 for float(np.float32(0.1))."""
    short = float(str(np.float32(value)))
    return short if np.float32(short) == np.float32(value) else value


def described_vectors(field: Field, rows: Sequence[Vector | None], most: int = 6) -> str:
    """A short text about vectors, for a report."""
    if not field.names:
        return f"vectors of {field.size} number{'s' * (field.size > 1)}"
    there = [row for row in rows if row is not None]
    counted = all(value in (0.0, 1.0) for row in there for value in row)
    counts = [f" ({int(sum(row[i] for row in there))})" if counted else "" for i in range(field.size)]
    shown = [f"{printable(name, 60)}{count}" for name, count in zip(field.names, counts, strict=True)]
    rest = ", ..." if len(shown) > most else ""
    return f"vectors of {field.size}: {', '.join(shown[:most])}{rest}"
