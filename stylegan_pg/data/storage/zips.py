"""Reading zip archives safely: members are listed from the directory alone, and unpacked one by one within limits."""

from __future__ import annotations

import contextlib
import errno
import functools
import lzma
import posixpath
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

MOST_MEMBERS = 2_000_000
_ENTRY = 46  # bytes that each member takes in the directory, at least
_END, _END64 = b"PK\x05\x06", b"PK\x06\x07"
_UTF8 = 0x800  # the flag of a name in UTF-8
_UNICODE_PATH = 0x7075  # the extra field of Info-ZIP
_MOST_RATIO = 1100  # no more comes out of deflated bytes; more in all means that members overlap
_MARGIN = 1 << 30  # bytes that may come out of a zip at any rate
_LARGE, _BOMB_RATIO = 1 << 26, 200  # a member of so many bytes that takes so many times less in the zip is no picture
# The exceptions that zipfile raises for damaged directories and members.
_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    LookupError,
    OverflowError,
    RuntimeError,
)


class ZipMember(NamedTuple):
    """A file in a zip: `raw` is its name in the archive, `name` its decoded path, `fault` as in tars.Member."""

    name: str
    raw: str
    size: int
    crc: int
    fault: str = ""


def is_zip(path: Path) -> bool:
    """Whether a file ends like a zip archive. Raises OSError."""
    with open(path, "rb") as file:
        return zipfile.is_zipfile(file)


def members_of(path: Path) -> list[ZipMember]:
    """The members of a zip except folders, in the order of its directory.

    Raises:
        UsageError: the directory is damaged or has too many entries, or members overlap, as in zip bombs.
        OSError: the file cannot be read.
    """
    if (most := _directory_bytes(path) // _ENTRY) > MOST_MEMBERS:
        raise UsageError(
            f"{printable(path)} has a directory of up to {most} members, more than {MOST_MEMBERS}: "
            "unpack it into a folder, or split it"
        )
    try:
        with _damage(), zipfile.ZipFile(path) as archive:
            found = [_member(info) for info in archive.infolist() if not info.is_dir()]
    except Damaged as error:
        raise UsageError(f"{printable(path)} is not a zip that can be read ({error}): fetch it again") from None
    total, there = sum(member.size for member in found), path.stat().st_size
    if total > _MOST_RATIO * there + _MARGIN:
        raise UsageError(
            f"{printable(path)} has {there} bytes and says that {total} come out of it: members overlap or their sizes "
            "are wrong; make the zip again"
        )
    return found


class Damaged(ValueError):  # noqa: N818 - what it is
    """A member or a directory that cannot be read; the message says why."""


@functools.lru_cache(maxsize=4)
def open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def content_of(path: str, raw: str) -> bytes:
    """The content of a member, at most as long as the directory says.

    Raises:
        Damaged: the member cannot be unpacked. OSError: the zip cannot be read.
    """
    with _damage():
        return open_zip(path).read(raw)


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise Damaged(printable(error) or type(error).__name__) from None
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a garbled place within the file, garbled bzip2 data
            raise Damaged(printable(error)) from None
        raise


def _member(info: zipfile.ZipInfo) -> ZipMember:
    name = posixpath.normpath(_name_of(info).replace("\\", "/").lstrip("/"))
    mode, unix = info.external_attr >> 16, info.create_system == 3
    fault = ""
    if unix and stat.S_ISLNK(mode):
        fault = "is a symbolic link: make the zip with the files themselves, or pack the folder"
    elif info.file_size > max(_LARGE, _BOMB_RATIO * info.compress_size):
        fault = f"is made of {info.compress_size} bytes and would unpack to {info.file_size}, as bombs do"
    elif info.flag_bits & 1:
        fault = "is encrypted: make the zip again without a password"
    return ZipMember(name, info.filename, info.file_size, info.CRC, fault)


def _name_of(info: zipfile.ZipInfo) -> str:
    """A member's name. Without the UTF-8 flag it should be in the code page of DOS, but macOS writes UTF-8 anyway,
    and Info-ZIP stores the name in UTF-8 in an extra field."""
    if info.flag_bits & _UTF8 or info.filename.isascii():
        return info.filename
    raw = info.orig_filename.encode("cp437")
    beside = _extra_of(info, _UNICODE_PATH)
    if beside[:5] == b"\1" + zlib.crc32(raw).to_bytes(4, "little"):
        raw = beside[5:]
    try:
        return raw.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        return info.filename


def _extra_of(info: zipfile.ZipInfo, wanted: int) -> bytes:
    """The content of a member's extra field, b"" if it has none."""
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == wanted:
            return extra[4 : 4 + size]
        extra = extra[4 + size :]
    return b""


def _directory_bytes(path: Path) -> int:
    """The size of the directory as the end record states it, 0 if that is damaged (zipfile reports it then)."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 16) - 22 - 20))
        tail = file.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) < place + 22:
            return 0
        said = int.from_bytes(tail[place + 12 : place + 16], "little")
        locator = tail[max(0, place - 20) : place]
        if said == 0xFFFFFFFF and locator[:4] == _END64:
            file.seek(min(size, int.from_bytes(locator[8:16], "little")))
            said = int.from_bytes(file.read(56)[40:48], "little")
        return min(said, size)
