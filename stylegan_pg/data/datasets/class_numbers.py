"""From labels as files spell them to numbered classes: which are numbers, which are names, and which are missing."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

MAX_CLASSES = 1_000_000

Label = int | str | None  # None: the picture has no label

_NUMBER = re.compile(r"[+-]?\d{1,18}(\.\d*)?", re.ASCII)
_NO_NUMBER = frozenset({"null", "none", "na", "n/a", "<na>"})  # spellings of a missing value


def as_labels(values: Sequence[Any], origin: str, *, mixed_are_names: bool = False) -> list[Label]:
    """Interpret raw labels: the result holds integers only or names only, and None for missing labels.

    Empty text, null and nan count as missing. A number may be written as text, or with decimals of zero (0.0, as
    spreadsheets write a column in which a value is missing).

    Args:
        values: from JSON or CSV: integers, floats, text, None.
        origin: where the labels come from, for messages.
        mixed_are_names: numbers among names, fractions and negative numbers are names; otherwise they are refused,
            unless all values are text.

    Raises:
        UsageError: vectors, booleans, and ambiguous labels; the message begins with `origin`.
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
    """Number the classes -> (the class number of each label, -1 for a missing one; the names of the classes).

    Only labels that occur become classes. Integers are numbered from 0 in ascending order, and their text is the name.
    Names are numbered in sorted order, or in numeric order if all of them are numbers (folders 1, 2, ... 10).

    Raises:
        UsageError: there are too many classes; the message begins with `origin`.
    """
    distinct = {label for label in labels if label is not None}
    numbers = all(isinstance(label, int) or label.isdecimal() for label in distinct)
    ordered = sorted(distinct, key=lambda label: (int(label), str(label)) if numbers else str(label))
    if len(ordered) > MAX_CLASSES:
        raise UsageError(f"{origin} has {len(ordered)} classes, more than {MAX_CLASSES}: check what it labels")
    place = {label: i for i, label in enumerate(ordered)}
    return [-1 if label is None else place[label] for label in labels], [str(label) for label in ordered]


def described(numbers: Sequence[int], names: Sequence[str], most: int = 6) -> str:
    """A short text about the classes: how many there are, the first names, and the number of pictures of each."""
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
    """The text of a .cls file in UTF-8, with or without a byte order mark.

    Raises:
        UsageError: the file has another encoding, in which different labels could be read as the same text.
    """
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise UsageError(f"{named} holds no text in UTF-8: {remedy}") from None
