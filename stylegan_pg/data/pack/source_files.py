"""The files of a folder, a zip or tars, as packing lists and reads them."""

import errno
import os
import posixpath
import stat
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.data.storage import tars, zips
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import MAX_JSON_BYTES, printable

# fmt: off
PICTURES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm",
    ".tga", ".jp2", ".avif",
})
# fmt: on
BROKEN_LINK = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
CONTINUES = "run the same command again: it continues where this one ended"
_LEFT = frozenset({"@eaDir", "$RECYCLE.BIN"})  # thumbnails of Synology's storage, and what Windows has deleted
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
        most = _MOST_BYTES if self.is_picture else MAX_JSON_BYTES
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


def stamp_of(there: os.stat_result) -> str:
    """The times of the last change; they differ for a rewritten file, even if its modification time was restored."""
    return f"{there.st_mtime_ns} {there.st_ctime_ns}"


def folder_id(folder: str) -> str:
    """An identifier that differs for another folder at the same path, such as a mount point without its disk."""
    there = os.stat(folder)
    return f"{there.st_dev} {there.st_ino}"


def named_apart(sources: list[Path]) -> list[tuple[Path, str]]:
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


def files_in(source: Path, notes: list[str]) -> tuple[list[File], bool]:
    """The files of one folder, zip or tar, and whether they are members of tars."""
    if source.is_dir():
        files = _folder_files(source, notes)
        found = [file for file in files if file.suffix == ".tar" and not file.is_hidden]
        if found and not any(file.is_picture for file in files):
            members = [member for tar in found for member in tar_files(Path(tar.container), notes, tar.path + "/")]
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
    return tar_files(source, notes), True


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


def tar_files(path: Path, notes: list[str], prefix: str = "") -> list[File]:
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
