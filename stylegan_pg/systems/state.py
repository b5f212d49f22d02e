"""State that training changes and that does not follow from nimg, besides weights and buffers: typed dataclasses whose
fields know their ranges, and how they are read from the plain JSON values of a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import finite_number, printable, whole_number

REMEDY = "restore another checkpoint, or take a new run=FOLDER"
LARGEST, MOST_COUNTED = sys.float_info.max, 1 << 62
Check = Callable[[Any, str], Any]  # (a value from a file, its name in messages) -> the value, or UsageError
T = TypeVar("T")


def a_number(low: float = -LARGEST, high: float = LARGEST) -> Check:
    """A check for finite numbers within [low, high]."""
    return lambda value, named: finite_number(value, low, high, named, REMEDY)


def a_count(most: int = MOST_COUNTED) -> Check:
    """A check for whole numbers within [0, most]."""
    return lambda value, named: whole_number(value, 0, most, named, REMEDY)


def or_null(check: Check) -> Check:
    """A check that lets null pass, too."""
    return lambda value, named: None if value is None else check(value, named)


def a_table(check: Check) -> Check:
    """A check for tables from names to values that pass `check`."""

    def checked(value: Any, named: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UsageError(f"{named} is no table: {REMEDY}")
        return {name: check(inner, f"{named}: {printable(name, 60)}") for name, inner in value.items()}

    return checked


def some_names(value: Any, named: str) -> list[str]:
    """A check for lists of texts."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{named} is no list of names: {REMEDY}")
    return list(value)


def must(check: Check) -> dict[str, Any]:
    """The metadata of a dataclass field whose stored values must pass `check`."""
    return {"check": check}


def read_state(cls: type[T], stored: Mapping[str, Any], named: str) -> T:
    """An instance of `cls`, a dataclass whose fields have the metadata of `must`, from plain JSON values.

    Missing fields get their defaults; names that `cls` does not have are ignored, because a later version may have
    written them.

    Raises:
        UsageError: naming the first value that is of a wrong type or out of range.
    """
    known: tuple[Any, ...] = fields(cls)  # type: ignore[arg-type]  # a dataclass
    given = [f for f in known if f.name in stored]
    return cls(**{f.name: f.metadata["check"](stored[f.name], f"{named}: {f.name}") for f in given})


@dataclass
class GANState:
    """What a GAN changes from step to step besides its networks."""

    augment_p: float | None = field(default=None, metadata=must(or_null(a_number(0, 1))))  # None: no augmentation
    # the sum of the signs of D's scores of real images since ADA's last adjustment, and the number of these scores
    signs: float = field(default=0.0, metadata=must(a_number()))
    signed: int = field(default=0, metadata=must(a_count()))
    means: dict[str, float] = field(default_factory=dict, metadata=must(a_table(a_number())))  # of terms, by name
    thawed: list[str] = field(default_factory=list, metadata=must(some_names))  # see GAN.lacks

    def plain(self) -> dict[str, Any]:
        """The state as JSON values."""
        return asdict(self)
