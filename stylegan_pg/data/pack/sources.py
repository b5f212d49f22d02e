"""Listing of SOURCE: the pictures of a folder, a zip or tars in sample order, the files that may label them, and counts
of all other files."""

import bisect
import errno
import os
import posixpath
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.data.datasets.sample_names import pair, read_names
from stylegan_pg.data.storage import patterns, tars, zips
from stylegan_pg.data.storage.remote import is_remote
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import MOST_JSON_BYTES, printable

# fmt: off
PICTURES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".avif",
})
# fmt: on
# Pictures of kinds that are not read, and what turns them into others.
_OTHER_PICTURES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "convert them to PNG or JPEG, for example with pillow-heif"),
    ".jxl": "convert them to PNG or JPEG, for example with pillow-jxl-plugin",
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"), "develop them to PNG or TIFF"),
    **dict.fromkeys((".psd", ".svg", ".eps", ".exr", ".hdr", ".xcf"), "export them as PNG"),
}
_ARCHIVES = frozenset({".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"})
_LEFT = frozenset({"@eaDir", "$RECYCLE.BIN"})  # thumbnails of Synology's storage, and what Windows has deleted
_LABELS = (".cls", ".json")  # of the picture with the same key
_MOST_KINDS = 20  # of ignored files, that are told apart
BROKEN_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
CONTINUES = "run the same command again: it continues where this one ended"
_MOST_BYTES = 3 << 27  # of one encoded picture; what is larger is a mistake or a bomb


class File(NamedTuple):
    """A file in SOURCE: the part of `container` from byte `member` on, or the zip member of that name."""

    path: str  # within SOURCE, parts joined by "/"
    inner: str  # the same within its tar, where SOURCE is several tars
    container: str
    member: int | str
    size: int
    stamp: str = ""  # with the size, tells versions of its content apart; empty where it could not be seen
    folder: str | None = None  # where it is no member of an archive: which folder holds it; empty if that is unknown
    fault: str = ""  # why it cannot be read at all

    def read(self) -> bytes:
        """The content. Raises ValueError if the file itself is the cause, OSError if it cannot be read at the
        moment."""
        most = _MOST_BYTES if self.is_picture else MOST_JSON_BYTES
        if self.fault:
            raise ValueError(self.fault)
        if self.size > most:
            raise ValueError(f"has {self.size} bytes, more than {most}")
        if isinstance(self.member, str):
            return zips.content_of(self.container, self.member)
        with open(self.container, "rb") as file:
            now = self.size if self.folder is None else os.fstat(file.fileno()).st_size  # it may be written just now
            if now > most:
                raise ValueError(f"has {now} bytes, more than {most}")
            file.seek(self.member)
            data = file.read(now)
        if len(data) < now:
            raise OSError(errno.EIO, "it ended before the size that it was listed with", self.container)
        return data

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.path)[1].lower()

    @property
    def is_hidden(self) -> bool:
        """Whether it is a leftover of an operating system, such as "._x.jpg" beside x.jpg (in zips below __MACOSX)."""
        parts = self.path.split("/")
        return any(part.startswith((".", "__MACOSX")) and part != ".." for part in parts) or not _LEFT.isdisjoint(parts)

    @property
    def is_picture(self) -> bool:
        return self.suffix in PICTURES and not self.is_hidden


class Listing(NamedTuple):
    """The files of SOURCE. `ignored` counts files that are neither pictures nor labels, by kind; `notes` are sentences
    about how SOURCE was interpreted."""

    pictures: list[File]  # in sample order
    dataset_json: list[File]  # those with pictures at or below their folders
    sidecars: dict[tuple[str, str], File]  # path of a picture and suffix (.cls, .json) -> the file beside it
    contested: dict[tuple[str, str], tuple[str, str]]  # the same -> paths of a file and of another picture that it fits
    ignored: dict[str, int]
    notes: tuple[str, ...]

    def beside(self, picture: File, suffix: str) -> File | None:
        """The file with this suffix (".cls" or ".json") that belongs to a picture.

        Raises:
            UsageError: it would belong to two pictures.
        """
        place = picture.path, suffix
        if place not in self.sidecars and place in self.contested:
            file, other = map(printable, self.contested[place])
            raise UsageError(
                f"{file} would label both {printable(picture.path)} and {other}: give each a label with its own name "
                f"({printable(posixpath.basename(picture.path))}{suffix}), rename one of them, or give --labels none"
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
        found, in_tars = _files(sources[0], notes)
    else:
        found, in_tars = [file for path, name in _named(sources) for file in _tar_files(path, notes, name)], True
    files = _by_path(found, notes)
    paths = [path for path, file in files.items() if not file.is_hidden]
    names = read_names(paths, PICTURES, webdataset=in_tars)
    if names.note:
        notes.append(names.note)
    split = {path: names.split(path) for path, file in sorted(files.items()) if file.is_picture}
    whole = {key for key, extension in split.values() if "." not in extension}
    parts = {path for path, (key, extension) in split.items() if "." in extension and key in whole}
    pictures = [files[path] for path in split if path not in parts]
    labels = [path for path, file in files.items() if file.suffix in _LABELS and not file.is_hidden]
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


def stamp_of(there: os.stat_result) -> str:
    """The times of the last change; they differ for a rewritten file, even if its modification time was restored."""
    return f"{there.st_mtime_ns} {there.st_ctime_ns}"


def folder_id(folder: str) -> str:
    """An identifier that differs for another folder at the same path, such as a mount point without its disk."""
    there = os.stat(folder)
    return f"{there.st_dev} {there.st_ino}"


def _named(sources: list[Path]) -> list[tuple[Path, str]]:
    """Several tars, each with a unique name, with which the paths of its members begin."""
    if not sources:
        raise UsageError("SOURCE as a list must hold at least one tar")
    for path in sources:
        if path.is_dir():
            raise UsageError(
                f"{printable(path)} is a folder: several of SOURCE must all be tars; give one folder, or tars"
            )
    names = [path.name for path in sources]
    if len(set(names)) < len(names):
        real = [os.path.abspath(path) for path in sources]
        names = [os.path.relpath(path, os.path.commonpath(real)).replace(os.sep, "/") for path in real]
    if len(set(names)) < len(names):
        twice = next(path for path, name in zip(sources, names, strict=True) if names.count(name) > 1)
        raise UsageError(f"SOURCE names {printable(twice)} twice: name each tar once")
    return [(path, f"{name}/") for path, name in zip(sources, names, strict=True)]


def _files(source: Path, notes: list[str]) -> tuple[list[File], bool]:
    """The files of one folder, zip or tar, and whether they are members of tars."""
    if source.is_dir():
        files = _folder_files(source, notes)
        found = [file for file in files if file.suffix == ".tar" and not file.is_hidden]
        if found and not any(file.is_picture for file in files):
            members = [member for tar in found for member in _tar_files(Path(tar.container), notes, tar.path + "/")]
            return members + [file for file in files if file.is_hidden or file.suffix != ".tar"], True
        return files, False
    if not source.exists():
        raise UsageError(f"{printable(source)}: no such folder, zip or tar; check the path of SOURCE")
    if not source.is_file():
        raise UsageError(
            f"{printable(source)} is a device or a pipe: write what comes out of it into a file, and pack that"
        )
    try:
        with open(source, "rb") as file:
            head = file.read(tars.BLOCK)
        if not tars.is_tar(head) and zips.is_zip(source):
            return [
                File(one.name, one.name, str(source), one.raw, one.size, f"{one.crc:08x}", fault=one.fault)
                for one in zips.members_of(source)
            ], False
    except OSError as error:
        raise RunError(f"{printable(source)} cannot be read ({error.strerror}). When it can, {CONTINUES}") from error
    if head.startswith(b"PK\x03\x04"):
        raise UsageError(f"{printable(source)} is a zip that lacks its end: fetch it again")
    if not tars.is_tar(head) and any(head):
        raise UsageError(
            f"{printable(source)} is neither a folder, nor a zip, nor an uncompressed tar: unpack .tar.gz and the like "
            "first, fetch a damaged file again"
        )
    return _tar_files(source, notes), True


def _folder_files(root: Path, notes: list[str]) -> list[File]:
    """All files below a folder. A link to a folder is followed only if its target is not read under its own name."""

    def refuse(error: OSError):
        raise RunError(f"{error.filename} cannot be listed ({error.strerror}). When it can, {CONTINUES}") from error

    found: list[File] = []
    seen: dict[str, str] = {}  # folders by their real paths -> where they were read
    waiting = [str(root)]
    for top in waiting:
        for folder, subfolders, names in os.walk(top, onerror=refuse):
            real, within = os.path.realpath(folder), os.path.relpath(folder, root)
            if real in seen:
                subfolders.clear()
                notes.append(f"{printable(within)} leads to the folder {printable(seen[real])}, which is read once")
                continue
            seen[real] = within
            waiting += sorted(link for name in subfolders if os.path.islink(link := os.path.join(folder, name)))
            this = folder_id(folder)
            found += (_folder_file(root, Path(folder, name), this, refuse) for name in sorted(names))
    return found


def _folder_file(root: Path, file: Path, folder: str, refuse) -> File:
    path = file.relative_to(root).as_posix()
    try:
        there = file.stat()
        holder = folder_id(os.path.dirname(os.path.realpath(file))) if file.is_symlink() else folder
    except OSError as error:
        if error.errno not in BROKEN_LINK:
            refuse(error)
        return File(path, path, str(file), 0, 0, folder="")  # it is found unreadable later
    fault = "" if stat.S_ISREG(there.st_mode) else "is a device, a socket or a named pipe, which holds no picture"
    return File(path, path, str(file), 0, there.st_size, stamp_of(there), holder, fault)


def _tar_files(path: Path, notes: list[str], prefix: str = "") -> list[File]:
    try:
        there = path.stat()
        if not stat.S_ISREG(there.st_mode):
            raise UsageError(f"{printable(path)} is no file")
        with open(path, "rb") as file:
            members = tars.members_of(file, printable(path))
    except FileNotFoundError:
        raise UsageError(f"{printable(path)}: no such tar; check the path of SOURCE") from None
    except OSError as error:
        raise RunError(f"{printable(path)} cannot be read ({error.strerror}). When it can, {CONTINUES}") from error
    names = [posixpath.normpath(member.name.lstrip("/")) for member in members]
    # Several tars joined into one file are several tars, if there are members of the same names in them.
    apart = len(set(names)) < len({(member.part, name) for member, name in zip(members, names, strict=True)})
    if apart:
        notes.append(f"{printable(path)} is several tars in one, with equal names in them: paths begin with 1/, 2/ ...")
    return [
        File(
            f"{prefix}{member.part + 1}/{name}" if apart else prefix + name,
            name,
            str(path),
            member.offset,
            member.size,
            stamp_of(there),
            fault=member.fault,
        )
        for member, name in zip(members, names, strict=True)
    ]


def few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
