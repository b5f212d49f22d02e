"""demo/avatars.py: what is packed with the drawings is true of them."""

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError

pytest.importorskip("dicebear")
pytest.importorskip("resvg_py")
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
import avatar_styles
import avatars
from avatar_styles import ATTRIBUTES, BACKGROUND, COLOURS, HAIR, PARTS, STYLES, Face, face_of
from avatars import draw, pack_avatars

SIZE = 64
SOME = [f"0-{i}" for i in range(4)]


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)], float)


def arrays(face: Face, seed: str, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture [size, size, 3], mask and edges [size, size], as numbers."""
    return tuple(np.array(one).astype(float) for one in draw(face, seed, size))  # type: ignore[return-value]


def inner(there: np.ndarray) -> np.ndarray:
    """The places that are true with all their neighbours."""
    padded = np.pad(there, 1, constant_values=True)
    parts = [
        padded[1 + i :][: len(there), 1 + j :][:, : there.shape[1]] for i, j in itertools.product((-1, 0, 1), repeat=2)
    ]
    return np.logical_and.reduce(parts)


@pytest.mark.parametrize("style", STYLES)
def test_parts_have_the_colours_that_the_attributes_name(style):
    """More than half of what the mask says is hair has the named hair colour, and no other one of the list; likewise
    skin, clothes and background. (The rest is outlines and shading.)"""
    for seed in SOME:
        face = face_of(style, seed)
        picture, mask, _ = arrays(face, seed, 192)
        for what, names in COLOURS.items():
            seen = picture[mask == PARTS.index(what)]
            if what not in {*STYLES[style].colours, "background"}:
                assert not seen.size
                continue
            assert len(seen) > 20, (what, seed)
            shares = {name: (abs(seen - rgb(colour)).max(axis=1) < 30).mean() for name, colour in names.items()}
            named = shares.pop(getattr(face, what))
            assert named > (0.95 if what == "background" else 0.5), (what, seed, named)
            assert max(shares.values()) < 0.15, (what, seed, shares)


@pytest.mark.parametrize("style", STYLES)
def test_masks_lie_exactly_on_the_pictures(style):
    """What changes with the background's colour is the background: a pixel belongs to it if more than half of it
    changes. What changes with the colour of the hair is hair, or eyes and brows in it."""
    for seed in SOME:
        face = face_of(style, seed)
        picture, mask, _ = arrays(face, seed)
        other = next(name for name in BACKGROUND if name != face.background)
        change = (rgb(BACKGROUND[other]) - rgb(BACKGROUND[face.background]))[None, None]
        moved = ((arrays(replace(face, background=other), seed)[0] - picture) * change).sum(axis=2) / (change**2).sum()
        clear = abs(moved - 0.5) > 0.2
        assert clear.mean() > 0.95
        assert ((moved > 0.5) == (mask == 0))[clear].mean() > 0.998, seed
        assert not np.array_equal((moved > 0.5)[:, 2:], (mask == 0)[:, :-2])  # two pixels aside it would not
        hair = next(name for name in HAIR if name != face.hair)
        changed = abs(arrays(replace(face, hair=hair), seed)[0] - picture).max(axis=2) > 40
        allowed = np.isin(mask, [PARTS.index(part) for part in ("hair", "brows", "eyes")])
        assert not changed[inner(~allowed)].any(), seed
        assert changed[inner(mask == PARTS.index("hair"))].mean() > 0.5, seed


@pytest.mark.parametrize("style", STYLES)
def test_edges_lie_on_the_borders_of_the_parts(style):
    for seed in SOME:
        picture, mask, edges = arrays(face_of(style, seed), seed)
        borders = np.zeros(mask.shape, bool)
        borders[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        borders[1:] |= mask[1:] != mask[:-1]
        lines = edges < 128
        assert lines[inner(~borders)].mean() < lines[borders].mean() / 3
        near = ~inner(~lines)  # lines and their neighbours
        assert near[borders].all(), seed
        assert near[:, 4:][borders[:, :-4]].mean() < 0.9  # four pixels aside they would not lie there
        # Where there is no line, neighbours have one colour, but for shading.
        steps = abs(np.diff(picture, axis=1)).max(axis=2)
        free = (edges[:, 1:] == 255) & (edges[:, :-1] == 255)
        assert (steps[free] < 25).mean() > 0.97
        assert steps[~free].mean() > 5 * steps[free].mean()


@pytest.mark.parametrize("style", STYLES)
def test_flags_are_drawn(style):
    drawn, found = STYLES[style], {}
    for flag in ("glasses", "mouth_open", "long_hair"):
        pairs = [replace(face_of(style, seed), **{flag: on}) for seed in SOME for on in (False, True)]
        found[flag] = [arrays(face, SOME[i // 2])[1] for i, face in enumerate(pairs)]
    there = [(mask == PARTS.index("glasses")).any() for mask in found["glasses"]]
    assert there == [False, bool(drawn.glasses)] * len(SOME)
    if drawn.closed:
        areas = [(mask == PARTS.index("mouth")).sum() for mask in found["mouth_open"]]
        assert sum(areas[1::2]) > 1.2 * sum(areas[::2])
    lowest = [np.flatnonzero((mask == PARTS.index("hair")).any(axis=1)).max() for mask in found["long_hair"]]
    assert all(long > short for short, long in zip(lowest[::2], lowest[1::2], strict=True))


def test_options_are_those_of_the_attributes():
    """What DiceBear says that it has drawn."""
    from dicebear import Avatar, Style

    for style, seed in itertools.product(STYLES, SOME):
        face, drawn = face_of(style, seed), STYLES[style]
        said = Avatar(Style(avatar_styles.definition(style)), avatar_styles.options_of(face, seed)).to_json()["options"]
        for what, name in drawn.colours.items():
            assert said[f"{name}Color"] == [f"#{COLOURS[what][getattr(face, what)]}"]
        assert said["mouthVariant"] in (drawn.open if face.mouth_open else drawn.closed)
        assert (said.get("glassesVariant") in drawn.glasses) == face.glasses
        assert said["hairVariant"] in (drawn.long if face.long_hair else drawn.short)["hairVariant"]


def test_vectors_and_captions_say_the_same():
    for style, i in itertools.product(STYLES, range(20)):
        face = face_of(style, f"1-{i}")
        there = {name for name, value in zip(ATTRIBUTES, face.vector, strict=True) if value}
        captions, named = avatars.captions_of(face, f"1-{i}"), set()
        assert len({*captions}) == len(captions) == len(avatars.WORDINGS)
        for caption in captions:
            for what in COLOURS:
                for colour in re.findall(rf"(\w+) {what}\b", caption):
                    if colour in COLOURS[what]:
                        named.add(f"{what}_{colour}")
            if "hair" in caption:
                length = re.search(r"(long|short)\b", caption)
                named |= {"long_hair"} if length and length[0] == "long" else set()
                assert not length or (length[0] == "long") == face.long_hair
            assert ("without glasses" in caption) <= (not face.glasses)
            assert ("with glasses" in caption) <= face.glasses
            assert ("open mouth" in caption) <= face.mouth_open
            assert ("closed mouth" in caption) <= (not face.mouth_open)
            named |= {"glasses"} if "with glasses" in caption else set()
            named |= {"mouth_open"} if "open mouth" in caption else set()
        assert named == there


def test_attributes_are_drawn_by_chance_and_by_themselves():
    vectors = np.array([face_of("micah", f"2-{i}").vector for i in range(600)])
    for what, names in COLOURS.items():
        columns = [ATTRIBUTES.index(f"{what}_{name}") for name in names]
        assert (vectors[:, columns].sum(axis=1) == 1).all()
        assert vectors[:, columns].mean(axis=0) == pytest.approx(1 / len(names), abs=0.07)
    correlations = np.corrcoef(vectors[:, [ATTRIBUTES.index("hair_red"), *range(len(ATTRIBUTES))[-3:]]].T)
    assert abs(correlations - np.eye(4)).max() < 0.13


# --------------------------------------------------------------------------------------------------------- packing


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("avatars") / "out"
    pack_avatars(out, 16, 40, ("micah", "pixel-art"))
    return out


def test_all_fields_are_packed(packed):
    indexes = {part: load_index(str(packed / part)) for part in ("train", "held-out")}
    assert {part: index.count for part, index in indexes.items()} == {"train": 36, "held-out": 4}
    for index in indexes.values():
        assert list(index.label_names) == ["micah", "pixel-art"]
        assert index.fields == {
            "attributes": Field("vector", len(ATTRIBUTES), names=ATTRIBUTES),
            "caption": Field("text"),
            "edges": Field("image", channels=1),
            "parts": Field("mask", channels=1),
        }
    index = indexes["train"]
    table, paths = index.table(16), json.loads((packed / "train" / "sources.json").read_text())
    for i in (0, 7, 35):
        style, number = paths[i].removesuffix(".png").split("/")
        seed = f"0-{int(number)}"
        face = face_of(style, seed)
        drawing = draw(face, seed, 16)
        assert index.label_names[table.label[i]] == style
        assert table.vectors["attributes"][i].tolist() == face.vector
        assert np.array_equal(table.image(i), np.array(drawing.picture).transpose(2, 0, 1))
        assert np.array_equal(table.value("parts", i)[0], np.array(drawing.parts))
        assert np.array_equal(table.value("edges", i)[0], np.array(drawing.edges))
        assert str(table.value("caption", i)).split("\n") == avatars.captions_of(face, seed)
    assert json.loads((packed / "parts.json").read_text()) == list(PARTS)
    credits = (packed / "CREDITS.txt").read_text()
    assert "Micah Lanier" in credits
    assert "CC BY 4.0" in credits
    assert Image.open(packed / "sheet.png").size == (4 * 3 * 96, 2 * 96)
    assert not [*packed.glob("*.new*")]


def test_a_killed_run_leaves_complete_files_and_continues(packed, tmp_path, monkeypatch):
    save, made = Image.Image.save, []

    def dying(self: Image.Image, path: Path, **how: Any) -> None:
        made.append(path)
        if len(made) == 20:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        save(self, path, **how)

    monkeypatch.setattr(Image.Image, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        pack_avatars(tmp_path, 16, 40, ("micah", "pixel-art"))
    monkeypatch.undo()
    pictures = [*tmp_path.rglob("*.png")]
    assert len(pictures) == 19
    assert all(Image.open(path).convert("RGB").size == (16, 16) for path in pictures)
    pack_avatars(tmp_path, 16, 40, ("micah", "pixel-art"))
    for part in ("train", "held-out"):
        ours, theirs = (json.loads((folder / part / "index.json").read_text()) for folder in (tmp_path, packed))
        assert ours["identity"] == theirs["identity"]
    before = (tmp_path / "train" / "index.json").stat().st_mtime_ns
    pack_avatars(tmp_path, 16, 40, ("micah", "pixel-art"))
    assert (tmp_path / "train" / "index.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("size", "styles", "message"),
    [
        (16, ("shapes",), "styles = shapes: give some of toon-head, micah"),
        (16, (), "styles = none: give some of"),
        (32, ("micah", "pixel-art"), "holds avatars that were drawn otherwise: remove it"),
    ],
)
def test_what_cannot_be_packed_is_refused(packed, size, styles, message):
    with pytest.raises(UsageError, match=message):
        pack_avatars(packed, size, 40, styles)


def test_licences_allow_changes():
    for style in STYLES:
        licence = avatar_styles.definition(style)["meta"]["license"]
        assert licence["name"] in ("CC BY 4.0", "CC0 1.0")
        assert "creativecommons.org" in licence["url"]
        assert licence["name"] in avatar_styles.credit(style)


def test_the_command(tmp_path, monkeypatch, capsys):
    given = ["avatars.py", tmp_path / "out", "--size", 16, "--count", 10, "--styles", "toon-head", "--workers", 1]
    monkeypatch.setattr(sys, "argv", [str(one) for one in given])
    avatars.main()
    assert "ToonHead by Johan Melin" in capsys.readouterr().out
    assert load_index(str(tmp_path / "out" / "train")).count == 9
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-2], "--seed", "2"])
    with pytest.raises(SystemExit, match="drawn otherwise"):
        avatars.main()
