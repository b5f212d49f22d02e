"""Packing, from outside: real pictures of every kind in, and what a reader of the packed dataset gets out."""

import hashlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from webdataset.compat import WebDataset

from stylegan_pg.data.index import load_index
from stylegan_pg.data.pack import pack
from stylegan_pg.errors import RunError, UsageError

RED = (255, 0, 0)


def packed(source, out, resolution=8, workers=0, **options):
    return pack(source, out, resolution=resolution, workers=workers, progress=False, **options)


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def noise(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def folder_of(folder: Path, names: list[str], size: int = 16) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(seed, size).save(folder / name)
    return folder


def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def only_image(source: Path, out: Path, resolution: int = 8, **options) -> np.ndarray:
    """The single picture of a source, packed losslessly: [C, H, W]."""
    report = packed(source, out, resolution, **options)
    assert (report.count, report.unreadable) == (1, ())
    return load_index(str(out)).table(resolution).image(0)


def labels_of(out: Path) -> tuple[tuple[str, ...], list[int]]:
    index = load_index(str(out))
    return index.label_names, index.table(index.resolutions[0]).label.tolist()


def files_of(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# --- Kinds of pictures ------------------------------------------------------------------------------------------------


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """An RGB profile in which red and blue have changed places."""
    data = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    return data.replace("sRGB".encode("utf-16-be"), "qRGB".encode("utf-16-be"))


def paletted() -> bytes:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.paste(0, (0, 0, 8, 4))
    return encoded(picture, transparency=0)


def tiff_12_bits(value: int) -> bytes:
    """8x8 grey TIFF of 12 bits a sample, all `value`; Pillow reads these but writes none."""
    strip = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255]) * 32
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, number) for tag, number in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


KINDS = {
    "grey.png": (encoded(Image.new("L", (8, 8), 77)), (77, 77, 77)),
    "bilevel.png": (encoded(Image.new("1", (8, 8), 1)), (255, 255, 255)),
    "rgb.bmp": (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "BMP"), (1, 2, 3)),
    "rgb.gif": (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "GIF"), (1, 2, 3)),
    "rgb.webp": (encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "WEBP", lossless=True), (1, 2, 3)),
    "rgb.jpg": (encoded(Image.new("RGB", (8, 8), (90, 90, 90)), "JPEG"), (90, 90, 90)),
    "grey.JPEG": (encoded(Image.new("L", (8, 8), 90), "JPEG"), (90, 90, 90)),
    "cmyk.jpg": (encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100), (0, 255, 255)),
    "cmyk.tif": (encoded(Image.new("CMYK", (8, 8), (0, 255, 0, 0)), "TIFF"), (255, 0, 255)),
    "alpha.png": (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 51))), (255, 204, 204)),
    "alpha.webp": (encoded(Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "greyalpha.png": (encoded(Image.new("LA", (8, 8), (0, 51))), (204, 204, 204)),
    "sixteen.png": (encoded(Image.fromarray(np.full((8, 8), 40000, np.uint16))), (156, 156, 156)),
    "sixteen.tif": (encoded(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "TIFF"), (255, 255, 255)),
    "sixteen.pgm": (b"P5 8 8 65535\n" + b"\x01\x01" * 64, (1, 1, 1)),
    "twelve.tif": (tiff_12_bits(2048), (128, 128, 128)),
    "srgb.png": (encoded(Image.new("RGB", (8, 8), RED), icc_profile=SRGB), RED),
    "profile.png": (encoded(Image.new("RGB", (8, 8), RED), icc_profile=swapped_profile()), (0, 0, 255)),
    "profile_alpha.png": (encoded(Image.new("RGBA", (8, 8), (*RED, 255)), icc_profile=swapped_profile()), (0, 0, 255)),
    "broken_profile.png": (encoded(Image.new("RGB", (8, 8), RED), icc_profile=b"nonsense" * 30), RED),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_becomes_srgb(tmp_path, name):
    data, colour = KINDS[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    image = only_image(tmp_path / "in", tmp_path / "out")
    assert image.dtype == np.uint8
    assert image.shape == (3, 8, 8)
    assert np.abs(image.astype(int) - np.reshape(colour, (3, 1, 1))).max() <= (1 if "profile" in name else 0)


def test_transparent_palette_is_composited_over_white(tmp_path):
    image = only_image(zip_of(tmp_path / "a.zip", {"p.png": paletted()}), tmp_path / "out")
    assert (image[:, :4] == 255).all()
    assert (image[:, 4:] == np.reshape((10, 200, 30), (3, 1, 1))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path, orientation, format):
    upright = noise(0, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Stored is what the camera saw: the inverse of what the tag asks for.
    ways = Image.Transpose
    inverse = {2: ways.FLIP_LEFT_RIGHT, 3: ways.ROTATE_180, 4: ways.FLIP_TOP_BOTTOM, 5: ways.TRANSPOSE}
    inverse |= {6: ways.ROTATE_90, 7: ways.TRANSVERSE, 8: ways.ROTATE_270}
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    data = encoded(stored, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    image = only_image(zip_of(tmp_path / "a.zip", {f"a.{format.lower()}": data}), tmp_path / "out")
    np.testing.assert_array_equal(image, np.asarray(upright).transpose(2, 0, 1))


def test_sixteen_bits_are_rounded_and_never_clipped(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    image = only_image(zip_of(tmp_path / "a.zip", {"a.png": encoded(Image.fromarray(values))}), tmp_path / "out")
    np.testing.assert_array_equal(image[0], np.round(values / 257))


@pytest.mark.parametrize(("channels", "format"), [(1, "jpg"), (1, "webp"), (1, "png"), (4, "png"), (4, "webp")])
def test_channels_and_formats(tmp_path, channels, format):
    source = np.full((64, 64, 4), (200, 100, 50, 255), np.uint8)
    source[:32, :, 3] = 128
    file = zip_of(tmp_path / "a.zip", {"a.png": encoded(Image.fromarray(source)), "b.png": encoded(noise(1, 64))})
    packed(file, tmp_path / "out", 64, channels=channels, format=format)
    table = load_index(str(tmp_path / "out")).table(64)
    assert len({table.image(i).shape for i in range(2)} | {(channels, 64, 64)}) == 1
    luma = Image.new("RGB", (1, 1), (200, 100, 50)).convert("L").getpixel((0, 0))
    expected = (200, 100, 50, 255) if channels == 4 else (luma,)
    assert np.abs(table.image(0)[:, -1, -1].astype(int) - expected).max() <= 3
    if channels == 4:
        assert abs(int(table.image(0)[3, 0, 0]) - 128) <= 1
        assert (table.image(1)[3] == 255).all()  # an opaque alpha is added


def test_non_square_pictures(tmp_path):
    wide = Image.new("RGB", (16, 8), "black")
    wide.paste(RED, (4, 0, 12, 8))
    file = zip_of(tmp_path / "a.zip", {"wide.png": encoded(wide), "square.png": encoded(noise(0))})
    packed(file, tmp_path / "centre")
    image = load_index(str(tmp_path / "centre")).table(8).image(1)
    assert (image == np.reshape(RED, (3, 1, 1))).all()
    report = packed(file, tmp_path / "none", crop="none")
    assert report.count == 1
    assert report.unreadable == (("wide.png", "is 16x8, not square, and crop = none"),)


def test_small_pictures_are_enlarged_and_counted(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"], size=8)
    noise(3, 64).save(source / "c.png")
    report = packed(source, tmp_path / "out", 16)
    assert report.upscaled == 2
    assert "2 pictures were smaller than 16 pixels" in report.summary()
    assert packed(folder_of(tmp_path / "in2", ["a.png"], 16), tmp_path / "out2", 16).upscaled == 0


@pytest.mark.parametrize(("format", "filter"), [("jpg", "lanczos"), ("png", "box")])
def test_levels_are_box_means_of_the_uncompressed_top(tmp_path, format, filter):
    source = folder_of(tmp_path / "in", ["a.png"], 96)
    packed(source, tmp_path / "out", 64, format=format, filter=filter)
    index = load_index(str(tmp_path / "out"))
    assert index.resolutions == (4, 8, 16, 32, 64)
    method = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}[filter]
    top = np.asarray(noise(0, 96).resize((64, 64), method)).transpose(2, 0, 1).astype(np.float64)
    for resolution in (4, 8, 16, 32):
        factor = 64 // resolution
        means = top.reshape(3, resolution, factor, resolution, factor).mean((2, 4))
        np.testing.assert_array_equal(index.table(resolution).image(0), np.floor(means + 0.5))
    difference = np.abs(index.table(64).image(0) - top).mean()
    assert difference == 0 if format == "png" else 0 < difference < 5


def test_means_of_many_white_pixels_do_not_overflow(tmp_path):
    white = zip_of(tmp_path / "a.zip", {"a.png": encoded(Image.new("L", (2048, 2048), 255))})
    packed(white, tmp_path / "out", 2048, channels=1)
    index = load_index(str(tmp_path / "out"))
    assert all((index.table(resolution).image(0) == 255).all() for resolution in index.resolutions)


def test_only_the_asked_for_levels(tmp_path):
    packed(folder_of(tmp_path / "in", ["a.png"]), tmp_path / "out", 16, lowest=8)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "index.json", "r0008", "r0016", "report.json", "sources.json",
    ]  # fmt: skip


# --- Kinds of sources -------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_path_order_and_other_files_are_counted(tmp_path):
    source = folder_of(tmp_path / "in", ["b.png", "a/z.png", "a/b/c.png", "a.png", "é.png", ".hidden.png"])
    for name in ("notes.txt", "meta.json", ".DS_Store", "a/._z.png"):
        (source / name).write_text("x")
    (source / "loop").symlink_to(source)
    report = packed(source, tmp_path / "out", labels="none")
    order = json.loads((tmp_path / "out" / "sources.json").read_text())
    assert order == ["a.png", "a/b/c.png", "a/z.png", "b.png", "é.png"]
    assert report.ignored == {".DS_Store": 1, ".json": 1, ".png": 2, ".txt": 1}
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
def test_zips_of_the_public_tools(tmp_path, labelled):
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(4)]
    labels = [[name, 3 - i % 2] for i, name in enumerate(names)] if labelled else None
    members = {name: encoded(noise(i)) for i, name in enumerate(names)}
    members["dataset.json"] = json.dumps({"labels": labels}).encode()
    packed(zip_of(tmp_path / "a.zip", members), tmp_path / "out")
    expected = (("0", "1", "2", "3"), [3, 2, 3, 2]) if labelled else ((), [-1] * 4)
    assert labels_of(tmp_path / "out") == expected
    counts = {"names": ["0", "1", "2", "3"], "counts": [0, 0, 2, 2]} if labelled else None
    assert json.loads((tmp_path / "out" / "index.json").read_text())["labels"] == counts


def test_numbered_buckets_are_not_classes(tmp_path):
    packed(folder_of(tmp_path / "in", ["00000/a.png", "01000/b.png"]), tmp_path / "out")
    assert labels_of(tmp_path / "out") == ((), [-1, -1])


def test_webdataset_reads_what_is_packed_and_it_can_be_packed_again(tmp_path):
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
        "numbers.json": (json.dumps(dict(zip(names, numbers, strict=True))), (tuple("01234"), [4, 0, 4])),
        "none.json": ('{"labels": null}', ((), [-1] * 3)),
        "words.csv": ("\n".join(f"{n},{w}" for n, w in pairs.items()), (("apple", "pear"), [1, 0, 1])),
        "header.csv": ("path,label\n./x/a.png, 2\nx\\b.png,0\ny/c.png,10\n", (tuple(map(str, range(11))), [2, 0, 10])),
    }
    for name, (text, expected) in files.items():
        (tmp_path / name).write_text(text)
        packed(source, tmp_path / "out" / name, labels=tmp_path / name)
        assert labels_of(tmp_path / "out" / name) == expected, name
    packed(source, tmp_path / "out" / "auto")
    assert labels_of(tmp_path / "out" / "auto") == (("x", "y"), [0, 0, 1])
    packed(source, tmp_path / "out" / "no", labels="none")
    assert labels_of(tmp_path / "out" / "no") == ((), [-1] * 3)


def test_numbered_class_folders_count_in_their_order(tmp_path):
    packed(folder_of(tmp_path / "in", ["1/a.png", "2/a.png", "10/a.png"]), tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("1", "2", "10"), [0, 2, 1])  # sample order is path order: 1, 10, 2


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
        ("l.json", '{"a.png": [0.5, 1], "b.png": [1, 2]}', "only class labels"),
        ("l.json", '{"a.png": 0, "b.png": "cat"}', "type int, str"),
        ("l.json", '{"a.png": 0, "b.png": -1}', "from -1 to 0"),
        ("l.json", '{"a.png": 0, "b.png": 1.5}', "type float, int"),
        ("l.json", "[1, 2", "is not JSON"),
        ("l.json", "3", "known form"),
        ("l.json", '{"labels": [["a.png"]]}', r"not \[path, label\]"),
        ("l.json", '{"labels": [["a.png", 0], ["a.png", 1]]}', "a.png two labels, 0 and 1"),
        ("l.csv", "a.png,0,7\nb.png,1", "not path,label, the first: a.png,0,7"),
    ],
)
def test_wrong_labels_are_refused(tmp_path, name, text, message):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        packed(source, tmp_path / "out", labels=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_wrong_labels_within_source_are_refused(tmp_path):
    pictures = {"a.png": encoded(noise(0)), "b.png": encoded(noise(1))}
    with pytest.raises(UsageError, match=r"SOURCE with its .cls files gives no label to 1 of 2"):
        packed(tar_of(tmp_path / "a.tar", {**pictures, "a.cls": b"1"}), tmp_path / "out")
    vectors = json.dumps({"labels": [["a.png", [1, 0]], ["b.png", [0, 1]]]}).encode()
    with pytest.raises(UsageError, match=r"dataset.json holds vector labels"):
        packed(zip_of(tmp_path / "a.zip", {**pictures, "dataset.json": vectors}), tmp_path / "out")
    with pytest.raises(UsageError, match=r"dataset.json does not hold labels in a known form"):
        packed(zip_of(tmp_path / "b.zip", {**pictures, "dataset.json": b'{"title": "x"}'}), tmp_path / "out")
    with pytest.raises(UsageError, match="give auto, none, or a JSON or CSV file"):
        packed(tmp_path / "a.zip", tmp_path / "out", labels="missing.json")


# --- Damaged and missing input ----------------------------------------------------------------------------------------


def test_damaged_pictures_are_left_out_with_their_reasons(tmp_path):
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
    assert reasons["text.png"] == "not a picture of a known format"
    texts = [(tmp_path / "out" / name).read_text() for name in ("report.json", "index.json", "sources.json")]
    assert not any(str(tmp_path) in text for text in texts)
    assert json.loads(texts[1])["unreadable"] == 8
    assert json.loads(texts[2]) == ["good.png", "later.png"]
    assert "8 pictures were left out" in report.summary()


def test_a_damaged_zip_member_is_left_out(tmp_path):
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
        "bad": r"holds no picture that can be read \(a.png: not a picture of a known format\)",
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
        ({"filter": "nearest"}, "filter = nearest: give one of lanczos, box"),
        ({"quality": 0}, "quality = 0"),
        ({"shard_size": "many"}, "shard_size = many"),
        ({"shard_size": "0MB"}, "shard_size = 0MB"),
        ({"workers": -1}, "workers = -1"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
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


# --- Again, interrupted, in parallel ----------------------------------------------------------------------------------


def test_a_complete_dataset_is_left_alone_and_never_mixed(tmp_path):
    source, out = folder_of(tmp_path / "in", ["x/a.png", "y/b.png"]), tmp_path / "out"
    first = packed(source, out)
    before = files_of(out)
    (out / ".pack").mkdir()  # as after a kill in the last moment
    again = packed(source, out)
    assert files_of(out) == before
    assert not (out / ".pack").exists()
    assert again.was_complete
    assert "already complete" in again.summary()
    assert (again.identity, again.count) == (first.identity, 2)
    with pytest.raises(UsageError, match="resolution was 8, is 16"):
        packed(source, out, 16)
    with pytest.raises(UsageError, match="the labels are others"):
        packed(source, out, labels="none")
    noise(9).save(source / "y" / "c.png")
    with pytest.raises(UsageError, match="pictures was 2, is 3; the pictures in SOURCE"):
        packed(source, out)
    assert files_of(out) == before
    (out / "index.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        packed(source, out)


PACK = (
    "import sys; from stylegan_pg.data.pack import pack; "
    "pack(sys.argv[1], sys.argv[2], resolution=64, shard_size='60kB', workers=int(sys.argv[3]), progress=False)"
)


def start_pack(source: Path, out: Path, workers: int, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", PACK, str(source), str(out), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, process: subprocess.Popen, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A source of 120 pictures, two of them damaged, and an uninterrupted packing of it."""
    folder = tmp_path_factory.mktemp("many")
    source = folder_of(folder / "in", [f"{i // 60}/{i:03d}.png" for i in range(120)], 96)
    for name in ("0/030.png", "1/119.png"):
        (source / name).write_bytes(b"damaged")
    report = packed(source, folder / "whole", 64, shard_size="60kB")
    assert report.count == 118
    assert len(list((folder / "whole" / "r0064").glob("*.tar"))) > 8
    return source, folder / "whole"


@pytest.mark.distributed
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path, many, workers):
    source, whole = many
    out = tmp_path / "out"

    def committed() -> int:
        return len(list((out / ".pack").glob("0*.json")))

    for target in (1, 3, 6):
        process = start_pack(source, out, workers, start_new_session=True)
        wait_for(lambda target=target: committed() >= target, process)
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
        process.wait()
        assert not (out / "index.json").exists()
        with pytest.raises(UsageError, match="packing was interrupted"):
            load_index(str(out))
        wait_for_group = time.monotonic() + 10
        while group_lives(process.pid) and time.monotonic() < wait_for_group:
            time.sleep(0.02)
        assert not group_lives(process.pid)
    (out / "index.json.tmp").write_text("half")
    done = committed()
    times = {path: path.stat().st_mtime_ns for path in (out / "r0064").glob("*.tar") if int(path.stem) < done}
    report = packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)
    assert all(path.stat().st_mtime_ns == old for path, old in times.items()), "committed groups are kept, not redone"
    assert len(report.unreadable) == 2


def test_damaged_books_of_an_interrupted_run_are_named(tmp_path, many):
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    (tmp_path / "out" / ".pack" / "plan.json").write_text('{"source": ')
    with pytest.raises(UsageError, match=r"plan\.json is damaged: remove .*out and pack again"):
        packed(many[0], tmp_path / "out", 64)


def group_lives(group: int) -> bool:
    """Whether a process group still has members that are not zombies."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


@pytest.mark.distributed
def test_ctrl_c_leaves_no_temporary_files_and_a_second_packing_is_kept_out(tmp_path, many):
    source, whole = many
    out = tmp_path / "out"

    def heed():  # what is started in the background of a script ignores it, and so do its children
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = start_pack(source, out, 2, start_new_session=True, preexec_fn=heed)
    wait_for(lambda: (out / ".pack" / "00000.json").exists(), process)
    os.killpg(process.pid, signal.SIGSTOP)  # or it may be done before we are
    with pytest.raises(UsageError, match="being written by another"):
        packed(source, out, 64, shard_size="60kB")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to workers, too
    os.killpg(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not (out / "index.json").exists()
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(UsageError, match=r"quality was 95, is 90"):
        packed(source, out, 64, shard_size="60kB", quality=90)
    packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)


def test_a_full_disk_is_named_and_packing_continues_afterwards(tmp_path, many):
    source, whole = many
    out = tmp_path / "out"

    def limit():  # a file that may not grow stands for a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = start_pack(source, out, 0, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "RunError" in errors
    assert "no room to write" in errors
    assert not (out / "index.json").exists()
    assert not list(out.rglob("*.tmp"))
    packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)


def test_a_failing_source_stops_packing_instead_of_thinning_it_out(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    real = open

    def failing(file, *args, **kwargs):
        if str(file).endswith("b.png"):
            raise OSError(5, "Input/output error")
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(RunError, match=r"b.png cannot be read: .*Input/output error"):
        packed(source, tmp_path / "out")
    monkeypatch.undo()
    assert packed(source, tmp_path / "out").count == 2


def test_a_group_whose_shard_was_lost_is_made_again(tmp_path, many):
    source, whole = many
    out = tmp_path / "out"
    process = start_pack(source, out, 0)
    wait_for(lambda: (out / ".pack" / "00004.json").exists(), process)
    process.kill()
    process.communicate()
    tar = out / "r0008" / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)


@pytest.mark.distributed
def test_workers_do_not_change_a_byte(tmp_path, many):
    source, whole = many
    report = packed(source, tmp_path / "out", 64, workers=2, shard_size="60kB")
    assert files_of(tmp_path / "out") == files_of(whole)
    assert report.unreadable == (
        ("0/030.png", "not a picture of a known format"),
        ("1/119.png", "not a picture of a known format"),
    )
