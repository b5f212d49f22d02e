"""Paired pictures and masks: which file of another folder belongs to a picture of SOURCE."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.data.datasets.fields import CAPTION, MAX_FIELDS, VECTOR, Field, is_field_name
from stylegan_pg.data.pack.samples import Partner
from stylegan_pg.data.pack.source_files import File, few
from stylegan_pg.data.pack.sources import list_source, sources_of
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

Folders = Sequence[str] | Mapping[str, str | os.PathLike[str]]


class PartnerFolder(NamedTuple):
    """The folder, zip or tar that holds the pictures of one field."""

    name: str
    field: Field
    source: str


class Matched(NamedTuple):
    """of: the partners of each picture, None for a picture that lacks one. lacking: such pictures' paths, for each
    field. notes: how the folders were interpreted."""

    of: list[tuple[Partner, ...] | None]
    lacking: dict[str, list[str]]
    notes: list[str]


def vector_files(vector: Folders, others: Iterable[str]) -> dict[str, Path]:
    """Parse the option `vector`: texts NAME=FILE, or {NAME: FILE} -> files by name. `others`: names of other fields.

    Raises:
        UsageError: a name is invalid or given to two fields.
    """
    found: dict[str, Path] = {}
    taken = {CAPTION, *(name.lower() for name in others)}
    for text in _texts(vector):
        name, sign, file = text.partition("=")
        if not sign or not file or not is_field_name(name):
            raise UsageError(
                f"vector = {printable(text)}: give NAME=FILE, with a name of letters, digits and _, neither image nor "
                "class"
            )
        if name.lower() in taken:
            raise UsageError(f"the name {name} is given to two fields: choose another for one of them")
        found[name] = Path(file)
        taken.add(name.lower())
    return dict(sorted(found.items()))


def partner_folders(pair: Folders, mask: Folders, channels: int, format: str) -> list[PartnerFolder]:
    """Parse the options `pair` and `mask`: texts NAME=FOLDER, or {NAME: FOLDER}; NAME:CHANNELS for pictures of another
    number of channels than the first.

    Raises:
        UsageError: a name or a number of channels is invalid.
    """
    found = [_folder("pair", one, channels, format) for one in _texts(pair)]
    found += [_folder("mask", one, 1, format) for one in _texts(mask)]
    names = [folder.name.lower() for folder in found]
    taken = {CAPTION, VECTOR}
    for folder in found:
        if names.count(folder.name.lower()) > 1 or folder.name.lower() in taken:
            raise UsageError(f"the name {folder.name} is given to two fields: choose another for one of them")
    if len(found) > MAX_FIELDS - len(taken):
        raise UsageError(f"{len(found)} folders are given with pair and mask: {MAX_FIELDS - len(taken)} are possible")
    return sorted(found)


def _texts(folders: Folders) -> list[str]:
    if isinstance(folders, Mapping):
        return [f"{name}={os.fspath(folder)}" for name, folder in folders.items()]
    return [folders] if isinstance(folders, str) else list(folders)


def _folder(option: str, text: str, channels: int, format: str) -> PartnerFolder:
    name, sign, source = text.partition("=")
    name, colon, number = name.partition(":")
    if not sign or not source or not is_field_name(name):
        raise UsageError(
            f"{option} = {printable(text)}: give NAME=FOLDER, with a name of letters, digits and _, neither "
            "image nor class"
        )
    if colon and (number not in ("1", "3", "4") or option == "mask"):
        what = "a mask has no channels" if option == "mask" else "channels are 1, 3 or 4"
        raise UsageError(f"{option} = {printable(text)}: {what}")
    channels = int(number) if colon else channels
    if option == "pair" and channels == 4 and format == "jpg":
        raise UsageError(f"{option} = {printable(text)}: jpg has no alpha channel; take format png or webp")
    return PartnerFolder(name, Field("image" if option == "pair" else "mask", channels=channels), source)


def matched(folders: Sequence[PartnerFolder], pictures: Sequence[File], sources: Iterable[Path]) -> Matched:
    """Find the partners of pictures: those of the same relative path, whatever the suffix.

    Raises:
        UsageError: a folder holds no pictures, lies within SOURCE, or has two that fit; RunError: as list_source.
    """
    tops = [source.resolve() for source in sources if source.is_dir()]
    found: list[dict[str, File]] = []
    lacking, notes = {}, []
    for folder in folders:
        places = sources_of(folder.source)
        inside = [place for place in places if any(place.resolve().is_relative_to(top) for top in tops)]
        if inside:
            raise UsageError(
                f"{printable(inside[0])} of {folder.name} lies within SOURCE, to whose pictures it would belong: give "
                "a SOURCE beside it"
            )
        listing = list_source(places)
        there = _by_stem(listing.pictures)
        found.append({picture.path: file for picture in pictures if (file := _partner(there, picture, folder))})
        lacking[folder.name] = [picture.path for picture in pictures if picture.path not in found[-1]]
        notes += [f"{folder.name}: {note}" for note in listing.notes]
        spare = len(listing.pictures) - len(found[-1])
        if spare:
            notes.append(f"{spare} pictures of {folder.name} belong to no picture of SOURCE")
    each: list[tuple[Partner, ...] | None] = []
    for picture in pictures:
        files = [by_path.get(picture.path) for by_path in found]
        whole = [Partner(f.name, f.field, file) for f, file in zip(folders, files, strict=True) if file is not None]
        each.append(tuple(whole) if len(whole) == len(folders) else None)
    return Matched(each, {name: paths for name, paths in lacking.items() if paths}, notes)


def _by_stem(pictures: Sequence[File]) -> dict[str, list[File]]:
    stems = defaultdict(list)
    for picture in pictures:
        stems[posixpath.splitext(picture.path)[0]].append(picture)
    return stems


def _partner(there: Mapping[str, list[File]], picture: File, folder: PartnerFolder) -> File | None:
    fitting = there.get(posixpath.splitext(picture.path)[0], [])
    exact = [file for file in fitting if file.path == picture.path]
    if len(fitting) > 1 and not exact:
        names = printable(few([file.path for file in fitting]))
        raise UsageError(f"{folder.name}: {names} fit {printable(picture.path)} equally: remove all but one")
    return (exact or fitting or [None])[0]
