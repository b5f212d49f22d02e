"""What a picture on the page is made of: plain numbers, checked where they come from the browser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stylegan_pg.errors import UsageError
from stylegan_pg.inference.sampling import NOISE
from stylegan_pg.untrusted import is_number, printable

SEEDS = 1 << 32  # seeds are 0 to SEEDS - 1, as of `sample`
ROW = 1000  # the seed above a seed on the plane of seeds is greater by this
MOST_PSI, MOST_AMOUNT = 2.0, 20.0
LONGEST_VECTOR = 65_536  # entries of a condition, and layers


@dataclass(frozen=True)
class Place:
    """A point on the plane of seeds, and the condition there.

    The plane has a seed at every point with whole coordinates: `seed`, `seed + 1` at its right and `seed + ROW` above
    it. `right` and `up`, in [0, 1), say how far the point lies towards these. `c` is the number of a class or of an
    example of a condition, or a vector; None for an unconditional generator.
    """

    seed: int = 0
    right: float = 0.0
    up: float = 0.0
    c: int | tuple[float, ...] | None = None

    def corners(self) -> list[tuple[int, float]]:
        """The seeds around the point and their bilinear weights, which sum to 1; only those whose weight is not 0."""
        found = []
        for dy, wy in ((0, 1 - self.up), (1, self.up)):
            for dx, wx in ((0, 1 - self.right), (1, self.right)):
                if wx * wy > 0:
                    found.append(((self.seed + dx + ROW * dy) % SEEDS, wx * wy))
        return found


@dataclass(frozen=True)
class Face:
    """All that determines a picture of a given generator.

    Attributes:
        place: the face itself.
        other: another one that is mixed in, or None.
        amount: how much of it, in [0, 1].
        layers: the numbers of the layers that take it; None for all. Numbers beyond the generator's have no effect.
        psi, cutoff: truncation, as in `sample`; cutoff None for all layers.
        noise, noise_seed: const, none or random; the seed of random noise.
        directions: {name of a direction: how many standard deviations}.
        direction_layers: the numbers of the layers that directions change; None for all.
        move: translation to the right and upwards in widths of the picture, and rotation in degrees, counterclockwise
            (StyleGAN3 only).
    """

    place: Place = field(default_factory=Place)
    other: Place | None = None
    amount: float = 1.0
    layers: tuple[int, ...] | None = None
    psi: float = 1.0
    cutoff: int | None = None
    noise: str = "const"
    noise_seed: int = 0
    directions: Mapping[str, float] = field(default_factory=dict)
    direction_layers: tuple[int, ...] | None = None
    move: tuple[float, float, float] = (0.0, 0.0, 0.0)


def parse_face(content: Any) -> Face:
    """A Face from a JSON object with the same names; those that are missing have their default values.

    Raises:
        UsageError: a name is unknown, or a value has another type or range.
    """
    given = dict(_table(content, "face", Face))
    for name in ("place", "other"):
        if given.get(name) is not None or name == "place":
            given[name] = _place(given.get(name, {}), name)
    for name in ("layers", "direction_layers"):
        if given.get(name) is not None:
            given[name] = _layers(given[name], name)
    for name, low, high in (("amount", 0, 1), ("psi", -MOST_PSI, MOST_PSI)):
        if name in given:
            given[name] = float(_number(given[name], low, high, name))
    if given.get("cutoff") is not None:
        given["cutoff"] = _whole(given["cutoff"], LONGEST_VECTOR, "cutoff")
    if "noise_seed" in given:
        given["noise_seed"] = _whole(given["noise_seed"], SEEDS - 1, "noise_seed")
    if given.get("noise", "const") not in NOISE:
        raise UsageError(f"noise {printable(repr(given['noise']), 80)} is not possible: {', '.join(NOISE)}")
    if "directions" in given:
        given["directions"] = _amounts(given["directions"])
    if "move" in given:
        given["move"] = _move(given["move"])
    return Face(**given)


def _table(content: Any, named: str, kind: type) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise UsageError(f"{named} is no JSON object")
    if unknown := sorted(content.keys() - kind.__dataclass_fields__.keys()):  # type: ignore[attr-defined]  # a dataclass
        raise UsageError(f"{named} has the unknown name {printable(repr(unknown[0]), 80)}")
    return content


def _place(content: Any, named: str) -> Place:
    given = dict(_table(content, named, Place))
    if "seed" in given:
        given["seed"] = _whole(given["seed"], SEEDS - 1, f"{named}.seed")
    for name in ("right", "up"):
        if name in given:
            given[name] = float(_number(given[name], 0, math.nextafter(1, 0), f"{named}.{name}"))
    c = given.get("c")
    if isinstance(c, list):
        if len(c) > LONGEST_VECTOR or not all(is_number(value, -3e38, 3e38) for value in c):
            raise UsageError(f"{named}.c is no list of finite numbers")
        given["c"] = tuple(float(value) for value in c)
    elif c is not None:
        given["c"] = _whole(c, 1 << 31, f"{named}.c")
    return Place(**given)


def _number(value: Any, low: float, high: float, named: str) -> float:
    if not is_number(value, low, high):
        raise UsageError(f"{named} is {printable(repr(value), 80)}, not a number from {low:g} to {high:g}")
    return value


def _whole(value: Any, high: int, named: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise UsageError(f"{named} is {printable(repr(value), 80)}, not a whole number from 0 to {high}")
    return value


def _layers(value: Any, named: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > LONGEST_VECTOR:
        raise UsageError(f"{named} is no list of numbers of layers")
    return tuple(_whole(one, LONGEST_VECTOR, named) for one in value)


def _amounts(value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or len(value) > 1000:
        raise UsageError("directions is no JSON object of amounts")
    return {name: float(_number(a, -MOST_AMOUNT, MOST_AMOUNT, "an amount of directions")) for name, a in value.items()}


def _move(value: Any) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3:
        raise UsageError("move is no list of three numbers: right, up, degrees")
    right, up, degrees = (float(_number(one, -360, 360, "a number of move")) for one in value)
    return right, up, degrees
