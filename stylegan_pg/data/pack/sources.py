"""Listing of SOURCE: the pictures of a folder, a zip or tars in sample order, the files that may label them, and counts
of all other files."""

import bisect
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.data.datasets.sample_names import pair, read_names
from stylegan_pg.data.pack.source_files import PICTURES, File, files_in, named_apart, tar_files
from stylegan_pg.data.storage import patterns
from stylegan_pg.data.storage.remote import is_remote
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

# Pictures of kinds that are not read, and what turns them into others.
_OTHER_PICTURES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "convert them to PNG or JPEG, for example with pillow-heif"),
    ".jxl": "convert them to PNG or JPEG, for example with pillow-jxl-plugin",
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), "develop them to PNG or TIFF"),
    **dict.fromkeys((".psd", ".svg", ".eps", ".exr", ".hdr", ".xcf"), "export them as PNG"),
}
_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
_BESIDE = (".cls", ".json", ".txt")  # labels and captions of the picture with the same key
_MOST_KINDS = 20  # of ignored files, that are told apart


class Listing(NamedTuple):
    """The files of SOURCE. `ignored` counts files that are neither pictures nor labels, by kind; `notes` are sentences
    about how SOURCE was interpreted."""

    pictures: list[File]  # in sample order
    dataset_json: list[File]  # those with pictures at or below their folders
    sidecars: dict[tuple[str, str], File]  # path of a picture and suffix (.cls, .json, .txt) -> the file beside it
    contested: dict[tuple[str, str], tuple[str, str]]  # the same -> paths of a file and of another picture that it fits
    ignored: dict[str, int]
    notes: tuple[str, ...]

    def beside(self, picture: File, suffix: str) -> File | None:
        """The file with this suffix (".cls", ".json" or ".txt") that belongs to a picture.

        Raises:
            UsageError: it would belong to two pictures.
        """
        place = picture.path, suffix
        if place not in self.sidecars and place in self.contested:
            file, other = map(printable, self.contested[place])
            labels, captions = ("label", "label", "--labels"), ("describe", "text", "--captions")
            verb, what, option = captions if suffix == ".txt" else labels
            raise UsageError(
                f"{file} would {verb} both {printable(picture.path)} and {other}: give each a {what} with its own name "
                f"({printable(posixpath.basename(picture.path))}{suffix}), rename one of them, or give {option} none"
            )
        return self.sidecars.get(place)


def sources_of(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The folder, zip or tars that SOURCE names: a path, a pattern with braces or *, or several of them separated by
    "::". Raises UsageError for anything that is not a path of this machine."""
    found: list[Path] = []
    for one in [source] if isinstance(source, str | os.PathLike) else source:
        text = os.fspath(one)
        there = patterns.literal(text)
        if there is None and is_remote(text):
            raise UsageError(f"{printable(text)} is no path: fetch it first; packing reads files of this machine")
        pattern = "::" in text or any(sign in text for sign in "{" + patterns.WILD)
        found += map(Path, [text if there is None else there] if there or not pattern else patterns.expand(text))
    return found


def list_source(sources: list[Path]) -> Listing:
    """List the files of a folder (with pictures, or with tars and no pictures), a zip, or tars.

    Raises:
        UsageError: there are no files or no pictures, or an archive is damaged.
        RunError: SOURCE cannot be read at the moment.
    """
    notes: list[str] = []
    if len(sources) == 1:
        found, in_tars = files_in(sources[0], notes)
    else:
        found, in_tars = [file for path, name in named_apart(sources) for file in tar_files(path, notes, name)], True
    files = _by_path(found, notes)
    paths = [path for path, file in files.items() if not file.is_hidden]
    names = read_names(paths, PICTURES, webdataset=in_tars)
    if names.note:
        notes.append(names.note)
    split = {path: names.split(path) for path, file in sorted(files.items()) if file.is_picture}
    whole = {key for key, extension in split.values() if "." not in extension}
    parts = {path for path, (key, extension) in split.items() if "." in extension and key in whole}
    pictures = [files[path] for path in split if path not in parts]
    labels = [path for path, file in files.items() if file.suffix in _BESIDE and not file.is_hidden]
    pairs = pair([picture.path for picture in pictures], labels, names)
    sidecars = {place: files[path] for place, path in pairs.of.items()}
    named = (file for file in files.values() if posixpath.basename(file.path) == "dataset.json")
    dataset_json = [file for file in named if not file.is_hidden and _is_above(file, pictures)]
    known = {file.path for file in (*pictures, *sidecars.values(), *dataset_json)}
    ignored = _counted(_kind(file, file.path in parts) for file in files.values() if file.path not in known)
    if not pictures:
        there = f"; it has {told(ignored)}" if ignored else ""
        raise UsageError(
            f"{printable(sources[0])} holds no pictures (known are {' '.join(sorted(PICTURES))}){there}: check the path"
        )
    return Listing(pictures, dataset_json, sidecars, pairs.contested, ignored, tuple(notes))


def _by_path(found: list[File], notes: list[str]) -> dict[str, File]:
    """Files by their paths. Paths are normalised to Unicode form NFC, so that names that look the same are equal,
    whichever system wrote them. Of members with the same name the last one counts, as when extracting."""
    given: dict[str, File] = {}
    replaced = [file.path for file in found if given.setdefault(file.path, file) is not file]
    given |= {file.path: file for file in found}
    if replaced:
        notes.append(
            f"members that a later one of the same name replaces, as when extracting: {len(replaced)}, the first "
            f"{printable(replaced[0])}"
        )
    files: dict[str, File] = {}
    for path, file in given.items():
        composed = path if path.isascii() else unicodedata.normalize("NFC", path)
        if composed != path and composed not in given and composed not in files:
            file = file._replace(path=composed, inner=unicodedata.normalize("NFC", file.inner))
        files[file.path] = file
    return files


def _kind(file: File, is_part: bool) -> str:
    """The kind under which a file that is neither a picture nor a label is counted: its suffix, with advice."""
    name = posixpath.basename(file.path)
    if is_part:
        return f".{name.partition('.')[2]} (parts of samples)"
    if file.is_hidden:
        return f"hidden {file.suffix}" if file.suffix in PICTURES else file.suffix or name
    if file.suffix in _OTHER_PICTURES:
        return f"{file.suffix} ({_OTHER_PICTURES[file.suffix]})"
    if file.suffix in _ARCHIVES:
        return f"{file.suffix} (archives within SOURCE, whose pictures are not read: unpack them, or pack them alone)"
    if file.suffix == ".cls":
        return ".cls without a picture of its own"
    if file.suffix == ".csv":
        return ".csv (not read by itself: where it holds labels, give it to --labels)"
    return file.suffix or (f"{name}, which {file.fault}" if file.fault else name)


def _counted(kinds: Iterable[str]) -> dict[str, int]:
    counts = Counter(map(printable, kinds)).most_common()
    shown = dict(sorted(counts[:_MOST_KINDS]))
    others = sum(count for _, count in counts[_MOST_KINDS:])
    return shown | ({"of other kinds": others} if others else {})


def normal_path(text: str) -> str:
    """Convert a path within SOURCE, as users and other systems may write it, to the form in the listing."""
    return posixpath.normpath(unicodedata.normalize("NFC", text.replace("\\", "/")))


def told(ignored: dict[str, int]) -> str:
    """The counts of `Listing.ignored` as a part of a sentence."""
    return ", ".join(f"{count} {kind}" for kind, count in ignored.items())


def _is_above(file: File, pictures: list[File]) -> bool:
    """Whether any of the pictures, which are sorted by path, lies at or below a file's folder."""
    folder = file.path[: -len(posixpath.basename(file.path))]
    place = bisect.bisect_left(pictures, folder, key=lambda picture: picture.path)
    return place < len(pictures) and pictures[place].path.startswith(folder)
