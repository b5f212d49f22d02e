"""Packed datasets of format 2 whose checksums are right and whose further fields are wrong: one message that names the
file, or a bad sample, and no memory for what is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from packing import folder_of, noise, packed
from test_hostile_datasets import change_index, change_shard, refused, setter

from stylegan_pg.data.datasets import arrays
from stylegan_pg.data.datasets.arrays import BadArray, read_array, written_array
from stylegan_pg.data.datasets.fields import MAX_ARRAY, MAX_FIELDS
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.table import CorruptSample


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Six pictures with captions, vectors, pairs and masks at 4x4 and 8x8, in several shards."""
    top = tmp_path_factory.mktemp("original")
    names = [f"{i}.png" for i in range(6)]
    source, pairs = folder_of(top / "in", names), folder_of(top / "B", names)
    (top / "m").mkdir()
    for i, name in enumerate(names):
        noise(i).convert("L").save(top / "m" / name)
        (source / name).with_suffix(".txt").write_text("text")
    (top / "l.json").write_text(json.dumps({name: [i, 0.5] for i, name in enumerate(names)}))
    packed(
        source, top / "out", captions="auto", labels=top / "l.json", pair=f"B={pairs}", mask=f"m={top / 'm'}",
        shard_size="11kB",
    )  # fmt: skip
    assert len(load_index(str(top / "out")).shards) > 1
    return top / "out"


@pytest.fixture
def dataset(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def array(**facts) -> dict:
    return {"kind": "array", "shape": [2], "dtype": "int64"} | facts


INDEX = {
    "table of 1 to": [
        setter("fields", {}), setter("fields", None), setter("fields", [1]), lambda c: c.pop("fields") and None,
        setter("fields", {f"a{i}": {"kind": "text"} for i in range(MAX_FIELDS + 1)}),
    ],
    "name": [
        setter("fields", name, {"kind": "text"})
        for name in ("", "image", "Class", "../x", "1a", "a.b", "\x1b[2J", "a" * 33, "é", "a b")
    ],
    "told apart": [setter("fields", "b", {"kind": "text"})],
    "kinds": [setter("fields", "B", "kind", "video"), setter("fields", "B", 5), setter("fields", "B", {})],
    "entries": [
        setter("fields", "B", "more", 1), setter("fields", "labels", {"kind": "vector"}),
        setter("fields", "caption", "channels", 3), setter("fields", "B", "names", ["x"]),
        setter("fields", "caption", "names", ["x"]),
    ],
    "channels": [setter("fields", "B", "channels", c) for c in (2, True, None, "3", 2**40)],
    "size": [setter("fields", "labels", "size", n) for n in (0, -1, 2**40, "2", 2.0, True, None)],
    "names of field": [
        setter("fields", "labels", "names", names)
        for names in (["x"], ["x"] * 3, [1, 2], "ab", None, {"a": 1}, ["x", "y" * 2000])
    ],
    "shape": [setter("fields", "x", array(shape=s)) for s in (5, [0], [-1], [2] * 9, ["2"], [2.0], [2**40])],
    "dtype": [setter("fields", "x", array(dtype=d)) for d in ("object", "O", "str", ">i8", "void", None, 5)],
    "bytes a sample": [setter("fields", "x", array(shape=[1 << 20, 1 << 20]))],
}  # fmt: skip


@pytest.mark.parametrize("what", INDEX)
def test_the_description_of_fields_is_held_against_ranges(dataset, what):
    good = (dataset / "index.json").read_text()
    for change in INDEX[what]:
        (dataset / "index.json").write_text(good)
        change_index(dataset, change)
        text = refused(dataset, lambda: load_index(str(dataset)))
        assert "index.json is damaged" in text
        assert what in text, text


def test_fields_in_format_1_are_refused(dataset):
    change_index(dataset, setter("format", 1))
    assert "format 1 knows none" in refused(dataset, lambda: load_index(str(dataset)))


def value(name: str, *at) -> tuple:
    """A path within the index of a shard: of the second sample's value of a field."""
    return ("fields", name, 1, *at)


SHARD = {
    "index.json says": [
        setter("fields", 5), setter("fields", {}), setter("fields", "more", []), lambda c: c.pop("fields") and None,
    ],
    "entries": [setter("fields", "B", []), setter("fields", "labels", {}), lambda c: c["fields"]["m"].pop() and None],
    r"offset, size, crc32": [setter(*value("B"), v) for v in ([1, 2], 5, None, [1, 2, 3, 4])],
    "whole numbers": [setter(*value("B", 0), v) for v in (None, "512", 1.0, True)],
    "beyond all ranges": [setter(*value("B", 1), 2**70)],
    "no place between": [setter(*value("B", 0), v) for v in (0, -512, 512, 2**40, 2**62)],
    "size that is not": [setter(*value("m", 1), v) for v in (0, -1, 2**40, 2**62)],
    "crc32 that is none": [setter(*value("m", 2), v) for v in (-1, 2**32)],
    "of a sample has": [setter(*value("caption"), [0, 0, 5]), setter(*value("caption", 1), 2**21)],
    "list of 2 numbers": [setter(*value("labels"), v) for v in ([1], [1, 2, 3], 5, None, {})],
    "something else than numbers": [setter(*value("labels", 0), v) for v in (None, "1", True, [1])],
    "no float32": [setter(*value("labels", 0), v) for v in (1e39, -1e300)],
    "range": [setter(*value("labels", 0), 10**400)],
}  # fmt: skip


@pytest.mark.parametrize("what", SHARD)
def test_the_places_and_vectors_of_a_shard_are_held_against_ranges_and_its_tar(original, tmp_path, what):
    for i, change in enumerate(SHARD[what]):
        folder = Path(shutil.copytree(original, tmp_path / str(i)))
        change_shard(folder, change)
        index = load_index(str(folder))
        text = refused(folder, lambda index=index: index.table(8))
        assert what in text, text
        assert "r0008/00000" in text
        assert len(index.table(4)) == 6


def test_a_member_that_is_something_else_is_a_bad_sample(dataset):
    """Checksums are those of whoever wrote the index: the place of a mask holds a caption, and so on."""
    shard = json.loads((dataset / "r0008" / "00000.index.json").read_text())["fields"]
    for name, other, message in (
        ("m", "caption", "its m: is not a picture of a supported format"),
        ("B", "caption", "its B: does not decode"),
        ("B", "m", "its B: .*not RGB"),
        ("caption", "B", "its caption is no text in UTF-8"),
    ):
        change_shard(dataset, setter("fields", name, 0, shard[other][0]))
        table = load_index(str(dataset)).table(8)
        with pytest.raises(CorruptSample, match=message):
            table.value(name, 0)
        change_shard(dataset, setter("fields", name, 0, shard[name][0]))


def claiming(shape: str, dtype: str = "<f8") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", claiming("(10**12,)"), claiming("(1000000000000,)"),
        claiming("(-1,)"), claiming("(2,)") + bytes(15), claiming("(2,)") + bytes(17), claiming("(1,) * 99"),
        claiming("(1,1,1,1,1,1,1,1,1)") + bytes(8), claiming("()", "|O"), claiming("(1,)", "<U2") + bytes(8),
        claiming("(1,)", "|V8") + bytes(8), claiming("(1,)", "<M8[s]") + bytes(8), claiming("(1,)", "<c16") + bytes(16),
        claiming("__import__('os').system('touch made')"), b"\x93NUMPY\x02\x00" + b"\xff" * 400,
        b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05print\x93.",
    ],
)  # fmt: skip
def test_arrays_that_are_none(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadArray):
        read_array(data)
    assert not (tmp_path / "made").exists()


def test_arrays_that_are_some(monkeypatch):
    monkeypatch.setattr(arrays.npy, "read_array", None)  # numpy's, which would believe a header
    for dtype in ("bool", "i1", "<u2", ">u4", "<i8", ">f2", "f4", ">f8"):
        rows = np.arange(6).reshape(2, 3).astype(dtype)
        for given in (rows, np.asfortranarray(rows)):
            found = read_array(written_array(given))
            assert np.array_equal(found, given)
            assert (found.dtype, found.flags.c_contiguous) == (given.dtype.newbyteorder("="), True)
    assert read_array(written_array(np.array(3))).shape == ()
    assert MAX_ARRAY <= 1 << 30
