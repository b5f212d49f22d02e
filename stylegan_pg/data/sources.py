"""What SOURCE holds: the pictures of a folder, a zip or tars in sample order, and the files that may label them."""

import contextlib
import functools
import os
import posixpath
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.errors import UsageError

# fmt: off
PICTURES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".avif",
})
# fmt: on
_MAX_BYTES = 1 << 30  # of one encoded picture; what is larger is a mistake or a bomb


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
    labels = {key_of(file.path): file for file in others if file.suffix == ".cls"}
    dataset_json = files.get("dataset.json")
    ignored = Counter(
        file.suffix or posixpath.basename(file.path)
        for file in others
        if file is not dataset_json and labels.get(key_of(file.path)) is not file
    )
    return Listing(pictures, dataset_json, labels, dict(sorted(ignored.items())))


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


def few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
