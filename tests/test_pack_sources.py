"""Packing folders, archives and labels of every form, intact and damaged, and with options that make no sense."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import encoded, folder_of, labels_of, noise, packed, tar_of, zip_of
from PIL import Image
from webdataset.compat import WebDataset

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError

# --- Kinds of sources -------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_path_order_and_other_files_are_counted(tmp_path):
    source = folder_of(tmp_path / "in", ["b.png", "a/z.png", "a/b/c.png", "a.png", "é.png", ".hidden.png"])
    for name in ("notes.txt", "meta.json", ".DS_Store", "a/._z.png"):
        (source / name).write_text("x")
    (source / "loop").symlink_to(source)
    report = packed(source, tmp_path / "out", labels="none")
    order = json.loads((tmp_path / "out" / "sources.json").read_text())
    assert order == ["a.png", "a/b/c.png", "a/z.png", "b.png", "é.png"]
    assert report.ignored == {".DS_Store": 1, ".json": 1, "hidden .png": 2, ".txt": 1}
    assert report.notes == ("loop leads to the folder ., which is read once",)
    assert load_index(str(tmp_path / "out")).source_of(2) == "a/z.png"
    table = load_index(str(tmp_path / "out")).table(8)
    assert table.label.tolist() == [-1] * 5


def test_folder_zip_and_tars_of_the_same_pictures_are_the_same_data(tmp_path):
    names = ["cat/1.png", "cat/2.png", "dog/1.png"]
    source = folder_of(tmp_path / "in", names)
    members = {name: (source / name).read_bytes() for name in names}
    tars = tmp_path / "tars"
    tars.mkdir()
    tar_of(tars / "00.tar", {name: members[name] for name in names[:2]})
    tar_of(tars / "01.tar", {names[2]: members[names[2]]})
    sources = {
        "folder": source,
        "zip": zip_of(tmp_path / "a.zip", dict(reversed(members.items()))),
        "tar": tar_of(tmp_path / "a.tar", {f"./{name}": data for name, data in members.items()}),
        "tars": tars,
        "list": [tars / "01.tar", tars / "00.tar"],
    }
    identities = {packed(src, tmp_path / "out" / kind).identity for kind, src in sources.items()}
    assert len(identities) == 1
    for kind in sources:
        assert labels_of(tmp_path / "out" / kind) == (("cat", "dog"), [0, 0, 1])


@pytest.mark.parametrize("labelled", [True, False])
def test_zips_of_published_tools(tmp_path, labelled):
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]
    labels = [[name, 3 - i % 2] for i, name in enumerate(names)] if labelled else None
    members = {name: encoded(noise(i)) for i, name in enumerate(names)}
    members["dataset.json"] = json.dumps({"labels": labels}).encode()
    packed(zip_of(tmp_path / "a.zip", members), tmp_path / "out")
    expected = (("2", "3"), [1, 0, 1, 0]) if labelled else ((), [-1] * 4)
    assert labels_of(tmp_path / "out") == expected
    counts = {"names": ["2", "3"], "counts": [2, 2]} if labelled else None
    assert json.loads((tmp_path / "out" / "index.json").read_text())["labels"] == counts


def test_numbered_buckets_are_not_classes(tmp_path):
    packed(folder_of(tmp_path / "in", ["00000/a.png", "01000/b.png"]), tmp_path / "out")
    assert labels_of(tmp_path / "out") == ((), [-1, -1])


def test_packed_shards_are_read_by_webdataset_and_can_be_packed_again(tmp_path):
    source = folder_of(tmp_path / "in", ["cat/1.png", "dog/1.png", "dog/2.png"], 64)
    packed(source, tmp_path / "out", 64, shard_size="10kB", format="webp")
    tars = sorted(str(path) for path in (tmp_path / "out" / "r0064").glob("*.tar"))
    assert len(tars) == 2
    reader: Any = WebDataset(tars, shardshuffle=False)
    samples = list(reader.decode("pil"))
    assert [sample["cls"] for sample in samples] == [0, 1, 1]
    assert [sample["__key__"] for sample in samples] == ["00000000", "00000001", "00000002"]
    assert samples[0]["webp"].size == (64, 64)
    packed(tmp_path / "out" / "r0016", tmp_path / "again", 16)
    first, again = (load_index(str(tmp_path / name)).table(16) for name in ("out", "again"))
    assert again.label.tolist() == [0, 1, 1]
    np.testing.assert_array_equal([first.image(i) for i in range(3)], [again.image(i) for i in range(3)])


def test_path_tricks_in_archives_are_harmless(tmp_path):
    members = {"../../evil.png": encoded(noise(0)), "/etc/evil.png": encoded(noise(1)), "a\\b.png": encoded(noise(2))}
    assert packed(zip_of(tmp_path / "in.zip", members), tmp_path / "zip", labels="none").count == 3
    assert packed(tar_of(tmp_path / "in.tar", members), tmp_path / "tar", labels="none").count == 3
    assert not list(tmp_path.parent.glob("**/evil.png"))


# --- Labels -----------------------------------------------------------------------------------------------------------


def test_label_files_in_every_form(tmp_path):
    names = ["x/a.png", "x/b.png", "y/c.png"]
    source = folder_of(tmp_path / "in", names)
    words, numbers = ["pear", "apple", "pear"], [4, 0, 4]
    pairs = dict(zip(names, words, strict=True))
    files = {
        "words.json": (json.dumps(pairs), (("apple", "pear"), [1, 0, 1])),
        "list.json": (json.dumps({"labels": list(pairs.items())}), (("apple", "pear"), [1, 0, 1])),
        "numbers.json": (json.dumps(dict(zip(names, numbers, strict=True))), (("0", "4"), [1, 0, 1])),
        "none.json": ('{"labels": null}', ((), [-1] * 3)),
        "words.csv": ("\n".join(f"{n},{w}" for n, w in pairs.items()), (("apple", "pear"), [1, 0, 1])),
        "header.csv": ("path,label\n./x/a.png, 2\nx\\b.png,0\ny/c.png,10\n", (("0", "2", "10"), [1, 0, 2])),
    }
    for name, (text, expected) in files.items():
        (tmp_path / name).write_text(text)
        packed(source, tmp_path / "out" / name, labels=tmp_path / name)
        assert labels_of(tmp_path / "out" / name) == expected, name
    packed(source, tmp_path / "out" / "auto")
    assert labels_of(tmp_path / "out" / "auto") == (("x", "y"), [0, 0, 1])
    packed(source, tmp_path / "out" / "no", labels="none")
    assert labels_of(tmp_path / "out" / "no") == ((), [-1] * 3)


def test_numbered_class_folders_are_sorted_by_number(tmp_path):
    packed(folder_of(tmp_path / "in", ["1/a.png", "2/a.png", "10/a.png"]), tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("1", "2", "10"), [0, 2, 1])  # samples are in the order of paths: 1, 10, 2


def test_cls_members_may_be_names(tmp_path):
    members = {
        "a.jpg": encoded(noise(0), "JPEG"),
        "a.cls": b"dog\n",
        "b.jpg": encoded(noise(1), "JPEG"),
        "b.cls": b"cat",
    }
    report = packed(tar_of(tmp_path / "a.tar", members), tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("cat", "dog"), [1, 0])
    assert report.ignored == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "l.json",
            '{"a.png": 0, "b.png": 1, "c.png": 1, "d.png": 0}',
            r"2 pictures that SOURCE does not have \(c.png, d",
        ),
        ("l.json", '{"a.png": 0}', r"no label to 1 of 2 pictures \(b.png\)"),
        ("l.json", '{"a.png": [0.5, 1], "b.png": [1]}', "vectors of 1 and 2 numbers"),
        ("l.json", '{"a.png": 0, "b.png": "cat"}', "type int, str"),
        ("l.json", '{"a.png": 0, "b.png": -1}', "from -1 to 0"),
        ("l.json", '{"a.png": 0, "b.png": 1.5}', "labels such as 1.5: number classes"),
        ("l.json", "[1, 2", "is not JSON"),
        ("l.json", "3", "known form"),
        ("l.json", '{"labels": [["a.png"]]}', r"not \[path, label\]"),
        ("l.json", '{"labels": [["a.png", 0], ["a.png", 1]]}', "a.png two labels, 0 and 1"),
        ("l.csv", "a.png,0,7\nb.png,1", "not path,label, the first: a.png,0,7"),
    ],
)
def test_wrong_labels_are_rejected(tmp_path, name, text, message):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        packed(source, tmp_path / "out", labels=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_wrong_labels_within_source_are_rejected(tmp_path):
    pictures = {"a.png": encoded(noise(0)), "b.png": encoded(noise(1))}
    with pytest.raises(UsageError, match=r"SOURCE with its .cls files gives no label to 1 of 2"):
        packed(tar_of(tmp_path / "a.tar", {**pictures, "a.cls": b"1"}), tmp_path / "out")
    vectors = json.dumps({"labels": [["a.png", [1, 0]], ["b.png", 3]]}).encode()
    with pytest.raises(UsageError, match=r"dataset.json has vectors and other labels, such as 3"):
        packed(zip_of(tmp_path / "a.zip", {**pictures, "dataset.json": vectors}), tmp_path / "out")
    with pytest.raises(UsageError, match=r"dataset.json does not hold labels in a known form"):
        packed(zip_of(tmp_path / "b.zip", {**pictures, "dataset.json": b'{"title": "x"}'}), tmp_path / "out")
    with pytest.raises(UsageError, match="give auto, folders, none, or a JSON or CSV file"):
        packed(tmp_path / "a.zip", tmp_path / "out", labels="missing.json")


# --- Damaged and missing input ----------------------------------------------------------------------------------------


def test_damaged_pictures_are_skipped_with_their_reasons(tmp_path):
    source = folder_of(tmp_path / "in", ["good.png", "later.png"], 64)
    jpeg, png = encoded(noise(5, 64), "JPEG"), encoded(noise(6, 64))
    damaged = {
        "empty.jpg": b"",
        "garbled.jpg": jpeg[:700] + bytes(b ^ 0x5A for b in jpeg[700:900]) + jpeg[900:],
        "float.tif": encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
        "negative.tif": encoded(Image.fromarray(np.full((8, 8), -1, np.int32)), "TIFF"),
        "text.png": b"not a picture at all",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
    }
    for name, data in damaged.items():
        (source / name).write_bytes(data)
    (source / "link.png").symlink_to(tmp_path / "nowhere.png")
    report = packed(source, tmp_path / "out")
    assert report.count == 2
    assert [path for path, _ in report.unreadable] == sorted([*damaged, "link.png"])
    reasons = dict(report.unreadable)
    assert all(reasons.values())
    assert "no defined range" in reasons["float.tif"]
    assert reasons["link.png"] == "No such file or directory"
    assert reasons["text.png"] == "is not a picture of a supported format"
    texts = [(tmp_path / "out" / name).read_text() for name in ("report.json", "index.json", "sources.json")]
    assert not any(str(tmp_path) in text for text in texts)
    assert json.loads(texts[1])["unreadable"] == 8
    assert json.loads(texts[2]) == ["good.png", "later.png"]
    assert "8 pictures were left out" in report.summary()


def test_a_damaged_zip_member_is_skipped(tmp_path):
    data = encoded(noise(0))
    path = zip_of(tmp_path / "a.zip", {"a.png": data, "b.png": encoded(noise(1))})
    content = bytearray(path.read_bytes())
    content[content.index(data) + 100] ^= 1
    path.write_bytes(content)
    report = packed(path, tmp_path / "out")
    assert report.count == 1
    assert "CRC" in report.unreadable[0][1]


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("x")
    tar = tar_of(tmp_path / "cut.tar", {"a.png": encoded(noise(0, 64)), "b.png": encoded(noise(1, 64))})
    tar.write_bytes(tar.read_bytes()[:9000])
    (tmp_path / "file").write_text("neither")
    archive = zip_of(tmp_path / "a.zip", {"a.png": encoded(noise(0))})
    for name, message in {
        "missing": "no such folder, zip or tar",
        "empty": "holds no pictures",
        "text": "holds no pictures",
        "bad": r"holds no picture that can be read \(a.png: is not a picture of a supported format\)",
        "cut.tar": "truncated",
        "file": "neither a folder, nor a zip, nor an uncompressed tar",
    }.items():
        with pytest.raises(UsageError, match=message):
            packed(tmp_path / name, tmp_path / "out" / name)
        assert not list((tmp_path / "out" / name).glob("*"))
    with pytest.raises(UsageError, match="SOURCE as a list"):
        packed([], tmp_path / "out" / "list")
    with pytest.raises(UsageError, match="uncompressed tar"):
        packed([archive, tar], tmp_path / "out" / "list")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 48}, "resolution = 48: give a power of two"),
        ({"resolution": 8192}, "resolution = 8192: give a power of two"),
        ({"lowest": 2}, "lowest = 2: give a power of two"),
        ({"lowest": 16}, "lowest = 16 is above resolution = 8"),
        ({"format": "bmp"}, "format = bmp: give one of jpg, png, webp"),
        ({"channels": 4}, "jpg has no alpha"),
        ({"channels": 2}, "channels = 2: give one of 1, 3, 4"),
        ({"crop": "left"}, "crop = left"),
        ({"base": "4by6"}, "base = 4by6: give rows and columns at resolution 4, such as 4x6"),
        ({"base": "0x4"}, "base = 0x4"),
        ({"base": (4,)}, "base = 4: give rows"),
        ({"base": "4x999", "resolution": 64}, "gives 64 rows and 15984 columns at resolution 64: with at most 8192"),
        ({"filter": "nearest"}, "filter = nearest: give one of lanczos, box"),
        ({"quality": 0}, "quality = 0"),
        ({"shard_size": "many"}, "shard_size = many"),
        ({"shard_size": "0MB"}, "shard_size = 0MB"),
        ({"workers": -1}, "workers = -1"),
    ],
)
def test_wrong_options_are_rejected(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        packed(folder_of(tmp_path / "in", ["a.png"]), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_used(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        packed(source, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    with pytest.raises(UsageError, match=r"holds other files \(thesis.doc\)"):
        packed(source, tmp_path / "full")
    for inside in (source, source / "packed"):
        with pytest.raises(UsageError, match="lies within SOURCE"):
            packed(source, inside)
    with pytest.raises(UsageError, match="cannot be written"):
        packed(source, tmp_path / "file" / "out" if os.geteuid() else Path("/sys/stylegan_pg_out"))
