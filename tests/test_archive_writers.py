"""Names in archives as other programs write them."""

import struct
import tarfile
import unicodedata
import zlib

import pytest
from packing import encoded, labels_of, noise, packed, tar_of, zip_of

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError


def test_long_names_in_gnu_incremental_backups(tmp_path):
    """Their headers contain times in the field where others have the first part of a long path."""
    path = tar_of(tmp_path / "x.tar", {f"{c}/{i}.png": encoded(noise(i)) for i in range(2) for c in "ab"})
    data = bytearray(path.read_bytes())
    at = 0
    while any(data[at : at + 512]):
        size = int(data[at + 124 : at + 135], 8)
        data[at + 257 : at + 265] = tarfile.GNU_MAGIC
        data[at + 345 : at + 369] = b"15303104762\x0015303104762\0"
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 155] = b"%06o\0" % sum(data[at : at + 512])
        at += 512 + -(-size // 512) * 512
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getnames()[0].startswith("15303104762/")  # Python's own reader reads them as a folder
    packed(path, tmp_path / "out")
    assert labels_of(tmp_path / "out")[0] == ("a", "b")
    foreign = load_index(str(path))
    assert [foreign.source_of(i) for i in range(foreign.count)] == ["a/0", "b/0", "a/1", "b/1"]


def test_encodings_of_names_in_zips(tmp_path):
    """macOS writes UTF-8 without the flag, DOS its code page, and Info-ZIP adds UTF-8 in an extra field."""
    classes = ("Zoë", "Žena")
    pictures = {f"{unicodedata.normalize('NFD', c)}/{i}.png": encoded(noise(i)) for i in range(2) for c in classes}
    macos = zip_of(tmp_path / "macos.zip", pictures)
    data = bytearray(macos.read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = data.find(mark)
        while at >= 0:
            assert struct.unpack_from("<H", data, at + flags)[0] & 0x800
            data[at + flags + 1] &= ~8
            at = data.find(mark, at + 4)
    macos.write_bytes(data)
    packed(macos, tmp_path / "macos")
    assert labels_of(tmp_path / "macos")[0] == classes

    dos = zip_of(tmp_path / "dos.zip", {"kat/0.png": encoded(noise(0)), "dog/0.png": encoded(noise(1))})
    plain = dos.read_bytes()
    dos.write_bytes(plain.replace(b"kat/", b"k\x84t\\"))
    packed(dos, tmp_path / "dos")
    assert labels_of(tmp_path / "dos")[0] == ("dog", "kät")

    raw, name = b"k\x84t/0.png", "кот/0.png".encode()
    field = struct.pack("<HHBI", 0x7075, 5 + len(name), 1, zlib.crc32(raw)) + name
    at = plain.find(b"PK\1\2")
    assert plain[at + 46 : at + 55] == b"kat/0.png"
    data = bytearray(plain[:at].replace(b"kat/", b"k\x84t/") + plain[at:].replace(b"kat/0.png", raw + field, 1))
    struct.pack_into("<H", data, at + 30, len(field))
    end = data.find(b"PK\5\6")
    struct.pack_into("<I", data, end + 12, struct.unpack_from("<I", data, end + 12)[0] + len(field))
    (tmp_path / "infozip.zip").write_bytes(data)
    packed(tmp_path / "infozip.zip", tmp_path / "infozip")
    assert labels_of(tmp_path / "infozip")[0] == ("dog", "кот")


def test_folders_of_operating_systems_are_not_classes(tmp_path):
    left = ("@eaDir/0.png/SYNOFILE_THUMB_M.png", "$RECYCLE.BIN/S-1/$R1.png", "__MACOSX/a/._0.png", ".thumbnails/0.png")
    names = ("a/0.png", "b/0.png", *left, *(f"a/{name}" for name in left[:1]))
    report = packed(zip_of(tmp_path / "x.zip", {name: encoded(noise(0)) for name in names}), tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("a", "b"), [0, 1])
    assert report.ignored == {"hidden .png": 5}


def test_tars_of_unsupported_pictures_must_be_packed(tmp_path):
    path = tar_of(tmp_path / "x.tar", {f"{i}.tif": encoded(noise(i), "TIFF") for i in range(2)})
    with pytest.raises(UsageError, match=r"sample 0 has no picture .*or pack it"):
        load_index(str(path))
    assert packed(path, tmp_path / "out").count == 2


def test_message_about_a_number_with_too_many_digits(tmp_path):
    members = {"0.png": encoded(noise(0)), "dataset.json": b'{"labels": [["0.png", ' + b"9" * 5000 + b"]]}"}
    with pytest.raises(UsageError, match=r"dataset\.json is not JSON \(.*5000 digits\): give") as caught:
        packed(zip_of(tmp_path / "x.zip", members), tmp_path / "out")
    assert "sys." not in str(caught.value)


def test_a_table_among_the_pictures_is_reported(tmp_path):
    """Hugging Face's imagefolder has metadata.csv beside the pictures."""
    members = {
        "0.png": encoded(noise(0)),
        "1.png": encoded(noise(1)),
        "metadata.csv": b"file_name,label\n0.png,3\n1.png,7\n",
    }
    path = zip_of(tmp_path / "x.zip", members)
    assert list(packed(path, tmp_path / "out").ignored) == [
        ".csv (not read by itself: where it holds labels, give it to --labels)"
    ]
    (tmp_path / "metadata.csv").write_bytes(members["metadata.csv"])
    packed(path, tmp_path / "labelled", labels=tmp_path / "metadata.csv")
    assert labels_of(tmp_path / "labelled") == (("3", "7"), [0, 1])
