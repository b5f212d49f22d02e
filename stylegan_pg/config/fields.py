"""The values that a key of the configuration may have, declared where the key is: `g_lr: float = positive(0.002)`.

Each function returns a dataclass field with a default and the demands on its value. checks.py enforces them and
keys.py describes them. Demands on several keys at once are in checks.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field
from typing import Any, NamedTuple

Number = int | float


class Demand(NamedTuple):
    """A test of a value, and the end of the sentence "it must be ..."."""

    fits: Callable[[Any], bool]
    wanted: str


class Values(NamedTuple):
    """What a field's metadata holds."""

    demands: tuple[Demand, ...] = ()
    words: str = ""  # behind the type in what `stylegan-pg config` prints
    choices: tuple[Any, ...] = ()  # all possible values, or what the value is made of
    several: bool = False  # the value is made of several of the choices
    is_path: bool = False  # of a file or folder: a leading ~ is the home folder
    by: str = ""  # of a table: what its keys are
    curve: tuple[Demand, ...] | None = None  # on the ends of curves; None: the value cannot be a curve


def _key(default: Any, values: Values) -> Any:
    metadata = {"values": values}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _limited(default: Any, demand: Demand, words: str, most: Number | None) -> Any:
    demands = [demand]
    if default is None:
        demands = [demand._replace(wanted=f"{demand.wanted}, or null")]
    if most is not None:
        demands.append(Demand(lambda value: value <= most, f"at most {most:.12g}"))
    return _key(default, Values(tuple(demands), words))


def positive(default: Number | None, *, most: Number | None = None) -> Any:
    """A number above 0, up to `most`."""
    return _limited(default, Demand(lambda value: 0 < value < math.inf, "above 0 and finite"), " above 0", most)


def at_least_0(default: Number | None, *, most: Number | None = None) -> Any:
    """A number of 0 or more, up to `most`."""
    return _limited(default, Demand(lambda value: 0 <= value < math.inf, "0 or more and finite"), ", 0 or more", most)


def share(default: float) -> Any:
    """A number from 0 to 1."""
    return _limited(default, Demand(lambda value: 0 <= value <= 1, "between 0 and 1"), " between 0 and 1", None)


def decay(default: float) -> Any:
    """A number from 0 to 1, without 1: a decay per step."""
    demands = (Demand(lambda value: 0 <= value <= 1, "between 0 and 1"), Demand(lambda value: value < 1, "below 1"))
    return _key(default, Values(demands, " from 0 to below 1"))


def between(default: float, low: float, high: float) -> Any:
    """A number within [low, high]."""
    words = f"between {low:g} and {high:g}"
    return _key(default, Values((Demand(lambda value: low <= value <= high, words),), f" {words}"))


def scheduled(number: Any, ends: Any = None) -> Any:
    """A number that may be a curve instead (curves.py). `number` is what one of the functions above gives for it; the
    ends of curves must fit this, too, or what `ends` was declared with."""
    values = values_of(number)
    return _key(number.default, values._replace(curve=values_of(ends or number).demands))


def choice(default: Any, *others: Any) -> Any:
    """One of several values, of which the first is the default."""
    values = (default, *others)
    demand = Demand(lambda value: value in values, " or ".join(map(str, values)))
    return _key(default, Values((demand,), choices=values))


def such_that(default: Any, fits: Callable[[Any], bool], wanted: str, *, most: Number | None = None) -> Any:
    """Any other demand; `wanted` completes "it must be ..."."""
    return _limited(default, Demand(fits, wanted), "", most)


def some_of(default: str, known: Sequence[str], separator: str = "") -> Any:
    """Several of `known`, each at most once: letters, or names with a separator between them."""

    def fits(value: str) -> bool:
        names = value.split(separator) if separator else list(value)
        return len(names) == len(set(names)) > 0 and set(names) <= set(known)

    return _key(
        default, Values((Demand(fits, f"some of {', '.join(known)}, each once"),), choices=tuple(known), several=True)
    )


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def is_resolution(n: int) -> bool:
    """Whether n is a power of two of 4 or more."""
    return is_power_of_two(n) and n >= 4


RESOLUTIONS = "a table from resolutions (powers of two, 4 or more) to"


def by_resolution(*, above_0: bool = False, choices: Sequence[str] = (), of: Any = None) -> Any:
    """A table from resolutions to numbers of 0 or more, or to one of several words; empty by default. `of` is what one
    of the functions above gives for such a number, if there are further demands on it."""

    def fits(table: Mapping[int, Any]) -> bool:
        return all(map(is_resolution, table)) and all(
            value in choices if choices else 0 <= value < math.inf for value in table.values()
        )

    demands = [Demand(fits, f"{RESOLUTIONS} {' or '.join(choices) or 'numbers of 0 or more'}")]
    if above_0:
        demands.append(Demand(lambda table: all(value > 0 for value in table.values()), "above 0"))
    return _key({}, Values((*demands, *_of_each(of)), by="resolution"))


def _of_each(number: Any) -> list[Demand]:
    """The demands of a number on all numbers of a table."""

    def of_table(demand: Demand) -> Demand:
        fits = demand.fits
        return Demand(lambda table: all(map(fits, table.values())), f"a table of numbers {demand.wanted}")

    return [of_table(demand) for demand in values_of(number).demands] if number else []


def by_kimg(of: Any = None) -> Any:
    """A table from kimg to numbers of 0 or more, which hold from there on; empty by default. `of` as in
    by_resolution."""

    def fits(table: Mapping[float, float]) -> bool:
        return all(kimg >= 0 and 0 <= value < math.inf for kimg, value in table.items())

    demand = Demand(fits, "a table from kimg (0 or more) to numbers of 0 or more")
    return _key({}, Values((demand, *_of_each(of)), by="kimg"))


def table(by: str, *demands: Demand, is_path: bool = False) -> Any:
    """A table whose keys are names or URLs; empty by default."""
    return _key({}, Values(demands, is_path=is_path, by=by))


def path(default: Any = "") -> Any:
    """The path of a file or folder, or a list of paths."""
    return _key(default, Values(is_path=True))


def values_of(given: Field[Any]) -> Values:
    """What a field of a configuration class may hold; no demands if it was declared without one of the above."""
    return given.metadata.get("values", Values())


def choices_of(cls: Any, name: str) -> tuple[Any, ...]:
    """All values that a field of a configuration class may have or be made of."""
    return values_of(cls.__dataclass_fields__[name]).choices
