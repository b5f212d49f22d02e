"""What SOURCE holds: the pictures of a folder, a zip or tars in sample order, and the files that may label them."""

import errno
import functools
import os
import posixpath
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.errors import RunError, UsageError

# fmt: off
PICTURES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".avif",
})
# fmt: on
BROKEN_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
CONTINUES = "run the same command again: it continues where this one ended"
_MAX_BYTES = 1 << 30  # of one encoded picture; what is larger is a mistake or a bomb


class File(NamedTuple):
    """A file in SOURCE: in `container`, from byte `member`, or as the zip member of that name."""

    path: str  # within SOURCE, parts joined by "/"
    inner: str  # the same within its tar, where SOURCE is several tars
    container: str
    member: int | str
    size: int
    stamp: str = ""  # with the size, tells versions of its content apart; empty where it could not be seen
    folder: str | None = None  # where it is no member of an archive: which folder holds it; empty if that is unknown

    def read(self) -> bytes:
        if self.size > _MAX_BYTES:
            raise ValueError(f"has {self.size} bytes, more than {_MAX_BYTES}")
        if isinstance(self.member, str):
            return open_zip(self.container).read(self.member)
        with open(self.container, "rb") as file:
            file.seek(self.member)
            data = file.read(self.size)
        if len(data) < self.size and self.folder is None:
            raise OSError(errno.EIO, "it has become shorter since it was listed", self.container)
        return data

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
    labels = {key_of(file.path): file for file in others if file.suffix == ".cls"}
    dataset_json = files.get("dataset.json")
    ignored = Counter(
        file.suffix or posixpath.basename(file.path)
        for file in others
        if file is not dataset_json and labels.get(key_of(file.path)) is not file
    )
    return Listing(pictures, dataset_json, labels, dict(sorted(ignored.items())))


def stamp_of(there: os.stat_result) -> str:
    """Times of the last change: a file that is written again gets another, also where its old time is put back."""
    return f"{there.st_mtime_ns} {there.st_ctime_ns}"


def folder_id(folder: str) -> str:
    """Another one for another folder at the same place, such as a mount point without its disk."""
    there = os.stat(folder)
    return f"{there.st_dev} {there.st_ino}"


def key_of(path: str) -> str:
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
        raise RunError(f"{error.filename} cannot be listed ({error.strerror}). When it can, {CONTINUES}") from error

    seen = set()  # links to folders are followed, in circles only once
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        subfolders.sort()
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        this = folder_id(folder)
        for name in names:
            file = Path(folder, name)
            path = file.relative_to(root).as_posix()
            try:
                there = file.stat()
                holder = folder_id(os.path.dirname(os.path.realpath(file))) if file.is_symlink() else this
            except OSError as error:
                if error.errno not in BROKEN_LINK:
                    refuse(error)
                yield File(path, path, str(file), 0, 0, folder="")  # it is found unreadable later
                continue
            yield File(path, path, str(file), 0, there.st_size, stamp_of(there), holder)


def _zip_files(path: Path) -> Iterator[File]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a zip that can be read ({error}): fetch it again") from error
    for member in members:
        if not member.is_dir():
            name = posixpath.normpath(member.filename.replace("\\", "/"))
            yield File(name, name, str(path), member.filename, member.file_size, f"{member.CRC:08x}")


def _tar_files(path: Path, prefix: str = "") -> Iterator[File]:
    try:
        stamp = stamp_of(path.stat())
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg():
                    name = posixpath.normpath(member.name)
                    yield File(prefix + name, name, str(path), member.offset_data, member.size, stamp)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(
            f"{path} is neither a folder, nor a zip, nor an uncompressed tar that can be read to its end ({error}): "
            "unpack .tar.gz and the like first, fetch a truncated file again"
        ) from error


def few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
