"""Labels in tars of other programs: classes in `cls` or `json` members, and vectors in `json` members."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from stylegan_pg.data.datasets.class_numbers import as_labels, number_classes
from stylegan_pg.data.datasets.field_columns import keys_of
from stylegan_pg.data.datasets.fields import VECTOR, Field
from stylegan_pg.data.datasets.foreign_tars import unpacked
from stylegan_pg.data.datasets.label_vectors import as_vectors
from stylegan_pg.data.storage.index_cache import Arrays
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import shown


class LabelVectors(NamedTuple):
    """fields: the vectors under the name VECTOR, empty if there are none. arrays: their columns (field_columns.py).
    note: why lists are without effect, else ""."""

    fields: dict[str, Field]
    arrays: Arrays
    note: str = ""


def classes_of(urls: Sequence[str], tars: Sequence[Arrays], keys: Sequence[str]) -> tuple[list[int], list[str]]:
    """The class number of each sample, -1 for none, and the classes' names.

    Raises:
        UsageError: some samples lack a .cls that others have.
    """
    labels = [one for tar in tars for one in unpacked(tar["labels"])]
    bare = [i for i, label in enumerate(labels) if label is None]
    if bare and any(int(tar["cls"]) for tar in tars):
        tar = int(np.repeat(np.arange(len(urls)), [len(tar["offset"]) for tar in tars])[bare[0]])
        raise UsageError(
            f"{shown(urls[tar])}: {printable(keys[bare[0]])} has no label (.cls), which others have: a member is "
            "missing; write the tar again"
        )
    origin = shown(urls[0])
    return number_classes(as_labels(labels, origin, mixed_are_names=True), origin)


def vectors_of(urls: Sequence[str], tars: Sequence[Arrays], taken: Collection[str]) -> LabelVectors:
    """Labels that are lists, as packing reads them: a vector, if all samples have one of equal size.

    taken: the names of other fields.
    """
    lists = [one for tar in tars for one in unpacked(tar["lists"])]
    there = sum(one is not None for one in lists)
    if not there:
        return LabelVectors({}, {})
    try:
        if VECTOR in map(str.lower, taken):
            raise UsageError(f"other members are named {VECTOR}")
        if there < len(lists):
            raise UsageError(f"{len(lists) - there} samples have none")
        field, rows = as_vectors(lists, shown(urls[0]))
    except UsageError as error:
        return LabelVectors({}, {}, f"{there} samples have a list as label in their .json, which is not used: {error}")
    return LabelVectors({VECTOR: field}, {keys_of(VECTOR, field)[0]: np.array(rows, np.float32)})
