"""Names with several dots, special characters or different Unicode forms, links, and special files."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import harness
import pytest
from packing import encoded, folder_of, labels_of, noise, packed, tar_of, zip_of

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack.sources import list_source
from stylegan_pg.errors import UsageError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(i: int) -> bytes:
    return encoded(noise(i))


def source(kind: str, path: Path, members: dict[str, bytes]) -> Path:
    if kind == "tar":
        return tar_of(path.with_suffix(".tar"), members)
    if kind == "zip":
        return zip_of(path.with_suffix(".zip"), members)
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


# --- several dots -----------------------------------------------------------------------------------------------------

KINDS = ["folder", "zip", "tar"]


@pytest.mark.parametrize("kind", KINDS)
def test_dates_and_versions_in_names_are_a_part_of_the_key(tmp_path, kind):
    members = {}
    for i, label in enumerate((b"cat", b"dog", b"cat", b"dog")):
        members |= {f"x/IMG_2024.01.0{i}.png": picture(i), f"x/IMG_2024.01.0{i}.cls": label}
    path = source(kind, tmp_path / "in", members)
    report = packed(path, tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("cat", "dog"), [0, 1, 0, 1])
    assert "keys of samples end at the last dot of a name (IMG_2024.01.00" in report.summary()
    assert report.ignored == {}
    if kind == "tar":
        index = load_index(str(path))
        assert [index.source_of(i) for i in range(4)] == [f"x/IMG_2024.01.0{i}" for i in range(4)]
        assert index.table(4).label.tolist() == [0, 1, 0, 1]
        assert "last dot" in index.notes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_members_of_one_webdataset_sample_are_one_picture(tmp_path, kind):
    members = {}
    for i in range(3):
        members |= {f"{i}.PNG": picture(i), f"{i}.seg.png": picture(9), f"{i}.cls": str(i % 2).encode()}
    path = source(kind, tmp_path / "in", members)
    report = packed(path, tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("0", "1"), [0, 1, 0])
    assert report.ignored == {".seg.png (parts of samples)": 3}
    assert "end at the first dot of a name, as in WebDataset" in report.summary()
    if kind == "tar":
        index = load_index(str(path))
        assert (index.count, index.table(4).label.tolist()) == (3, [0, 1, 0])
        assert index.table(16).read(0) == picture(0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_only_picture_of_a_key_may_have_any_extension(tmp_path, kind):
    members = {}
    for i in range(3):
        members |= {f"{i}.rgb.png": picture(i), f"{i}.cls": str(i).encode()}
    path = source(kind, tmp_path / "in", members)
    packed(path, tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("0", "1", "2"), [0, 1, 2])
    if kind == "tar":
        assert load_index(str(path)).table(4).label.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_with_the_same_key(tmp_path, kind):
    both = {"a.png": picture(1), "a.cls": b"0", "a.b.png": picture(2), "a.b.cls": b"1"}
    packed(source(kind, tmp_path / "both", both), tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("0", "1"), [1, 0])  # labels in the order of the paths
    formats = {"a.png": picture(1), "a.jpg": encoded(noise(2), "JPEG"), "a.cls": b"0"}
    path = source(kind, tmp_path / "formats", formats)
    with pytest.raises(UsageError, match=r"a\.cls would label both a\.jpg and a\.png: .*\(a\.jpg\.cls\)"):
        packed(path, tmp_path / "formats-out")
    assert packed(path, tmp_path / "formats-out", labels="none").count == 2
    views = {"1.left.png": picture(1), "1.right.png": picture(2), "1.cls": b"0"}
    views |= {"2.left.png": picture(3), "2.right.png": picture(4), "2.cls": b"1"}
    path = source(kind, tmp_path / "views", views)
    with pytest.raises(UsageError, match=r"1\.cls would label both 1\.left\.png and 1\.right\.png"):
        packed(path, tmp_path / "views-out")
    assert packed(path, tmp_path / "views-out", labels="none").count == 4
    own = {name.replace(".cls", f".{side}.cls"): data for name, data in views.items() for side in ("left", "right")}
    packed(source(kind, tmp_path / "own", dict(sorted(own.items()))), tmp_path / "own-out")
    assert labels_of(tmp_path / "own-out") == (("0", "1"), [0, 0, 1, 1])
    if kind == "tar":
        assert load_index(str(tmp_path / "own.tar")).table(4).label.tolist() == [0, 0, 1, 1]
        index = load_index(str(path))
        assert (index.count, index.table(4).label.tolist(), [*index.fields]) == (2, [0, 1], ["right"])
        assert "each sample has several pictures: left.png is shown, with right.png" in index.notes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_may_be_named_by_the_full_file_name(tmp_path, kind):
    members = {"a.png": picture(1), "a.png.cls": b"p", "b.png": picture(2), "b.png.cls": b"q"}
    path = source(kind, tmp_path / "in", members)
    packed(path, tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("p", "q"), [0, 1])
    if kind == "tar":
        assert load_index(str(path)).label_names == ("p", "q")
    members |= {
        "a.jpg": encoded(noise(3), "JPEG"),
        "a.jpg.cls": b"r",
        "c.2024.1.png": picture(4),
        "c.2024.1.png.cls": b"s",
    }
    packed(source(kind, tmp_path / "more", members), tmp_path / "more-out")
    assert labels_of(tmp_path / "more-out") == (("p", "q", "r", "s"), [2, 0, 1, 3])


def test_names_with_dots_in_a_folder_without_labels(tmp_path):
    names = ["a.png", "a.edited.png", "b.png", "v1.0.png", "v1.1.png"]
    report = packed(folder_of(tmp_path / "in", names), tmp_path / "out")
    assert (report.count, report.ignored, report.notes) == (5, {}, ())
    versions = {f"v1.{i}.png": picture(i) for i in range(3)}
    index = load_index(str(tar_of(tmp_path / "x.tar", versions)))
    assert [index.source_of(i) for i in range(3)] == ["v1.0", "v1.1", "v1.2"]


def test_all_tars_of_a_set_use_the_same_rule(tmp_path):
    """One tar alone would be split at the first dots, but another one of the set cannot be."""
    (tmp_path / "set").mkdir()
    tar_of(tmp_path / "set" / "1.tar", {"a.b.png": picture(1), "a.cls": b"0"})
    tar_of(tmp_path / "set" / "2.tar", {"c.1.png": picture(1), "c.1.cls": b"0", "c.2.png": picture(2), "c.2.cls": b"1"})
    with pytest.raises(UsageError, match=r"1\.tar: sample a has no picture \(cls\)"):
        load_index(str(tmp_path / "set"))
    tar_of(tmp_path / "set" / "1.tar", {"a.b.png": picture(1), "a.b.cls": b"0"})
    index = load_index(str(tmp_path / "set"))
    assert [index.source_of(i) for i in range(3)] == ["a.b", "c.1", "c.2"]


# --- signs that mean something ----------------------------------------------------------------------------------------

SIGNS = ["set.tar", "set{a}", "set{0..3}", "set*1", "a::b", "pipe:touch z", "points:ring", "x?y", "s[1]"]


@pytest.mark.parametrize("name", SIGNS)
def test_output_folders_with_special_names(tmp_path, monkeypatch, name):
    folder_of(tmp_path / "in", ["a.png", "b.png"])
    monkeypatch.chdir(tmp_path)
    packed("in", name)
    for url in (name, str(tmp_path / name), f"{name}/index.json"):
        index = load_index(url)
        assert (index.count, index.table(8).image(1).shape) == (2, (3, 8, 8))
        assert index.source_of(1) == "b.png"
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("name", ["q{1,2}.tar", "q*.tar", "q::r.tar", "pipe:touch z.tar", "q?.tar"])
def test_tars_with_special_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tar_of(Path(name), {"a.png": picture(1)})
    tar_of(Path("q1.tar"), {"b.png": picture(2)})
    for url in (name, str(tmp_path / name)):
        index = load_index(url)
        assert [index.source_of(i) for i in range(index.count)] == ["a"]
        assert index.table(16).read(0) == picture(1)
    assert [file.path for file in list_source([Path(name)]).pictures] == ["a.png"]
    assert packed(name, tmp_path / "out").count == 1
    assert not (tmp_path / "z").exists()


def test_pack_takes_tars_as_training_does(tmp_path):
    tars = [str(tar_of(tmp_path / f"{i}.tar", {f"{i}.png": picture(i)})) for i in range(3)]
    other = tmp_path / "other"
    other.mkdir()
    same_name = str(tar_of(other / "0.tar", {"q.png": picture(7)}))
    sources = {
        "braces": f"{tmp_path}/{{0..2}}.tar",
        "glob": f"{tmp_path}/[0-9].tar",
        "colons": "::".join(tars),
        "list": tars,
    }
    assert len({packed(each, tmp_path / "out" / name).identity for name, each in sources.items()}) == 1
    assert packed([*tars, same_name], tmp_path / "out" / "folders").count == 4
    done = harness.command("pack", *tars, tmp_path / "cli", "--resolution", "8", "--workers", "0")
    assert (done.returncode, "3 pictures" in done.stdout) == (0, True), done.stderr
    for each, message in {
        f"{tmp_path}/{{0..3}}.tar": r"3\.tar: no such tar",
        f"{tmp_path}/x*.tar": "there is no tar",
        f"{tmp_path}/{{0..3.tar": "not a valid brace pattern",
        f"pipe:cat {tars[0]}": "is no path: fetch it first",
        "https://host/x.tar": "is no path: fetch it first",
    }.items():
        with pytest.raises(UsageError, match=message):
            packed(each, tmp_path / "none")
    with pytest.raises(UsageError, match=r"0\.tar twice"):
        packed([tars[0], tars[0]], tmp_path / "none")
    with pytest.raises(UsageError, match="several of SOURCE must all be tars"):
        packed([tars[0], other], tmp_path / "none")


# --- Unicode, links, and what is no file ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unicode_forms_of_a_name_are_equal(tmp_path, kind):
    one, two = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    assert one != two
    members = {f"{one}/a{two}.png": picture(1), f"{two}/b.png": picture(2), "z/c.png": picture(3)}
    path = source(kind, tmp_path / "in", members)
    packed(path, tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("z", one), [0, 1, 1])
    (tmp_path / "l.csv").write_text(f"path,label\n{two}/a{one}.png,p\n{one}/b.png,q\nz/c.png,r\n")
    packed(path, tmp_path / "csv", labels=tmp_path / "l.csv")
    assert labels_of(tmp_path / "csv") == (("p", "q", "r"), [2, 0, 1])
    beside = {f"{one}.png": picture(1), f"{two}.cls": b"cat", "b.png": picture(2), "b.cls": b"dog"}
    packed(source(kind, tmp_path / "beside", beside), tmp_path / "cls")
    assert labels_of(tmp_path / "cls") == (("cat", "dog"), [1, 0])
    words = {
        f"{i}.{end}": data
        for i, name in enumerate((one, two))
        for end, data in (("png", picture(i)), ("cls", name.encode()))
    }
    words |= {"2.png": picture(2), "2.cls": b"z"}
    path = source(kind, tmp_path / "words", words)
    packed(path, tmp_path / "words-out")
    assert labels_of(tmp_path / "words-out") == (("z", one), [1, 1, 0])
    if kind == "tar":
        assert load_index(str(path)).label_names == ("z", one)


def test_two_files_that_differ_in_unicode_form_are_both_packed(tmp_path):
    one, two = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    path = zip_of(tmp_path / "x.zip", {one: picture(1), two: picture(2)})
    assert packed(path, tmp_path / "out").count == 2


def test_links_to_class_folders(tmp_path):
    inside = folder_of(tmp_path / "in", ["cats/1.png", "dogs/2.png"])
    outside = folder_of(tmp_path / "elsewhere", ["3.png", "deep/4.png"])
    (inside / "a_link").symlink_to(inside / "cats")
    (inside / "birds").symlink_to(outside)
    (inside / "more").symlink_to(outside)
    (inside / "dogs" / "up").symlink_to(inside)
    report = packed(inside, tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("birds", "cats", "dogs"), [0, 0, 1, 2])
    assert report.notes == (
        "a_link leads to the folder cats, which is read once",
        "more leads to the folder birds, which is read once",
        "dogs/up leads to the folder ., which is read once",
    )


def test_special_files_are_reported_and_not_opened(tmp_path):
    folder = folder_of(tmp_path / "in", ["a.png"])
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(tmp_path / "pipe.tar")
    (folder / "device.png").symlink_to("/dev/zero")
    report = packed(folder, tmp_path / "out")
    reason = "is a device, a socket or a named pipe, which holds no picture"
    assert report.unreadable == (("device.png", reason), ("pipe.png", reason))
    with pytest.raises(UsageError, match=r"pipe\.tar is a device or a pipe: write what comes out of it into a file"):
        packed(tmp_path / "pipe.tar", tmp_path / "none")
    tar = tar_of(tmp_path / "x.tar", {"a.png": picture(1)})
    with pytest.raises(UsageError, match=r"pipe\.tar is no file"):
        packed([tar, tmp_path / "pipe.tar"], tmp_path / "none")
    for url in (tmp_path / "pipe.tar", f"{tmp_path}/*.tar"):
        with pytest.raises(UsageError, match=r"pipe\.tar is no"):
            load_index(str(url))


def test_unsupported_formats_are_named_with_a_remedy(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.HEIC", "b.heic", "c.jxl", "d.dng", "e.psd", "._f.png"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=r"holds no pictures .*2 \.heic .*pillow-heif.*1 \.jxl .*pillow-jxl.*1 hidden"):
        packed(folder, tmp_path / "out")
    folder_of(folder, ["g.png"])
    said = packed(folder, tmp_path / "out").summary()
    for words in ("2 .heic (convert them to PNG or JPEG", "1 .dng (develop", "1 .psd (export", "1 hidden .png"):
        assert words in said
