"""Safe reading of zip archives. Members are listed from the directory only, and are unpacked one by one within
limits."""

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

MAX_MEMBERS = 2_000_000
_ENTRY = 46  # the smallest number of bytes of a member's entry in the directory
_END, _END64 = b"PK\x05\x06", b"PK\x06\x07"
_UTF8 = 0x800  # the flag that a name is in UTF-8
_UNICODE_PATH = 0x7075  # the extra field in which Info-ZIP stores a UTF-8 name
_MAX_RATIO = 1100  # deflate cannot compress more than this; a larger total ratio means that members overlap
_MARGIN = 1 << 30  # bytes of unpacked content that are always accepted
_LARGE, _BOMB_RATIO = 1 << 26, 200  # a member with more bytes and a higher compression ratio is not a picture
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
    """A file in a zip.

    Attributes:
        name: The decoded path.
        raw: The name in the archive.
        size: The number of bytes of the content.
        crc: The CRC-32 of the content.
        fault: As in tars.Member.
    """

    name: str
    raw: str
    size: int
    crc: int
    fault: str = ""


def is_zip(path: Path) -> bool:
    """Return whether a file has the end record of a zip archive. Raises OSError if it cannot be read."""
    with open(path, "rb") as file:
        return zipfile.is_zipfile(file)


def members_of(path: Path) -> list[ZipMember]:
    """Return the members of a zip except folders, in the order of its directory.

    Raises:
        UsageError: if the directory is damaged or has too many entries, or members overlap, as in zip bombs.
        OSError: if the file cannot be read.
    """
    if (most := _directory_bytes(path) // _ENTRY) > MAX_MEMBERS:
        raise UsageError(
            f"{printable(path)} has a directory of up to {most} members, more than {MAX_MEMBERS}: "
            "unpack it into a folder, or split it"
        )
    try:
        with _damage(), zipfile.ZipFile(path) as archive:
            found = [_member(info) for info in archive.infolist() if not info.is_dir()]
    except Damaged as error:
        raise UsageError(f"{printable(path)} is not a readable zip ({error}): download it again") from None
    total, there = sum(member.size for member in found), path.stat().st_size
    if total > _MAX_RATIO * there + _MARGIN:
        raise UsageError(
            f"{printable(path)} has {there} bytes, but its members have {total} bytes according to its directory: "
            "members overlap or their sizes are wrong; create the zip again"
        )
    return found


class Damaged(ValueError):  # noqa: N818 - it names what is wrong
    """A member or a directory cannot be read. The message states the reason."""


@functools.lru_cache(maxsize=4)
def open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def content_of(path: str, raw: str) -> bytes:
    """Return the content of a member. It has at most as many bytes as the directory states.

    Raises:
        Damaged: if the member cannot be unpacked.
        OSError: if the zip cannot be read.
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
        if error.errno in (None, errno.EINVAL):  # an invalid offset, or invalid bzip2 data
            raise Damaged(printable(error)) from None
        raise


def _member(info: zipfile.ZipInfo) -> ZipMember:
    name = posixpath.normpath(_name_of(info).replace("\\", "/").lstrip("/"))
    mode, unix = info.external_attr >> 16, info.create_system == 3
    fault = ""
    if unix and stat.S_ISLNK(mode):
        fault = "is a symbolic link: create the zip with the files themselves, or pack the folder"
    elif info.file_size > max(_LARGE, _BOMB_RATIO * info.compress_size):
        fault = f"has {info.compress_size} bytes and would unpack to {info.file_size}, as zip bombs do"
    elif info.flag_bits & 1:
        fault = "is encrypted: create the zip again without a password"
    return ZipMember(name, info.filename, info.file_size, info.CRC, fault)


def _name_of(info: zipfile.ZipInfo) -> str:
    """Return the name of a member. Without the UTF-8 flag, names should be in the code page of DOS, but macOS writes
    UTF-8 nevertheless, and Info-ZIP stores a UTF-8 name in an extra field."""
    if info.flag_bits & _UTF8 or info.filename.isascii():
        return info.filename
    raw = info.orig_filename.encode("cp437")
    field = _extra_of(info, _UNICODE_PATH)
    if field[:5] == b"\1" + zlib.crc32(raw).to_bytes(4, "little"):
        raw = field[5:]
    try:
        return raw.partition(b"\0")[0].decode()
    except UnicodeDecodeError:
        return info.filename


def _extra_of(info: zipfile.ZipInfo, wanted: int) -> bytes:
    """Return the content of a member's extra field, or b"" if it has none."""
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == wanted:
            return extra[4 : 4 + size]
        extra = extra[4 + size :]
    return b""


def _directory_bytes(path: Path) -> int:
    """Return the size of the directory that the end record states, or 0 if the record is damaged; zipfile then reports
    the damage."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 16) - 22 - 20))
        tail = file.read()
        place = tail.rfind(_END)
        if place < 0 or len(tail) < place + 22:
            return 0
        stated = int.from_bytes(tail[place + 12 : place + 16], "little")
        locator = tail[max(0, place - 20) : place]
        if stated == 0xFFFFFFFF and locator[:4] == _END64:
            file.seek(min(size, int.from_bytes(locator[8:16], "little")))
            stated = int.from_bytes(file.read(56)[40:48], "little")
        return min(stated, size)
