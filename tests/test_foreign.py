"""WebDataset tars that others wrote: read as webdataset reads them, never changed, refused by name if damaged."""

import io
import json
import os
import shutil
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset
from packing import encoded, files_of
from PIL import Image

from stylegan_pg.data.datasets import foreign_tars
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.table import CorruptSample
from stylegan_pg.data.images.decode import BadPicture, decode_to_fit
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.errors import UsageError

COUNT = 20


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of each test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(folder))
    return folder


def picture(i: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth, and different for each i."""
    small = np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(i: int, *size: int) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(picture(i, *size)), 95, "RGB", "444")


def samples(count: int = COUNT) -> list[dict]:
    suffixes = ("jpg", "png", "webp", "jpeg")
    made = []
    for i in range(count):
        suffix = suffixes[i % 4]
        exact = (
            encoded(Image.fromarray(picture(i)), suffix.upper(), lossless=True) if suffix in ("png", "webp") else b""
        )
        data = exact or jpeg(i)
        made.append(
            {"__key__": f"train.d/{i:04d}", suffix: data, "cls": i % 3, "json": {"caption": "x"}, "seg.png": b"?"}
        )
    return made


def write(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pictures(count: int = 4) -> dict[str, bytes]:
    return {f"{i:03d}.jpg": jpeg(i) for i in range(count)}


@pytest.fixture
def shards(tmp_path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    writing: Any = webdataset  # which exports its names without types
    with writing.ShardWriter(str(folder / "a-%03d.tar"), maxcount=7, verbose=0) as writer:
        for sample in samples():
            writer.write(sample)
    return folder


# --- what is read -----------------------------------------------------------------------------------------------------


def test_tars_of_shard_writer_are_read_as_webdataset_reads_them(shards, tmp_path):
    before = files_of(shards)
    index = load_index(str(shards))
    assert (index.count, index.channels, index.label_names) == (COUNT, 3, ("0", "1", "2"))
    assert index.resolutions == (4, 8, 16, 32)
    reading: Any = webdataset  # as above
    theirs = list(reading.WebDataset(str(shards / "a-{000..002}.tar"), shardshuffle=False))
    table = index.table(32)
    for i, sample in enumerate(theirs):
        assert index.source_of(i) == sample["__key__"]
        assert table.read(i) == next(sample[s] for s in ("jpg", "jpeg", "png", "webp") if s in sample)
        assert table.label[i] == int(sample["cls"])
    assert len(theirs) == COUNT
    assert files_of(shards) == before  # nothing is written there
    for url in (f"{shards}/a-{{000..002}}.tar", f"{shards}/*.tar", f"file://{shards}/a-{{000..002}}.tar"):
        assert load_index(url).identity == index.identity
    listed = "::".join(str(path) for path in sorted(shards.iterdir()))
    assert load_index(listed).identity == index.identity
    assert load_index(str(shards / "a-001.tar")).count == 7
    assert index.source_of(COUNT) == ""


def test_every_resolution_shows_the_middle_of_the_same_pictures(shards):
    index = load_index(str(shards))
    for resolution in index.resolutions:
        table = index.table(resolution)
        for i in range(4):  # of each format
            expected = Image.fromarray(picture(i)).resize(
                (resolution, resolution), Image.Resampling.LANCZOS, box=(8, 0, 56, 48)
            )
            assert table.image(i).shape == (3, resolution, resolution)
            difference = np.abs(table.image(i).transpose(1, 2, 0).astype(int) - np.asarray(expected))
            assert difference.mean() < (6 if resolution < 16 else 3)  # of JPEGs an eighth of the size is decoded
            assert difference.max() < 40
            np.testing.assert_array_equal(table.image(i), table.image(i))
    wide = load_index(str(shards), (4, 6))
    assert wide.resolutions == (4, 8, 16, 32)
    assert wide.table(32).image(0).shape == (3, 32, 48)
    assert wide.identity != index.identity
    with pytest.raises(UsageError, match=r"smaller than 64x64.*at most 32"):
        index.table(64)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(tmp_path, format):
    long = "/".join(["a" * 60] * (2 if format == tarfile.USTAR_FORMAT else 5))
    members = {f"{long}/{i:03d}.jpg": jpeg(i) for i in range(3)} | ({"ä.jpg": jpeg(3)} if format else {})
    index = load_index(str(write(tmp_path / "x.tar", members, format)))
    table = index.table(32)
    for i, (name, data) in enumerate(members.items()):
        assert (index.source_of(i), table.read(i)) == (name.removesuffix(".jpg"), data)


@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_tars_of_gnu_tar(tmp_path, format):
    if not shutil.which("tar"):
        pytest.skip("no tar command")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i in range(5):
        (tmp_path / "in" / "sub" / f"{i}.JPG").write_bytes(jpeg(i))
        (tmp_path / "in" / "sub" / f"{i}.cls").write_text("cat\n" if i % 2 else "dog\n")
    made = ["tar", f"--format={format}", "--sort=name", "-cf", str(tmp_path / "x.tar"), "-C", str(tmp_path / "in"), "."]
    subprocess.run(made, check=True)
    index = load_index(str(tmp_path / "x.tar"))
    assert [index.source_of(i) for i in range(index.count)] == [f"./sub/{i}" for i in range(5)]
    assert index.label_names == ("cat", "dog")
    assert index.table(4).label.tolist() == [1, 0, 1, 0, 1]
    assert [index.table(4).read(i) for i in range(5)] == [jpeg(i) for i in range(5)]


def test_hidden_files_are_left_alone_and_hard_links_followed(tmp_path):
    """Of a folder that was on a Mac, with equal files that GNU tar has written once."""
    junk = {"data/.DS_Store": b"?", "data/._0001.jpg": b"?", "data/.git/x": b"?"}
    path = write(tmp_path / "x.tar", junk | {"data/0001.jpg": jpeg(1), "data/0001.cls": b"4"})
    with tarfile.open(path, "a") as tar:
        for name, target in (("data/0002.jpg", "data/0001.jpg"), ("data/0002.cls", "data/0001.cls")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    index = load_index(str(path))
    assert [index.source_of(i) for i in range(index.count)] == ["data/0001", "data/0002"]
    table = index.table(16)
    assert table.read(0) == table.read(1) == jpeg(1)
    assert table.label.tolist() == [0, 0]
    assert index.label_names == ("4",)


@pytest.mark.parametrize("labels", [(-1, 7, -1), (5_000_000_000, 3, 3)])
def test_numbers_that_cannot_count_classes_are_names(labels, tmp_path):
    members = pictures(3) | {f"{i:03d}.cls": str(label).encode() for i, label in enumerate(labels)}
    index = load_index(str(write(tmp_path / "x.tar", dict(sorted(members.items())))))
    assert set(index.label_names) == set(map(str, labels))
    assert [index.label_names[i] for i in index.table(16).label] == list(map(str, labels))


def test_the_same_relative_path_in_another_folder_is_another_tar(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        os.utime(write(tmp_path / name / "x.tar", {f"{name}.jpg": jpeg(1)}), (1, 1))
        monkeypatch.chdir(tmp_path / name)
        assert load_index("x.tar").source_of(0) == name


def test_labels_in_json(tmp_path):
    members = {}
    for i in range(4):
        members |= {f"{i}.jpg": jpeg(i), f"{i}.json": json.dumps({"label": i % 2, "more": [1]}).encode()}
    assert load_index(str(write(tmp_path / "x.tar", members))).table(4).label.tolist() == [0, 1, 0, 1]
    members["3.json"] = b'{"label": null}'
    index = load_index(str(write(tmp_path / "y.tar", members)))
    assert index.label_names == ("0", "1")
    assert index.table(4).label.tolist() == [0, 1, 0, -1]
    assert not index.notes
    members |= {"2.json": b'{"label": [0, 1]}', "3.json": b'{"label": true}'}
    index = load_index(str(write(tmp_path / "v.tar", members)))
    assert index.table(4).label.tolist() == [0, 1, -1, -1]
    assert index.notes[0].startswith("1 samples have a label in their .json that is no number, name or list")
    assert "1 samples have a list as label in their .json, which is not used: 3 samples have none" in index.notes[1]
    members["3.json"] = b"{"
    with pytest.raises(UsageError, match=r"z\.tar: 3\.json is not JSON"):
        load_index(str(write(tmp_path / "z.tar", members)))


def test_commands_and_grey_pictures(tmp_path):
    grey = {f"{i}.png": encoded(Image.fromarray(picture(i)[:, :, 0])) for i in range(3)}
    path = write(tmp_path / "x.tar", grey)
    index = load_index(f"pipe:cat {path}")
    assert (index.count, index.channels) == (3, 1)
    assert index.table(16).image(2).shape == (1, 16, 16)
    assert [index.table(4).read(i) for i in range(3)] == list(grey.values())


# --- the cached index -------------------------------------------------------------------------------------------------


def test_headers_are_read_once_and_again_when_a_tar_changes(shards, cache, monkeypatch):
    read = []
    real = foreign_tars.members_of
    monkeypatch.setattr(foreign_tars, "members_of", lambda file, named: read.append(named) or real(file, named))
    first = load_index(str(shards))
    assert len(read) == 3
    assert load_index(str(shards)) == first
    assert len(read) == 3
    write(shards / "a-001.tar", {f"new/{i}.jpg": jpeg(90 + i) for i in range(3)} | {f"new/{i}.cls": b"1" for i in ()})
    with pytest.raises(UsageError, match="has no label"):
        load_index(str(shards))
    assert len(read) == 4  # that tar alone
    (shards / "a-001.tar").unlink()
    assert load_index(str(shards)).count == 13
    assert len(read) == 4
    for file in (cache / "indexes").glob("*.npz"):  # a damaged cache costs time and nothing else
        file.write_bytes(file.read_bytes()[:-40])
    assert load_index(str(shards)).count == 13
    assert len(read) == 6


def test_an_index_that_does_not_match_is_noticed(shards):
    """A tar that was replaced while a run reads it: what is no picture there is bad, by name, and nothing crashes."""
    table = load_index(str(shards)).table(16)
    write(shards / "a-000.tar", {"x.txt": b"#" * 60_000})
    with pytest.raises(CorruptSample, match=r"sample 3 in tars/a-000\.tar") as caught:
        table.image(3)
    assert caught.value.kind in ("decode", "truncated")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_truncated_tars_are_refused_by_name(tmp_path):
    path = write(tmp_path / "x.tar", pictures())
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    for length in (1, 300, 512, last.offset, last.offset + 100, last.offset_data, last.offset_data + 700, end):
        path.write_bytes(data[:length])
        with pytest.raises(UsageError, match=r"x\.tar is (truncated after|not an uncompressed tar)"):
            load_index(str(path))
    path.write_bytes(data[: end + 512])  # one of the two blocks that end a tar will do, as for other readers
    assert load_index(str(path)).count == 4
    garbled = bytearray(data)
    garbled[last.offset + 5 : last.offset + 90] = b"?" * 85
    path.write_bytes(garbled)
    with pytest.raises(UsageError, match=rf"x\.tar is damaged after 002\.jpg, at byte {last.offset}"):
        load_index(str(path))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": "picture", "a.cls": "1", "b.cls": "2"}, r"sample b has no picture \(cls\)"),
        ({"a.jpg": "picture", "a.cls": "1", "b.jpg": "picture"}, r"b has no label \(\.cls\), which others have"),
        ({"a.jpg": "picture", "b.jpg": "picture", "a.cls": "1"}, r"sample a has no picture \(cls\)"),
        ({"a.jpg": "picture", "a.png": "picture"}, r"sample a has several pictures \(jpg, png\)"),
        ({"a.txt": "1"}, r"sample a has no picture \(txt\)"),
        ({}, r"holds no pictures"),
        ({"a.jpg": "?"}, r"none of the first pictures of the tars can be read"),
    ],
)
def test_missing_members_are_refused_by_name(tmp_path, members, message):
    content = {name: jpeg(1) if data == "picture" else data.encode() for name, data in members.items()}
    with pytest.raises(UsageError, match=rf"x\.tar:? {message}" if "none" not in message else message):
        load_index(str(write(tmp_path / "x.tar", content)))


def test_what_is_no_tar(tmp_path, shards):
    (tmp_path / "x.tar").write_bytes(os.urandom(5000))
    with pytest.raises(UsageError, match=r"x\.tar is not an uncompressed tar"):
        load_index(str(tmp_path / "x.tar"))
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(shards / "a-000.tar", "a.jpg")
    with pytest.raises(UsageError, match=r"z\.tar is not an uncompressed tar .*decompress"):
        load_index(str(tmp_path / "z.tar"))
    with pytest.raises(UsageError, match=r"a-003\.tar: no such tar"):
        load_index(str(shards / "a-{000..003}.tar"))
    with pytest.raises(UsageError, match=r"there is no tar"):
        load_index(str(shards / "b-*.tar"))
    with pytest.raises(UsageError, match=r"a-000\.tar twice"):
        load_index("::".join([str(shards / "a-000.tar")] * 2))
    with pytest.raises(UsageError, match="not a valid brace pattern"):
        load_index(str(shards / "a-{000..002.tar"))
    with pytest.raises(UsageError, match="ftp:// is not supported"):
        load_index("ftp://server/a.tar")


def png_that_says(width: int, height: int) -> bytes:
    """A decompression bomb: a small PNG of very many equal pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(jpeg(0))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_named_one_by_one(tmp_path):
    garbled = bytearray(jpeg(5))
    garbled[len(garbled) // 2 : len(garbled) // 2 + 60] = b"\xff\xd1\x00" * 20
    Image.open(io.BytesIO(bytes(garbled))).load()  # which lenient decoders take
    members = pictures(4) | {
        "x-bomb.png": png_that_says(60_000, 60_000),
        "x-bomb1.png": png_that_says(10_000, 10_000),
        "x-bomb2.jpg": jpeg_that_says(60_000, 60_000),
        "x-corrupt.jpg": b"\xff\xd8\xff" + os.urandom(300),
        "x-cut.jpg": jpeg(6)[:-200],
        "x-garbled.jpg": bytes(garbled),
        "x-grey.png": encoded(Image.fromarray(picture(1)[:, :, 0])),
        "x-small.jpg": jpeg(1, 30, 64),
        "x-cmyk.jpg": encoded(Image.fromarray(picture(1)).convert("CMYK"), "JPEG"),
        "x-text.png": b"not a picture",
    }
    index = load_index(str(write(tmp_path / "x.tar", members)))
    table, found = index.table(32), {}
    for i in range(len(table)):
        try:
            table.image(i)
        except CorruptSample as error:
            found[index.source_of(i)] = (error.kind, error.reason)
    assert {name: kind for name, (kind, _) in found.items()} == {
        "x-bomb": "size",
        "x-bomb1": "size",
        "x-bomb2": "size",
        "x-corrupt": "decode",
        "x-cut": "decode",
        "x-garbled": "decode",
        "x-small": "size",
        "x-text": "decode",
    }
    assert "more than 89478485 pixels" in found["x-bomb"][1]
    assert found["x-small"][1] == "is 30x64, smaller than 32x32 (rows x columns)"
    shown = list(batches(table, index.order(0), start=0, end=28, batch=14, share=range(14), workers=0))
    assert {bad.kind for batch in shown for bad in batch.bad} == {"size", "decode"}
    assert all(len(batch.image) == 14 for batch in shown)  # replaced, and full


def test_reduced_decoding_keeps_what_it_needs():
    """Large JPEGs, decoded at a fraction of their size, look as if they had been decoded whole."""
    for height, width, size in [
        (1024, 1024, (64, 64)),
        (700, 1111, (96, 64)),
        (333, 260, (128, 128)),
        (64, 90, (64, 64)),
    ]:
        data = jpeg(3, height, width)
        image = decode_to_fit(data, size, 3)
        scale = min(height / size[0], width / size[1])
        across, down = size[1] * scale, size[0] * scale
        box = ((width - across) / 2, (height - down) / 2, (width + across) / 2, (height + down) / 2)
        whole = Image.fromarray(simplejpeg.decode_jpeg(data)).resize(
            (size[1], size[0]), Image.Resampling.LANCZOS, box=box
        )
        assert np.abs(image.transpose(1, 2, 0).astype(int) - np.asarray(whole)).mean() < 2
    with pytest.raises(BadPicture, match="smaller"):
        decode_to_fit(jpeg(3, 64, 63), (64, 64), 3)
