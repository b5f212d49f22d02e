"""Conditions that a user describes in words, for generators whose conditions are vectors with named entries."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from typing import Any

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

FORM = "give names of entries, separated by commas, each with =NUMBER where it is not 1"
_LARGEST = 3e38
_PLACE = re.compile(r"#(\d{1,9})", re.ASCII)


def ask_for(G: Any, texts: Sequence[str]) -> None:
    """Let the conditions that `texts` describe take the place of the examples in a generator's description: they are
    then what example_conditions gives, and class_names their texts.

    Args:
        G: a generator from a snapshot.
        texts: one for each condition, see `vector_of`.

    Raises:
        UsageError: as vector_of; or the generator's conditions are no vectors.
    """
    description = getattr(G, "description", {})
    if not G.c_dim:
        raise UsageError("--condition: this generator is unconditional: omit it")
    if "condition" not in description:
        raise UsageError("--condition: this generator has classes: choose them with --labels")
    names = list(description.get("label_names") or [])
    rows = [vector_of(text, names, G.c_dim, str(description["condition"])) for text in texts]
    G.description = {**description, "conditions": rows, "condition_texts": list(texts)}


def vector_of(text: str, names: Sequence[str], size: int, field: str) -> list[float]:
    """A condition from a text such as "hair_red, glasses=1, age=0.3": numbers of the entries that are named, 1 where
    none is given, and 0 for all others.

    Args:
        text: entries are named as the dataset names them, or by their place from 0: #3, or #3=0.5. A name that contains
            a comma may be quoted; "" is a vector of zeros.
        names: those of the entries, may be empty. size: number of the entries. field: the vector's name, for messages.

    Raises:
        UsageError: an entry is not known or named twice, or a number is none; the message lists the known names.
    """
    row, named = [0.0] * size, set()
    try:
        parts = next(csv.reader([text], skipinitialspace=True), [])
    except csv.Error as error:
        raise UsageError(f"--condition: {printable(repr(text))} is not a list of entries ({error}): {FORM}") from None
    for part in parts if text.strip() else []:
        place, number = _entry(part.strip(), names, size, field)
        if place in named:
            raise UsageError(f"--condition: {printable(repr(text))} gives entry {printable(part)} twice: keep one")
        named.add(place)
        row[place] = number
    return row


def _entry(part: str, names: Sequence[str], size: int, field: str) -> tuple[int, float]:
    """The place of an entry and its number."""
    if names.count(part) == 1:  # also a name that contains a =
        return names.index(part), 1.0
    name, sign, number = part.rpartition("=") if "=" in part else (part, "", "1")
    name = name.strip()
    place = _PLACE.fullmatch(name)
    if names.count(name) == 1:
        found = names.index(name)
    elif place and int(place[1]) < size:
        found = int(place[1])
    else:
        known = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "") if names else f"#0 to #{size - 1}"
        raise UsageError(
            f"--condition: {printable(repr(name))} is no entry of the vector {printable(field)}, which has "
            f"{printable(known, 2000)}: {FORM}"
        )
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if not abs(value) <= _LARGEST:
        raise UsageError(f"--condition: {printable(repr(part))} has no number behind {sign}: {FORM}")
    return found, value
