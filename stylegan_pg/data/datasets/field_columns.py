"""Further fields in the JSON files of a packed dataset, format 2: their validation, and their conversion to arrays.

index.json describes each field by name under "fields". The index of a shard holds under "fields", again by name, one
entry for each sample: [offset, size, crc32] of the member that holds its value ([0, 0, 0] where it has no text), or a
vector's float32 numbers themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from stylegan_pg.data.datasets.description import HEADER, MOST_PICTURE
from stylegan_pg.data.datasets.fields import (
    DTYPES,
    KINDS,
    MAX_ARRAY,
    MAX_DIMENSIONS,
    MAX_ENTRIES,
    MAX_FIELDS,
    MAX_TEXT,
    MAX_VALUES,
    Field,
    Members,
    is_field_name,
)
from stylegan_pg.data.storage.index_cache import Arrays
from stylegan_pg.untrusted import printable, whole_number

_MAX_NPY_HEADER = 1 << 16  # bytes
_MAX_NAME = 1000  # characters
_KEYS = {"vector": {"size"}, "text": set(), "array": {"shape", "dtype"}, "image": {"channels"}, "mask": set()}
_NAMED = ("vector", "mask")  # the kinds that may have names


def described(fields: Mapping[str, Field]) -> dict[str, Any]:
    """The fields as index.json describes them; the inverse of `fields_from`."""
    found = {}
    for name, field in sorted(fields.items()):
        facts = {"kind": field.kind, **{key: getattr(field, key) for key in sorted(_KEYS[field.kind])}}
        found[name] = facts | ({"names": list(field.names)} if field.names else {})
        if "shape" in facts:
            found[name]["shape"] = list(field.shape)
    return found


def fields_from(content: Any) -> dict[str, Field]:
    """Parse "fields" of an index.json.

    Raises:
        ValueError, UsageError: the message says what is wrong.
    """
    if not isinstance(content, dict) or not 1 <= len(content) <= MAX_FIELDS:
        raise ValueError(f"its fields are {_shown(content)}, no table of 1 to {MAX_FIELDS} of them")
    if len({name.lower() for name in content}) < len(content):
        raise ValueError(f"its fields {_shown([*content])} are not told apart by their letters alone")
    return {name: _field(name, facts) for name, facts in content.items()}


def _field(name: str, facts: Any) -> Field:
    if not is_field_name(name):
        raise ValueError(f"a field has the name {_shown(name)}, which is none")
    if not isinstance(facts, dict) or facts.get("kind") not in KINDS:
        raise ValueError(f"its field {name} is {_shown(facts)}, of none of the kinds {', '.join(KINDS)}")
    kind = facts["kind"]
    if facts.keys() - {"names"} != _KEYS[kind] | {"kind"} or ("names" in facts and kind not in _NAMED):
        raise ValueError(f"its field {name} of kind {kind} has the entries {_shown([*facts])}")
    if kind == "vector":
        size = whole_number(facts["size"], 1, MAX_ENTRIES, f"the size of field {name}", "a vector has entries")
        return Field(kind, size, names=_names(name, facts, size, size))
    if kind == "array":
        return _array(name, facts)
    if kind == "image":
        if facts["channels"] not in (1, 3, 4) or isinstance(facts["channels"], bool):
            raise ValueError(f"the channels of field {name} are {_shown(facts['channels'])}, not 1, 3 or 4")
        return Field(kind, channels=facts["channels"])
    return Field(kind, channels=int(kind == "mask"), names=_names(name, facts, 1, MAX_VALUES))


def _array(name: str, facts: Any) -> Field:
    shape, dtype = facts["shape"], facts["dtype"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"the shape of field {name} is {_shown(shape)}, no list of up to {MAX_DIMENSIONS} numbers")
    for side in shape:
        whole_number(side, 1, MAX_ARRAY, f"the shape of field {name}", "an array has sides")
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of field {name} is {_shown(dtype)}, none of {', '.join(DTYPES)}")
    field = Field("array", shape=tuple(shape), dtype=dtype)
    if field.bytes > MAX_ARRAY:
        raise ValueError(f"field {name} has {field.bytes} bytes a sample, more than {MAX_ARRAY}")
    return field


def _names(name: str, facts: Any, least: int, most: int) -> tuple[str, ...]:
    names = facts.get("names")
    if names is None and "names" not in facts:
        return ()
    if not isinstance(names, list) or not least <= len(names) <= most:
        raise ValueError(f"the names of field {name} are {_shown(names)}, no list of {least} to {most} texts")
    if not all(isinstance(one, str) and len(one) <= _MAX_NAME for one in names):
        raise ValueError(f"the names of field {name} are {_shown(names)}, no texts of up to {_MAX_NAME} characters")
    return tuple(names)


# ------------------------------------------------------------------------------------------------- of a shard's index


def arrays_of(shard: Any, fields: Mapping[str, Field], offset: np.ndarray, size: np.ndarray) -> Arrays:
    """Parse "fields" in the index of a shard, whose other entries `description.columns_of` has checked.

    Args:
        shard: the parsed content of the shard's index file.
        fields: as index.json describes them.
        offset, size: int64 [samples], of the samples' pictures in the tar, in rising order.

    Returns:
        The arrays of each field under the names that `keys_of` gives, in the order of the samples.

    Raises:
        ValueError, UsageError: the message says what is wrong.
    """
    content = shard.get("fields")
    if not isinstance(content, dict) or content.keys() != fields.keys():
        names = [*content] if isinstance(content, dict) else content
        raise ValueError(f"it has values of the fields {_shown(names)}, index.json says {_shown([*fields])}")
    arrays: Arrays = {}
    ends = np.append(offset[1:] - HEADER, shard["tar_bytes"])
    for name, field in fields.items():
        rows = content[name]
        if not isinstance(rows, list) or len(rows) != len(offset):
            raise ValueError(f"its values of field {name} are no list of {len(offset)} entries")
        if field.kind == "vector":
            arrays[keys_of(name, field)[0]] = _vectors(name, rows, field.size)
        else:
            found = _members(name, field, rows, offset + size, ends)
            arrays |= dict(zip(keys_of(name, field), found, strict=True))
    return arrays


def keys_of(name: str, field: Field) -> tuple[str, ...]:
    """The names under which a field's arrays are kept: one for a vector, three for the places of members."""
    return (f"{name}.vectors",) if field.kind == "vector" else (f"{name}.offset", f"{name}.size", f"{name}.crc32")


def kinds_of(fields: Mapping[str, Field], count: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """dtype and shape of each array of the fields, for `count` samples."""
    found: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {}
    for name, field in fields.items():
        if field.kind == "vector":
            found[keys_of(name, field)[0]] = (np.float32, (count, field.size))
        else:
            found |= dict(
                zip(keys_of(name, field), [(k, (count,)) for k in (np.int64, np.int64, np.uint32)], strict=True)
            )
    return found


def vectors_in(arrays: Arrays, fields: Mapping[str, Field]) -> dict[str, np.ndarray]:
    """`SampleTable.vectors` from the arrays that `arrays_of` made."""
    return {name: arrays[keys_of(name, field)[0]] for name, field in fields.items() if field.kind == "vector"}


def members_in(arrays: Arrays, fields: Mapping[str, Field]) -> dict[str, Members]:
    """`SampleTable.members` from the arrays that `arrays_of` made."""
    others = {name: field for name, field in fields.items() if field.kind != "vector"}
    return {name: Members(*(arrays[key] for key in keys_of(name, field))) for name, field in others.items()}


def _vectors(name: str, rows: list[Any], size: int) -> np.ndarray:
    if {*map(type, rows)} != {list} or {*map(len, rows)} != {size}:
        raise ValueError(f"a sample's {name} is no list of {size} numbers")
    flat = list(itertools.chain.from_iterable(rows))
    if {*map(type, flat)} - {int, float}:
        raise ValueError(f"a sample's {name} holds something else than numbers")
    try:
        values = np.array(flat, np.float64)
    except OverflowError:
        raise ValueError(f"a sample's {name} has a number beyond all ranges") from None
    if not (np.abs(values) <= np.finfo(np.float32).max).all():
        raise ValueError(f"a sample's {name} has a number that is no float32")
    return values.astype(np.float32).reshape(len(rows), size)


def _members(
    name: str, field: Field, rows: list[Any], begins: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, size and CRC-32 of the members, each of which lies in its sample's part [begins, ends) of the tar."""
    if {*map(type, rows)} != {list} or {*map(len, rows)} != {3}:
        raise ValueError(f"a sample's {name} is not [offset, size, crc32]")
    if {type(number) for row in rows for number in row} != {int}:
        raise ValueError(f"a sample's {name} is not three whole numbers")
    try:
        offset, size, crc = np.array(rows, np.int64).T
    except OverflowError:
        raise ValueError(f"a sample's {name} has a number beyond all ranges") from None
    least, most = _sizes(field)
    none = (offset == 0) & (size == 0) & (crc == 0) & (field.kind == "text")
    for what, fits in {
        f"a size that is not from {least} to {most} bytes": none | ((size >= least) & (size <= most)),
        "no place between its picture and the next one": none
        | ((offset >= begins + HEADER) & (offset <= ends) & (size <= ends - offset)),
        "a crc32 that is none": (crc >= 0) & (crc < 1 << 32),
    }.items():
        if not fits.all():
            raise ValueError(f"the {name} of a sample has {what}: {_shown(rows[int(np.argmin(fits))])}")
    return offset.copy(), size.copy(), crc.astype(np.uint32)


def _sizes(field: Field) -> tuple[int, int]:
    """The least and the most bytes of a member."""
    if field.kind == "array":
        return field.bytes + 1, field.bytes + _MAX_NPY_HEADER
    return 1, MAX_TEXT if field.kind == "text" else MOST_PICTURE


def _shown(value: Any) -> str:
    return printable(repr(value), 80)
