"""Further fields in tars of other programs: by the suffixes of their members, where all samples have them alike."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from packing import encoded, folder_of, noise, packed, tar_of
from PIL import Image

from stylegan_pg.data.datasets.contact_sheet import contact_sheet
from stylegan_pg.data.datasets.fields import MAX_ENTRIES, Field
from stylegan_pg.data.datasets.mixture import mix
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.table import CorruptSample
from stylegan_pg.data.verify import check, info
from stylegan_pg.errors import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path_factory.mktemp("cache")))


def npy(values: Any, dtype: Any = None) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype), allow_pickle=True)
    return buffer.getvalue()


def mask(i: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 19, (size, size), dtype=np.uint8))


def samples(count: int = 3, **further: Any) -> dict[str, bytes]:
    """The members of pictures 000.png and so on, each followed by what `further` makes of its number."""
    members = {}
    for i in range(count):
        members[f"{i:03d}.png"] = encoded(noise(i))
        members |= {f"{i:03d}.{suffix.replace('__', '.')}": make(i) for suffix, make in further.items()}
    return members


EVERY: dict[str, Any] = {
    "txt": lambda i: f"text {i}".encode(),
    "de__txt": lambda i: f"Text {i}".encode(),
    "mask__png": lambda i: encoded(mask(i)),
    "B__jpg": lambda i: encoded(noise(50 + i), "JPEG"),
    "depth__png": lambda i: encoded(noise(70 + i).convert("L")),
    "npy": lambda i: npy([i, 0.5, -1], np.float64),
    "tokens__npy": lambda i: npy([[i, 1], [2, 3]], ">i8"),
    "json": lambda i: b'{"caption": "not this"}',
    "bin": lambda i: b"?",
}
FIELDS = {
    "caption": Field("text"),
    "de": Field("text"),
    "mask": Field("mask", channels=1),
    "B": Field("image", channels=3),
    "depth": Field("image", channels=1),
    "array": Field("vector", 3),
    "tokens": Field("array", shape=(2, 2), dtype="int64"),
}


def test_every_kind_of_member_is_a_field(tmp_path):
    tar_of(tmp_path / "0.tar", samples(**EVERY))
    tar_of(tmp_path / "1.tar", {f"x{name}": data for name, data in samples(2, **EVERY).items()})
    for _ in range(2):  # read, and from the cache
        index = load_index(str(tmp_path))
        assert index.fields == FIELDS
        table: Any = index.table(16)
        for place, i in enumerate([0, 1, 2, 0, 1]):
            assert table.value("caption", place) == f"text {i}"
            assert table.value("de", place) == f"Text {i}"
            assert np.array_equal(table.value("mask", place)[0], np.array(mask(i)))
            assert np.array_equal(table.value("depth", place)[0], np.array(noise(70 + i).convert("L")))
            assert table.value("B", place).shape == (3, 16, 16)
            assert table.value("array", place).tolist() == [i, 0.5, -1]
            tokens = table.value("tokens", place)
            assert (tokens.tolist(), tokens.dtype) == ([[i, 1], [2, 3]], np.dtype("int64"))
    assert table.vectors["array"].dtype == np.float32
    assert not index.notes[1:]
    assert list(check(index, [16], workers=1)) == []
    assert "field tokens: array of int64 [2, 2]" in list(info(index))
    contact_sheet(index, tmp_path / "sheet.png")


def test_identity_and_keys_are_those_without_fields(tmp_path):
    """So that runs that began before fields were known continue."""
    members = samples(**EVERY)
    index = load_index(str(tar_of(tmp_path / "a.tar", members)))
    assert index.source_of(1) == "001"
    kept = {name for name in members if name.count(".") == 1 and name.endswith("png")}
    unknown = (name if name in kept else f"{name[:-3]}x{k:02d}" for k, name in enumerate(members))
    ignored = dict(zip(unknown, members.values(), strict=True))
    other = load_index(str(tar_of(tmp_path / "b.tar", ignored)))
    assert (other.fields, other.identity) == ({}, index.identity)


@pytest.mark.parametrize(
    ("parts", "first", "others"),
    [
        ("B A", "A", ["B"]),
        ("A image", "image", ["A"]),
        ("mask img", "img", ["mask"]),
        ("right left", "left", ["right"]),
        ("seg picture y", "picture", ["seg", "y"]),
    ],
)
def test_of_several_pictures_one_is_shown(tmp_path, parts, first, others):
    members = {f"{i}.{part}.png": encoded(mask(i)) for i in range(2) for part in parts.split()}
    index = load_index(str(tar_of(tmp_path / "a.tar", members)))
    assert (index.count, sorted(index.fields), index.channels) == (2, others, 1)
    assert [index.source_of(i) for i in range(2)] == ["0", "1"]
    assert index.table(16).read(1) == members[f"1.{first}.png"]
    assert f"{first}.png is shown, with " in index.notes[0]


def test_tars_of_one_sample_follow_those_of_several(tmp_path):
    for name, numbers in (("0", [0]), ("1", [1, 2])):
        members = {f"{i}.{side}.png": encoded(noise(i)) for i in numbers for side in ("left", "right")}
        tar_of(tmp_path / f"{name}.tar", members)
    index = load_index(str(tmp_path))
    assert (index.count, sorted(index.fields)) == (3, ["right"])


def test_tars_that_show_different_pictures_are_refused(tmp_path):
    for name, sides in (("0", ("left", "right")), ("1", ("near", "right"))):
        members = {f"{i}.{side}.png": encoded(noise(i)) for i in range(2) for side in sides}
        tar_of(tmp_path / f"{name}.tar", members)
    with pytest.raises(UsageError, match=r"the first of which is left\.png in .*0\.tar and near\.png in .*1\.tar"):
        load_index(str(tmp_path))


def test_a_picture_named_as_a_mask_in_colours_is_a_picture(tmp_path):
    members = samples(seg__png=lambda i: encoded(noise(i)), label__map__png=lambda i: encoded(mask(i).convert("P")))
    index = load_index(str(tar_of(tmp_path / "a.tar", members)))
    assert index.fields == {"seg": Field("image", channels=3), "label_map": Field("mask", channels=1)}


@pytest.mark.parametrize(
    ("suffix", "make"),
    {
        "missing in some": ("x__png", None),
        "no picture": ("x__png", lambda i: b"?"),
        "another shape": ("x__png", lambda i: encoded(noise(i, 16).resize((16, 20)))),
        "several shapes": ("x__npy", lambda i: npy([0] * (i + 1))),
        "several types": ("x__npy", lambda i: npy([0], ["i4", "i8", "i8"][i])),
        "objects": ("x__npy", lambda i: npy([{}], object)),
        "texts": ("x__npy", lambda i: npy(["a"])),
        "no array": ("x__npy", lambda i: b"\x93NUMPY\x01\x00v\x00{"),
        "nothing in it": ("x__npy", lambda i: npy([])),
        "more than there is": ("x__npy", lambda i: npy(np.zeros(9)).replace(b"(9,)", b"(8,)")),
    }.values(),
)
def test_members_that_are_not_alike_are_no_fields(tmp_path, suffix, make):
    further: dict[str, Any] = {suffix: make or (lambda i: encoded(noise(i)))}
    members = samples(**further)
    if make is None:
        del members["001.x.png"]
    index = load_index(str(tar_of(tmp_path / "a.tar", members)))
    assert (index.count, index.fields) == (3, {})
    assert index.notes[-1].startswith("members that are not alike in all samples, and are no fields: x")


def test_samples_and_whole_tars_may_lack_texts(tmp_path):
    members = samples(txt=lambda i: b"here")
    del members["001.txt"]
    tar_of(tmp_path / "0.tar", members)
    tar_of(tmp_path / "1.tar", {f"x{name}": data for name, data in samples().items()})
    table = load_index(str(tmp_path)).table(8)
    assert [table.value("caption", i) for i in range(6)] == ["here", "", "here", "", "", ""]


def json_members(*contents: Any) -> dict[str, bytes]:
    further: dict[str, Any] = {"json": lambda i: json.dumps(contents[i]).encode()}
    return samples(len(contents), **further)


def test_captions_in_json(tmp_path):
    contents = [{"caption": " a face "}, {"caption": "", "prompt": "b"}, {"text": ["c", "d "]}, {"caption": 5}, [1]]
    path = tar_of(tmp_path / "0.tar", json_members(*contents, {"caption": "\ud800"}))
    tar_of(tmp_path / "1.tar", {f"x{name}": data for name, data in samples(1, txt=lambda i: b"{}").items()})
    index = load_index(str(tmp_path))
    assert (index.fields, index.notes) == ({"caption": Field("text")}, ())
    table = index.table(8)
    assert [table.value("caption", i) for i in range(7)] == ["a face", "b", "c\nd", "", "", "", "{}"]
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"caption": " a', b'["caption": " a'))
    table.report_damage(0)
    with pytest.raises(CorruptSample, match="its json is not JSON"):
        table.value("caption", 0)


def test_txt_members_go_before_captions_in_json(tmp_path):
    members = json_members({"caption": "x"}, {"caption": "y"}) | {"000.txt": b"t"}
    ordered = dict(sorted(members.items()))
    table = load_index(str(tar_of(tmp_path / "0.tar", ordered))).table(8)
    assert [table.value("caption", i) for i in range(2)] == ["t", ""]


@pytest.mark.parametrize(
    ("contents", "size", "values"),
    [
        ([{"label": [1, 0.5]}, {"label": [3, -1]}], 2, [[1, 0.5], [3, -1]]),
        ([{"label": ["young", "smiling"]}, {"label": []}], 2, [[1, 1], [0, 0]]),
        ([{"label": [1], "caption": "x"}, {"label": [2]}], 1, [[1], [2]]),
    ],
)
def test_lists_in_json_are_vectors(tmp_path, contents, size, values):
    tar_of(tmp_path / "0.tar", json_members(*contents))
    tar_of(tmp_path / "1.tar", {f"x{name}": data for name, data in json_members(*contents).items()})
    index = load_index(str(tmp_path))
    assert (index.fields["labels"].size, index.label_names, index.notes) == (size, (), ())
    assert index.table(8).vectors["labels"].tolist() == values * 2
    assert list(check(index, [16], workers=1)) == []


def test_a_class_and_a_vector(tmp_path):
    members = json_members({"label": [1, 2]}, {"label": [3, 4]}) | {"000.cls": b"b", "001.cls": b"a"}
    index = load_index(str(tar_of(tmp_path / "0.tar", dict(sorted(members.items())))))
    assert (index.label_names, index.table(8).label.tolist()) == (("a", "b"), [1, 0])
    assert index.table(8).vectors["labels"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("contents", "why"),
    [
        ([{"label": [1, 2]}, {"label": [3]}], "vectors of 1 and 2 numbers"),
        ([{"label": [1, 2]}, {}], "1 samples have none"),
        ([{"label": [1, 2]}, {"label": 7}], "1 samples have none"),
        ([{"label": [1, float("nan")]}, {"label": [1, 2]}], "finite numbers"),
        ([{"label": [[1]]}, {"label": [1]}], "finite numbers"),
    ],
)
def test_lists_that_do_not_fit_are_noted(tmp_path, contents, why):
    index = load_index(str(tar_of(tmp_path / "0.tar", json_members(*contents))))
    assert index.fields == {}
    assert why in index.notes[0]
    assert "a list as label in their .json, which is not used" in index.notes[0]


def test_members_named_labels_go_before_lists_in_json(tmp_path):
    further: dict[str, Any] = {"labels__npy": lambda i: npy([0.5]), "json": lambda i: b'{"label": [1, 2]}'}
    index = load_index(str(tar_of(tmp_path / "0.tar", samples(**further))))
    assert index.fields == {"labels": Field("vector", 1)}
    assert index.notes[0].endswith("which is not used: other members are named labels")


def test_tars_with_other_fields_have_those_in_common(tmp_path):
    tar_of(tmp_path / "0.tar", samples(npy=lambda i: npy([0.5]), B__png=lambda i: encoded(noise(i))))
    second = samples(npy=lambda i: npy([0.5, 1]), B__png=lambda i: encoded(noise(i).convert("L")))
    tar_of(tmp_path / "1.tar", {f"x{name}": data for name, data in second.items()})
    index = load_index(str(tmp_path))
    assert index.fields["B"].kind == "image"
    assert np.shape(index.table(8).value("B", 4)) == (index.fields["B"].channels, 8, 8)
    assert "array" not in index.fields
    assert "no fields: array" in index.notes[-1]


def test_long_and_integer_arrays_are_no_vectors(tmp_path):
    long = np.zeros(MAX_ENTRIES + 1, np.float32)
    members = samples(long__npy=lambda i: npy(long), whole__npy=lambda i: npy([1, 2]), nan__npy=lambda i: npy([np.nan]))
    index = load_index(str(tar_of(tmp_path / "a.tar", members)))
    assert {name: one.kind for name, one in index.fields.items()} == dict.fromkeys(["long", "whole", "nan"], "array")


def test_names_are_made_to_fit(tmp_path):
    names = ["image__png", "class__npy", "1__txt", "x-y__txt", "x__y__txt", "X_Y__txt", f"{'n' * 90}__txt"]
    contents = {"png": lambda i: encoded(noise(i)), "npy": lambda i: npy([1]), "txt": lambda i: b"x"}
    further: dict[str, Any] = {name: contents[name[-3:]] for name in names}
    members = samples(**further)
    index = load_index(str(tar_of(tmp_path / "a.tar", members)))
    expected = {"picture_image", "array_class", "text_1", "x_y", "X_Y_2", "x_y_3", "n" * 20}
    assert {name.lower() for name in index.fields} == {name.lower() for name in expected}


def test_an_array_that_changes_after_indexing_is_a_bad_sample(tmp_path):
    path = tar_of(tmp_path / "a.tar", samples(t__npy=lambda i: npy([1, 2])))
    table = load_index(str(path)).table(8)
    data = path.read_bytes()
    at = int(table.members["t"].offset[1])
    for old, new, message in (
        (b"'<i8'", b"'|O8'", "its t holds object, no plain numbers"),
        (b"(2,)", b"(3,)", "has 16 bytes of numbers, where its shape needs 24"),
        (b"(2,), }            ", b"(999999999999999,),}", "bytes of numbers, where its shape needs 79999999"),
        (b"(2,)", b"(1,)", "has 16 bytes of numbers, where its shape needs 8"),
        (b"'<i8'", b"'<u8'", r"its t is uint64 \[2\], not int64 \[2\]"),
        (b"\x93NUMPY\x01", b"\x93NUMPY\x09", "is a .npy file of version 9.0"),
        (b"\x93NUMPY", b"\x80\x04\x95pik", r"is no \.npy file"),
    ):
        end = at + int(table.members["t"].size[1])
        assert old in data[at:end]
        changed = data[:at] + data[at:end].replace(old, new)[: end - at] + data[end:]
        path.write_bytes(changed)
        table.report_damage(1)
        with pytest.raises(CorruptSample, match=message):
            table.value("t", 1)


def test_packed_tars_without_their_index_have_the_same_fields(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    for name in ("a", "b"):
        (source / f"{name}.txt").write_text(name)
    (tmp_path / "l.json").write_text(json.dumps({"a.png": [1, 2], "b.png": [3, 4]}))
    pairs = folder_of(tmp_path / "B", ["a.png", "b.png"])
    masks = tmp_path / "m"
    masks.mkdir()
    for i, name in enumerate("ab"):
        mask(i).save(masks / f"{name}.png")
    packed(
        source, tmp_path / "out", 16,
        captions="auto", labels=tmp_path / "l.json", pair=f"B={pairs}", mask=f"mask={masks}", format="png",
    )  # fmt: skip
    ours, foreign = load_index(str(tmp_path / "out")), load_index(str(tmp_path / "out" / "r0016" / "00000.tar"))
    assert foreign.fields == ours.fields
    for name in ours.fields:
        assert np.array_equal(ours.table(16).value(name, 1), foreign.table(16).value(name, 1))
    assert mix([ours, foreign], [1, 1]).table(16).fields == ours.fields


def test_tars_of_webdataset_s_writer(tmp_path):
    writing: Any = webdataset
    with writing.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            pixels = np.asarray(noise(i))
            writer.write({"__key__": f"{i}", "png": pixels, "txt": "a", "npy": np.ones(4, np.float32), "__url__": "x"})
    index = load_index(str(Path(tmp_path / "a.tar")))
    assert index.fields == {"caption": Field("text"), "array": Field("vector", 4)}
