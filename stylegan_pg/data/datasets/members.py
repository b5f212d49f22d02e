"""Samples in a tar of pictures: consecutive members with the same key form one sample."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from stylegan_pg.data.datasets.class_numbers import LABEL_BYTES, cls_label
from stylegan_pg.data.datasets.fields import MAX_ARRAY, MAX_TEXT
from stylegan_pg.data.datasets.json_members import caption_in, json_content
from stylegan_pg.data.datasets.sample_names import BESIDE, Names, at_first_dot, read_names
from stylegan_pg.data.storage.tars import Member, content_of
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

PICTURES = ("jpg", "jpeg", "png", "webp")
MOST_BYTES = 3 << 27  # of a picture
_META = re.compile(r"__[^/]*__($|/)")  # as webdataset


_FIRST = ("image", "img", "a", "picture")  # names of what is the picture, among several of a sample
_FURTHER = {"txt": "text", "npy": "array"} | dict.fromkeys(PICTURES, "picture")  # kinds of members by their suffixes
_MOST = {"text": MAX_TEXT, "array": MAX_ARRAY, "picture": MOST_BYTES}  # bytes

Part = tuple[str, str]  # of a sample: name, "" where it has none; "text", "json" (a caption), "array" or "picture"


class Sample(NamedTuple):
    key: str
    picture: Member
    label: int | float | str | None  # as written in the file
    has_cls: bool
    listed: list[Any] | None  # a label in its json that is a list
    is_odd: bool  # whether its json has a label that can be no class and no vector, such as true
    further: dict[Part, Member]  # what may be further fields (foreign_fields.py)


def names_of(members: Iterable[Member]) -> tuple[Names, str]:
    """Decide where keys end in the names of a tar's members: as sample_names.py says, and at the first dot if every
    sample has the same several pictures, such as photographs and masks. Returns this, and the extension of the picture
    that is shown in the latter case, else ""."""
    paths = [member.name for member in members if _counts(member.name)]
    names = read_names(paths, [f".{suffix}" for suffix in PICTURES], webdataset=True)
    if names.last_dot and (parts := _parts_of_each(paths)):
        first, *others = sorted(parts, key=_rank)
        note = f"each sample has several pictures: {printable(first)} is shown, with {printable(', '.join(others))}"
        return Names(False, note), first
    return names, ""


def _rank(extension: str) -> tuple[int, str]:
    """Sorts the extensions of a sample's pictures: the first one is the picture that is shown."""
    name = extension.rpartition(".")[0].lower()
    return (_FIRST.index(name) if name in _FIRST else len(_FIRST), extension)


def _parts_of_each(paths: list[str]) -> frozenset[str]:
    """The extensions that the pictures of all keys have in common (image.jpg and mask.png), if they are words and not
    numbers; empty if they differ from key to key, or have labels of their own."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        key, extension = at_first_dot(path)
        if "." in extension and f".{extension.rpartition('.')[2].lower()}" in BESIDE:
            return frozenset()
        if extension.rpartition(".")[2].lower() in PICTURES:
            found[key].add(extension)
    kinds = {frozenset(extensions) for extensions in found.values()}
    common = kinds.pop()
    words = not any(re.fullmatch(r"[\d.]+[.][a-z]+", extension) for extension in common)
    return common if not kinds and len(common) > 1 and len(found) > 1 and words else frozenset()


def samples_of(file: IO[bytes], members: Iterable[Member], names: Names, named: str) -> Iterator[Sample]:
    """The samples of a tar: consecutive members with the same key, as webdataset groups them. A key that
    occurs again in a joined tar gets a suffix.

    Raises:
        UsageError: a sample has no picture or two, or a picture or a label cannot be read.
    """
    split = ((*names.split(member.name), member) for member in members if _counts(member.name))
    keys: set[str] = set()
    for (key, part), group in itertools.groupby(split, lambda one: (one[0], one[2].part)):
        extensions = [(suffix, member) for _, suffix, member in group if suffix]
        found = [(_kind(suffix.lower()), member) for suffix, member in extensions]
        pictures = _pictures(extensions)
        if not found:
            continue
        if len(pictures) != 1:
            raise UsageError(
                f"{named}: sample {printable(key)} has {'no picture' if not pictures else 'several pictures'} "
                f"({printable(', '.join(suffix for suffix, _ in found))}): each sample needs one "
                f"{' or '.join(PICTURES)}; write the tar again"
                f"{'' if pictures else ', or pack it, which reads more kinds of pictures and leaves other files out'}"
            )
        picture, files = pictures[0], dict(found)
        read = [picture, *(files[suffix] for suffix in ("cls", "json") if suffix in files)]
        for member in read:
            if member.fault:
                raise UsageError(f"{named}: {printable(member.name)} {member.fault}; mend the tar")
        if picture.size > MOST_BYTES:
            raise UsageError(
                f"{named}: {printable(picture.name)} has {picture.size} bytes, more than a picture's {MOST_BYTES}: "
                "write the tar without it"
            )
        content, further = _json(file, files, named), _further(extensions, picture)
        if caption_in(content) and ("", "text") not in further:
            further["", "json"] = files["json"]
        label, listed, is_odd = _labels(content)
        if "cls" in files:
            label, is_odd = _cls(file, files["cls"], named), False
        yield Sample(_of_its_own(key, part, keys, named), picture, label, "cls" in files, listed, is_odd, further)


def _counts(name: str) -> bool:
    """Whether a member may be part of a sample; hidden files of operating systems (.DS_Store, ._0001.jpg) and
    webdataset's metadata (__key__) are not."""
    base = name.rpartition("/")[2]
    return "." in base and not base.startswith(".") and not _META.match(name)


def _kind(extension: str) -> str:
    """The kind of file that an extension means; labels may follow the picture's full name (0001.jpg.cls)."""
    first, _, last = extension.partition(".")
    return last if first in PICTURES and f".{last}" in BESIDE else extension


def _pictures(extensions: list[tuple[str, Member]]) -> list[Member]:
    """The pictures among a sample's files: those with a picture's extension; if there are none, the first of those
    whose extension ends in one (0001.rgb.png)."""
    exact = [member for extension, member in extensions if extension.lower() in PICTURES]
    others = [one for one in extensions if one[0].rpartition(".")[2].lower() in PICTURES]
    return exact or [member for _, member in sorted(others, key=lambda one: _rank(one[0]))[:1]]


def _further(extensions: list[tuple[str, Member]], picture: Member) -> dict[Part, Member]:
    """The members of a sample that may be further fields; those that are empty, too large or no files are not."""
    found: dict[Part, Member] = {}
    for extension, member in extensions:
        name, _, suffix = extension.rpartition(".")
        kind = _FURTHER.get(suffix.lower())
        if kind and member != picture and not member.fault and 0 < member.size <= _MOST[kind]:
            found["" if name.lower() in PICTURES else name, kind] = member  # a text may follow the picture's full name
    return found


def _of_its_own(key: str, part: int, keys: set[str], named: str) -> str:
    """A key that is unique in the tar; joined tars may repeat keys, and each occurrence is a sample of its own."""
    if key in keys and part:
        key = f"{key} (tar {part + 1} in it)"
    if key in keys:
        raise UsageError(
            f"{named} has the sample {printable(key)} twice: write the tar again, or pack it, which takes the last one"
        )
    keys.add(key)
    return key


def _cls(file: IO[bytes], member: Member, named: str) -> int | str:
    if member.size > LABEL_BYTES:
        raise UsageError(f"{named}: {printable(member.name)} has {member.size} bytes, too many for a label")
    text = cls_label(content_of(file, member), f"{named}: {printable(member.name)}", "write the tar again")
    return int(text) if re.fullmatch(r"-?\d{1,18}", text) else text


def _json(file: IO[bytes], files: dict[str, Member], named: str) -> Mapping[str, Any]:
    """The entries of a sample's json; none if it has no json, or one that is too large."""
    if "json" not in files or files["json"].size > LABEL_BYTES or files["json"].fault:
        return {}
    member = files["json"]
    try:
        return json_content(content_of(file, member), f"{named}: {printable(member.name)}", "write the tar again")
    except UsageError:
        if "cls" in files:  # the label does not depend on it
            return {}
        raise


def _labels(content: Mapping[str, Any]) -> tuple[int | float | str | None, list[Any] | None, bool]:
    """ "label" in a json as a class, as a list, and whether it is neither."""
    label = content.get("label")
    if isinstance(label, list):
        return None, label, False
    fits = isinstance(label, int | float | str) and not isinstance(label, bool)
    return label if fits else None, None, not fits and label is not None
