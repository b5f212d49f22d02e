"""Labels of the pictures in SOURCE: from a dataset.json, .cls and .json files beside them, folders, or a file that the
user names. The interpretation is reported, and an ambiguous one is refused with the alternatives."""

import csv
import io
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stylegan_pg.data.datasets.class_numbers import LABEL_BYTES, Label, as_labels, cls_label
from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.datasets.json_members import json_content
from stylegan_pg.data.datasets.label_vectors import as_vectors
from stylegan_pg.data.pack.reading import Unreadable, read_listed
from stylegan_pg.data.pack.source_files import PICTURES, File, few
from stylegan_pg.data.pack.sources import Listing, normal_path
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import MAX_JSON_BYTES, open_regular, parse_json, printable

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
_NONE = "or give --labels none"
_FORM = f'give {{"path": label, ...}} or {{"labels": [["path", label], ...]}}, {_NONE}'


class Labels(NamedTuple):
    """The labels of a listing's pictures, in their order; `said` says where they come from, or why there are none.

    They are classes; or, if `field` describes them, vectors: tuples of numbers, None for a missing one.
    """

    of: list[Any]
    said: str
    beside: frozenset[str] = frozenset()  # suffixes of the files beside the pictures that were taken
    field: Field | None = None

    @property
    def any(self) -> bool:
        return any(label is not None for label in self.of)


def labels_of(listing: Listing, labels: str | os.PathLike[str]) -> Labels:
    """The labels that the option `labels` asks for (see `pack`).

    Raises:
        UsageError: labels contradict each other, fit no picture, have an unknown form or are ambiguous.
    """
    pictures = listing.pictures
    if labels == "none":
        return Labels([None] * len(pictures), "")
    if labels == "folders":
        return _by_folders(pictures, as_they_are=True)
    if labels != "auto":
        return _from_file(Path(labels), listing)
    if listing.dataset_json:
        return _from_dataset_json(listing)
    beside = _from_members(listing)
    return beside if beside.any else _by_folders(pictures)


def vectors_of(path: Path, listing: Listing, name: str) -> Labels:
    """The vectors of the field `name` from a JSON or CSV file (see `pack`), whose every picture has one.

    Raises:
        UsageError: the file holds something else, or lacks a picture.
    """
    found = _from_file(path, listing, "vector")
    said = f"vector {name}: {found.said}"
    if not found.field:
        raise UsageError(f"{said} holds no vectors: give several columns of numbers with a header, or lists in JSON")
    bare = [picture.path for picture, row in zip(listing.pictures, found.of, strict=True) if row is None]
    if bare:
        raise UsageError(f"{said} has no numbers for {len(bare)} pictures ({printable(few(bare))}): add them")
    return found


# ------------------------------------------------------------------------------------------------------ files of labels


def _from_file(path: Path, listing: Listing, option: str = "labels") -> Labels:
    origin = printable(path)
    forms = "auto, folders, none, or a" if option == "labels" else "a"
    data = read_table(path, option, f"give {forms} JSON or CSV file")
    if path.suffix.lower() == ".json":
        return _labels(_parse_json(origin, data, lambda _: True), listing.pictures, origin)
    rows, header = csv_rows(origin, data, picture_finder(listing.pictures, origin), "path,label")
    lines = [header, *rows] if header else rows
    columns = len(lines[0]) - 1 if lines else 1
    if columns < 1 or any(len(line) != columns + 1 for line in lines):
        wrong = next(line for line in lines if len(line) != 2)
        raise UsageError(
            f"{origin} has lines that are not path,label, the first: {printable(','.join(wrong))}; write two columns, "
            "separated by a comma, or as many in each line for vectors"
        )
    if columns > 1:
        vectors = unique(origin, [(path, _vector(cells, origin)) for path, *cells in rows])
        return _labels(vectors, listing.pictures, origin, [name.strip() for name in header[1:]])
    return _labels(unique(origin, [(path, label.strip()) for path, label in rows]), listing.pictures, origin)


def _vector(cells: list[str], origin: str) -> list[float] | None:
    """The numbers of a line; None if all of its cells are empty."""
    if not any(cell.strip() for cell in cells):
        return None
    numbers = []
    for cell in cells:
        try:
            numbers.append(float(cell))
        except ValueError:
            raise UsageError(
                f"{origin} has {printable(repr(cell), 60)} where a line of several columns has numbers: write "
                "path,label for classes, or a number in each column"
            ) from None
    return numbers


def read_table(path: Path, option: str, forms: str) -> bytes:
    """The content of a JSON or CSV file that the user gave to an option.

    Raises:
        UsageError: it cannot be read, is too large, or is neither by its name; the message ends with `forms`.
    """
    origin = printable(path)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{option} = {origin}: {error.strerror}; {forms}") from error
    if len(data) > MAX_JSON_BYTES:
        raise UsageError(f"{option} = {origin}: it has more than {MAX_JSON_BYTES} bytes; {forms}")
    if path.suffix.lower() not in (".csv", ".json"):
        raise UsageError(f"{option} = {origin}: its name must end in .json or .csv, which says how it is read")
    return data


def _from_dataset_json(listing: Listing) -> Labels:
    """Labels from a dataset.json, which applies to the pictures at or below its folder, by their relative paths."""
    given: dict[str, Any] = {}
    known = {picture.path for picture in listing.pictures}
    for file in listing.dataset_json:
        folder = posixpath.dirname(file.path)

        def place_of(path: str, folder: str = folder) -> str:
            below = _joined(folder, path)
            return path if below not in known and path in known else below

        def names_picture(path: str, place_of: Callable[[str], str] = place_of) -> bool:
            return place_of(path) in known

        found = _parse_json(printable(file.path), content_of(file), names_picture)
        given |= {place_of(path): label for path, label in found.items()}
    return _labels(given, listing.pictures, " and ".join(printable(file.path) for file in listing.dataset_json))


def _joined(folder: str, path: str) -> str:
    return normal_path(posixpath.join(folder, path.replace("\\", "/")))


def content_of(file: File, most: int = 1 << 28, remedy: str = f"mend it, {_NONE}") -> bytes:
    """The bytes of a file of labels in SOURCE. Raises UsageError if it has more than `most`, or cannot be read."""
    if file.size > most:
        raise UsageError(f"{printable(file.path)} in SOURCE has {file.size} bytes, more than {most}: {remedy}")
    try:
        return read_listed(file)
    except Unreadable as error:
        raise UsageError(f"{printable(file.path)} in SOURCE cannot be read ({error}): {remedy}") from error


def _parse_json(origin: str, data: bytes, names_picture: Callable[[str], bool]) -> dict[str, Any]:
    """Parse a file of labels to {path: label}; empty if it says that there are no labels."""
    content = parse_json(data, origin, _FORM, finite=False)
    if isinstance(content, dict) and isinstance(content.get("labels", ""), list | dict | None):
        content = content["labels"] or []
    elif isinstance(content, dict) and not any(map(names_picture, content)):
        raise UsageError(f"{origin} does not hold labels in a known form: {_FORM}")
    if isinstance(content, dict):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{origin} does not hold labels in a known form: {_FORM}")
    if not all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in content):
        raise UsageError(f"{origin} has entries that are not [path, label]: {_FORM}")
    return unique(origin, content)


class LabelRows(NamedTuple):
    """The lines of a CSV file, and its header, which is empty if the file has none."""

    rows: list[list[str]]
    header: list[str]


def csv_rows(origin: str, data: bytes, found: Callable[[str], str | None], form: str) -> LabelRows:
    """Parse a CSV file whose first column names pictures. A first line that names none is its header.

    Raises:
        UsageError: it is no CSV; the message names the `form` of a line.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{origin} is not CSV in UTF-8 ({error}): write lines of {form}") from error
    if rows and found(rows[0][0]) is None and posixpath.splitext(rows[0][0])[1].lower() not in PICTURES:
        return LabelRows(rows[1:], rows[0])
    return LabelRows(rows, [])


def unique(origin: str, rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for path, label in rows:
        if path in given and given[path] != label and given[path] == given[path] and label == label:  # nan is not nan
            raise UsageError(f"{origin} gives {printable(path)} two labels, {given[path]} and {label}: keep one")
        given[path] = label
    return given


def picture_finder(pictures: list[File], origin: str) -> Callable[[str], str | None]:
    """A function that maps a name in a file of labels or captions to the path of a picture, or None. The name may lack
    the common folder of all pictures, and the suffix. UsageError if several pictures fit."""
    known = {picture.path for picture in pictures}
    common, _ = _parted([path.split("/")[:-1] for path in known])
    stems: dict[str, list[str]] = defaultdict(list)
    for path in sorted(known):
        stems[posixpath.splitext(path)[0]].append(path)

    def found(path: str) -> str | None:
        forms = (path, _joined("", path), _joined(common, path))
        whole = [form for form in forms if form in known] or [one for form in forms for one in stems.get(form, ())]
        if len(set(whole)) > 1 and whole[0] not in forms:
            raise UsageError(f"{origin} labels {printable(path)}, which may be {printable(few(whole))}: add suffixes")
        return whole[0] if whole else None

    return found


def _labels(given: dict[str, Any], pictures: list[File], origin: str, names: Sequence[str] = ()) -> Labels:
    """Labels of a table {path: label}, looked up by the pictures' paths. `names`: of a vector's entries."""
    if not given:
        return Labels([None] * len(pictures), f"{origin} says that there are none")
    return _interpreted(looked_up(given, pictures, origin), origin, names)


def _interpreted(values: list[Any], origin: str, names: Sequence[str] = ()) -> Labels:
    if any(isinstance(value, list) for value in values):
        field, rows = as_vectors(values, origin, names)
        return Labels(rows, origin, field=field)
    return Labels(as_labels(values, origin), origin)


def looked_up(given: dict[str, Any], pictures: list[File], origin: str) -> list[Any]:
    """The value of each picture in a table {path: value}, None where there is none.

    Raises:
        UsageError: the table names pictures that SOURCE does not have, or one of them twice with different values.
    """
    place_of, found, strange = picture_finder(pictures, origin), {}, []
    for path, label in given.items():
        place = place_of(path)
        if place is None:
            strange.append(path)
            continue
        if place in found:
            unique(origin, [(place, found[place]), (place, label)])
        found[place] = label
    if strange:
        raise UsageError(
            f"{origin} names {len(strange)} pictures that SOURCE does not have ({printable(few(strange))}): "
            "write paths as they are within SOURCE"
        )
    return [found.get(picture.path) for picture in pictures]


# ------------------------------------------------------------------------------------------------ beside the pictures


def _from_members(listing: Listing) -> Labels:
    """Labels as in WebDataset: the text of KEY.cls, else "label" in KEY.json."""
    values: list[Any] = []
    kinds = set()
    for picture in listing.pictures:
        cls, json = (listing.beside(picture, suffix) for suffix in (".cls", ".json"))
        if cls:
            named = f"{printable(cls.path)} in SOURCE"
            values.append(cls_label(content_of(cls, LABEL_BYTES), named, f"mend it, {_NONE}"))
            kinds.add(".cls")
        elif json:
            named = f"{printable(json.path)} in SOURCE"
            values.append(json_content(content_of(json, LABEL_BYTES), named, f"mend it, {_NONE}").get("label"))
            if values[-1] is not None:
                kinds.add(".json")
        else:
            values.append(None)
    origin = f"SOURCE with its {' and '.join(sorted(kinds))} files"
    return _interpreted(values, origin)._replace(beside=frozenset(kinds))


# ------------------------------------------------------------------------------------------------------------- folders


def _by_folders(pictures: list[File], as_they_are: bool = False) -> Labels:
    """Labels from class folders: the first level at which the pictures' paths differ, or the level below if the folders
    there are train/, val/ and the like.

    as_they_are: accept any folder names, and pictures outside the folders.
    """
    nothing: list[Label] = [None] * len(pictures)
    wrapper, rests = _parted([picture.inner.split("/")[:-1] for picture in pictures])
    below = f" in {printable(wrapper)}" if wrapper else ""
    tops = sorted({rest[0] for rest in rests if rest})
    splits = [top for top in tops if top.lower() in _SPLITS]
    if splits == tops and tops and not as_they_are:
        _, rests = _parted([rest[1:] for rest in rests])
        below, tops = f" below {printable(', '.join(splits))}", sorted({rest[0] for rest in rests if rest})
    elif not as_they_are and any(not split.lower().startswith("train") for split in splits):
        others = [top for top in tops if top not in splits]
        raise UsageError(
            f"folder {printable(few(splits))} in SOURCE looks like a part for training or testing, "
            f"{printable(few(others))} like classes: give --labels folders to take all of them for "
            "classes, a JSON or CSV file, or --labels none"
        )
    names: list[Label] = [rest[0] if rest else None for rest in rests]
    outside = names.count(None)
    if len(tops) < 2:
        if as_they_are:
            raise UsageError("labels = folders: SOURCE has no two folders of pictures side by side; give auto or none")
        return Labels(nothing, f"no class folders{below}" if splits else "")
    if as_they_are:
        return Labels(names, f"the layout of folders{below}")
    if all(re.fullmatch(r"\d{5,}", top) for top in tops):
        return Labels(
            nothing, f"folders such as {tops[0]} are taken for buckets; --labels folders takes them for classes"
        )
    if outside > len(pictures) // 2:
        return Labels(
            nothing,
            f"{outside} of {len(pictures)} pictures lie outside the folders {printable(few(tops))}; --labels folders "
            "takes these for classes",
        )
    return Labels(names, f"the layout of folders{below}")


def _parted(folders: list[list[str]]) -> tuple[str, list[list[str]]]:
    """The leading folders that all paths share, and the remaining paths."""
    common: list[str] = []
    while len(tops := {folder[0] for folder in folders if folder}) == 1:
        common += tops
        folders = [folder[1:] for folder in folders]
    return "/".join(common), folders
