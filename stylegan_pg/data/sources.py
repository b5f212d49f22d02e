"""What SOURCE holds: the pictures of a folder, a zip or tars in sample order, and their classes."""

import contextlib
import csv
import functools
import io
import json
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stylegan_pg.errors import UsageError

# fmt: off
PICTURES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".avif",
})
# fmt: on
_MAX_BYTES = 1 << 30  # of one encoded picture; what is larger is a mistake or a bomb
MAX_CLASSES = 1_000_000


class File(NamedTuple):
    """A file in SOURCE: in `container`, from byte `member`, or as the zip member of that name."""

    path: str  # within SOURCE, parts joined by "/"
    inner: str  # the same within its tar, where SOURCE is several tars
    container: str
    member: int | str
    size: int

    def read(self) -> bytes:
        if self.size > _MAX_BYTES:
            raise ValueError(f"has {self.size} bytes, more than {_MAX_BYTES}")
        if isinstance(self.member, str):
            return open_zip(self.container).read(self.member)
        with open(self.container, "rb") as file:
            file.seek(self.member)
            return file.read(self.size)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.path)[1].lower()

    @property
    def is_picture(self) -> bool:
        # Hidden files include the "._x.jpg" that macOS leaves beside x.jpg, in zips below __MACOSX.
        hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in self.path.split("/"))
        return self.suffix in PICTURES and not hidden


class Listing(NamedTuple):
    pictures: list[File]  # in sample order
    dataset_json: File | None
    cls: dict[str, File]  # WebDataset key (path up to the name's first dot) -> label file
    ignored: dict[str, int]  # files that are none of these: suffix -> how many


@functools.lru_cache(maxsize=4)
def open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def list_source(sources: list[Path]) -> Listing:
    if len(sources) == 1:
        found = _files(sources[0])
    else:
        tars = {path.name: path for path in sources}
        if len(tars) < len(sources) or not sources:
            raise UsageError("SOURCE as a list must hold at least one tar, and no two of the same name")
        found = [file for name, path in tars.items() for file in _tar_files(path, name + "/")]
    files = {file.path: file for file in found}  # of members with one name the last counts, as when extracting
    pictures = sorted((file for file in files.values() if file.is_picture), key=lambda file: file.path)
    if not pictures:
        raise UsageError(f"{sources[0]} holds no pictures (known are {' '.join(sorted(PICTURES))}): check the path")
    others = [file for file in files.values() if not file.is_picture]
    labels = {_key(file.path): file for file in others if file.suffix == ".cls"}
    dataset_json = files.get("dataset.json")
    ignored = Counter(
        file.suffix or posixpath.basename(file.path)
        for file in others
        if file is not dataset_json and labels.get(_key(file.path)) is not file
    )
    return Listing(pictures, dataset_json, labels, dict(sorted(ignored.items())))


def _key(path: str) -> str:
    folder, name = posixpath.split(path)
    return posixpath.join(folder, name.split(".")[0])


def _files(source: Path) -> list[File]:
    if source.is_dir():
        files = list(_folder_files(source))
        tars = [file for file in files if file.suffix == ".tar"]
        if tars and not any(file.is_picture for file in files):
            return [member for tar in tars for member in _tar_files(Path(tar.container), tar.path + "/")]
        return files
    if not source.exists():
        raise UsageError(f"{source}: no such folder, zip or tar; check the path of SOURCE")
    return list(_zip_files(source) if zipfile.is_zipfile(source) else _tar_files(source))


def _folder_files(root: Path) -> Iterator[File]:
    def refuse(error: OSError):
        raise UsageError(f"{error.filename} cannot be listed ({error.strerror}): mend its permissions") from error

    seen = set()  # links to folders are followed, in circles only once
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        subfolders.sort()
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        for name in names:
            file = Path(folder, name)
            path = file.relative_to(root).as_posix()
            with contextlib.suppress(OSError):  # a broken link is listed, and found unreadable later
                yield File(path, path, str(file), 0, file.stat().st_size)
                continue
            yield File(path, path, str(file), 0, 0)


def _zip_files(path: Path) -> Iterator[File]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a zip that can be read ({error}): fetch it again") from error
    for member in members:
        if not member.is_dir():
            name = posixpath.normpath(member.filename.replace("\\", "/"))
            yield File(name, name, str(path), member.filename, member.file_size)


def _tar_files(path: Path, prefix: str = "") -> Iterator[File]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg():
                    name = posixpath.normpath(member.name)
                    yield File(prefix + name, name, str(path), member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(
            f"{path} is neither a folder, nor a zip, nor an uncompressed tar that can be read to its end ({error}): "
            "unpack .tar.gz and the like first, fetch a truncated file again"
        ) from error


def classes_of(listing: Listing, labels: str | os.PathLike[str]) -> tuple[list[int], list[str]]:
    """The class of each picture and the classes' names; ([], []) without labels."""
    given: dict[str, Any] | None = None
    origin = str(labels)
    if labels == "auto" and listing.dataset_json:
        origin = "dataset.json"
        given = _parse_json(origin, _read_label(listing.dataset_json))
    elif labels == "auto" and listing.cls:
        origin = "SOURCE with its .cls files"
        keyed = {picture.path: listing.cls.get(_key(picture.path)) for picture in listing.pictures}
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
    found = {p if p in known else posixpath.normpath(p.replace("\\", "/")): label for p, label in given.items()}
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


def few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
