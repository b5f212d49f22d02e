"""The selection of the pictures of SOURCE that are packed, and their class numbers."""

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from stylegan_pg.data.datasets.class_numbers import described, number_classes
from stylegan_pg.data.pack.labels import labels_of
from stylegan_pg.data.pack.sources import File, few, list_source
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable


@dataclass(frozen=True)
class Chosen:
    """The pictures to pack, in sample order, their class numbers (-1: none), and remarks about the others."""

    pictures: list[File]
    classes: list[int]
    names: list[str]
    ignored: dict[str, int]
    notes: tuple[str, ...]
    unlabelled: list[str]
    remarks: list[str]


def choose(
    sources: list[Path], labels: str | os.PathLike[str], unlabelled: str, max_images: int | None, gone: Collection[str]
) -> Chosen:
    """Choose the pictures of SOURCE to pack. `gone`: pictures that were listed earlier and are missing now; they still
    count when max_images pictures are chosen among all.

    Raises:
        UsageError: pictures have no label and `unlabelled` is "refuse"; as list_source, labels_of and number_classes.
    """
    listing = list_source(sources)
    found = labels_of(listing, labels)
    ignored = Counter(listing.ignored)
    ignored.update(file.suffix for file in listing.sidecars.values() if file.suffix not in found.beside)
    pairs = list(zip(listing.pictures, found.of, strict=True))
    bare = [picture.path for picture, label in pairs if label is None] if found.any else []
    remarks = []
    if bare and unlabelled == "refuse":
        raise UsageError(
            f"labels: {found.said} gives no label to {len(bare)} of {len(pairs)} pictures ({printable(few(bare))}): "
            "label them, give --unlabelled skip to leave them out or --unlabelled keep to pack them without a class, "
            "or give --labels none"
        )
    if unlabelled == "skip":
        pairs = [(picture, label) for picture, label in pairs if label is not None or not bare]
    if max_images is not None:
        paths = sorted({picture.path for picture, _ in pairs} | set(gone))
        number = min(max_images, len(paths))
        taken = {paths[i * len(paths) // number] for i in range(number)}
        if number < len(paths):
            remarks.append(
                f"{number} of {len(paths)} pictures were taken, evenly spread over their order (--max-images)"
            )
        pairs = [(picture, label) for picture, label in pairs if picture.path in taken]
    numbers, names = number_classes([label for _, label in pairs], found.said)
    if names:
        remarks.insert(0, f"labels: from {found.said}; {described(numbers, names)}")
        remarks.insert(1, "training uses them with data.conditional=true")
    elif found.said:
        remarks.insert(0, f"no labels: {found.said}")
    if bare:
        fate = "were left out" if unlabelled == "skip" else "have no class"
        remarks.append(f"{len(bare)} pictures without a label {fate}: {printable(few(bare))}")
    return Chosen(
        [picture for picture, _ in pairs],
        numbers,
        names,
        dict(sorted(ignored.items())),
        listing.notes,
        bare if unlabelled == "skip" else [],
        remarks,
    )
