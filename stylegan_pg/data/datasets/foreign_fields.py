"""Further fields in tars of other programs: which members of the samples they are, by their suffixes.

    KEY.txt, KEY.NAME.txt                   text "caption", or NAME; a sample may lack it
    KEY.json                                text "caption", if the tar has no KEY.txt and a json holds one
                                            (json_members.py); its label may be a vector (foreign_labels.py)
    KEY.NAME.png (jpg, jpeg, webp)          mask, if NAME contains mask, seg, label or parsing and the picture is one of
                                            whole numbers (grey or a palette); else a further picture
    KEY.npy, KEY.NAME.npy                   "array", or NAME: a vector, if it holds up to MAX_ENTRIES finite
                                            floating-point numbers in one dimension; else an array

A field is what all samples have alike: every sample has the member, arrays have one shape and dtype, and pictures, as
far as the first ones tell, the shape of the picture beside them. Members that are not alike are named and ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import IO, Any, NamedTuple

import numpy as np

from stylegan_pg.data.datasets.arrays import HEADER_BYTES, BadArray, array_header, read_array
from stylegan_pg.data.datasets.field_columns import fields_from, keys_of
from stylegan_pg.data.datasets.fields import CAPTION, MAX_ARRAY, MAX_ENTRIES, MAX_FIELDS, Field, is_field_name
from stylegan_pg.data.datasets.members import Part, Sample
from stylegan_pg.data.images.decode import BadPicture, header, lies_on, mask_values
from stylegan_pg.data.storage.index_cache import Arrays
from stylegan_pg.data.storage.tars import Member, content_of
from stylegan_pg.untrusted import printable

PROBES = 16  # pictures that tell sizes and channels
MAX_LEFT = 10  # members that are no fields, which a note names
_MASK = re.compile("mask|seg|label|parsing", re.IGNORECASE)
_UNNAMED = {"text": CAPTION, "json": CAPTION, "array": "array", "picture": "picture"}


class Fields(NamedTuple):
    """fields: by name. arrays: their columns (field_columns.py). left: names of members that are no fields.
    json_caption: whether the caption is in the json members."""

    fields: dict[str, Field]
    arrays: Arrays
    left: list[str]
    json_caption: bool = False


def fields_in(file: IO[bytes], samples: Sequence[Sample]) -> Fields:
    """The further fields of the samples of one tar, which is open as `file`."""
    counts: Counter[Part] = Counter(part for sample in samples for part in sample.further)
    if counts["", "text"]:
        del counts["", "json"]
    optional = ("text", "json")
    whole = [part for part, n in sorted(counts.items()) if part[1] in optional or n == len(samples)][:MAX_FIELDS]
    found = Fields({}, {}, [], ("", "json") in whole)
    for part, name in _named(whole).items():
        members = [sample.further.get(part) for sample in samples]
        read = _read(file, part, samples, [member for member in members if member is not None])
        if read is None:
            found.left.append(name)
            continue
        found.fields[name], values = read
        columns = [values] if values is not None else _places(members)
        found.arrays.update(zip(keys_of(name, read[0]), columns, strict=True))
    others = (printable(".".join(part), 40) for part in sorted(counts.keys() - {*whole}))
    return found._replace(left=[*found.left, *itertools.islice(others, MAX_LEFT)])


def _named(parts: Sequence[Part]) -> dict[Part, str]:
    """A field's name for each part, all different, also to those who ignore case."""
    names: dict[Part, str] = {}
    taken: set[str] = set()
    for part in parts:
        plain = re.sub(r"[^A-Za-z0-9_]", "_", part[0])[:20] or _UNNAMED[part[1]]
        plain = plain if is_field_name(plain) else f"{part[1]}_{plain}"
        forms = itertools.chain([plain], (f"{plain}_{i}" for i in itertools.count(2)))
        names[part] = next(form for form in forms if form.lower() not in taken)
        taken.add(names[part].lower())
    return names


def _places(members: Sequence[Member | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets, sizes and (unknown) checksums of members; 0 where there is none."""
    offset = np.array([member.offset if member else 0 for member in members], np.int64)
    size = np.array([member.size if member else 0 for member in members], np.int64)
    return offset, size, np.zeros([len(members)], np.uint32)


def _read(
    file: IO[bytes], part: Part, samples: Sequence[Sample], members: Sequence[Member]
) -> tuple[Field, np.ndarray | None] | None:
    """A field, and the values of a vector; None if the members are not alike."""
    if part[1] in ("text", "json"):
        return Field("text"), None
    if part[1] == "array":
        return _array(file, members)
    field = _picture(file, part[0], samples)
    return None if field is None else (field, None)


def _picture(file: IO[bytes], name: str, samples: Sequence[Sample]) -> Field | None:
    """The field of further pictures or masks, by the first sample of which both pictures can be read; None if there is
    none, or if the pictures have another shape."""
    for sample in samples[:PROBES]:
        with contextlib.suppress(BadPicture):
            data = content_of(file, sample.further[name, "picture"])
            there, first = header(data), header(content_of(file, sample.picture))
            if not lies_on((there.width, there.height), (first.width, first.height)):
                return None
            if _MASK.search(name):
                with contextlib.suppress(BadPicture):
                    mask_values(data)
                    return Field("mask", channels=1)
            return Field("image", channels=there.channels)
    return None


def _array(file: IO[bytes], members: Sequence[Member]) -> tuple[Field, np.ndarray | None] | None:
    try:
        heads = [
            array_header(content_of(file, member._replace(size=min(member.size, HEADER_BYTES)))) for member in members
        ]
        first = heads[0]
        if any((head.shape, head.name) != (first.shape, first.name) for head in heads) or 0 in first.shape:
            return None
        field = Field("array", shape=first.shape, dtype=first.name)
        if field.bytes > MAX_ARRAY:
            return None
        if not first.name.startswith("float") or len(first.shape) != 1 or first.shape[0] > MAX_ENTRIES:
            return field, None
        with np.errstate(over="ignore"):
            values = np.stack([read_array(content_of(file, member)).astype(np.float32) for member in members])
    except BadArray:
        return None
    return (Field("vector", first.shape[0]), values) if np.isfinite(values).all() else (field, None)


# ----------------------------------------------------------------------------------------------------- of several tars


def united(described: Sequence[Mapping[str, Any]], left: Sequence[Sequence[str]]) -> Fields:
    """The fields that all tars have alike, without their arrays.

    described: the fields of each tar that has samples, as index.json describes fields. left: what was left in each.
    """
    each = [fields_from(one) if one else {} for one in described]
    found = Fields({}, {}, [])
    names = {name: None for fields in each for name in fields}
    for name in sorted(names):
        field = _common([fields.get(name) for fields in each])
        is_known = name.lower() in {one.lower() for one in found.fields} or len(found.fields) == MAX_FIELDS
        if field is None or is_known:
            found.left.append(name)
        else:
            found.fields[name] = field
    others = sorted({name for names in left for name in names} - {*found.left})
    return found._replace(left=[*found.left, *others][:MAX_LEFT])


def _common(fields: Sequence[Field | None]) -> Field | None:
    """What describes a field in all tars; None if they differ."""
    there = [field for field in fields if field is not None]
    if {field.kind for field in there} == {"text"}:
        return there[0]
    if len(there) < len(fields):
        return None
    if {field.kind for field in there} == {"image"}:
        return replace(there[0], channels=Counter(field.channels for field in there).most_common(1)[0][0])
    return there[0] if len({*there}) == 1 else None


def joined_columns(fields: Mapping[str, Field], tars: Sequence[Arrays]) -> Arrays:
    """The columns of the fields of several tars, one after another; a tar may lack texts."""
    arrays = {}
    for name, field in fields.items():
        for key in keys_of(name, field):
            kind = np.uint32 if key.endswith("crc32") else np.int64
            arrays[key] = np.concatenate([tar.get(key, np.zeros([len(tar["offset"])], kind)) for tar in tars])
    return arrays
