"""What a conditional generator is given: the one-hot class of a real image, or a vector field of it."""

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
    """The field that conditions are taken from: "class" or the name of a vector.

    Args:
        index: the dataset.
        wanted: data.condition; "" chooses the class where the dataset has classes, else its only vector.

    Raises:
        UsageError: there is no such field, or none that can be a condition, or several vectors.
    """
    vectors = [name for name, field in index.fields.items() if field.kind == "vector"]
    possible = ([CLASS] if index.label_names else []) + vectors
    if wanted and wanted not in possible:
        raise UsageError(
            f"data.condition={printable(wanted)}: {index.path} has no such class or vector field (it has "
            f"{', '.join(possible) or 'none'}); pack it with --labels, or name another"
        )
    if wanted or index.label_names:
        return wanted or CLASS
    if not vectors:
        raise UsageError(f"data.conditional=true, but {index.path} has no labels: pack it with --labels")
    if len(vectors) > 1:
        raise UsageError(f"data.conditional=true: {index.path} has several vectors: name one as data.condition")
    return vectors[0]


def condition_size(index: DatasetIndex, field: str) -> int:
    """The length c_dim of a condition."""
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
        """Conditions float32 [n, size] of the images with these ordinals."""
        return self.of(torch.from_numpy(self.values[np.asarray(ordinals, np.int64)]))

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Conditions [n, size] from the values of the field in a batch: int64 [n] or floats [n, size]."""
        return one_hot(values, self.size) if self.are_classes else values

    def examples(self, most: int = 16) -> list[list[float]]:
        """The conditions of up to so many images, evenly spaced in the dataset; none for classes."""
        if self.are_classes:
            return []
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))
        return self.values[chosen].tolist()


def conditions_of(index: DatasetIndex, table: SampleTable, field: str) -> Conditions:
    """The conditions of the images of one resolution.

    Raises:
        UsageError: images have no class.
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
    """The names of the entries of a condition: those of the classes, or of the vector's entries; [] if they have
    none."""
    return list(index.label_names) if field == CLASS else list(index.fields[field].names)


def conditions_for(index: DatasetIndex, table: SampleTable, G: Any, wanted: str = "") -> Conditions:
    """The conditions of a dataset's images for a generator: those of the field `wanted`, or, for "", of the field that
    the description of its snapshot names or that the dataset suggests.

    Raises:
        UsageError: the dataset has no conditions of the generator's length.
    """
    named = str(getattr(G, "description", {}).get("condition", ""))
    field = condition_field(index, wanted or (named if named in index.fields else ""))
    size = condition_size(index, field)
    if size != G.c_dim:
        kind = "classes" if field == CLASS else f"entries in {field}"
        raise UsageError(f"the generator takes conditions of length {G.c_dim}, and {index.path} has {size} {kind}")
    return conditions_of(index, table, field)
