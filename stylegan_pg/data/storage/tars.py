"""A strict reader of tar archives: damage is an error with its position, and nothing is skipped silently.

Every header is checked against the size of the file. A tar of any content is read in one forward pass, with memory for
the names of its members only. If further members follow the end mark (`cat a.tar b.tar`), they are read, too, as by
tar's --ignore-zeros.
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
MOST_MEMBERS = 5_000_000  # of one archive
_MOST_EXTENSION = 1 << 20  # bytes of a long name or of pax records
_MOST_EXTENSIONS = 16  # such headers in a row, in front of one member
_MOST_LINKS = 40  # symbolic links in a chain, the limit of the Linux kernel
_REMEDY = "fetch it again, or write it again"
_PAX = re.compile(rb"(\d{1,10}) ([^=]{1,1000})=")
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_FOLDER_LISTING = b"D"  # a folder, in GNU's incremental backups
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A file in a tar: `size` bytes at `offset`; `part` is the index of the tar among those joined in the file.

    `fault` says why its content cannot be read, as the end of a sentence that begins with the member's name.
    """

    name: str
    offset: int
    size: int
    part: int = 0
    fault: str = ""


def members_of(file: IO[bytes], named: str) -> list[Member]:
    """The members of a tar (v7, ustar, GNU, pax) except folders, in order, with links resolved to their targets.

    Args:
        file: a file on disk.
        named: its name in messages.

    Raises:
        UsageError: it is not a tar, or is damaged or truncated; the message gives the position in bytes.
    """
    return _Walk(file.fileno(), named).members()


def is_tar(head: bytes) -> bool:
    """Whether a file that begins with these bytes (at least BLOCK of them) is an uncompressed tar."""
    return len(head) >= BLOCK and _parsed(head[:BLOCK]) is not None


def content_of(file: IO[bytes], member: Member) -> bytes:
    """The bytes of a member, fewer only if the file was shortened since."""
    return os.pread(file.fileno(), member.size, member.offset)


class _Damaged(ValueError):  # noqa: N818 - a reason, which becomes a message
    pass


class _Walk:
    def __init__(self, fd: int, named: str):
        self.fd, self.named = fd, named
        self.size = os.fstat(fd).st_size
        self.last = ""  # the last whole member
        self.found: list[Member] = []
        self.links: dict[int, str] = {}  # index in `found` of each symbolic link -> its target
        self.extra: dict[str, str] = {}  # fields that extension headers give the next member
        self.everywhere: dict[str, str] = {}  # fields that pax's global headers give all following members
        self.extensions = 0

    def members(self) -> list[Member]:
        at = part = 0
        seen: dict[str, Member] = {}  # possible targets of hard links
        while True:
            block = os.pread(self.fd, BLOCK, at)
            if len(block) < BLOCK:
                self._cut(at)
            if any(block):
                try:
                    at = self._member(block, at, part, seen)
                except _Damaged as reason:
                    self._broken(at, str(reason))
                continue
            if self.extra:
                self._broken(at, "zeros stand there, where a member's header should")
            following = _past_zeros(self.fd, at, self.size)
            if following >= self.size:
                break
            if following - at < 2 * BLOCK or _parsed(os.pread(self.fd, BLOCK, following)) is None:
                self._broken(at, f"zeros stand there, and what follows them at byte {following} is no further tar")
            at, part = following, part + 1
            self.everywhere = {}
        return self._linked()

    def _member(self, block: bytes, at: int, part: int, seen: dict[str, Member]) -> int:
        """Read one header and return the position of the next one."""
        info = _parsed(block)
        if info is None:
            if not at:
                raise UsageError(
                    f"{self.named} is no uncompressed tar (it begins with no header of one): unpack .tar.gz and the "
                    "like first, or fetch it again"
                )
            raise _Damaged("what stands there is no header of a tar")
        body = at + BLOCK
        if info.type in _LONG or info.type in _PAX_TYPES:
            return self._extension(info, body)
        extra, self.extra, self.extensions = self.everywhere | self.extra, {}, 0
        name = extra.get("GNU.sparse.name") or extra.get("path") or info.name
        size = self._size(extra.get("size", info.size)) if _has_content(info) else 0
        if info.type == tarfile.GNUTYPE_SPARSE:
            body = self._past_map(block, body)
        end = body + _padded(size)
        if end > self.size:
            self._cut(at, f" and says that it has {size} bytes")
        self.last = name
        if info.isdir() or info.type == _FOLDER_LISTING:
            return end
        if len(self.found) == MOST_MEMBERS:
            raise UsageError(f"{self.named} has more than {MOST_MEMBERS} members: split it into several tars")
        member = Member(name, body, size, part, _fault(info, extra))
        if info.islnk():
            target = extra.get("linkpath") or info.linkname
            there = seen.get(target)
            if there is None:
                there = Member(name, 0, 0, part, f"is a hard link to {printable(target)}, which is not in front of it")
            member = there._replace(name=name, part=part)
        elif info.issym():
            target = extra.get("linkpath") or info.linkname
            self.links[len(self.found)] = target
            member = member._replace(fault=f"is a link to {printable(target)}, which is no file in the tar")
        seen[name] = member
        self.found.append(member)
        return end

    def _extension(self, info: tarfile.TarInfo, body: int) -> int:
        """Read an extension header, which describes following members, and return the position of the next header."""
        size = self._size(info.size)
        self.extensions += 1
        if size > _MOST_EXTENSION or self.extensions > _MOST_EXTENSIONS:
            raise _Damaged("there is no end to what it tells about the next member's name")
        if body + _padded(size) > self.size:
            self._cut(body - BLOCK)
        content = os.pread(self.fd, size, body)
        if info.type in _LONG:
            text = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            self.extra[_LONG[info.type]] = text.rstrip("/") or text
        elif info.type == tarfile.XGLTYPE:
            self.everywhere |= _pax(content)
        else:
            self.extra |= _pax(content)
        return body + _padded(size)

    def _size(self, text: int | str) -> int:
        if isinstance(text, str) and not re.fullmatch(r"[0-9]{1,19}", text):
            raise _Damaged(f"its size is {printable(text, 40)}")
        if int(text) < 0:
            raise _Damaged(f"its size is {text}")
        return int(text)

    def _past_map(self, block: bytes, body: int) -> int:
        """The position behind the blocks that continue the map of a sparse file in GNU's format."""
        more = block[482]
        while more:
            block = os.pread(self.fd, BLOCK, body)
            if len(block) < BLOCK:
                self._cut(body)
            more, body = block[504], body + BLOCK
        return body

    def _linked(self) -> list[Member]:
        """All members, with symbolic links resolved."""
        if not self.links:
            return self.found
        places = {posixpath.normpath(member.name): place for place, member in enumerate(self.found)}
        found = list(self.found)
        for place in self.links:
            name, there, steps = self.found[place].name, place, 0
            while there in self.links and steps < _MOST_LINKS:
                folder = posixpath.dirname(self.found[there].name)
                there = places.get(posixpath.normpath(posixpath.join(folder, self.links[there])), -1)
                steps += 1
            if there >= 0 and there not in self.links:
                found[place] = self.found[there]._replace(name=name, part=self.found[place].part)
        return found

    def _cut(self, at: int, why: str = "") -> NoReturn:
        raise UsageError(
            f"{self.named} is truncated after {printable(self.last) or 'its beginning'}: what follows begins at byte "
            f"{at}{why}, and the file ends at byte {self.size}; {_REMEDY}"
        )

    def _broken(self, at: int, why: str) -> NoReturn:
        raise UsageError(
            f"{self.named} is damaged after {printable(self.last) or 'its beginning'}, at byte {at} ({why}): {_REMEDY}"
        )


def _parsed(block: bytes) -> tarfile.TarInfo | None:
    """Parse a header; None if its checksum is wrong."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    if block[257:265] == tarfile.GNU_MAGIC:  # GNU stores times where ustar has the prefix of a long path
        info.name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape").rstrip("/")
    return info


def _has_content(info: tarfile.TarInfo) -> bool:
    return info.isreg() or info.type not in tarfile.SUPPORTED_TYPES


def _fault(info: tarfile.TarInfo, extra: dict[str, str]) -> str:
    sparse = any(key.startswith(("GNU.sparse.", "SCHILY.realsize")) for key in extra)
    if sparse or info.type == tarfile.GNUTYPE_SPARSE:
        return "is a sparse file, as tar's --sparse writes them: leave that option away"
    if info.isdev():
        return "is a device or a named pipe, which has no content"
    if not (info.isreg() or info.islnk() or info.issym()):
        return f"is a member of the kind {printable(info.type.decode('latin-1'))!r}, which no file has"
    return ""


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _pax(content: bytes) -> dict[str, str]:
    """The records of a pax header ("LENGTH KEY=VALUE\\n") that are used here."""
    found, at = {}, 0
    while at < len(content) and content[at]:
        match = _PAX.match(content, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise _Damaged("its pax records are garbled")
        key = match[2].decode("utf-8", "surrogateescape")
        if key in ("path", "linkpath", "size") or key.startswith(("GNU.sparse.", "SCHILY.realsize")):
            value = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
            found[key] = value.rstrip("/") or value
        at = end
    return found


def _past_zeros(fd: int, at: int, size: int) -> int:
    """The first block from `at` on that is not all zeros, or `size`; holes in the file take no time."""
    while at < size:
        try:
            at = max(at, os.lseek(fd, at, os.SEEK_DATA) // BLOCK * BLOCK)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return size
        piece = os.pread(fd, 1 << 20, at)
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if not piece or zeros < len(piece):
            return at + zeros // BLOCK * BLOCK if piece else size
        at += len(piece)
    return size
