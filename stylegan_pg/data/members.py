"""What is in a tar of pictures: members as webdataset groups them into samples, of any tar's writer."""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from stylegan_pg.errors import UsageError

PICTURES = ("jpg", "jpeg", "png", "webp")
LABEL_BYTES = 1 << 20  # of a json with a label
_META = re.compile(r"__[^/]*__($|/)")  # as webdataset


class Member(NamedTuple):
    name: str
    offset: int
    size: int


class Sample(NamedTuple):
    key: str
    picture: Member
    label: int | str | None
    has_cls: bool


def samples_of(file: IO[bytes], named: str) -> Iterator[Sample]:
    """The samples of a tar, members grouped as webdataset groups them.

    Raises:
        UsageError: a sample without a picture or with two, and as _members.
    """
    members = ((_split(member.name), member) for member in _members(file, named))
    for key, group in itertools.groupby(((*split, member) for split, member in members if split), lambda m: m[0]):
        found = [(suffix.lower(), member) for _, suffix, member in group]
        files = dict(found)
        pictures = [member for suffix, member in found if suffix in PICTURES]
        if len(pictures) != 1:
            raise UsageError(
                f"{named}: sample {key} has {'no picture' if not pictures else 'several pictures'} "
                f"({', '.join(files)}): each sample needs one {' or '.join(PICTURES)}; write the tar again"
            )
        label = None
        if "cls" in files:
            text = content_of(file, files["cls"]).decode("utf-8", "replace").strip()
            label = int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
        elif "json" in files and files["json"].size <= LABEL_BYTES:
            label = _json_label(content_of(file, files["json"]), f"{named}: {key}.json")
        yield Sample(key, pictures[0], label, "cls" in files)


def _split(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member, split at the first dot of its name; None for what is no part of a sample, such as the
    hidden files that systems leave in folders (.DS_Store, ._0001.jpg)."""
    match = re.match(r"^((?:.*/|)[^./]+)[.]([^/]*)$", name)  # webdataset's own, but for hidden files
    return None if match is None or _META.match(name) else (match[1], match[2])


def _json_label(data: bytes, named: str) -> int | str | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{named} is not JSON ({error}): write the tar again") from None
    label = content.get("label") if isinstance(content, dict) else None
    return label if isinstance(label, int | str) and not isinstance(label, bool) else None


def _members(file: IO[bytes], named: str) -> Iterator[Member]:
    """The regular files of a tar (ustar, GNU, pax), in order.

    Raises:
        UsageError: no tar, or one that is damaged or ends too early.
    """
    end, size = 0, os.fstat(file.fileno()).st_size
    last, seen = "", {}  # seen: what hard links may lead to
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * member.isreg()
                last = member.name
                if end > size:
                    break
                if member.issparse():
                    raise UsageError(f"{named}: {member.name} is a sparse file: write the tar without --sparse")
                if member.isreg():
                    seen[member.name] = Member(member.name, member.offset_data, member.size)
                    yield seen[member.name]
                elif member.islnk() and member.linkname in seen:
                    yield seen[member.linkname]._replace(name=member.name)
    except tarfile.TarError as error:
        if not last:
            raise UsageError(
                f"{named} is no uncompressed tar ({error}): unpack .tar.gz and the like first, or fetch it again"
            ) from None
        end = size + 1
    # tarfile takes the end of the file, and anything that is no header, for the end of the tar.
    mark = os.pread(file.fileno(), tarfile.BLOCKSIZE, end)
    if end > size or len(mark) < tarfile.BLOCKSIZE:
        raise UsageError(f"{named} is truncated after {last or 'its beginning'}: fetch it again, or write it again")
    if any(mark):
        raise UsageError(f"{named} is damaged after {last}, at byte {end}: fetch it again, or write it again")


def content_of(file: IO[bytes], member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)
