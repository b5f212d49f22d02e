"""The class of each picture that is packed: from folders, .cls files, a dataset.json, or a JSON or CSV file."""

import csv
import io
import json
import os
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stylegan_pg.data.sources import PICTURES, File, Listing, few, normal_path
from stylegan_pg.errors import UsageError

MAX_CLASSES = 1_000_000


def classes_of(listing: Listing, labels: str | os.PathLike[str]) -> tuple[list[int], list[str]]:
    """The class of each picture and the classes' names; ([], []) without labels."""
    given: dict[str, Any] | None = None
    origin = str(labels)
    if labels == "auto" and listing.dataset_json:
        origin = "dataset.json"
        given = _parse_json(origin, _read_label(listing.dataset_json))
    elif labels == "auto" and any(file.suffix == ".cls" for file in listing.sidecars.values()):
        origin = "SOURCE with its .cls files"
        keyed = {picture.path: listing.beside(picture, ".cls") for picture in listing.pictures}
        texts = {path: _read_label(file).decode("utf-8", "replace").strip() for path, file in keyed.items() if file}
        given = _integers_if_all(texts)
    elif labels == "auto":
        given = _class_folders(listing.pictures)
    elif labels != "none":
        try:
            data = Path(labels).read_bytes()
        except OSError as error:
            raise UsageError(f"labels = {labels}: {error.strerror}; give auto, none, or a JSON or CSV file") from error
        given = _parse_csv(origin, data, listing) if origin.lower().endswith(".csv") else _parse_json(origin, data)
    if given is None:
        return [], []
    found = _look_up(given, listing.pictures, origin)
    return number_classes([found[picture.path] for picture in listing.pictures], origin)


def _read_label(file: File) -> bytes:
    try:
        return file.read()
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{file.path} in SOURCE cannot be read ({error}): mend it, or give --labels none") from error


def _class_folders(pictures: list[File]) -> dict[str, str] | None:
    folders = {picture.path: picture.inner.partition("/")[0] for picture in pictures if "/" in picture.inner}
    names = set(folders.values())
    buckets = all(re.fullmatch(r"\d{5,}", name) for name in names)
    return folders if len(folders) == len(pictures) and len(names) > 1 and not buckets else None


def _parse_json(origin: str, data: bytes) -> dict[str, Any] | None:
    """{path: label}, or None where the file says that there are no labels."""
    form = 'give {"path": label, ...} or {"labels": [["path", label], ...]}, or --labels none'
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UsageError(f"{origin} is not JSON ({error}): {form}") from error
    if isinstance(content, dict) and isinstance(content.get("labels", ""), list | None):
        content = content["labels"]
    elif origin == "dataset.json" or not isinstance(content, dict):
        raise UsageError(f"{origin} does not hold labels in a known form: {form}")
    if not isinstance(content, list):
        return content
    if not all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in content):
        raise UsageError(f"{origin} has entries that are not [path, label]: {form}")
    return _unique(origin, content)


def _parse_csv(origin: str, data: bytes, listing: Listing) -> dict[str, Any]:
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{origin} is not CSV in UTF-8 ({error}): write lines of path,label") from error
    if rows and posixpath.splitext(rows[0][0])[1].lower() not in PICTURES:
        rows = rows[1:]  # the header
    wrong = [row for row in rows if len(row) != 2]
    if wrong:
        raise UsageError(f"{origin} has lines that are not path,label, the first: {','.join(wrong[0])}")
    return _integers_if_all(_unique(origin, [(path, label.strip()) for path, label in rows]))


def _unique(origin: str, rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for path, label in rows:
        if given.setdefault(path, label) != label:
            raise UsageError(f"{origin} gives {path} two labels, {given[path]} and {label}: keep one")
    return given


def _integers_if_all(texts: dict[str, str]) -> dict[str, Any]:
    """In files that know only text, a column of numbers is meant as numbers."""
    if all(re.fullmatch(r"-?\d{1,18}", text) for text in texts.values()):
        return {path: int(text) for path, text in texts.items()}
    return dict(texts)


def _look_up(given: dict[str, Any], pictures: list[File], origin: str) -> dict[str, Any]:
    """The labels by the pictures' own paths; every one must fit a picture, and every picture have one."""
    known = {picture.path for picture in pictures}
    found = {p if p in known else normal_path(p): label for p, label in given.items()}
    strange = [path for path in found if path not in known]
    if strange:
        raise UsageError(
            f"{origin} names {len(strange)} pictures that SOURCE does not have ({few(strange)}): "
            "write paths as they are within SOURCE"
        )
    bare = [picture.path for picture in pictures if picture.path not in found]
    if bare:
        raise UsageError(
            f"{origin} gives no label to {len(bare)} of {len(pictures)} pictures ({few(bare)}): label all or none, "
            "or give --labels none"
        )
    return found


def number_classes(labels: list[Any], origin: str) -> tuple[list[int], list[str]]:
    """Class numbers of labels that are all integers or all names, and the classes' names. Raises UsageError for other
    labels, naming their `origin`."""
    kinds = {type(label) for label in labels}
    if kinds & {list, tuple, dict}:
        raise UsageError(f"{origin} holds vector labels: only class labels, integers or names, are supported")
    if kinds == {int}:
        if min(labels) < 0 or max(labels) >= MAX_CLASSES:
            raise UsageError(
                f"{origin} has labels from {min(labels)} to {max(labels)}: number classes from 0, or name them"
            )
        return labels, [str(i) for i in range(max(labels) + 1)]
    if kinds != {str}:
        kind = ", ".join(sorted(k.__name__ for k in kinds))
        raise UsageError(f"{origin} has labels of type {kind}: give all as integers or all as names")
    # Folders 1, 2, ... 10 in their order as numbers.
    numbers = all(label.isdecimal() for label in labels)
    names = sorted(set(labels), key=lambda name: (int(name), name) if numbers else name)
    place = {name: i for i, name in enumerate(names)}
    return [place[label] for label in labels], names
