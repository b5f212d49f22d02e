"""The styles of avatars that demo/avatars.py draws: what is drawn in each for which attribute, and which
part of the face each of its components belongs to.

Every style is a package of drawings by one artist, combined by DiceBear. Only those are described here whose licence
allows that the drawings are changed and given away.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

LICENCES = ("CC BY 4.0", "CC0 1.0")
# Colours are told apart from each other and from those of other parts at a few pixels.
HAIR = {"black": "231815", "brown": "5a2f17", "blonde": "e8c04f", "red": "c2402a", "blue": "3b6fd4"}
SKIN = {"light": "f6d5b8", "tan": "d19a6a", "dark": "946040"}
CLOTHES = {"white": "f1f5f9", "green": "15803d", "purple": "6d28d9", "orange": "f97316"}
BACKGROUND = {"blue": "8ecae6", "yellow": "fdf0c4", "pink": "f4a6b0", "green": "95d5b2"}
GLASSES = "0d9488"
COLOURS = {"hair": HAIR, "skin": SKIN, "clothes": CLOTHES, "background": BACKGROUND}
FLAGS = ("glasses", "mouth_open", "long_hair")
ATTRIBUTES = (*(f"{what}_{name}" for what, names in COLOURS.items() for name in names), *FLAGS)

PARTS = ("background", "skin", "hair", "clothes", "eyes", "brows", "mouth", "glasses")  # values of the mask, in order
PART_OF = {  # the part that the elements of a component belong to; of what lies in none, the skin
    "hair": "hair",
    "rearHair": "hair",
    "frontHair": "hair",
    "sideburns": "hair",
    "clothes": "clothes",
    "eyes": "eyes",
    "eyebrows": "brows",
    "mouth": "mouth",
    "glasses": "glasses",
}


@dataclass(frozen=True)
class Drawn:
    """How DiceBear draws the attributes in one style.

    colours: names of the style's colours by what they are of. short, long: options for hair of that length. closed,
    open: variants of the mouth; a style without one of them always has the other. glasses: variants, () where the style
    has none. options: what is the same in all pictures. parts: exceptions from PART_OF.
    """

    colours: Mapping[str, str]
    short: Mapping[str, Any]
    long: Mapping[str, Any]
    closed: Sequence[str]
    open: Sequence[str]
    glasses: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)


def _variants(form: str, *numbers: int) -> list[str]:
    return [form.format(number) for number in numbers]


STYLES: dict[str, Drawn] = {
    "toon-head": Drawn(
        {"hair": "hair", "skin": "skin", "clothes": "clothes"},
        {"hairVariant": ["sideComed", "spiky", "undercut"], "rearHairProbability": 0},
        {"hairVariant": ["sideComed", "bun"], "rearHairProbability": 100, "rearHairVariant": ["longStraight"]},
        ["smile", "sad"],
        ["laugh", "agape"],
        options={
            "scale": 1.1,
            "beardProbability": 0,
            "eyesVariant": ["wide", "happy"],
            "clothesVariant": ["tShirt", "turtleNeck", "dress"],
        },
    ),
    "micah": Drawn(
        {"hair": "hair", "skin": "base", "clothes": "shirt"},
        {"hairVariant": ["fonze", "mrT"]},
        {"hairVariant": ["full", "pixie"]},
        ["smile", "smirk", "frown", "sad"],
        ["laughing", "surprised", "nervous"],
        ["round", "square"],
        options={
            "scale": 1.1,
            "hairProbability": 100,
            "clothesVariant": ["crew", "open"],
            "earringsProbability": 0,
            "facialHairProbability": 0,
            "glassesColor": [GLASSES],
            "eyesVariant": ["eyes", "round", "smiling"],
        },
    ),
    "adventurer": Drawn(
        {"hair": "hair", "skin": "skin"},
        {"hairVariant": _variants("short{:02d}", 1, 2, 3, 4, 5, 7, 10, 11)},
        {"hairVariant": _variants("long{:02d}", 4, 5, 7, 9, 15)},
        _variants("variant{:02d}", 2, 4, 9, 10, 29),
        _variants("variant{:02d}", 14, 15, 25, 26, 27, 28),
        _variants("variant{:02d}", 1, 2, 3, 4, 5),
        options={
            "scale": 1.25,
            "earringsProbability": 0,
            "detailsProbability": 0,
            "glassesColor": [GLASSES],
        },
    ),
    "miniavs": Drawn(
        {"hair": "hair", "skin": "skin", "clothes": "body"},
        {"hairVariant": ["classic01", "classic02", "curly", "elvis", "stylish"]},
        {"hairVariant": ["long", "ponyTail"]},
        [],
        ["default", "missingTooth"],
        ["normal"],
        options={"scale": 1.1, "blushProbability": 0, "mustacheProbability": 0, "eyesVariant": ["happy", "normal"]},
        parts={"body": "clothes"},
    ),
    "pixel-art": Drawn(
        {"hair": "hair", "skin": "skin", "clothes": "clothing"},
        {"hairVariant": _variants("short{:02d}", 1, 2, 5, 6, 8, 9, 14, 15, 16)},
        {"hairVariant": _variants("long{:02d}", 3, 7, 9, 12, 13, 17)},
        _variants("sad{:02d}", 4, 5, 6, 7, 8),
        ["happy12"],
        _variants("dark{:02d}", 1, 2, 5, 6),
        options={
            "beardProbability": 0,
            "hatProbability": 0,
            "accessoriesProbability": 0,
            "glassesColor": [GLASSES],
            "mouthColor": ["de0f0d"],
            "clothesVariant": _variants("variant{:02d}", 3, 4, 5, 8, 12),
        },
    ),
    "big-ears": Drawn(
        {"hair": "hair", "skin": "skin"},
        {"hairVariant": _variants("short{:02d}", 8, 11, 13, 14, 15, 16, 17, 20)},
        {"hairVariant": _variants("long{:02d}", 3, 7, 8, 9, 12, 18)},
        _variants("variant{:04d}", 702, 704, 705, 707, 708),
        _variants("variant{:04d}", 101, 102, 103, 501, 502, 503),
        options={"scale": 1.3, "translateY": -4, "detailsProbability": 0},
    ),
}


@dataclass(frozen=True)
class Face:
    """What a picture shows; names of colours are keys of COLOURS."""

    style: str
    hair: str
    skin: str
    background: str
    clothes: str = ""  # of a style without clothes: none
    glasses: bool = False
    mouth_open: bool = False
    long_hair: bool = False

    @property
    def vector(self) -> list[int]:
        """Zeros and ones in the order of ATTRIBUTES."""
        there = {f"{what}_{getattr(self, what)}" for what in COLOURS}
        there |= {flag for flag in FLAGS if getattr(self, flag)}
        return [int(name in there) for name in ATTRIBUTES]


def face_of(style: str, seed: str) -> Face:
    """The attributes of a picture, each drawn by itself and with equal chances."""
    dice, drawn = random.Random(f"attributes of {seed} in {style}"), STYLES[style]
    colours = {what: dice.choice([*names]) for what, names in COLOURS.items()}
    if "clothes" not in drawn.colours:
        colours["clothes"] = ""
    glasses, mouth, hair = (dice.random() < 0.5 for _ in FLAGS)
    mouth_open = (mouth or not drawn.closed) and bool(drawn.open)
    return Face(style, **colours, glasses=glasses and bool(drawn.glasses), mouth_open=mouth_open, long_hair=hair)


def options_of(face: Face, seed: str) -> dict[str, Any]:
    """DiceBear's options for a face; what no attribute decides follows from the seed."""
    drawn = STYLES[face.style]
    colours = {f"{name}Color": [COLOURS[what][getattr(face, what)]] for what, name in drawn.colours.items()}
    glasses = {"glassesVariant": [*drawn.glasses], "glassesProbability": 100 * face.glasses} if drawn.glasses else {}
    return {
        **drawn.options,
        **(drawn.long if face.long_hair else drawn.short),
        **colours,
        **glasses,
        "mouthVariant": [*(drawn.open if face.mouth_open else drawn.closed)],
        "backgroundColor": [BACKGROUND[face.background]],
        "seed": seed,
    }


# ------------------------------------------------------------------------------------------------- flat drawings


@functools.cache
def definition(style: str) -> dict[str, Any]:
    """The drawing parts of a style. If the demo's packages are missing, the program exits with a message."""
    try:
        text = files("dicebear_styles").joinpath(f"{style}.json").read_text("utf-8")
    except ImportError:
        sys.exit("error: the demo's packages are missing: pip install 'stylegan-pg[demo]'")
    return json.loads(text)


def credit(style: str) -> str:
    """The line that the licence of a style asks for."""
    meta = definition(style)["meta"]
    return (
        f"{meta['source']['name']} by {meta['creator']['name']} ({meta['source']['url']}), licensed under "
        f"{meta['license']['name']} ({meta['license']['url']}), drawn by DiceBear with other colours."
    )


class Flat:
    """A style in which each element has a colour of its own, so that a drawing says which element each pixel shows.

    definition: with the colours of numbers 1, 2, ...; parts: the place in PARTS for each number, that of the background
    for 0. Shading, which is translucent, is left out: what it lies on is what a pixel shows.
    """

    KEPT = frozenset({"mask", "clipPath", "defs", "linearGradient", "radialGradient", "filter"})  # which are not drawn

    def __init__(self, style: str):
        whole, exceptions = definition(style), STYLES[style].parts
        self.parts = [PARTS.index("background")]
        self.definition = {
            **whole,
            "attributes": {**whole.get("attributes", {}), "shape-rendering": "crispEdges"},
            "canvas": {**whole["canvas"], "elements": self._elements(whole["canvas"]["elements"], "skin")},
            "components": {},
        }
        for name, component in whole["components"].items():
            part = exceptions.get(name) or PART_OF.get(name, "skin")
            variants = {
                key: {**variant, "elements": self._elements(variant["elements"], part)}
                for key, variant in component.get("variants", {}).items()
            }
            new = {**component, "variants": variants} if variants else component
            self.definition["components"][name] = new

    def _elements(self, elements: Sequence[Mapping[str, Any]], part: str) -> list[Any]:
        return [new for element in elements if (new := self._element(element, part)) is not None]

    def _element(self, element: Mapping[str, Any], part: str) -> Mapping[str, Any] | None:
        if element.get("type") != "element" or element["name"] in self.KEPT:
            return element
        a = dict(element.get("attributes", {}))
        if _below_1(a, "opacity") or "mix-blend-mode" in str(a.get("style", "")):
            return None
        for paint in ("fill", "stroke"):
            if _below_1(a, f"{paint}-opacity"):
                a[paint] = "none"
                del a[f"{paint}-opacity"]
        painted = [paint for paint in ("fill", "stroke") if a.get(paint, "none") != "none"]
        if painted:
            a |= dict.fromkeys(painted, f"#{len(self.parts):06x}")
            self.parts.append(PARTS.index(part))
        new = {**element, "attributes": a}
        return new | ({"children": self._elements(element["children"], part)} if "children" in element else {})


def _below_1(attributes: Mapping[str, Any], name: str) -> bool:
    return float(attributes.get(name, 1)) < 1
