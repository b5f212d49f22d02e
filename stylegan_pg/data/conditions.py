"""The conditions of a generator: the one-hot class of a real image, or one of its vector fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stylegan_pg.data.classes import one_hot
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

CLASS = "class"


def condition_field(index: DatasetIndex, wanted: str = "") -> str:
    """Return the field of the conditions: "class" or the name of a vector.

    Args:
        index: The dataset.
        wanted: data.condition; "" chooses the class if the dataset has classes, and its only vector otherwise.

    Raises:
        UsageError: There is no such field, or none that can be a condition, or several vectors.
    """
    vectors = [name for name, field in index.fields.items() if field.kind == "vector"]
    possible = ([CLASS] if index.label_names else []) + vectors
    if wanted and wanted not in possible:
        raise UsageError(
            f"data.condition={printable(wanted)}: {index.path} has no such class or vector field (it has "
            f"{', '.join(possible) or 'none'}); pack it with --labels or --vector, or name another"
        )
    if wanted or index.label_names:
        return wanted or CLASS
    if not vectors:
        raise UsageError(f"data.conditional=true, but {index.path} has no labels: pack it with --labels")
    if len(vectors) > 1:
        raise UsageError(f"data.conditional=true: {index.path} has several vectors: name one as data.condition")
    return vectors[0]


def condition_size(index: DatasetIndex, field: str) -> int:
    """Return the length c_dim of a condition."""
    return len(index.label_names) if field == CLASS else index.fields[field].size


@dataclass(frozen=True)
class Conditions:
    """The conditions of a dataset's images, by ordinal.

    field: "class" or the name of a vector. size: the length of a condition. values: the class numbers int64 [samples],
    or the vectors float32 [samples, size].
    """

    field: str
    size: int
    values: np.ndarray

    @property
    def are_classes(self) -> bool:
        return self.field == CLASS

    def __len__(self) -> int:
        return len(self.values)

    def at(self, ordinals: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the conditions, float32 [n, size], of the images with these ordinals."""
        return self.of(torch.from_numpy(self.values[np.asarray(ordinals, np.int64)]))

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Return conditions [n, size] for the values of the field in a batch, int64 [n] or floats [n, size]."""
        return one_hot(values, self.size) if self.are_classes else values

    def examples(self, most: int = 16) -> list[list[float]]:
        """Return the conditions of up to `most` images, evenly spaced in the dataset; [] for classes."""
        if self.are_classes:
            return []
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))
        return self.values[chosen].tolist()


def conditions_of(index: DatasetIndex, table: SampleTable, field: str) -> Conditions:
    """Return the conditions of the images of one resolution.

    Raises:
        UsageError: Some images have no class.
    """
    if field != CLASS:
        return Conditions(field, condition_size(index, field), table.vectors[field])
    if bare := int((table.label < 0).sum()):
        raise UsageError(
            f"data.conditional=true, but {bare} of {index.count} images in {index.path} have no label: pack them "
            "with --unlabelled skip, or set data.conditional=false"
        )
    return Conditions(CLASS, condition_size(index, CLASS), table.label)


def names_of(index: DatasetIndex, field: str) -> list[str]:
    """Return the names of the classes or of the vector's entries; [] if they have none."""
    return list(index.label_names) if field == CLASS else list(index.fields[field].names)


def conditions_for(index: DatasetIndex, table: SampleTable, G: Any, wanted: str = "") -> Conditions:
    """Return the conditions of a dataset's images for a generator. They are in the field `wanted`. If it is "", they
    are in the field that the description of the generator's snapshot names, or in the dataset's default field.

    Raises:
        UsageError: The dataset has no conditions of the generator's length.
    """
    named = str(getattr(G, "description", {}).get("condition", ""))
    field = condition_field(index, wanted or (named if named in index.fields else ""))
    size = condition_size(index, field)
    if size != G.c_dim:
        kind = "classes" if field == CLASS else f"entries in {field}"
        raise UsageError(f"the generator takes conditions of length {G.c_dim}, and {index.path} has {size} {kind}")
    return conditions_of(index, table, field)
