"""Tars and zips that are truncated, damaged, concatenated or malicious: each member is packed, or an error names the
problem."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packing import encoded, noise, packed, tar_of, zip_of

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack.sources import list_source
from stylegan_pg.data.storage import tars, zips
from stylegan_pg.errors import UsageError

BLOCK = 512


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(i: int) -> bytes:
    return encoded(noise(i))


def pictures(prefix: str, count: int = 3, first: int = 0) -> dict[str, bytes]:
    return {f"{prefix}{i}.png": picture(first + i) for i in range(count)}


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: str) -> bytes:
    """Return a header that tarfile would not write, for example with a negative size."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, fields.get("link", "")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    number = size & (1 << 88) - 1
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + number.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, **fields) -> bytes:
    return header(name, len(data), **fields) + data + bytes(-len(data) % BLOCK)


def pax(records: bytes) -> bytes:
    return member("pax", records, kind=tarfile.XHDTYPE)


def readers(path: Path) -> list[Callable[[], object]]:
    return [lambda: list_source([path]), lambda: load_index(str(path))]


GOOD, END = member("good.png", picture(0)), bytes(2 * BLOCK)

# --- cut, damaged and joined tars -------------------------------------------------------------------------------------


def test_every_truncation_of_a_tar_is_reported(tmp_path):
    data = tar_of(
        tmp_path / "x.tar", {"a.png": picture(1), "a.cls": b"1", "b.png": picture(2), "b.cls": b"2"}
    ).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        last = tar.getmembers()[-1]
    whole = last.offset_data + BLOCK
    for length in (*range(0, whole, 97), *range(0, whole + BLOCK, BLOCK)):
        (tmp_path / "x.tar").write_bytes(data[:length])
        with pytest.raises(UsageError, match=r"x\.tar is (truncated after .* byte \d+|neither a folder)"):
            list_source([tmp_path / "x.tar"])
    (tmp_path / "x.tar").write_bytes(data[: whole + BLOCK])  # one block of zeros is accepted as the end
    assert len(list_source([tmp_path / "x.tar"]).pictures) == 2


@pytest.mark.parametrize("kind", ["garbled", "zeroed"])
def test_the_position_of_an_invalid_header_is_reported(tmp_path, kind):
    path = tar_of(tmp_path / "x.tar", pictures("a"))
    with tarfile.open(path) as tar:
        place = tar.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    data[place : place + BLOCK] = bytes(BLOCK) if kind == "zeroed" else os.urandom(BLOCK)
    path.write_bytes(data)
    for read in readers(path):
        with pytest.raises(UsageError, match=rf"x\.tar is damaged after a0\.png, at byte {place} .*download it again"):
            read()


def test_concatenated_tars_are_read_completely(tmp_path):
    one, two = tar_of(tmp_path / "1.tar", pictures("a")), tar_of(tmp_path / "2.tar", pictures("b", first=3))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert packed(both, tmp_path / "out").count == 6
    for url in (str(both), f"pipe:cat {one} {two}"):
        index = load_index(url)
        assert [index.source_of(i) for i in range(index.count)] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    both.write_bytes(one.read_bytes() + one.read_bytes().replace(picture(1), picture(9)))  # other pictures, equal names
    report = packed(both, tmp_path / "again")
    assert report.count == load_index(str(both)).count == 6
    assert json.loads((tmp_path / "again" / "sources.json").read_text())[3] == "2/a0.png"
    assert "several tars in one" in report.summary()
    both.write_bytes(one.read_bytes() + two.read_bytes()[:1500])
    for read in readers(both):
        with pytest.raises(UsageError, match=r"both\.tar is truncated after"):
            read()
    both.write_bytes(one.read_bytes() + b"#" * BLOCK)
    for read in readers(both):
        with pytest.raises(UsageError, match=r"both\.tar is damaged after a2\.png, at byte \d+"):
            read()


# --- members of all kinds ---------------------------------------------------------------------------------------------


def test_links_in_tars_and_members_without_content(tmp_path):
    path = tmp_path / "x.tar"
    links = {
        "c/2.png": (tarfile.LNKTYPE, "c/1.png"),
        "d/3.png": (tarfile.SYMTYPE, "../c/1.png"),
        "d/4.png": (tarfile.SYMTYPE, "5.png"),  # the target follows the link
    }
    made = b"".join(header(name, kind=kind, link=target) for name, (kind, target) in links.items())
    path.write_bytes(member("c/1.png", picture(1)) + made + member("d/5.png", picture(5)) + END)
    assert packed(path, tmp_path / "out").unreadable == ()
    packed_table, foreign = load_index(str(tmp_path / "out")).table(8), load_index(str(path)).table(8)
    assert [foreign.read(i) for i in range(5)] == [picture(1)] * 3 + [picture(5)] * 2
    assert (packed_table.image(0) == packed_table.image(2)).all()
    assert packed_table.label.tolist() == [0, 0, 1, 1, 1]

    faults = {
        "hard.png": (tarfile.LNKTYPE, "nowhere.png", "is a hard link to nowhere.png"),
        "loop.png": (tarfile.SYMTYPE, "loop.png", "is a link to loop.png, which is not a file in the tar"),
        "pipe.png": (tarfile.FIFOTYPE, "", "is a device or a named pipe"),
        "what.png": (b"Z", "", "of the type 'Z'"),
    }
    made = b"".join(header(name, kind=kind, link=target) for name, (kind, target, _) in faults.items())
    others = b"".join(member(name, b"x") for name in ("in.zip", "more.tar.gz", "x.heic", "x.jxl", "._x.png"))
    path.write_bytes(GOOD + made + others + END)
    report = packed(path, tmp_path / "faults")
    assert report.count == 1
    reasons = dict(report.unreadable)
    assert list(reasons) == list(faults)
    assert all(words in reasons[name] for name, (_, _, words) in faults.items())
    for words in ("1 .zip (archives within", "1 .gz (archives", "pillow-heif", "pillow-jxl", "1 hidden .png"):
        assert words in report.summary()
    with pytest.raises(UsageError, match=r"x\.tar: hard\.png is a hard link to nowhere\.png"):
        load_index(str(path))


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_members_are_reported_and_others_read(tmp_path, format):
    with open(tmp_path / "sparse.png", "wb") as file:
        for _ in range(8):  # more pieces than fit into a header of GNU tar
            file.write(picture(1))
            file.seek(1 << 17, os.SEEK_CUR)
        file.write(b"x")
    path = tmp_path / "x.tar"
    command = ["tar", "--sparse", f"--format={format}", "-cf", str(path), "-C", str(tmp_path), "sparse.png"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no GNU tar")
    with tarfile.open(path, "a") as tar:
        for name, data in pictures("z").items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = packed(path, tmp_path / "out")
    assert report.count == 3
    assert [(name, "is a sparse file" in reason) for name, reason in report.unreadable] == [("sparse.png", True)]
    with pytest.raises(UsageError, match=r"x\.tar: sparse\.png is a sparse file"):
        load_index(str(path))


def test_the_last_of_several_members_with_the_same_name_is_used(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(member("a.png", picture(1)) + GOOD + member("./a.png", picture(2)) + END)
    for source in (path, zip_of(tmp_path / "x.zip", {"a.png": picture(1), "b.png": picture(3), "./a.png": picture(2)})):
        report = packed(source, tmp_path / f"out-{source.suffix}", 16)
        assert report.count == 2
        assert "a later one of the same name replaces, as when extracting: 1, the first a.png" in report.summary()
        image = load_index(report.out).table(16).image(0)
        assert (image.transpose(1, 2, 0) == noise(2)).all()
    path.write_bytes(member("a.png", picture(1)) + GOOD + member("a.png", picture(2)) + END)
    with pytest.raises(UsageError, match=r"x\.tar has the sample a twice"):
        load_index(str(path))


def test_other_files_in_a_folder_of_tars_are_counted(tmp_path):
    for i in range(2):
        tar_of(tmp_path / f"{i}.tar", {f"/data/{i}.png": picture(i)})  # absolute names, as tar -P writes them
    zip_of(tmp_path / "more.zip", {"a.png": picture(1)})
    (tmp_path / "x.heic").write_bytes(b"x")
    report = packed(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert report.count == 2
    assert [kind.split()[0] for kind in report.ignored] == [".heic", ".zip"]


# --- made to harm -----------------------------------------------------------------------------------------------------

LONG = member("././@LongLink", b"name\0", kind=tarfile.GNUTYPE_LONGNAME)
SPARSE = bytearray(header("s.png", kind=tarfile.GNUTYPE_SPARSE))
SPARSE[482] = 1  # another block of its map follows
SPARSE[148:156] = b" " * 8
SPARSE[148:156] = b"%06o\0 " % sum(SPARSE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + header("a.png", -BLOCK) + END, rf"damaged after good\.png, at byte {len(GOOD)} .its size is -512"),
        (header("a.png", -2 * BLOCK) + END, "size is -1024"),
        (GOOD + header("a.png", 4 << 40) + END, "truncated after good.png.*has 4398046511104 bytes acc"),
        (GOOD + header("x", 1 << 86) + END, "truncated"),
        (GOOD + LONG * 50_000 + END, "extension headers before the next member are too long"),
        (GOOD + member("l", bytes(2 << 20), kind=tarfile.GNUTYPE_LONGNAME) + END, "next member are too long"),
        (GOOD + pax(b"13 size=-512\n") + member("a.png", picture(1)) + END, "its size is -512"),
        (GOOD + pax(b"0 =\n") + member("a.png", picture(1)) + END, "pax records are invalid"),
        (GOOD + pax(b"9999 path=a\n") + member("a.png", picture(1)) + END, "pax records are invalid"),
        (GOOD + pax(b"12 path=abc\n") + END, "there are zeros instead of a member's header"),
        (GOOD + bytes(SPARSE) + (bytes(504) + b"\1" + bytes(7)) * 2000, "truncated"),
    ],
)
def test_malicious_tars_give_one_message(tmp_path, content, message):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    began = time.process_time()
    for read in readers(path):
        with pytest.raises(UsageError, match=message):
            read()
    assert time.process_time() - began < 10


def test_very_deep_paths_are_fast(tmp_path):
    path = tmp_path / "x.tar"
    names = [b"a/" * 400_000 + b"%d.png" % i for i in range(3)]
    path.write_bytes(b"".join(member("l", name, kind=tarfile.GNUTYPE_LONGNAME) + GOOD for name in names) + END)
    began = time.process_time()
    tracemalloc.start()
    assert len(list_source([path]).pictures) == 3
    assert tracemalloc.get_traced_memory()[1] < 1 << 28
    tracemalloc.stop()
    assert time.process_time() - began < 10


def test_archives_with_too_many_members_are_refused(tmp_path, monkeypatch):
    for module in (tars, zips):
        monkeypatch.setattr(module, "MAX_MEMBERS", 9)
    for make, name in ((tar_of, "x.tar"), (zip_of, "x.zip")):
        few, many = pictures("a", 4), pictures("a", 1) | {f"{i}.txt": b"" for i in range(20)}
        assert len(list_source([make(tmp_path / name, few)]).pictures) == 4
        with pytest.raises(UsageError, match=r"members"):
            list_source([make(tmp_path / name, many)])


def test_tars_that_consist_mostly_of_holes_are_fast(tmp_path):
    path = tmp_path / "x.tar"
    with open(path, "wb") as file:
        file.write(GOOD)
        file.truncate(1 << 43)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("a file system without holes")
    assert [len(list_source([path]).pictures), load_index(str(path)).count] == [1, 1]
    with open(path, "wb") as file:
        file.write(GOOD + header("big.png", 4 << 40))
        file.truncate(1 << 43)
    report = packed(path, tmp_path / "out")
    assert report.unreadable == (("big.png", "has 4398046511104 bytes, more than 402653184"),)
    with pytest.raises(UsageError, match=r"big\.png has 4398046511104 bytes"):
        load_index(str(path))


def limited_pack(source: Path, out: Path) -> subprocess.CompletedProcess:
    """Pack by the command line, in a process limited to 2 GiB of memory."""
    command = [
        sys.executable,
        "-m",
        "stylegan_pg",
        "pack",
        str(source),
        str(out),
        "--resolution",
        "8",
        "--workers",
        "0",
    ]
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))  # noqa: E731
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=120, check=False)


@pytest.mark.slow
def test_zip_bombs_are_reported(tmp_path):
    path = tmp_path / "x.zip"
    for content, mib in ((b"[[],", 270), (b"[],", 100), (b'{"a":', 100)):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", picture(1))
            with archive.open("dataset.json", "w", force_zip64=True) as file:
                for _ in range(mib):
                    file.write(content * ((1 << 20) // len(content)))
        done = limited_pack(path, tmp_path / "out")
        assert done.returncode == 2
        assert "dataset.json" in done.stderr
        assert "Traceback" not in done.stderr
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture(1))
        with archive.open("b.png", "w") as file:
            for _ in range(80):
                file.write(bytes(1 << 20))
    report = packed(path, tmp_path / "out")
    assert report.count == 1
    assert "would unpack to 83886080, as zip bombs do" in dict(report.unreadable)["b.png"]


def test_zips_with_overlapping_linked_or_encrypted_members(tmp_path):
    path = zip_of(tmp_path / "x.zip", {"a.png": picture(1), "b.png": picture(2)})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")  # the last entry of the directory
    data[place + 24 : place + 28] = (0xF0000000).to_bytes(4, "little")  # the unpacked size
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"x\.zip has \d+ bytes, but its members have \d+ bytes"):
        list_source([path])
    data[place + 24 : place + 28] = len(picture(2)).to_bytes(4, "little")
    data[place + 8] |= 1  # encrypted
    path.write_bytes(data)
    assert "is encrypted" in dict(packed(path, tmp_path / "out").unreadable)["b.png"]
    data[place + 42 : place + 46] = (0xFFFFFFF0).to_bytes(4, "little")  # the offset in the file
    path.write_bytes(data)
    assert [name for name, _ in packed(path, tmp_path / "place").unreadable] == ["b.png"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", picture(1))
        info = zipfile.ZipInfo("b.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "a.png")
    assert "symbolic link" in dict(packed(path, tmp_path / "link").unreadable)["b.png"]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UsageError, match=r"x\.zip is a zip that lacks its end"):
        list_source([path])


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    inner = zip_of(tmp_path / "inner.zip", {"q.png": picture(7)})
    path = tar_of(tmp_path / "x.tar", {"a.png": picture(1), "inner.zip": inner.read_bytes()})
    assert packed(path, tmp_path / "out").ignored == {
        ".zip (archives within SOURCE, whose pictures are not read: unpack them, or pack them alone)": 1
    }


@pytest.mark.slow
def test_names_from_archives_are_escaped_in_messages(tmp_path):
    evil = "\x1b[2J\u202e"
    members = {f"{evil}c/{evil}.png": picture(1), "d/b.png": picture(2), f"d/{evil}bad.png": b"?", f"x.{evil}": b""}
    out = tmp_path / "out"
    done = limited_pack(zip_of(tmp_path / "x.zip", members), out)
    assert done.returncode == 0, done.stderr
    assert r"\x1b[2J\u202ebad.png" in done.stdout
    folder = tmp_path / "tars"
    folder.mkdir()
    foreign = tar_of(folder / "x.tar", {f"{evil}.png": picture(1)[:-40], "b.png": picture(2)})
    damaged = next(iter((out / "r0008").glob("*.tar")))
    data = bytearray(damaged.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 1
    damaged.write_bytes(data)
    said = done.stdout + done.stderr
    for command in (["info", str(out)], ["check", str(out)], ["check", str(foreign)]):
        run = [sys.executable, "-m", "stylegan_pg", "data", *command]
        if command[0] == "check":
            run += ["--workers", "1"]
        done = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == (1 if command[0] == "check" else 0), done.stderr
        assert r"\x1b[2J\u202e" in done.stdout
        said += done.stdout + done.stderr
    path = tmp_path / "y.tar"
    path.write_bytes(member(f"{evil}.png", picture(1)))
    said += limited_pack(path, tmp_path / "cut").stderr
    assert r"y.tar is truncated after \x1b[2J\u202e.png" in said
    assert all(c.isprintable() or c == "\n" for line in said.splitlines() if "packing:" not in line for c in line)
