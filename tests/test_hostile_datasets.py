"""Packed datasets with correct checksums and wrong contents: one message that names the file, exit code 2, and `data
check` finds the same."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from PIL import Image

from stylegan_pg.data.datasets.index import identity_of
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.data.verify import check
from stylegan_pg.errors import UsageError

Change = Callable[[Any], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """12 pictures of two classes at 4x4 and 8x8, in several shards."""
    folder = tmp_path_factory.mktemp("original")
    random = np.random.default_rng(0)
    for i in range(12):
        file = folder / "in" / f"class{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    pack(folder / "in", folder / "out", resolution=8, shard_size="4kB", workers=0, progress=False)
    assert len(load_index(str(folder / "out")).shards) > 1
    return folder / "out"


@pytest.fixture
def dataset(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def write_index(folder: Path, content: Any) -> None:
    content["identity"] = identity_of(content)
    (folder / "index.json").write_text(json.dumps(content))


def change_index(folder: Path, change: Change) -> None:
    """Change the index as an attacker would, with a matching identity."""
    content = json.loads((folder / "index.json").read_text())
    change(content)
    write_index(folder, content)


def change_shard(folder: Path, change: Change) -> None:
    """Change the first shard's index at 8x8, with all matching checksums."""
    file = folder / "r0008" / "00000.index.json"
    content = json.loads(file.read_text())
    content = change(content) or content
    file.write_text(json.dumps(content))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    change_index(folder, lambda index: index["shards"][0]["index_sha256"].update({"8": digest}))


def setter(*path: Any) -> Change:
    """Return a function that sets the node at path[:-1] to path[-1]."""

    def change(content: Any) -> None:
        for key in path[:-2]:
            content = content[key]
        content[path[-2]] = path[-1]

    return change


def refused(folder: Path, act: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as error:
        act()
    text = str(error.value)
    assert str(folder) in text
    assert text.isprintable()
    assert len(text) < 1000
    return text


INDEX = {
    "count is": [setter("count", 2**41), setter("count", -1), setter("count", "12"), setter("count", True)],
    "add up": [setter("count", 13), setter("count", 2**40), setter("shards", 0, "count", 3)],
    "resolution": [
        setter("resolutions", []), setter("resolutions", [8, 4]), setter("resolutions", [4, 4]),
        setter("resolutions", [4, 6]), setter("resolutions", [4, 2**40]), setter("resolutions", 8),
        setter("resolutions", ["4", "8"]),
    ],
    "channels": [setter("channels", 2), setter("channels", None), setter("channels", True)],
    "base": [setter("base", [4, 2**40]), setter("base", [4.0, 4.0]), setter("base", "46"), setter("base", None)],
    "labels|class": [
        setter("labels", 5), setter("labels", "names", [1, 2]), setter("labels", "names", ["a"]),
        setter("labels", "names", {}), setter("labels", "counts", ["6", "6"]), setter("labels", "counts", [7, 7]),
        setter("labels", "counts", [-1, 2]),
    ],
    "shard": [
        setter("shards", {}), setter("shards", 0, 5), setter("shards", 0, "name", "../00000"),
        setter("shards", 0, "name", "/etc/passwd"), setter("shards", 0, "name", "\x1b[2J"),
        setter("shards", 0, "name", 0),
        setter("shards", 0, "count", 0),
        setter("shards", 0, "index_sha256", {}), setter("shards", 0, "index_sha256", "8", 5),
        lambda c: c["shards"].__setitem__(1, c["shards"][0]), lambda c: c["shards"][1].update(name="00000"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", INDEX)
def test_ranges_of_an_index(dataset, what):
    good = (dataset / "index.json").read_text()
    for change in INDEX[what]:
        content = json.loads(good)
        change(content)
        if "base" in content and not isinstance(content["base"], list):
            content["identity"] = "0" * 64  # it cannot be computed for this content
            (dataset / "index.json").write_text(json.dumps(content))
            refused(dataset, lambda: load_index(str(dataset)))
            continue
        write_index(dataset, content)
        text = refused(dataset, lambda: load_index(str(dataset)))
        assert "index.json is damaged" in text
        assert any(word in text for word in what.split("|")), text


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 1, "format": 1}',
        '{"format": ' * 100 + "1" + "}" * 100,
        "[" * 100_000,
        '{"format": NaN}',
        '{"format": 1e999}',
        '{"format": ' + "9" * 10_000 + "}",
        '{"format": "\\ud800"}',
        "null",
    ],
)
def test_invalid_json(dataset, text):
    (dataset / "index.json").write_text(text)
    refused(dataset, lambda: load_index(str(dataset)))


def test_missing_keys_are_named(dataset):
    good = json.loads((dataset / "index.json").read_text())
    for key in ("count", "resolutions", "channels", "labels", "shards"):
        (dataset / "index.json").write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        assert key in refused(dataset, lambda: load_index(str(dataset)))


def sample(place: int, value: Any) -> Change:
    return setter("samples", 1, place, value)


SHARD = {
    "label": [sample(3, 2), sample(3, -1), sample(3, 2**62)],
    "class": [sample(3, 1), sample(3, None)],  # it has the other class, so the counts are wrong
    "place": [sample(1, -512), sample(1, 2**40), sample(1, 2**62), sample(1, 0), sample(1, 511)],
    "size": [sample(2, 2**40), sample(2, 0), sample(2, -1), sample(2, 2**62)],
    "number": [
        sample(2, 2**70), sample(4, None), sample(1, "512"), sample(0, 5), sample(3, "0"), sample(3, 1.0),
        sample(3, True),
    ],
    "crc32": [sample(4, -1), sample(4, 2**32)],
    "sample": [
        setter("samples", 5), setter("samples", []), setter("samples", 0, None), setter("samples", 0, [1, 2]),
        lambda c: c["samples"].append(c["samples"][0]), setter("samples", 1, []),
    ],
    "tar": [setter("tar_bytes", 2**40), setter("tar_bytes", -1), setter("tar_bytes", None), setter("tar_sha256", 5)],
    "table": [lambda c: [1], lambda c: "x"],
}  # fmt: skip


@pytest.mark.parametrize("what", SHARD)
def test_ranges_of_a_shard_index(original, tmp_path, what):
    for i, change in enumerate(SHARD[what]):
        folder = Path(shutil.copytree(original, tmp_path / str(i)))
        change_shard(folder, change)
        index = load_index(str(folder))
        text = refused(folder, lambda index=index: index.table(8))
        assert what in text, text
        assert "r0008/00000" in text
        assert len(index.table(4)) == 12
    assert list(check(index, [8], 1)) == [f"resolution 8: {text}"]


def test_sources_with_a_wrong_structure(dataset):
    good = (dataset / "sources.json").read_text()
    for text in ("{}", "[]", "5", '["a"]', json.dumps([1] * 12), "[" * 2000, "\xff", json.dumps(["a"] * 11)):
        (dataset / "sources.json").write_text(text)
        index = load_index(str(dataset))
        assert index.source_of(3) == ""
        assert "sources.json" in refused(dataset, index.sources)
    (line,) = check(index, [4], 1)
    assert f"{dataset}/sources.json" in line
    (dataset / "sources.json").write_text(good)
    assert load_index(str(dataset)).source_of(3)
    (dataset / "sources.json").unlink()
    assert load_index(str(dataset)).sources() == []


def test_a_cached_table_with_a_wrong_structure_is_computed_again(original, tmp_path, monkeypatch):
    monkeypatch.setattr("stylegan_pg.data.datasets.index.SMALL", 0)
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    index = load_index(str(original))
    expected = index.table(8)
    (file,) = (tmp_path / "cache" / "indexes").glob("*.npz")
    good = file.read_bytes()
    with np.load(file) as kept:
        arrays = dict(kept)
    for wrong in ({"size": arrays["size"][:3]}, {"label": arrays["label"].astype(np.int8)}, {"more": arrays["size"]}):
        np.savez(file, **(arrays | wrong))
        np.testing.assert_array_equal(index.table(8).size, expected.size)
        assert file.read_bytes() != good or wrong
    for content in (b"", b"PK\x03\x04", good[:200], good[:100] + b"\xff" * 40 + good[140:], b"\x93NUMPY\x01\x00v\x00{"):
        file.write_bytes(content)
        np.testing.assert_array_equal(index.table(8).offset, expected.offset)


def test_exit_codes_of_commands(dataset):
    """Commands end with exit code 2, immediately and without a traceback. Only `data check` continues to find more."""
    change_shard(dataset, sample(1, -512))
    for command, code in (("info", 2), ("check", 1)):
        done = harness.command("data", command, dataset, expected=code)
        assert "has no place within its tar" in (done.stderr if code == 2 else done.stdout)
        assert "Traceback" not in done.stderr
