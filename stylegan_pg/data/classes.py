"""Classes of a generator: parsing of class names and numbers, file names for classes, and condition tensors."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

MAX_NUMBERS = 1_000_000  # limit of the numbers that one text may expand to
LONGEST_FILE_NAME = 80  # bytes of the class's part of a file name
RULE = "classes by name, or by position from 0: #3 or index:3, several as #1-3"
_NUMBERS = re.compile(r"\s*(\d+)(?:-(\d+))?\s*", re.ASCII)
_PLACES = re.compile(r"(?:#|index:)(\d+)(?:-(?:#|index:)?(\d+))?", re.ASCII)


def parse_numbers(text: str) -> list[int]:
    """'0-3,8' -> [0, 1, 2, 3, 8].

    Raises:
        UsageError: the text is not a list of numbers and ranges.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = _NUMBERS.fullmatch(part)
        first, last = _range(found) if found else (1, 0)
        if first > last:
            raise UsageError(f"{printable(repr(text))} is not a list of numbers: write for example 0-63 or 1,5,9")
        if last - first >= MAX_NUMBERS - len(numbers):
            raise UsageError(
                f"{printable(repr(text))} stands for more than {MAX_NUMBERS} numbers: give fewer at a time"
            )
        numbers += range(first, last + 1)
    return numbers


def _range(found: re.Match[str]) -> tuple[int, int]:
    """Return the first and the last number of a range. They are cut to a number of digits that Python can parse."""
    return int(found[1][:30]), int((found[2] or found[1])[:30])


def example_conditions(G: Any) -> torch.Tensor | None:
    """Return the example conditions, float32 [k, c_dim], in the snapshot of a generator whose conditions are vectors.
    The result is None for a generator with classes or without conditions."""
    rows = getattr(G, "description", {}).get("conditions")
    return torch.tensor(rows, dtype=torch.float32) if rows else None


def class_names(G: Any) -> list[str]:
    """Return the names of a conditional generator's classes, or their numbers if names are unknown. If conditions are
    vectors, the numbers of the snapshot's examples are used as class names, or the texts of those that a user asked for
    (asked_conditions.py)."""
    examples = example_conditions(G)
    if examples is not None:
        return list(G.description.get("condition_texts") or map(str, range(len(examples))))
    known = list(getattr(G, "description", {}).get("label_names") or [])
    return [str(known[i]) if i < len(known) else str(i) for i in range(G.c_dim)]


def conditions_at(G: Any, numbers: Sequence[int]) -> torch.Tensor:
    """Return the conditions, float32 [n, c_dim], of classes or of a snapshot's examples by their numbers."""
    examples = example_conditions(G)
    return one_hot(numbers, G.c_dim) if examples is None else examples[list(numbers)]


def parse_classes(G: Any, labels: str | None) -> list[int]:
    """Class numbers from a text such as 'cat,dog', '#3', 'index:3' or '#0-9'; all classes for None; [] for an
    unconditional generator.

    Parts are separated by commas; a part that contains a comma may be quoted. A part that equals the name of a class is
    that class. A plain number is a class number if no class has a number as its name.

    Raises:
        UsageError: the generator is unconditional or does not know a label; the message lists the known ones.
    """
    if not G.c_dim:
        if labels is not None:
            raise UsageError("this generator is unconditional: omit the labels")
        return []
    if labels is None:
        return list(range(len(class_names(G))))
    names = class_names(G)
    if labels in names:
        parts = [labels]
    else:
        try:
            parts = next(csv.reader([labels], skipinitialspace=True), None) or [""]
        except csv.Error as error:
            raise UsageError(f"--labels: {printable(repr(labels))} is not a list of classes ({error})") from None
    numbers = [k for part in parts for k in _classes_of(part if part in names else part.strip(), names)]
    if len(numbers) > MAX_NUMBERS:
        raise UsageError(f"--labels: {printable(repr(labels))} stands for more than {MAX_NUMBERS} classes")
    return numbers


def _classes_of(part: str, names: list[str]) -> Sequence[int]:
    """The classes of one part: a name, or a range of class numbers."""
    known = printable(f"{len(names)} classes ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''})")
    shown = printable(repr(part))
    for form in (str, lambda name: unicodedata.normalize("NFC", name)):  # accents can be written in two ways
        there = [i for i, name in enumerate(names) if form(name) == form(part)]
        if len(there) > 1:
            places = ", ".join(f"#{i}" for i in there[:20])
            raise UsageError(f"--labels: {len(there)} classes are named {shown}: choose by position, {places}")
        if there:
            return there
    number, place = _NUMBERS.fullmatch(part), _PLACES.fullmatch(part)
    misleading = any(name.isdecimal() and name != str(i) for i, name in enumerate(names))
    if number and not place and misleading:
        raise UsageError(
            f"--labels: {shown} is not the name of any of the {known}, some of which have numbers as names: write "
            f"#{part.strip()} for a position"
        )
    found = place or number
    if not found:
        raise UsageError(f"--labels: {shown} is unknown; the generator has {known}: give {RULE}")
    first, last = _range(found)
    if first > last:
        raise UsageError(f"--labels: {shown} goes backwards: give {RULE}")
    if last >= len(names):
        raise UsageError(f"--labels: {shown}: position {last} is not one of the {known}, which begin at 0")
    return range(first, last + 1)


def labels_to_c(G: Any, labels: str | None, count: int) -> torch.Tensor | None:
    """Return conditions [count, c_dim] for a text that `parse_classes` parses. The classes are repeated to get `count`.

    Without a text, all classes of a conditional generator are used in turn. The result is None for an unconditional
    generator.

    Raises:
        UsageError: See parse_classes.
    """
    numbers = parse_classes(G, labels)
    return conditions_at(G, [numbers[i % len(numbers)] for i in range(count)]) if numbers else None


def file_names(names: Sequence[str]) -> list[str]:
    """Return file names for classes. Characters that some systems do not allow are replaced. The class number is
    appended if two names would be equal, also if only on systems that ignore case."""
    plain = [_file_name(name) for name in names]
    counts: dict[str, int] = {}
    for name in map(_folded, plain):
        counts[name] = counts.get(name, 0) + 1
    taken = {name for name, count in counts.items() if count == 1}
    result = []
    for i, name in enumerate(plain):
        if counts[_folded(name)] > 1:
            name = f"{name}-{i}"
            while _folded(name) in taken:
                name += "_"
            taken.add(_folded(name))
        result.append(name)
    return result


def _file_name(name: str) -> str:
    kept = "".join("_" if not c.isprintable() or c in '/\\:*?"<>|' else c for c in unicodedata.normalize("NFC", name))
    cut = kept.encode()[:LONGEST_FILE_NAME].decode(errors="ignore")
    return cut.rstrip(". ") or "_"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def condition(c: Any, count: int, names: Sequence[str]) -> torch.Tensor | None:
    """The condition of `count` images, floats [count, classes] (None for an unconditional generator).

    Args:
        c: one of
            - a tensor [count, classes] of any numeric type: one-hot, or a mixture of classes;
            - a class number or a class name for all images;
            - class numbers or names for each image: a list, an array, or an integer tensor [count].
        count: the number of images.
        names: the names of all classes, empty for an unconditional generator.

    Raises:
        UsageError: c has another form, or contains an unknown class.
    """
    forms = f"c is a class number, {count} of them, their names, or a tensor [{count}, {len(names)}], one-hot"
    if not names:
        if c is None or (isinstance(c, torch.Tensor) and c.ndim == 2 and c.shape[1] == 0):
            return None
        raise UsageError("this generator is unconditional: omit c")
    if c is None:
        raise UsageError(f"this generator has {len(names)} classes, and c is missing: {forms}")
    if isinstance(c, str | int):
        c = [c] * count
    if isinstance(c, list | tuple) and any(isinstance(k, str) for k in c):
        unknown = [k for k in c if k not in names]
        if unknown:
            raise UsageError(f"c: {printable(repr(unknown[0]))} is not a class of this generator: {forms}")
        c = [list(names).index(k) for k in c]
    try:
        given = torch.as_tensor(c)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"c cannot be used ({printable(error)}): {forms}") from None
    kinds = [given.is_floating_point(), given.is_complex(), given.dtype == torch.bool]
    if given.shape == (count, len(names)) and not kinds[1]:
        return given if kinds[0] else given.float()
    if given.shape != (count,) or any(kinds):
        what = f"shape {list(given.shape)} and type {str(given.dtype).removeprefix('torch.')}"
        raise UsageError(f"c has {what}, for {count} latents: {forms}")
    if count and not 0 <= int(given.min()) <= int(given.max()) < len(names):
        span = f"{int(given.min())} to {int(given.max())}"
        raise UsageError(f"c is in the range {span}, but this generator has the classes 0 to {len(names) - 1}: {forms}")
    return one_hot(given, len(names))


def vector_condition(c: Any, count: int, size: int) -> torch.Tensor:
    """The condition of `count` images, floats [count, size], of a generator whose conditions are vectors.

    Args:
        c: a tensor, an array or lists of numbers: [count, size], or [size] for all images.
        count: the number of images.
        size: the length of a condition.

    Raises:
        UsageError: c has another form or holds numbers that are not finite.
    """
    form = f"c is a tensor [{count}, {size}], or [{size}] for all images"
    try:
        given = torch.as_tensor(c, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"c cannot be used ({printable(error)}): {form}") from None
    if given.shape == (size,):
        given = given.expand(count, size)
    if given.shape != (count, size) or not given.isfinite().all():
        raise UsageError(f"c has shape {list(given.shape)}, or numbers that are not finite: {form}")
    return given


def one_hot(labels: Sequence[int] | np.ndarray | torch.Tensor, classes: int) -> torch.Tensor:
    """One-hot float32 [n, classes] of class numbers [n]."""
    return torch.nn.functional.one_hot(torch.as_tensor(labels).long(), classes).float()
