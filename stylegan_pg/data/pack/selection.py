"""The selection of the pictures of SOURCE that are packed, with their class numbers and their further fields."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stylegan_pg.data.datasets.class_numbers import described, number_classes
from stylegan_pg.data.datasets.fields import CAPTION, VECTOR, Field
from stylegan_pg.data.datasets.label_vectors import Vector, described_vectors
from stylegan_pg.data.pack.captions import TEXT, Captions, captions_of
from stylegan_pg.data.pack.labels import Labels, labels_of, vectors_of
from stylegan_pg.data.pack.partners import Matched, PartnerFolder, matched
from stylegan_pg.data.pack.samples import Partner, SourceSample
from stylegan_pg.data.pack.source_files import File, few
from stylegan_pg.data.pack.sources import list_source
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

_USED = "training uses them with data.conditional=true"


class Wanted(NamedTuple):
    """The options that say what to pack (see `pack`)."""

    labels: str | os.PathLike[str]
    unlabelled: str
    captions: str | os.PathLike[str]
    folders: Sequence[PartnerFolder]
    vectors: Mapping[str, Path]  # files by the names of fields
    unpaired: str
    max_images: int | None


@dataclass(frozen=True)
class Chosen:
    """The samples to pack, in their order, the names of their classes, their further fields by name (sorted), and
    remarks about other pictures."""

    samples: list[SourceSample]
    names: list[str]
    fields: dict[str, Field]
    ignored: dict[str, int]
    notes: tuple[str, ...]
    unlabelled: list[str]
    unpaired: list[str]
    remarks: list[str]


class _Entry(NamedTuple):
    """A picture of the listing with what belongs to it; `partners` is None if one of them is missing."""

    picture: File
    label: Any
    caption: File | str | None
    partners: tuple[Partner, ...] | None
    vectors: tuple[Vector, ...]  # of the fields in Wanted.vectors


def choose(sources: list[Path], wanted: Wanted, gone: Collection[str]) -> Chosen:
    """Choose the pictures of SOURCE to pack. `gone`: pictures that were listed earlier and are missing now; they still
    count when max_images pictures are chosen among all.

    Raises:
        UsageError: pictures have no label and `unlabelled` is "refuse", or no partner and `unpaired` is; as
            list_source, labels_of, vectors_of, captions_of, matched and number_classes.
    """
    listing = list_source(sources)
    found, captions = labels_of(listing, wanted.labels), captions_of(listing, wanted.captions)
    vectors = {name: vectors_of(path, listing, name) for name, path in wanted.vectors.items()}
    if found.field and VECTOR in map(str.lower, vectors):
        raise UsageError(f"the labels are vectors, and vector {VECTOR} would have their name: choose another for it")
    rows = zip(*(one.of for one in vectors.values()), strict=True) if vectors else [()] * len(listing.pictures)
    partners = matched(wanted.folders, listing.pictures, sources)
    ignored = Counter(listing.ignored)
    taken = found.beside | ({TEXT} if wanted.captions == "auto" else set())
    spare = Counter(file.suffix for file in listing.sidecars.values() if file.suffix not in taken)
    ignored.update(spare)
    entries = [_Entry(*one) for one in zip(listing.pictures, found.of, captions.of, partners.of, rows, strict=True)]
    bare = [one.picture.path for one in entries if one.label is None] if found.any else []
    _refuse_unlabelled(found, bare, len(entries), wanted.unlabelled)
    if wanted.unlabelled == "skip":
        entries = [one for one in entries if one.label is not None or not bare]
    alone = [one.picture.path for one in entries if one.partners is None]
    _refuse_unpaired(partners, len(entries), alone, wanted.unpaired)
    entries, remarks = _limited([one for one in entries if one.partners is not None], wanted.max_images, gone)
    numbers, names = [-1] * len(entries), []
    if not found.field:
        numbers, names = number_classes([one.label for one in entries], found.said)
    remarks = [*_labels_remarks(found, numbers, names, entries), *remarks]
    if bare:
        kept = f"have {'zeros for labels' if found.field else 'no class'}"
        fate = "were left out" if wanted.unlabelled == "skip" else kept
        remarks.append(f"{len(bare)} pictures without a label {fate}: {printable(few(bare))}")
    remarks += [f"{name}: {described_vectors(one.field, one.of)}" for name, one in vectors.items() if one.field]
    remarks += _caption_remarks(captions, spare[TEXT])
    remarks += _partner_remarks(partners, alone)
    return Chosen(
        [_sample(one, number, found.field, captions, [*vectors]) for one, number in zip(entries, numbers, strict=True)],
        names,
        dict(sorted(_fields(found, captions, wanted.folders, vectors).items())),
        dict(sorted(ignored.items())),
        (*listing.notes, *partners.notes),
        bare if wanted.unlabelled == "skip" else [],
        alone,
        remarks,
    )


def _refuse_unlabelled(found: Labels, bare: Sequence[str], total: int, unlabelled: str) -> None:
    if bare and unlabelled == "refuse":
        without = "with zeros" if found.field else "without a class"
        raise UsageError(
            f"labels: {found.said} gives no label to {len(bare)} of {total} pictures ({printable(few(list(bare)))}): "
            f"label them, give --unlabelled skip to leave them out or --unlabelled keep to pack them {without}, "
            "or give --labels none"
        )


def _refuse_unpaired(partners: Matched, total: int, alone: Collection[str], unpaired: str) -> None:
    if not alone or (unpaired == "skip" and len(alone) < total):
        return
    name, paths = next((name, there) for name, paths in partners.lacking.items() if (there := {*alone} & {*paths}))
    raise UsageError(
        f"{name}: {len(paths)} of {total} pictures have no partner there ({printable(few(sorted(paths)))}): it is the "
        "file with the same path, whatever its suffix; add them, or give --unpaired skip to leave these pictures out"
    )


def _limited(entries: list[_Entry], max_images: int | None, gone: Collection[str]) -> tuple[list[_Entry], list[str]]:
    """At most `max_images` entries, evenly spread, and a remark if some were left out."""
    if max_images is None:
        return entries, []
    paths = sorted({one.picture.path for one in entries} | set(gone))
    number = min(max_images, len(paths))
    taken = {paths[i * len(paths) // number] for i in range(number)}
    remarks = []
    if number < len(paths):
        remarks.append(f"{number} of {len(paths)} pictures were taken, evenly spread over their order (--max-images)")
    return [one for one in entries if one.picture.path in taken], remarks


def _sample(entry: _Entry, number: int, field: Field | None, captions: Captions, names: Sequence[str]) -> SourceSample:
    vectors: list[tuple[str, Vector]] = [*zip(names, entry.vectors, strict=True)]
    if field:
        vectors.append((VECTOR, (0.0,) * field.size if entry.label is None else entry.label))
    caption = (entry.caption or "") if captions.said else None
    return SourceSample(entry.picture, number, entry.partners or (), caption, tuple(vectors))


def _fields(
    found: Labels, captions: Captions, folders: Sequence[PartnerFolder], vectors: Mapping[str, Labels]
) -> dict[str, Field]:
    fields = {folder.name: folder.field for folder in folders}
    fields |= {name: one.field for name, one in vectors.items() if one.field}
    if found.field:
        fields[VECTOR] = found.field
    if captions.said:
        fields[CAPTION] = Field("text")
    return fields


def _labels_remarks(
    found: Labels, numbers: Sequence[int], names: Sequence[str], entries: Sequence[_Entry]
) -> list[str]:
    if found.field:
        what = described_vectors(found.field, [one.label for one in entries])
        return [f"labels: from {found.said}; {what} (field {VECTOR})", _USED]
    if names:
        return [f"labels: from {found.said}; {described(numbers, names)}", _USED]
    return [f"no labels: {found.said}"] if found.said else []


def _caption_remarks(captions: Captions, spare: int) -> list[str]:
    if captions.said:
        there = sum(caption is not None for caption in captions.of)
        return [f"captions: from {captions.said}; {there} of {len(captions.of)} pictures have one (field {CAPTION})"]
    if spare:
        return [f"{spare} {TEXT} files beside pictures were not read: --captions auto takes them for captions"]
    return []


def _partner_remarks(partners: Matched, alone: Sequence[str]) -> list[str]:
    fields: Mapping[str, Field] = {one.name: one.field for each in partners.of if each for one in each}
    remarks = [f"{name}: a {field} beside each picture" for name, field in fields.items()]
    if alone:
        remarks.append(f"{len(alone)} pictures without a partner were left out: {printable(few(list(alone)))}")
    return remarks
