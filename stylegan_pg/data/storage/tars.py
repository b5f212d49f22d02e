"""A strict reader of tar archives. Damage is an error that states its position, and nothing is skipped silently.

Every header is checked against the size of the file. A tar is read in one forward pass, and only the names of its
members are kept in memory. Members that follow the end mark (`cat a.tar b.tar`) are read as well, as with tar's option
--ignore-zeros.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import tarfile
from typing import IO, NamedTuple, NoReturn

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 5_000_000  # members of one archive
_MAX_EXTENSION = 1 << 20  # bytes of an extension header: a long name, or pax records
_MAX_EXTENSIONS = 16  # consecutive extension headers before one member
_MAX_LINKS = 40  # symbolic links in a chain; the Linux kernel has the same limit
_REMEDY = "download it again, or create it again"
_PAX = re.compile(rb"(\d{1,10}) ([^=]{1,1000})=")
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_FOLDER_LISTING = b"D"  # the type of a folder in GNU's incremental backups
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: The path in the tar.
        offset, size: The position and number of bytes of the content.
        part: The index of the tar among several tars that are concatenated in one file.
        fault: Why the content cannot be read, or "". It completes a sentence that begins with the member's name.
    """

    name: str
    offset: int
    size: int
    part: int = 0
    fault: str = ""


def members_of(file: IO[bytes], named: str) -> list[Member]:
    """Return the members of a tar (v7, ustar, GNU, pax) except folders, in order. Links are resolved to their targets.

    Args:
        file: A file on disk.
        named: The name of the file in messages.

    Raises:
        UsageError: if the file is not a tar, or is damaged or truncated. The message states the position in bytes.
    """
    return _Reader(file.fileno(), named).members()


def is_tar(head: bytes) -> bool:
    """Return whether a file whose first bytes are `head` (at least BLOCK bytes) is an uncompressed tar."""
    return len(head) >= BLOCK and _parsed(head[:BLOCK]) is not None


def content_of(file: IO[bytes], member: Member) -> bytes:
    """Return the bytes of a member, or fewer if the file has been truncated since it was listed."""
    return os.pread(file.fileno(), member.size, member.offset)


class _Damaged(ValueError):  # noqa: N818 - it names what is wrong
    """A header is damaged. The text of the exception becomes a part of a UsageError's message."""


class _Reader:
    """One pass over the headers of a tar."""

    def __init__(self, fd: int, named: str):
        self.fd, self.named = fd, named
        self.size = os.fstat(fd).st_size
        self.last = ""  # the name of the last complete member
        self.found: list[Member] = []
        self.links: dict[int, str] = {}  # {index in `found` of a symbolic link: its target}
        self.next_fields: dict[str, str] = {}  # fields of the next member, from extension headers
        self.global_fields: dict[str, str] = {}  # fields of all following members, from pax's global headers
        self.extensions = 0

    def members(self) -> list[Member]:
        at = part = 0
        seen: dict[str, Member] = {}  # possible targets of hard links
        while True:
            block = os.pread(self.fd, BLOCK, at)
            if len(block) < BLOCK:
                self._raise_truncated(at)
            if any(block):
                try:
                    at = self._member(block, at, part, seen)
                except _Damaged as reason:
                    self._raise_damaged(at, str(reason))
                continue
            if self.next_fields:
                self._raise_damaged(at, "there are zeros instead of a member's header")
            following = _skip_zeros(self.fd, at, self.size)
            if following >= self.size:
                break
            if following - at < 2 * BLOCK or _parsed(os.pread(self.fd, BLOCK, following)) is None:
                self._raise_damaged(at, f"there are zeros, and the data after them at byte {following} is not a tar")
            at, part = following, part + 1
            self.global_fields = {}
        return self._resolve_links()

    def _member(self, block: bytes, at: int, part: int, seen: dict[str, Member]) -> int:
        """Read one header and return the position of the next one."""
        info = _parsed(block)
        if info is None:
            if not at:
                raise UsageError(
                    f"{self.named} is not an uncompressed tar (it does not begin with a tar header): decompress "
                    ".tar.gz and similar files first, or download it again"
                )
            raise _Damaged("the data is not a tar header")
        body = at + BLOCK
        if info.type in _LONG or info.type in _PAX_TYPES:
            return self._extension(info, body)
        extra, self.next_fields, self.extensions = self.global_fields | self.next_fields, {}, 0
        name = extra.get("GNU.sparse.name") or extra.get("path") or info.name
        size = self._size(extra.get("size", info.size)) if _has_content(info) else 0
        if info.type == tarfile.GNUTYPE_SPARSE:
            body = self._skip_sparse_map(block, body)
        end = body + _padded(size)
        if end > self.size:
            self._raise_truncated(at, f" and has {size} bytes according to its header")
        self.last = name
        if info.isdir() or info.type == _FOLDER_LISTING:
            return end
        if len(self.found) == MAX_MEMBERS:
            raise UsageError(f"{self.named} has more than {MAX_MEMBERS} members: split it into several tars")
        member = Member(name, body, size, part, _fault(info, extra))
        if info.islnk():
            target = extra.get("linkpath") or info.linkname
            there = seen.get(target)
            if there is None:
                there = Member(name, 0, 0, part, f"is a hard link to {printable(target)}, which does not precede it")
            member = there._replace(name=name, part=part)
        elif info.issym():
            target = extra.get("linkpath") or info.linkname
            self.links[len(self.found)] = target
            member = member._replace(fault=f"is a link to {printable(target)}, which is not a file in the tar")
        seen[name] = member
        self.found.append(member)
        return end

    def _extension(self, info: tarfile.TarInfo, body: int) -> int:
        """Read an extension header, which describes following members, and return the position of the next header."""
        size = self._size(info.size)
        self.extensions += 1
        if size > _MAX_EXTENSION or self.extensions > _MAX_EXTENSIONS:
            raise _Damaged("the extension headers before the next member are too long")
        if body + _padded(size) > self.size:
            self._raise_truncated(body - BLOCK)
        content = os.pread(self.fd, size, body)
        if info.type in _LONG:
            text = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            self.next_fields[_LONG[info.type]] = text.rstrip("/") or text
        elif info.type == tarfile.XGLTYPE:
            self.global_fields |= _pax(content)
        else:
            self.next_fields |= _pax(content)
        return body + _padded(size)

    def _size(self, text: int | str) -> int:
        if isinstance(text, str) and not re.fullmatch(r"[0-9]{1,19}", text):
            raise _Damaged(f"its size is {printable(text, 40)}")
        if int(text) < 0:
            raise _Damaged(f"its size is {text}")
        return int(text)

    def _skip_sparse_map(self, block: bytes, body: int) -> int:
        """Return the position after the blocks that continue the map of a sparse file in GNU's format."""
        more = block[482]
        while more:
            block = os.pread(self.fd, BLOCK, body)
            if len(block) < BLOCK:
                self._raise_truncated(body)
            more, body = block[504], body + BLOCK
        return body

    def _resolve_links(self) -> list[Member]:
        """Return all members, with symbolic links resolved."""
        if not self.links:
            return self.found
        places = {posixpath.normpath(member.name): place for place, member in enumerate(self.found)}
        found = list(self.found)
        for place in self.links:
            name, there, steps = self.found[place].name, place, 0
            while there in self.links and steps < _MAX_LINKS:
                folder = posixpath.dirname(self.found[there].name)
                there = places.get(posixpath.normpath(posixpath.join(folder, self.links[there])), -1)
                steps += 1
            if there >= 0 and there not in self.links:
                found[place] = self.found[there]._replace(name=name, part=self.found[place].part)
        return found

    def _raise_truncated(self, at: int, why: str = "") -> NoReturn:
        raise UsageError(
            f"{self.named} is truncated after {printable(self.last) or 'its beginning'}: the next member begins at "
            f"byte {at}{why}, and the file ends at byte {self.size}; {_REMEDY}"
        )

    def _raise_damaged(self, at: int, why: str) -> NoReturn:
        raise UsageError(
            f"{self.named} is damaged after {printable(self.last) or 'its beginning'}, at byte {at} ({why}): {_REMEDY}"
        )


def _parsed(block: bytes) -> tarfile.TarInfo | None:
    """Parse a header. Return None if its checksum is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    if block[257:265] == tarfile.GNU_MAGIC:  # GNU stores times in the field of ustar's path prefix
        info.name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape").rstrip("/")
    return info


def _has_content(info: tarfile.TarInfo) -> bool:
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def _fault(info: tarfile.TarInfo, extra: dict[str, str]) -> str:
    sparse = any(key.startswith(("GNU.sparse.", "SCHILY.realsize")) for key in extra)
    if sparse or info.type == tarfile.GNUTYPE_SPARSE:
        return "is a sparse file, as tar writes with --sparse: create the tar without that option"
    if info.isdev():
        return "is a device or a named pipe, which has no content"
    if not (info.isreg() or info.islnk() or info.issym()):
        return f"is a member of the type {printable(info.type.decode('latin-1'))!r}, which is not a file"
    return ""


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax(content: bytes) -> dict[str, str]:
    """Return {key: value} of the records ("LENGTH KEY=VALUE\\n") of a pax header that this module uses."""
    found, at = {}, 0
    while at < len(content) and content[at]:
        match = _PAX.match(content, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise _Damaged("its pax records are invalid")
        key = match[2].decode("utf-8", "surrogateescape")
        if key in ("path", "linkpath", "size") or key.startswith(("GNU.sparse.", "SCHILY.realsize")):
            value = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
            found[key] = value.rstrip("/") or value
        at = end
    return found


def _skip_zeros(fd: int, at: int, size: int) -> int:
    """Return the position of the first block from `at` on that contains a non-zero byte, or `size`. Holes of sparse
    files are skipped at once."""
    while at < size:
        try:
            at = max(at, os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is only a hole up to the end
                return size
        piece = os.pread(fd, 1 << 20, at)
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if not piece or zeros < len(piece):
            return at + zeros // BLOCK * BLOCK if piece else size
        at += len(piece)
    return size
