"""Expansion of paths, globs, brace patterns and URLs. The name of an existing file or folder is never expanded."""

from __future__ import annotations

import glob
import itertools
import os
from collections import Counter

from braceexpand import braceexpand

from stylegan_pg.data.storage import remote
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import shown

WILD = "*?["  # the special characters of glob patterns
MAX_PLACES = 1_000_000  # expansions of one brace pattern


def literal(text: str) -> str | None:
    """Return the path of an existing file or folder whose name is exactly `text`, or None. The name may contain special
    characters of patterns.

    A name that looks like a URL or a command, such as "pipe:x", is returned as "./pipe:x".
    """
    path = text.removeprefix("file://")
    if not path or not os.path.lexists(path):
        return None
    return f"./{path}" if remote.is_remote(path) or path.startswith("points:") else path


def expand(text: str) -> list[str]:
    """Return the tars that a text names. It can be a file, a folder (its tars sorted by name), a glob or brace pattern,
    or a URL, or several of these separated by "::".

    Raises:
        UsageError: if there are none, or a tar occurs twice.
    """
    parts = [text] if literal(text) is not None else text.split("::")
    found = [place for part in parts for place in _expanded(part)]
    if not found:
        raise UsageError(f"{shown(text)}: there is no tar; check the path")
    if len(set(found)) < len(found):
        twice = next(tar for tar, n in Counter(found).items() if n > 1)
        raise UsageError(f"{printable(text)} names {shown(twice)} twice: name each tar once")
    return found


def _expanded(part: str) -> list[str]:
    there = literal(part)
    if there is not None:
        return _tars_of(there)
    try:
        each = list(itertools.islice(braceexpand(part), MAX_PLACES))
    except ValueError as error:
        raise UsageError(
            f"{printable(part)} is not a valid brace pattern ({error}): an example is 'shard-{{000..099}}.tar'"
        ) from None
    found = []
    for one in each:
        there = literal(one)
        path = one.removeprefix("file://")
        if there is not None:
            found += _tars_of(there)
        elif remote.is_remote(one) or "://" in path:
            found.append(one)
        elif any(sign in path for sign in WILD):
            found += sorted(literal(match) or match for match in glob.glob(path))
        else:
            found.append(path)
    return found


def _tars_of(path: str) -> list[str]:
    """Return the path of a tar, or the tars in a folder."""
    return sorted(glob.glob(f"{glob.escape(path)}/*.tar")) if os.path.isdir(path) else [path]
