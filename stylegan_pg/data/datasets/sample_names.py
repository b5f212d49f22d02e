"""Grouping of files into samples: where in a file's name the key of its sample ends.

In WebDataset a key ends at the first dot (0001.jpg, 0001.cls and 0001.seg.png are one sample). In other names it ends
at the last dot (IMG_2024.01.00.png and IMG_2024.01.00.cls). The set of files decides which rule applies; two pictures
never share a key.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple

BESIDE = frozenset({".cls", ".json", ".txt"})  # suffixes of files that belong to the picture with the same key


class Names(NamedTuple):
    """The rule for the names of a set of files.

    last_dot: whether keys end at the last dot. note: a sentence with the decision and its reason, if it matters.
    """

    last_dot: bool
    note: str

    def split(self, path: str) -> tuple[str, str]:
        """(key, extension): ("a/0001", "seg.png") at the first dot, ("a/0001.seg", "png") at the last."""
        return at_last_dot(path) if self.last_dot else at_first_dot(path)


def at_first_dot(path: str) -> tuple[str, str]:
    folder, name = posixpath.split(path)
    first, _, extension = name.partition(".")
    return posixpath.join(folder, first), extension


def at_last_dot(path: str) -> tuple[str, str]:
    stem, suffix = posixpath.splitext(path)
    return stem, suffix[1:]


def read_names(paths: Collection[str], pictures: Collection[str], webdataset: bool) -> Names:
    """Decide where keys end in the names of a set of files.

    Keys end at the first dot if each sample then has exactly one main picture (the one whose name has a single dot, or
    the only one), and no picture whose name has several dots has a label or text of its own. Otherwise they end at the
    last dot.

    Args:
        paths: all files.
        pictures: the suffixes of pictures (".png").
        webdataset: whether a picture whose name has several dots belongs to the sample beside it even if that has no
            label or text (true for tars).
    """
    dotted: dict[str, list[str]] = defaultdict(list)  # key at the first dot -> pictures whose names go on behind it
    beside = set()  # keys at the last dot of labels and texts
    for path in paths:
        stem, suffix = posixpath.splitext(path)
        if suffix.lower() in BESIDE:
            beside.add(stem)
        elif suffix.lower() in pictures and (first := at_first_dot(path)[0]) != stem:
            dotted[first].append(path)
    if not dotted:
        return Names(False, "")
    stems = ((path, *posixpath.splitext(path)) for path in paths)
    plain = {stem: path for path, stem, suffix in stems if stem in dotted and suffix.lower() in pictures}
    for first, group in dotted.items():
        if reason := _not_first(first, group, plain.get(first), beside, webdataset):
            key, name = (posixpath.basename(text) for text in (at_last_dot(reason[0])[0], reason[0]))
            note = f"keys of samples end at the last dot of a name ({key} of {name}): {reason[1]}"
            return Names(True, note if beside or webdataset else "")
    telling = next((first for first in dotted if first in plain or first in beside), None)
    if telling is None:  # it makes no difference
        return Names(True, "")
    key, name = (posixpath.basename(text) for text in (telling, plain.get(telling, dotted[telling][0])))
    other = "" if telling not in plain else f", to which {posixpath.basename(dotted[telling][0])} belongs as a part"
    note = f"keys of samples end at the first dot of a name, as in WebDataset: {name} is the picture of {key}{other}"
    return Names(False, note)


def _not_first(
    first: str, group: list[str], plain: str | None, beside: Collection[str], webdataset: bool
) -> tuple[str, str] | None:
    """A picture of the key `first` that must be a sample of its own, and why; None if keys may end at the first dot."""
    for path in group:
        if at_last_dot(path)[0] in beside or path in beside:
            return path, "it has a label or a text of its own"
    path = group[0]
    if plain is None:
        return (path, f"{posixpath.basename(group[1])} would have the same one at the first dot") if group[1:] else None
    if re.fullmatch(r"[\d.]+", at_last_dot(path)[0][len(first) + 1 :]):
        return path, f"it is numbered, beside {posixpath.basename(plain)}"
    if not webdataset and first not in beside:
        return path, f"{posixpath.basename(plain)} has neither a label nor a text beside it"
    return None


class Pairs(NamedTuple):
    """Files beside pictures. of: (picture, suffix) -> its file. contested: (picture, suffix) -> (file, another picture
    that the file fits as well)."""

    of: dict[tuple[str, str], str]
    contested: dict[tuple[str, str], tuple[str, str]]


def pair(pictures: Collection[str], files: Collection[str], names: Names) -> Pairs:
    """Assign label files to pictures: a file belongs to the picture with the same key (0001.cls), or with the same full
    name (0001.png.cls)."""
    pairs = Pairs({}, {})
    keyed, begun = defaultdict(list), defaultdict(list)  # pictures by their keys, and by their names' beginnings
    for picture in pictures:
        keyed[names.split(picture)[0]].append(picture)
        begun[at_first_dot(picture)[0]].append(picture)
    known = frozenset(pictures)
    for file in files:
        stem, suffix = posixpath.splitext(file)
        if stem in known:
            pairs.of[stem, suffix.lower()] = file
    named_whole = set(pairs.of)
    for file in files:
        stem, suffix = posixpath.splitext(file)
        if stem in known or names.split(file)[0] != stem:
            continue
        group = [one for one in keyed.get(stem) or begun.get(stem, ()) if (one, suffix.lower()) not in named_whole]
        for picture, other in zip(group, reversed(group), strict=True):
            if len(group) == 1:
                pairs.of[picture, suffix.lower()] = file
            else:
                pairs.contested[picture, suffix.lower()] = (file, other if other != picture else group[0])
    return pairs
