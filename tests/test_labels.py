"""Labels in every form, complete, empty and ambiguous: how they are interpreted in packing and in foreign tars."""

import json
from pathlib import Path

import harness
import pytest
from packing import encoded, folder_of, labels_of, noise, packed, tar_of, zip_of

from stylegan_pg.data.datasets.mixture import mix
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.verify import info
from stylegan_pg.errors import UsageError

NAMES = [f"{i:02d}.png" for i in range(12)]
COUNTING = tuple(map(str, range(12)))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return folder_of(tmp_path_factory.mktemp("pictures"), NAMES)


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    return {name: encoded(noise(seed)) for seed, name in enumerate(NAMES)}


def csv_of(path: Path, labels: list, header: str = "path,label\n") -> Path:
    path.write_text(header + "".join(f"{name},{label}\n" for name, label in zip(NAMES, labels, strict=True)))
    return path


def json_of(path: Path, labels: list) -> Path:
    path.write_text(json.dumps(dict(zip(NAMES, labels, strict=True))))
    return path


# --- numbers, names, and none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["", " ", "nan", "NaN", "null", "<NA>"])
def test_empty_labels_and_numbers(tmp_path, pictures, empty):
    labels = csv_of(tmp_path / "l.csv", [empty if i == 5 else i for i in range(12)])
    with pytest.raises(
        UsageError, match=r"no label to 1 of 12 pictures \(05\.png\).*--unlabelled skip.*--unlabelled k"
    ):
        packed(pictures, tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()
    present = tuple(name for name in COUNTING if name != "5")
    skipped = packed(pictures, tmp_path / "skip", labels=labels, unlabelled="skip")
    assert (skipped.count, skipped.unlabelled) == (11, ("05.png",))
    assert "1 pictures without a label were left out: 05.png" in skipped.summary()
    assert labels_of(tmp_path / "skip") == (present, list(range(11)))
    kept = packed(pictures, tmp_path / "keep", labels=labels, unlabelled="keep")
    assert "1 pictures without a label have no class: 05.png" in kept.summary()
    assert labels_of(tmp_path / "keep") == (present, [0, 1, 2, 3, 4, -1, 5, 6, 7, 8, 9, 10])
    assert json.loads((tmp_path / "keep" / "index.json").read_text())["labels"]["counts"] == [1] * 11
    assert "1 images without a label" in list(info(load_index(str(tmp_path / "keep"))))


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([f"{i}.0" for i in range(12)], COUNTING),
        ([float(i) for i in range(12)], COUNTING),
        ([str(i) for i in range(12)], COUNTING),
        ([i + 1 for i in range(12)], tuple(str(i + 1) for i in range(12))),
        ([1990 + 3 * i for i in range(12)], tuple(str(1990 + 3 * i) for i in range(12))),
        ([10**12 + i for i in range(12)], tuple(str(10**12 + i) for i in range(12))),
        (["none", *[f"c{i:02d}" for i in range(11)]], (*[f"c{i:02d}" for i in range(11)], "none")),
    ],
)
def test_classes_are_the_numbers_that_occur(tmp_path, pictures, labels, names):
    for make in (csv_of, json_of):
        kind = make.__name__[:-3]
        packed(pictures, tmp_path / kind, labels=make(tmp_path / f"l.{kind}", labels))
        assert labels_of(tmp_path / kind)[0] == names
        assert sorted(labels_of(tmp_path / kind)[1]) == list(range(12))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([i / 8 for i in range(12)], "labels such as 0.125: number classes in integers, or name them"),
        ([i - 1 for i in range(12)], "labels from -1 to 10: where a number stands for no label, leave it empty"),
        ([True, *range(11)], "type bool, int"),
        (["a", *range(11)], "type int, str"),
    ],
)
def test_ambiguous_labels_are_refused_with_a_question(tmp_path, pictures, labels, message):
    with pytest.raises(UsageError, match=message):
        packed(pictures, tmp_path / "out", labels=json_of(tmp_path / "l.json", labels))


def test_the_command_prints_its_interpretation(tmp_path, pictures):
    labels = csv_of(tmp_path / "l.csv", [1990 + i % 10 if i != 3 else "" for i in range(12)], header="")
    command = ["pack", pictures, tmp_path / "out", "--resolution", "8", "--labels", labels, "--workers", "0"]
    refused = harness.command(*command, expected=2)
    assert "--unlabelled skip" in refused.stderr
    assert "Traceback" not in refused.stderr
    result = harness.command(*command, "--unlabelled", "keep", expected=0)
    assert f"labels: from {labels}; 9 classes: 1990 (2), 1991 (2), 1992 (1)" in result.stdout
    assert "1999 (1), numbered from 0 in this order" in result.stdout
    assert "data.conditional=true" in result.stdout
    assert "1 pictures without a label have no class: 03.png" in result.stdout


# --- beside the pictures, and dataset.json ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_files_beside_pictures_label_them_when_packing_as_in_training(tmp_path, members, kind):
    def label(i: int) -> bytes:
        value = "" if i == 4 else 20 * i
        return str(value).encode() if kind == "cls" else json.dumps({"label": value or (None if i else 0)}).encode()

    beside = {f"{i:02d}.{kind}": label(i) for i in range(12)}
    tar = tar_of(tmp_path / "a.tar", dict(sorted((members | beside).items())))
    with pytest.raises(UsageError, match=rf"its \.{kind} files gives no label to 1 of 12 pictures \(04\.png\)"):
        packed(tar, tmp_path / "out")
    report = packed(tar, tmp_path / "out", unlabelled="keep")
    expected = tuple(str(20 * i) for i in range(12) if i != 4), [0, 1, 2, 3, -1, 4, 5, 6, 7, 8, 9, 10]
    assert labels_of(tmp_path / "out") == expected
    assert report.ignored == {}
    foreign = load_index(str(tar))
    assert (foreign.label_names, foreign.table(8).label.tolist()) == expected
    both = mix([foreign, load_index(str(tmp_path / "out"))], [1, 1])
    assert both.table(8).label.tolist() == 2 * expected[1]


def test_conditional_training_refuses_pictures_without_a_label_by_name(tmp_path, members):
    beside = {f"{i:02d}.json": json.dumps({"label": i % 2} if i else {"caption": "x"}).encode() for i in range(12)}
    tar = tar_of(tmp_path / "a.tar", dict(sorted((members | beside).items())))
    command = ["train", "demo", f"data.url={tar}", f"run={tmp_path / 'run'}"]
    command += ["resolution=8", "growth.start=null", "growth.stable_kimg_at={}", "growth.fade_kimg_at={}"]
    command += ["loss.r1_gamma_at={}", "train.total_kimg=0.032", "train.device=cpu", "data.conditional=true"]
    result = harness.command(*command, expected=2)
    assert "1 of 12 images in" in result.stderr
    assert "--unlabelled skip" in result.stderr
    assert "Traceback" not in result.stderr


def test_json_without_labels_is_counted_as_ignored(tmp_path, members):
    captions = {f"{i:02d}.json": b'{"caption": "label"}' for i in range(12)}
    report = packed(tar_of(tmp_path / "a.tar", members | captions), tmp_path / "out")
    assert labels_of(tmp_path / "out") == ((), [-1] * 12)
    assert report.ignored == {".json": 12}
    broken = tar_of(tmp_path / "b.tar", members | captions | {"03.json": b"{"})
    with pytest.raises(UsageError, match=r"03\.json in SOURCE is not JSON.*--labels none"):
        packed(broken, tmp_path / "none")


@pytest.mark.parametrize("form", ["path: label", "labels: list", "labels: object", "from the root"])
def test_a_dataset_json_labels_what_is_below_its_folder(tmp_path, members, form):
    numbers = {name: i % 3 for i, name in enumerate(NAMES)}
    content = {
        "path: label": numbers,
        "labels: list": {"labels": list(numbers.items())},
        "labels: object": {"labels": numbers},
        "from the root": {f"wrap/{name}": label for name, label in numbers.items()},
    }[form]
    wrapped = {f"wrap/{name}": data for name, data in members.items()}
    wrapped["wrap/dataset.json"] = json.dumps(content).encode()
    report = packed(zip_of(tmp_path / "a.zip", wrapped), tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("0", "1", "2"), [0, 1, 2] * 4)
    assert "labels: from wrap/dataset.json" in report.summary()


def test_each_dataset_json_labels_its_own_folder(tmp_path, members):
    parts = {f"{part}/{name}": data for part in ("a", "b") for name, data in members.items()}
    for part, other in (("a", 0), ("b", 1)):
        parts[f"{part}/dataset.json"] = json.dumps(dict.fromkeys(NAMES, other)).encode()
    packed(zip_of(tmp_path / "a.zip", parts), tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("0", "1"), [0] * 12 + [1] * 12)


def test_a_label_file_may_omit_the_outer_folder(tmp_path, members):
    archive = zip_of(tmp_path / "a.zip", {f"wrap/{name}": data for name, data in members.items()})
    packed(archive, tmp_path / "out", labels=csv_of(tmp_path / "l.csv", list(range(12))))
    assert labels_of(tmp_path / "out") == (COUNTING, list(range(12)))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "classes", "said"),
    [
        (["a/1.png", "b/2.png"], ("a", "b"), "the layout of folders;"),
        (["images/a/1.png", "images/b/2.png"], ("a", "b"), "the layout of folders in images;"),
        (["train/a/1.png", "train/b/2.png", "val/a/3.png"], ("a", "b"), "folders below train, val;"),
        (["x/Train/im/a/1.png", "x/Train/im/b/2.png", "x/TEST/im/a/3.png"], ("a", "b"), "folders below TEST, Train;"),
        (["car/1.png", "train/2.png"], ("car", "train"), "the layout of folders;"),
        (["1/a.png", "2/a.png", "10/a.png"], ("1", "2", "10"), "numbered from 0"),
        (["2019/1.png", "2020/2.png"], ("2019", "2020"), "2 classes: 2019 (1), 2020 (1)"),
        (["train/1.png", "val/2.png"], (), "no labels: no class folders below train, val"),
        (["images/train/1.png", "images/val/2.png"], (), "no class folders below"),
        (["00000/1.png", "00001/2.png"], (), "taken for buckets; --labels folders"),
        (["a/1.png", "b/2.png", "3.png", "4.png", "5.png"], (), "3 of 5 pictures lie outside the folders a, b"),
        (["1.png", "2.png"], (), "no labels"),
    ],
)
def test_class_folders_are_the_first_level_that_differs(tmp_path, names, classes, said):
    report = packed(folder_of(tmp_path / "in", names), tmp_path / "out")
    assert report.label_names == classes
    assert said in report.summary()


@pytest.mark.parametrize("names", [["a/1.png", "a/2.png", "b/3.png", "x.png"], ["im/a/1.png", "im/b/2.png", "x.png"]])
def test_a_picture_beside_class_folders(tmp_path, names):
    source = folder_of(tmp_path / "in", names)
    with pytest.raises(UsageError, match=r"no label to 1 of . pictures \(x\.png\)"):
        packed(source, tmp_path / "out")
    assert packed(source, tmp_path / "out", unlabelled="skip").label_names == ("a", "b")
    assert labels_of(tmp_path / "out")[1][-1] == 1
    packed(source, tmp_path / "keep", unlabelled="keep")
    assert labels_of(tmp_path / "keep")[1][-1] == -1
    assert packed(source, tmp_path / "none", labels="none").label_names == ()


def test_a_test_folder_among_classes_is_ambiguous(tmp_path):
    source = folder_of(tmp_path / "in", ["cat/1.png", "dog/2.png", "test/3.png"])
    with pytest.raises(
        UsageError, match="folder test in SOURCE looks like a part for training or testing, cat, dog like"
    ):
        packed(source, tmp_path / "out")
    assert packed(source, tmp_path / "out", labels="folders").label_names == ("cat", "dog", "test")
    with pytest.raises(UsageError, match="no two folders of pictures side by side"):
        packed(source / "cat", tmp_path / "one", labels="folders")
    with pytest.raises(UsageError, match="unlabelled = drop: give one of skip, keep, refuse"):
        packed(source, tmp_path / "one", unlabelled="drop")


def test_classes_without_a_valid_picture_are_reported(tmp_path):
    source = folder_of(tmp_path / "in", ["a/1.png", "b/2.png", "c/3.png"])
    (source / "b" / "2.png").write_bytes(b"?")
    report = packed(source, tmp_path / "out")
    assert report.empty_classes == ("b",)
    assert "warning: 1 classes have no picture that could be packed: b" in report.summary()


# --- what people's tools write ----------------------------------------------------------------------------------------


def test_a_label_file_has_one_encoding(tmp_path, members):
    pictures = {name: members[name] for name in NAMES[:2]}
    beside = {"00.cls": b"\xef\xbb\xbf10\r\n", "01.cls": b"9\r\n"}
    marked = tar_of(tmp_path / "a.tar", dict(sorted((pictures | beside).items())))
    packed(marked, tmp_path / "out")
    assert labels_of(tmp_path / "out") == (("9", "10"), [1, 0])
    assert load_index(str(marked)).label_names == ("9", "10")
    for encoding in ("latin-1", "utf-16"):
        beside = {"00.cls": "é".encode(encoding), "01.cls": "è".encode(encoding)}
        other = tar_of(tmp_path / f"{encoding}.tar", dict(sorted((pictures | beside).items())))
        for read in (lambda tar=other: packed(tar, tmp_path / "no"), lambda tar=other: load_index(str(tar))):
            with pytest.raises(UsageError, match=r"00\.cls.* holds no text in UTF-8"):
                read()


def test_a_table_may_name_pictures_without_their_suffixes(tmp_path):
    pictures = folder_of(tmp_path / "p", [f"train/{i}.png" for i in range(4)])
    for header in ("id,breed\n", ""):
        table = tmp_path / f"l{len(header)}.csv"
        table.write_text(header + "".join(f"{i},b{i % 2}\n" for i in range(4)))
        packed(pictures, tmp_path / table.stem, labels=table)
        assert labels_of(tmp_path / table.stem) == (("b0", "b1"), [0, 1, 0, 1])
    folder_of(pictures, ["train/0.jpg"])
    with pytest.raises(UsageError, match=r"l0\.csv labels 0, which may be train/0\.jpg, train/0\.png: add suffixes"):
        packed(pictures, tmp_path / "two", labels=table)
    for name, text, message in (
        ("semicolons.csv", "train/0.png;a\n", "separated by a comma"),
        ("tabs.tsv", "train/0.png\ta\n", r"must end in \.json or \.csv"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=message):
            packed(pictures, tmp_path / "no", labels=tmp_path / name)
