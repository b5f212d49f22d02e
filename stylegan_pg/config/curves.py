"""Curves: numbers that go from one value to another while images are shown.

A key that may hold a curve holds a number, or a list of plain tables {from, to, kimg, shape, start}, as a user writes
them: `optim.g_lr: {from: 2e-4, to: 5e-5, kimg: 20000, shape: cosine}`. Several curves follow one another.

- Within a curve, with T its length and t the images shown since its start, both in images, the value is
  `from + t/T (to - from)` (linear), or `from + (1 - (1 + cos(pi t/T)) / 2) (to - from)` (cosine).
- Before the first curve the value is its `from`. Between two curves, and after the last one, it is the `to` of the
  curve before.
- A curve without `start` begins where the one before it ends, and the first one at 0. Curves must not overlap.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import is_number, printable

Scheduled: TypeAlias = Any  # float, or a list of curves; OmegaConf knows no unions with lists
Table = Mapping[str, Any]  # a curve as it is written

NUMBERS, SHAPES = ("from", "to", "kimg", "start"), ("linear", "cosine")
KEYS = ("from", "to", "kimg", "shape", "start")
MOST_KIMG = 1e9
MOST_CURVES = 64
EXAMPLE = "{from: A, to: B, kimg: LENGTH, shape: cosine}"


@dataclass(frozen=True)
class Curve:
    """A number that goes from `a` to `b` within `kimg` thousand images from `start` thousand images on."""

    a: float
    b: float
    kimg: float
    shape: str
    start: float

    @property
    def begin(self) -> float:
        """The number of images at which it starts."""
        return self.start * 1000

    @property
    def end(self) -> float:
        """The number of images at which it has reached `b`."""
        return (self.start + self.kimg) * 1000

    def at(self, nimg: float) -> float:
        """The value after nimg images, which lies between `a` and `b`."""
        t = (nimg - self.begin) / (self.kimg * 1000)
        if t <= 0 or t >= 1:
            return self.b if t > 0 else self.a
        part = t if self.shape == "linear" else 1 - (1 + math.cos(math.pi * t)) / 2
        value = self.a + part * (self.b - self.a)
        return min(max(value, min(self.a, self.b)), max(self.a, self.b))  # not beyond them by rounding

    def plain(self) -> dict[str, Any]:
        """The curve as it is written."""
        return {"from": self.a, "to": self.b, "kimg": self.kimg, "shape": self.shape, "start": self.start}


def is_curve(value: Scheduled) -> bool:
    """Whether the value of a key is one or several curves, and not a number."""
    return isinstance(value, list | tuple)


def read(value: Any, key: str) -> list[Curve]:
    """The curves that a key holds.

    Args:
        value: a list of plain tables. key: the key, for messages.

    Raises:
        UsageError: naming the number of the curve that is missing or not possible, and the remedy.
    """
    if not is_curve(value) or not value:
        raise UsageError(f"{key}={printable(value, 80)} is not possible: it must be a number, or a curve {EXAMPLE}")
    if len(value) > MOST_CURVES:
        raise UsageError(f"{key} has {len(value)} curves: give at most {MOST_CURVES}")
    found: list[Curve] = []
    for i, one in enumerate(value):
        found.append(_read_one(one, place(key, i, len(value)), found[-1] if found else None))
    return found


def place(key: str, index: int, count: int) -> str:
    """The name of one of the curves of a key, as overrides and messages have it: `optim.g_lr.1` is the second one."""
    return key if count == 1 else f"{key}.{index}"


def _read_one(table: Any, named: str, before: Curve | None) -> Curve:
    if not isinstance(table, Mapping):
        raise UsageError(f"{named}: {printable(table, 80)} is not possible: it must be a curve {EXAMPLE}")
    for name in table:
        if name not in KEYS:
            raise UsageError(unknown(named, name))
    for name in ("from", "to", "kimg"):
        if table.get(name) is None:
            raise UsageError(f"{named}.{name} is not set: a curve needs from, to and kimg, as in {EXAMPLE}")
    start = table.get("start")
    if start is None:
        start = 0.0 if before is None else before.start + before.kimg
    numbers = {name: table[name] for name in ("from", "to", "kimg")} | {"start": start}
    for name, number in numbers.items():
        if not is_number(number):
            raise _impossible(named, name, number, "a finite number")
    shape = table.get("shape", "linear")
    if shape not in SHAPES:
        raise _impossible(named, "shape", shape, " or ".join(SHAPES))
    if not 0 < numbers["kimg"] <= MOST_KIMG:
        raise _impossible(named, "kimg", numbers["kimg"], f"above 0 and at most {MOST_KIMG:g}, the curve's length")
    if not 0 <= numbers["start"] <= MOST_KIMG:
        raise _impossible(named, "start", numbers["start"], f"0 or more and at most {MOST_KIMG:g}")
    end = before.start + before.kimg if before else 0.0
    if start < end - 1e-9 * max(end, 1.0):
        raise _impossible(
            named,
            "start",
            start,
            f"{end:.10g} or more, because the curve before ends there and curves must not overlap",
        )
    return Curve(float(table["from"]), float(table["to"]), float(table["kimg"]), shape, float(start))


def _impossible(named: str, name: str, value: Any, wanted: str) -> UsageError:
    return UsageError(f"{named}.{name}={printable(value, 80)} is not possible: it must be {wanted}")


def unknown(named: str, name: Any) -> str:
    """The message about a name that no curve has."""
    near = get_close_matches(str(name), KEYS, 1, 0.5)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return f"{named}: a curve has no {printable(repr(name))}{meant} (it has {', '.join(KEYS)})"


def completed(value: Any, key: str) -> Scheduled:
    """The value of a key with all that its curves leave out; a number as it is. Raises UsageError as `read`."""
    return [curve.plain() for curve in read(value, key)] if is_curve(value) else value


@functools.lru_cache(maxsize=1024)
def _known(tables: tuple[tuple[tuple[str, Any], ...], ...]) -> tuple[Curve, ...]:
    return tuple(read([dict(table) for table in tables], "a curve"))


def curves_of(value: Scheduled) -> Sequence[Curve]:
    """The curves of a checked value, none if it is a number."""
    return _known(tuple(tuple(table.items()) for table in value)) if is_curve(value) else ()


def at(value: Scheduled, nimg: float) -> float:
    """The number that holds after nimg images."""
    curves = curves_of(value)
    if not curves:
        return value
    begun = [curve for curve in curves if nimg >= curve.begin]
    return (begun[-1] if begun else curves[0]).at(nimg)


def moves(value: Scheduled, nimg: float) -> bool:
    """Whether nimg lies within a curve, where the number changes from step to step."""
    return any(curve.begin <= nimg < curve.end for curve in curves_of(value))


def numbers_in(value: Scheduled, key: str) -> Iterator[tuple[str, float]]:
    """(name, value) of the ends of all curves, or of the number itself."""
    curves = curves_of(value)
    for i, curve in enumerate(curves):
        named = place(key, i, len(curves))
        yield from ((f"{named}.from", curve.a), (f"{named}.to", curve.b))
    if not curves:
        yield key, value


def largest(value: Scheduled) -> float:
    """The largest value that a number or its curves take."""
    return max(number for _, number in numbers_in(value, ""))


def scaled(value: Scheduled, factor: float) -> Scheduled:
    """A number, or curves, multiplied by a factor."""
    if not is_curve(value):
        return value * factor
    return [dict(table) | {name: table[name] * factor for name in ("from", "to")} for table in value]


def as_text(value: Scheduled) -> str:
    """A number or curves in the form of an override's value, as short as possible."""
    if not is_curve(value):
        return f"{value:.6g}"
    tables = [", ".join(f"{k}: {v if isinstance(v, str) else f'{v:.6g}'}" for k, v in table.items()) for table in value]
    one = [f"{{{table}}}" for table in tables]
    return one[0] if len(one) == 1 else f"[{', '.join(one)}]"


# --- one number of a curve in an override -----------------------------------------------------------------------------


class Part(NamedTuple):
    """What an override such as `optim.g_lr.1.to=1e-5` changes: a number of a curve, by the curve's index, or of the
    only curve."""

    index: int | None
    name: str


def part_of(names: Sequence[str], key: str) -> Part:
    """The part that the names behind a key mean.

    Raises:
        UsageError: there is no such part.
    """
    index = int(names[0]) if len(names) == 2 and names[0].isdigit() and len(names[0]) < 4 else None
    if len(names) - (index is not None) != 1 or names[-1] not in KEYS:
        raise UsageError(unknown(key, ".".join(names)))
    return Part(index, names[-1])


def changed(value: Any, part: Part, new: Any, key: str) -> list[dict[str, Any]]:
    """Curves with one number changed; a number makes way for a new curve.

    Raises:
        UsageError: there is no such curve, or there are several and the override does not say which one.
    """
    tables = [dict(table) for table in value] if is_curve(value) else [{}]
    if part.index is None and len(tables) > 1:
        raise UsageError(f"{key} has {len(tables)} curves: say which one, as in {key}.0.{part.name}={printable(new)}")
    if (part.index or 0) >= len(tables):
        raise UsageError(f"{key}.{part.index}: there are {len(tables)} curves, and the first one is {key}.0")
    tables[part.index or 0][part.name] = new
    return tables
