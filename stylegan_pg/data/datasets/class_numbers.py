"""From labels, as files spell them, to numbered classes: what is a number, what is a name, and what is no label."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import parse_json, printable

MAX_CLASSES = 1_000_000

Label = int | str | None  # None: a picture without one

_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d*)?", re.ASCII)
_NO_NUMBER = frozenset({"null", "none", "na", "n/a", "<na>"})  # how tools write a number that is missing


def as_labels(values: Sequence[Any], origin: str, *, mixed_are_names: bool = False) -> list[Label]:
    """Labels as they are meant, all of them integers or all of them names.

    Empty text, null and nan are no labels. Numbers stay numbers also as text and with decimals of zero (0.0, as
    spreadsheets write a column in which one is missing).

    values: of JSON or CSV: integers, floats, text, None.
    mixed_are_names: numbers among names are names too, fractions are names, and numbers may be negative; otherwise they
        are refused, unless all is text.

    Raises:
        UsageError: vectors, truth values, and what may be meant in several ways; the message begins with `origin`.
    """
    labels: list[Any] = [_cleaned(value) for value in values]
    kinds = {type(label) for label in labels}
    if kinds & {list, tuple, dict}:
        raise UsageError(f"{origin} holds vector labels: only class labels, integers or names, are supported")
    texts = {label for label in labels if isinstance(label, str)}
    numeric = {text for text in texts if _NUMBER.fullmatch(text)}
    if (numeric or kinds & {int, float}) and all(text.lower() in _NO_NUMBER for text in texts - numeric):
        labels = [_number(x) if x in numeric else None if x in texts else x for x in labels]
    if mixed_are_names and any(isinstance(label, float | str) for label in labels):
        return [None if label is None else str(label) for label in labels]
    fractions = [label for label in labels if isinstance(label, float)]
    if fractions:
        raise UsageError(f"{origin} has labels such as {fractions[0]}: number classes in integers, or name them")
    kinds = {type(label) for label in labels} - {type(None)}
    if len(kinds) > 1 or not kinds <= {int, str}:
        kind = ", ".join(sorted(k.__name__ for k in kinds))
        raise UsageError(f"{origin} has labels of type {kind}: give all as integers or all as names")
    least = min((label for label in labels if isinstance(label, int)), default=0)
    if least < 0 and not mixed_are_names:
        most = max(label for label in labels if label is not None)
        raise UsageError(
            f"{origin} has labels from {least} to {most}: where a number stands for no label, leave it empty, or name "
            "the classes"
        )
    return labels


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        text = unicodedata.normalize("NFC", value.strip())  # names that look the same are the same
        return None if text.lower() in ("", "nan") else text
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _number(text: str) -> int | float:
    digits, _, decimals = text.partition(".")
    return float(text) if decimals.strip("0") else int(digits)


def number_classes(labels: Sequence[Label], origin: str) -> tuple[list[int], list[str]]:
    """The class number of each label, -1 where there is none, and the classes' names in their order.

    Only what occurs is a class: integers are numbered from 0 in their order, whatever they count from, and stand in the
    names; names are numbered as sorted, and in the order of their numbers where all are numbers (folders 1, 2, ... 10).

    Raises:
        UsageError: more classes than anything could be trained with; the message begins with `origin`.
    """
    distinct = {label for label in labels if label is not None}
    numbers = all(isinstance(label, int) or label.isdecimal() for label in distinct)
    ordered = sorted(distinct, key=lambda label: (int(label), str(label)) if numbers else str(label))
    if len(ordered) > MAX_CLASSES:
        raise UsageError(f"{origin} has {len(ordered)} classes, more than {MAX_CLASSES}: check what it labels")
    place = {label: i for i, label in enumerate(ordered)}
    return [-1 if label is None else place[label] for label in labels], [str(label) for label in ordered]


def described(numbers: Sequence[int], names: Sequence[str], most: int = 6) -> str:
    """Classes as a few words for people: how many, the first names, and how many pictures each of these has."""
    counts = [0] * len(names)
    for number in numbers:
        if number >= 0:
            counts[number] += 1
    shown = ", ".join(f"{printable(name, 60)} ({counts[i]})" for i, name in enumerate(names[:most]))
    rest = f", ... {printable(names[-1], 60)} ({counts[-1]})" if len(names) > most else ""
    renumbered = all(name.isdecimal() for name in names) and [*names] != [str(i) for i in range(len(names))]
    order = ", numbered from 0 in this order" if renumbered else ""
    return f"{len(names)} class{'' if len(names) == 1 else 'es'}: {shown}{rest}{order}"


LABEL_BYTES = 1 << 20  # of a .cls or .json file beside a picture


def cls_label(data: bytes, named: str, remedy: str) -> str:
    """The text of a .cls file, also where an editor has put UTF-8's mark in front. Raises UsageError for another
    encoding, in which different labels may look alike."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UsageError(f"{named} holds no text in UTF-8: {remedy}") from None


def json_label(data: bytes, named: str, remedy: str) -> Any:
    """ "label" in the JSON beside a picture, as it stands there; None without one. Raises UsageError for no JSON."""
    content = parse_json(data, named, remedy, finite=False)
    return content.get("label") if isinstance(content, dict) else None
