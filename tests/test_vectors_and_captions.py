"""Packing of labels that are vectors, and of captions: where they come from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import encoded, folder_of, noise, packed, tar_of, zip_of

from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.datasets.label_vectors import shortest
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError

NAMES = [f"{i:02d}" for i in range(6)]
VECTORS = {f"{name}.png": [0.1 * i, -1.0, 1e-7] for i, name in enumerate(NAMES)}


def vectors_of(out: Path) -> tuple[Field, list[list[float]]]:
    index = load_index(str(out))
    return index.fields["labels"], index.table(4).vectors["labels"].tolist()


def test_vectors_of_a_dataset_json_and_of_columns(tmp_path):
    pictures = {"a.png": encoded(noise(0)), "b.png": encoded(noise(1))}
    content = json.dumps({"labels": [["a.png", [1, 0.5]], ["b.png", [True, -3]]]}).encode()
    packed(zip_of(tmp_path / "a.zip", pictures | {"dataset.json": content}), tmp_path / "zip")
    assert vectors_of(tmp_path / "zip") == (Field("vector", 2), [[1, 0.5], [1, -3]])
    folder = folder_of(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "l.csv").write_text("file,smile,age\na.png,1,0.5\nb.png, 0 ,-3e2\n")
    report = packed(folder, tmp_path / "csv", labels=tmp_path / "l.csv")
    assert vectors_of(tmp_path / "csv") == (Field("vector", 2, names=("smile", "age")), [[1, 0.5], [0, -300]])
    assert any("smile, age" in remark for remark in report.remarks)
    (tmp_path / "one.json").write_text('{"a": [2.5], "b": [3]}')
    packed(folder, tmp_path / "one", labels=tmp_path / "one.json")
    assert vectors_of(tmp_path / "one") == (Field("vector", 1), [[2.5], [3]])


def test_lists_of_names_are_zeros_and_ones(tmp_path):
    folder = folder_of(tmp_path / "in", ["a.png", "b.png", "c.png"])
    (tmp_path / "l.json").write_text('{"a.png": ["tree", "sky"], "b.png": [], "c.png": ["sky", "sea"]}')
    report = packed(folder, tmp_path / "out", labels=tmp_path / "l.json")
    field, rows = vectors_of(tmp_path / "out")
    assert field == Field("vector", 3, names=("sea", "sky", "tree"))
    assert rows == [[0, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert any("sea (1), sky (2), tree (1)" in remark for remark in report.remarks)


def test_pictures_without_a_vector(tmp_path):
    folder = folder_of(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "l.csv").write_text("file,x,y\na.png,1,2\nb.png,,\n")
    with pytest.raises(UsageError, match=r"gives no label to 1 of 2 pictures.*keep to pack them with zeros"):
        packed(folder, tmp_path / "out", labels=tmp_path / "l.csv")
    report = packed(folder, tmp_path / "keep", labels=tmp_path / "l.csv", unlabelled="keep")
    assert vectors_of(tmp_path / "keep")[1] == [[1, 2], [0, 0]]
    assert any("have zeros" in remark for remark in report.remarks)
    packed(folder, tmp_path / "skip", labels=tmp_path / "l.csv", unlabelled="skip")
    assert vectors_of(tmp_path / "skip")[1] == [[1, 2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a.png": [1, NaN], "b.png": [1, 2]}', "a vector with nan: give finite numbers"),
        ('{"a.png": [1, 1e39], "b.png": [1, 2]}', r"a vector with 1e\+39"),
        ('{"a.png": [1, null], "b.png": [1, 2]}', "a vector with None"),
        ('{"a.png": [1, "x"], "b.png": [1, 2]}', "a vector with 'x'"),
        ('{"a.png": [[1]], "b.png": [[2]]}', r"a vector with \[1\]"),
        ('{"a.png": [1], "b.png": "cat"}', "vectors and other labels, such as 'cat'"),
        ('{"a.png": [], "b.png": []}', "lists of 0 names"),
    ],
)
def test_vectors_that_are_none(tmp_path, text, message):
    folder = folder_of(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "l.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        packed(folder, tmp_path / "out", labels=tmp_path / "l.json")


def test_a_word_in_a_column_of_numbers(tmp_path):
    folder = folder_of(tmp_path / "in", ["a.png"])
    (tmp_path / "l.csv").write_text("file,x,y\na.png,1,cat\n")
    with pytest.raises(UsageError, match="'cat' where a line of several columns has numbers"):
        packed(folder, tmp_path / "out", labels=tmp_path / "l.csv")


def test_numbers_in_an_index_are_the_packed_float32():
    values = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    values = np.concatenate([values, np.array([1e-45, 3.4e38, 0.1, 16777217.0], np.float32)])
    for value in values:
        text = json.dumps(shortest(float(value)))
        assert np.float32(json.loads(text)) == value
    assert json.dumps(shortest(float(np.float32(0.1)))) == "0.1"


def test_a_shard_s_index_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr("stylegan_pg.data.pack.shard_writer.MAX_NUMBERS", 6)
    folder = folder_of(tmp_path / "in", [f"{name}.png" for name in NAMES])
    (tmp_path / "l.json").write_text(json.dumps(VECTORS))
    packed(folder, tmp_path / "out", labels=tmp_path / "l.json")
    assert [shard.count for shard in load_index(str(tmp_path / "out")).shards] == [2, 2, 2]


# --- captions ---------------------------------------------------------------------------------------------------------


def captions_of(out: Path) -> list[Any]:
    table = load_index(str(out)).table(4)
    return [table.value("caption", i) for i in range(len(table))]


def test_captions_from_files(tmp_path):
    folder = folder_of(tmp_path / "in", ["x/a.png", "x/b.png"])
    (tmp_path / "c.json").write_text('{"x/a.png": ["one ", "two"], "b": "drei \\u00e4"}')
    packed(folder, tmp_path / "json", captions=tmp_path / "c.json")
    assert captions_of(tmp_path / "json") == ["one\ntwo", "drei ä"]
    (tmp_path / "c.csv").write_text('path,text\na.png,"one, with a comma"\na.png,two\n')
    report = packed(folder, tmp_path / "csv", captions=tmp_path / "c.csv")
    assert captions_of(tmp_path / "csv") == ["one, with a comma\ntwo", ""]
    assert any("1 of 2 pictures" in remark for remark in report.remarks)
    members = {"a.png": encoded(noise(0)), "a.txt": b"\xef\xbb\xbfhello", "b.png": encoded(noise(1))}
    packed(tar_of(tmp_path / "a.tar", members), tmp_path / "tar", captions="auto")
    assert captions_of(tmp_path / "tar") == ["hello", ""]


def test_captions_that_are_none(tmp_path):
    folder = folder_of(tmp_path / "in", ["a.png", "b.png"])
    cases = {
        "c.json": ('{"a.png": 3}', "a.png 3, which is no text"),
        "d.json": ('["a"]', "does not hold captions in a known form"),
        "e.json": ('{"z.png": "x"}', "1 pictures that SOURCE does not have"),
        "c.csv": ("a.png,one,two\n", "not path,text, the first: a.png,one,two"),
        "c.yaml": ("", r"must end in \.json or \.csv"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=message):
            packed(folder, tmp_path / "out", captions=tmp_path / name)
    with pytest.raises(UsageError, match=r"no \.txt files beside its pictures"):
        packed(folder, tmp_path / "out", captions="auto")
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00")
    report = packed(folder, tmp_path / "out", captions="auto")
    assert report.unreadable == (("a.png", "its caption a.txt is no text in UTF-8"),)
    assert captions_of(tmp_path / "out") == [""]


# --- pairs and masks --------------------------------------------------------------------------------------------------


def test_captions_in_json_files_beside_the_pictures(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png", "b.png", "c.png"])
    (source / "a.json").write_text('{"caption": "one", "label": 3}')
    (source / "b.json").write_text('{"captions": ["two", "three"], "label": 4}')
    packed(source, tmp_path / "out", 16, captions="auto", unlabelled="keep")
    table = load_index(str(tmp_path / "out")).table(16)
    assert [table.value("caption", i) for i in range(3)] == ["one", "two\nthree", ""]
    (source / "c.json").write_text("{")
    with pytest.raises(UsageError, match=r"c\.json in SOURCE is not JSON"):
        packed(source, tmp_path / "two", 16, captions="auto", labels="none")


def test_vectors_beside_classes(tmp_path):
    """A file of `vector` becomes a field of its own, and the labels remain classes."""
    folder = folder_of(tmp_path / "in", ["x/a.png", "y/b.png"])
    (tmp_path / "v.csv").write_text("file,smile,age\nx/a.png,1,0.5\ny/b.png,0,-300\n")
    (tmp_path / "w.json").write_text('{"x/a": [2.5], "y/b": [3]}')
    vector = {"face": tmp_path / "v.csv", "other": tmp_path / "w.json"}
    report = packed(folder, tmp_path / "out", labels="folders", vector=vector)
    index = load_index(str(tmp_path / "out"))
    assert list(index.label_names) == ["x", "y"]
    assert index.fields == {"face": Field("vector", 2, names=("smile", "age")), "other": Field("vector", 1)}
    table = index.table(4)
    assert table.vectors["face"].tolist() == [[1, 0.5], [0, -300]]
    assert table.vectors["other"].tolist() == [[2.5], [3]]
    assert table.label.tolist() == [0, 1]
    assert any("face: vectors of 2: smile, age" in remark for remark in report.remarks)
    (tmp_path / "v.csv").write_text("file,smile,age\nx/a.png,1,0.5\ny/b.png,0,7\n")
    packed(folder, tmp_path / "out", labels="folders", vector=vector)
    assert load_index(str(tmp_path / "out")).table(4).vectors["face"].tolist() == [[1, 0.5], [0, 7]]


@pytest.mark.parametrize(
    ("text", "vector", "message"),
    [
        ("file,u,v\na.png,1,2\n", "face={}", r"vector face: .*v.csv has no numbers for 1 pictures \(b.png\)"),
        ("file,u\na.png,1\nb.png,2\n", "face={}", "vector face: .*holds no vectors: give several columns"),
        ("file,u,v\na.png,1,2\nb.png,1,2\n", "caption={}", "the name caption is given to two fields"),
        ("file,u,v\na.png,1,2\nb.png,1,2\n", "class={}", "vector = class=.*give NAME=FILE"),
        ("file,u,v\na.png,1,2\nb.png,1,2\n", "face", "vector = face: give NAME=FILE"),
    ],
)
def test_unfit_vectors_are_refused(tmp_path, text, vector, message):
    folder = folder_of(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        packed(folder, tmp_path / "out", vector=[vector.format(tmp_path / "v.csv")])
