"""The fields of a batch, and the datasets from which they are read.

The names of a batch's fields:

    image       the picture of the first dataset, always present
    class       its class, a whole number, -1 for none
    NAME        a further field of the first dataset (datasets/fields.py), or a condition derived from the picture
                (data.derived), or the picture of a further dataset (data.unpaired)
    B.NAME      a field of the further dataset B
    NAME@next   a field of the next image of the global batch (of the first one for the last): a mismatched condition
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stylegan_pg.data.datasets.sampler import Mixture, Order, flipped
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.loader.derived import Derivation, parse
from stylegan_pg.data.loader.reading import Bad, read_good, values_of
from stylegan_pg.errors import UsageError
from stylegan_pg.rng import derive
from stylegan_pg.untrusted import printable

NEXT = "@next"


@dataclass(frozen=True)
class OrderedTable:
    """A dataset at one resolution: its samples, their order, and the ordinals of samples that are known to be bad."""

    table: SampleTable
    order: Order | Mixture
    known: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of a field's value for one image. The shape of a picture is [height, width, channels]. A text
    has no dtype."""

    shape: tuple[int, ...] = ()
    dtype: Any = None
    is_picture: bool = False
    is_mask: bool = False


@dataclass(frozen=True)
class Part:
    """The fields of a batch that are read from one sample of one dataset for each image."""

    name: str  # of a further dataset, else ""
    source: OrderedTable
    fields: Mapping[str, str]  # name in the batch -> name in the table
    derived: Mapping[str, Derivation] = field(default_factory=dict)  # of the picture
    is_next: bool = False

    def at(self, nimg: int, i: int, batch: int) -> tuple[int, int]:
        """Return (epoch, ordinal) of the sample for image i of the global batch that begins at nimg."""
        return self.source.order.at(nimg + ((i + 1) % batch if self.is_next else i))

    def specs(self) -> dict[str, Spec]:
        table = self.source.table
        found = {name: _spec(table, of) for name, of in self.fields.items()}
        picture = (*table.image_size, table.channels)
        return found | {n: Spec(recipe.shape(*picture), np.uint8, True) for n, recipe in self.derived.items()}

    def read(self, place: tuple[int, int], k: int, out: Mapping[str, Any], mirror: bool) -> list[Bad]:
        """Write the values of one sample to row k of `out`, and return the samples that were found to be bad. Raises as
        read_good."""
        (epoch, ordinal), source, seed = place, self.source, self.source.order.seed
        pictures = {n: out[n][k] for n in self.fields if isinstance(out[n], np.ndarray) and out[n].ndim == 4}
        memory = {self.fields[n]: pixels for n, pixels in pictures.items()}
        wanted = list(self.fields.values())
        values, _, bad = read_good(
            source.table, ordinal, source.known, lambda i: values_of(source.table, i, wanted, memory), self.name
        )
        if mirror and flipped(seed, epoch, ordinal):
            for pixels in map(torch.from_numpy, pictures.values()):
                pixels.copy_(pixels.flip(1))  # eight times as fast as NumPy
        for name in self.fields.keys() - pictures.keys():
            out[name][k] = values[self.fields[name]]
        for name, recipe in self.derived.items():
            key = derive(seed, f"derived {name}", epoch, ordinal)
            out[name][k] = recipe.apply(pictures["image"], lambda key=key: np.random.Generator(np.random.Philox(key)))
        return bad


def _spec(table: SampleTable, name: str) -> Spec:
    if name == "image":
        return Spec((*table.image_size, table.channels), table.dtype, True)
    if name == "class":
        return Spec((), np.int64)
    field = table.fields[name]
    if field.is_picture:
        return Spec((*table.image_size, field.channels), np.uint8, True, field.kind == "mask")
    if field.kind == "vector":
        return Spec((field.size,), np.float32)
    return Spec() if field.kind == "text" else Spec(field.shape, np.dtype(field.dtype))


def parts_of(
    names: Sequence[str],
    first: OrderedTable,
    others: Mapping[str, OrderedTable] | None = None,
    derived: Mapping[str, str] | None = None,
) -> list[Part]:
    """Return the parts that contain the picture of the first dataset and the fields `names`.

    Args:
        names: Names of fields; see the docstring of this module.
        first: The dataset whose images nimg counts.
        others: Further datasets by name.
        derived: Recipes by name; see derived.py.

    Raises:
        UsageError: A name is unknown, or the same name is used twice.
    """
    others, recipes = others or {}, {name: parse(text) for name, text in (derived or {}).items()}
    _check_distinct(first.table, others, recipes)
    main, following, rest = {"image": "image"}, {}, {name: {} for name in others}
    taken: dict[str, Derivation] = {}
    for name in names:
        plain, dataset = name.removesuffix(NEXT), name.split(".", 1)[0]
        if name in recipes:
            taken[name] = recipes[name]
        elif dataset in others:
            rest[dataset][name] = _known(
                others[dataset].table, name[len(dataset) + 1 :] or "image", name, others, recipes
            )
        else:
            known = _known(first.table, plain, name, others, recipes)
            (following if plain != name else main)[name] = known
    parts = [Part("", first, main, taken)]
    parts += [Part("", first, following, is_next=True)] if following else []
    return parts + [Part(name, others[name], fields) for name, fields in rest.items() if fields]


def _known(
    table: SampleTable, name: str, asked: str, others: Mapping[str, OrderedTable], recipes: Mapping[str, Any]
) -> str:
    there = ["image", "class", *table.fields]
    if name not in there:
        names = ", ".join([*there, *others, *recipes])
        raise UsageError(
            f"training needs the field {printable(repr(asked))}, which the data does not have (it has {names}): pack "
            "it with that field (see stylegan-pg pack --help), or give data.unpaired or data.derived"
        )
    return name


def _check_distinct(table: SampleTable, others: Mapping[str, OrderedTable], recipes: Mapping[str, Any]) -> None:
    there = {"image", "class", *table.fields}
    for key, names in (("data.unpaired", set(others)), ("data.derived", set(recipes))):
        for name in sorted(names):
            if name in there or not name.isidentifier():
                reason = "a field of that name exists" if name in there else "names consist of letters, digits and _"
                raise UsageError(f"{key}: {printable(repr(name))} is not possible, because {reason}: choose another")
        there |= names
