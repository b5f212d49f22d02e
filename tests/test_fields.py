"""Packing of further fields (vectors, captions, pairs, masks) together, and datasets of format 2, which hold them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from packing import encoded, files_of, folder_of, noise, packed, tar_of, zip_of
from PIL import Image

from stylegan_pg.data.datasets.contact_sheet import contact_sheet
from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.mixture import mix
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.sampler import flipped
from stylegan_pg.data.datasets.shard_index import fits
from stylegan_pg.data.datasets.table import CorruptSample
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.data.pack import shard_writer
from stylegan_pg.data.verify import check, info
from stylegan_pg.errors import UsageError

NAMES = [f"{i:02d}" for i in range(6)]
VECTORS = {f"{name}.png": [0.1 * i, -1.0, 1e-7] for i, name in enumerate(NAMES)}


def mask_of(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 19, (size, size), dtype=np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Six pictures in `in`, with captions of four, and their pairs and masks beside it."""
    top = tmp_path_factory.mktemp("fields")
    folder_of(top / "in", [f"{name}.png" for name in NAMES])
    for i, name in enumerate(NAMES):
        for folder in ("B", "seg"):
            (top / folder).mkdir(exist_ok=True)
        noise(100 + i).save(top / "B" / f"{name}.bmp")
        mask_of(i).save(top / "seg" / f"{name}.png")
        if i < 4:
            (top / "in" / f"{name}.txt").write_text(f" ein Bild, Größe {i}\n")
    (top / "labels.json").write_text(json.dumps(VECTORS))
    return top


def options(top: Path, **changed: Any) -> dict[str, Any]:
    every = {
        "labels": top / "labels.json",
        "captions": "auto",
        "pair": [f"B={top / 'B'}"],
        "mask": {"seg": top / "seg"},
        "format": "png",
        "shard_size": "5kB",
    }
    return every | changed


@pytest.fixture(scope="module")
def dataset(source) -> DatasetIndex:
    packed(source / "in", source / "out", 16, **options(source))
    return load_index(str(source / "out"))


def test_every_field_comes_back(source, dataset):
    assert dataset.fields == {
        "B": Field("image", channels=3),
        "caption": Field("text"),
        "labels": Field("vector", 3),
        "seg": Field("mask", channels=1),
    }
    assert len(dataset.shards) > 1
    table = pickle.loads(pickle.dumps(dataset.table(16)))
    for i, name in enumerate(NAMES):
        assert np.array_equal(
            table.value("B", i), np.array(Image.open(source / "B" / f"{name}.bmp")).transpose(2, 0, 1)
        )
        assert np.array_equal(table.value("seg", i)[0], np.array(Image.open(source / "seg" / f"{name}.png")))
        assert table.value("caption", i) == (f"ein Bild, Größe {i}" if i < 4 else "")
        assert np.array_equal(table.value("labels", i), np.array(VECTORS[f"{name}.png"], np.float32))
    assert table.vectors["labels"].dtype == np.float32


def test_lower_resolutions_have_means_of_pairs_and_values_of_masks(source, dataset):
    table = dataset.table(8)
    top = np.array(Image.open(source / "B" / "00.bmp")).astype(int).reshape(8, 2, 8, 2, 3).sum(axis=(1, 3))
    assert np.array_equal(table.value("B", 0), ((top + 2) // 4).transpose(2, 0, 1))
    mask = table.value("seg", 0)
    assert mask.shape == (1, 8, 8)
    assert set(mask.ravel().tolist()) <= set(np.array(Image.open(source / "seg" / "00.png")).ravel().tolist())


def test_webdataset_reads_the_members(dataset):
    import webdataset

    wds: Any = webdataset
    sample = next(iter(wds.WebDataset(f"{dataset.root}/r0016/00000.tar", shardshuffle=False)))
    assert {*sample} >= {"__key__", "png", "b.png", "seg.png", "txt", "labels.npy"}
    vector = np.load(io.BytesIO(sample["labels.npy"]))
    assert np.array_equal(vector, np.array(VECTORS["00.png"], np.float32))


def test_a_dataset_without_fields_has_format_1(source, dataset):
    report = packed(source / "in", source / "plain", 16)
    assert json.loads((source / "plain" / "index.json").read_text())["format"] == 1
    assert json.loads((source / "out" / "index.json").read_text())["format"] == 2
    assert any("--captions auto" in remark for remark in report.remarks)
    assert report.identity != dataset.identity


def test_the_cached_table_is_the_same_and_damage_to_it_is_noticed(source, dataset, monkeypatch):
    monkeypatch.setattr("stylegan_pg.data.datasets.index.SMALL", 0)
    fresh = dataset.table(16)
    cached = dataset.table(16)
    for name in ("B", "seg", "caption"):
        assert all(np.array_equal(a, b) for a, b in zip(fresh.members[name], cached.members[name], strict=True))
    assert np.array_equal(fresh.vectors["labels"], cached.vectors["labels"])
    found: dict[str, np.ndarray] = {}
    monkeypatch.setattr("stylegan_pg.data.datasets.index.cached", lambda key, make, fits: found.update(make()) or found)
    dataset.table(16)
    stamps, count, fields = found["stamps"], dataset.count, dataset.fields
    assert fits(found, stamps, count, fields)
    assert not fits(found, stamps, count, {})
    assert not fits(found | {"labels.vectors": found["labels.vectors"][:, :2]}, stamps, count, fields)
    assert not fits(found | {"B.crc32": found["B.crc32"].astype(np.int64)}, stamps, count, fields)


def test_packing_again_changes_nothing_and_workers_do_not_either(source, dataset, tmp_path):
    before = files_of(source / "out")
    assert packed(source / "in", source / "out", 16, **options(source)).was_complete
    assert files_of(source / "out") == before
    packed(source / "in", tmp_path / "two", 16, **options(source, workers=2))
    assert files_of(tmp_path / "two") == before


def copied(source: Path, to: Path) -> Path:
    for part in ("in", "B", "seg"):
        shutil.copytree(source / part, to / part)
    shutil.copy(source / "labels.json", to)
    packed(to / "in", to / "out", 16, **options(to))
    return to


def test_only_groups_of_changed_further_files_are_packed_again(source, dataset, tmp_path):
    top = copied(source, tmp_path)
    shards = sorted((top / "out" / "r0016").glob("*.tar"))
    changes = {
        "01.png": lambda: (top / "in" / "01.txt").write_text("another text"),
        "03.png": lambda: mask_of(77).save(top / "seg" / "03.png"),
        "05.png": lambda: noise(78).save(top / "B" / "05.bmp"),
        "02.png": lambda: (top / "labels.json").write_text(json.dumps(VECTORS | {"02.png": [9, 9, 9]})),
    }
    for path, change in changes.items():
        before = {shard: shard.stat().st_mtime_ns for shard in shards}
        change()
        report = packed(top / "in", top / "out", 16, **options(top))
        assert report.repacked == (path,)
        assert 0 < sum(shard.stat().st_mtime_ns != before[shard] for shard in shards) < len(shards)
    table = load_index(str(top / "out")).table(16)
    assert table.value("caption", 1) == "another text"
    assert np.array_equal(table.value("seg", 3)[0], np.array(mask_of(77)))
    assert table.vectors["labels"][2].tolist() == [9, 9, 9]
    os.utime(top / "seg" / "04.png")  # only touched
    assert packed(top / "in", top / "out", 16, **options(top)).was_complete


def test_an_interrupted_packing_continues_to_the_same_files(source, dataset, tmp_path, monkeypatch):
    whole, commit = files_of(source / "out"), shard_writer.Group.commit

    def interrupted(self, *args):
        if self.name == "00001":
            raise KeyboardInterrupt
        return commit(self, *args)

    monkeypatch.setattr(shard_writer.Group, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packed(source / "in", tmp_path / "out", 16, **options(source))
    assert not (tmp_path / "out" / "index.json").exists()
    monkeypatch.undo()
    packed(source / "in", tmp_path / "out", 16, **options(source))
    assert files_of(tmp_path / "out") == whole


def test_other_fields_are_another_packing(source, dataset):
    with pytest.raises(UsageError, match=r"packed otherwise: fields was .*caption.*, is B .*Repeat the command"):
        packed(source / "in", source / "out", 16, **options(source, captions="none", labels="none"))
    with pytest.raises(UsageError, match=r"fields was .*, is none"):
        packed(source / "in", source / "out", 16, format="png", shard_size="5kB")


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_pictures_without_a_partner(source, tmp_path):
    few = folder_of(tmp_path / "few", ["00.jpg", "01.jpg", "99.jpg"])
    with pytest.raises(
        UsageError, match=r"B: 4 of 6 pictures have no partner there \(02\.png, 03\.png.*--unpaired skip"
    ):
        packed(source / "in", tmp_path / "out", pair=f"B={few}")
    report = packed(source / "in", tmp_path / "out", pair=f"B={few}", unpaired="skip")
    assert (report.count, len(report.unpaired)) == (2, 4)
    assert any("1 pictures of B belong to no picture" in note for note in report.notes)
    with pytest.raises(UsageError, match="B: 6 of 6 pictures"):
        packed(source / "in", tmp_path / "none", pair=f"B={folder_of(tmp_path / 'x', ['x.png'])}", unpaired="skip")


def test_partners_of_another_shape_are_left_out_with_the_reason(tmp_path):
    source, other = folder_of(tmp_path / "in", ["a.png", "b.png", "c.png"]), tmp_path / "B"
    other.mkdir()
    noise(1, 32).save(other / "a.png")  # twice the size is the same shape
    Image.new("RGB", (16, 17)).save(other / "b.png")
    (other / "c.png").write_bytes(b"?")
    report = packed(source, tmp_path / "out", pair=f"B={other}")
    assert report.count == 1
    assert report.unreadable == (
        ("b.png", "its B b.png: is 16x17, where the picture is 16x16 (width x height)"),
        ("c.png", "its B c.png: is not a picture of a supported format"),
    )


def test_channels_of_pairs_and_archives_of_them(source, tmp_path):
    members = {f"{name}.png": encoded(noise(i).convert("L")) for i, name in enumerate(NAMES)}
    for make, name in ((zip_of, "d.zip"), (tar_of, "d.tar")):
        path = make(tmp_path / name, members)
        packed(source / "in", tmp_path / f"{name}-out", 16, pair={"depth:1": path}, format="webp")
        index = load_index(str(tmp_path / f"{name}-out"))
        assert index.fields == {"depth": Field("image", channels=1)}
        assert np.array_equal(index.table(16).value("depth", 2)[0], np.array(noise(2).convert("L")))


def test_masks_keep_indices_and_are_padded_with_zeros(tmp_path):
    source, masks = folder_of(tmp_path / "in", []), tmp_path / "m"
    masks.mkdir()
    source.mkdir()
    Image.new("RGB", (8, 16)).save(source / "a.png")
    indexed = Image.fromarray(np.full([32, 16], 7, np.uint8), "P")
    indexed.putpalette([9, 9, 9] * 256)
    indexed.save(masks / "a.png")
    packed(source, tmp_path / "out", 16, mask=f"m={masks}", crop="pad")
    mask = load_index(str(tmp_path / "out")).table(16).value("m", 0)
    assert np.asarray(mask)[0, 0].tolist() == [0] * 4 + [7] * 8 + [0] * 4
    Image.fromarray(np.eye(16, 8) > 0).save(masks / "a.png")  # a bit for each pixel
    packed(source, tmp_path / "bits", 16, mask=f"m={masks}", crop="pad")
    bits = np.asarray(load_index(str(tmp_path / "bits")).table(16).value("m", 0))
    assert np.array_equal(bits[0, :, 4:12], np.eye(16, 8))
    Image.new("RGB", (8, 16)).save(masks / "a.png")
    with pytest.raises(UsageError, match=r"its m a\.png: its mode is RGB: a mask is a grey or a palette picture"):
        packed(source, tmp_path / "colours", 16, mask=f"m={masks}", crop="pad")


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"pair": "B"}, "give NAME=FOLDER"),
        ({"pair": "image=x"}, "give NAME=FOLDER"),
        ({"mask": "../x=y"}, "give NAME=FOLDER"),
        ({"pair": "B:2=x"}, "channels are 1, 3 or 4"),
        ({"mask": "B:1=x"}, "a mask has no channels"),
        ({"pair": ["B=x"], "mask": ["b=y"]}, "is given to two fields"),
        ({"pair": "caption=x"}, "is given to two fields"),
        ({"pair": "B:4=x"}, "jpg has no alpha channel"),
        ({"pair": "B=missing"}, "missing: no such folder, zip or tar"),
        ({"unpaired": "keep"}, "unpaired = keep: give one of skip, refuse"),
    ],
)
def test_options_that_make_no_sense(source, tmp_path, chosen, message):
    with pytest.raises(UsageError, match=message):
        packed(source / "in", tmp_path / "out", **chosen)


def test_a_folder_of_pairs_within_source_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match=r"seg of seg lies within SOURCE"):
        packed(source, tmp_path / "out", mask=f"seg={source / 'seg'}")


def test_the_command_of_the_documentation(source, tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text().replace("\\\n", " ")
    (command,) = (line for line in text.splitlines() if line.startswith("stylegan-pg pack photos"))
    for name, folder in {"photos": "in", "sketches": "B", "masks": "seg"}.items():
        shutil.copytree(source / folder, tmp_path / name)
    (tmp_path / "attributes.csv").write_text("file,x,y\n" + "".join(f"{name}.png,1,{name}\n" for name in NAMES))
    (tmp_path / "captions.json").write_text('{"00.png": "a"}')
    words = shlex.split(command.replace("--resolution 256", "--resolution 16"))[1:]
    done = harness.command(*words, "--unpaired", "skip", cwd=tmp_path, expected=0)
    assert "captions: from captions.json; 1 of 6 pictures" in done.stdout
    assert {name: str(field) for name, field in load_index(str(tmp_path / "data" / "faces")).fields.items()} == {
        "caption": "text",
        "labels": "vector of 2",
        "parsing": "mask",
        "sketch": "image, grey",
    }


# --- what reads them --------------------------------------------------------------------------------------------------


def test_a_mixture_has_the_fields_that_its_parts_describe_equally(source, dataset, tmp_path):
    packed(source / "in", tmp_path / "other", 16, captions="auto", format="png", pair=f"B:1={source / 'B'}")
    other = load_index(str(tmp_path / "other"))
    mixed = mix([dataset, other], [1, 1])
    assert mixed.fields == {"caption": Field("text")}
    table = mixed.table(16)
    assert table.fields == mixed.fields
    assert [table.value("caption", i) for i in (1, 6 + 1, 6 + 5)] == ["ein Bild, Größe 1"] * 2 + [""]


def test_batches_have_the_fields_mirrored_together(dataset):
    table, order = dataset.table(16), dataset.order(0)
    how: Any = {"fields": ["B", "seg", "caption", "labels"], "share": range(4), "mirror": True, "workers": 0}
    (batch,) = batches(table, order, start=0, end=4, batch=4, **how)
    flips = set()
    for k in range(4):
        epoch, i = order.at(k)
        flips.add(is_flipped := flipped(0, epoch, i))
        for name in ("B", "seg"):
            expected = np.asarray(table.value(name, i))
            found = batch.fields[name][k].numpy()
            assert np.array_equal(found, expected[:, :, ::-1] if is_flipped else expected)
        assert batch.fields["caption"][k] == table.value("caption", i)
        assert np.array_equal(batch.fields["labels"][k].numpy(), table.vectors["labels"][i])
    assert flips == {False, True}


def test_data_info_lists_fields_and_the_sheet_shows_them(dataset, tmp_path):
    lines = list(info(dataset))
    assert "field B: image, RGB" in lines
    assert "field caption: text, of 4 samples" in lines
    assert "field labels: vector of 3" in lines
    contact_sheet(dataset, tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png").convert("RGB"))
    table = dataset.table(16)
    assert sheet.shape[1] % (16 * 3) == 0
    assert np.array_equal(sheet[:16, :16], table.image(0).transpose(1, 2, 0))
    assert np.array_equal(sheet[:16, 16:32], table.value("B", 0).transpose(1, 2, 0))
    mask = table.value("seg", 0)[0]
    colours = {value: {tuple(c) for c in sheet[:16, 32:48][mask == value].tolist()} for value in np.unique(mask)}
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(colours)


def members_of(tar: Path) -> dict[str, tuple[int, int]]:
    with tarfile.open(tar) as archive:
        return {member.name: (member.offset_data, member.size) for member in archive.getmembers()}


@pytest.mark.parametrize("suffix", ["B.png", "seg.png", "txt"])
def test_data_check_looks_at_further_members(source, dataset, tmp_path, suffix):
    top = copied(source, tmp_path)
    tar = top / "out" / "r0008" / "00001.tar"
    name, (offset, size) = next((n, p) for n, p in members_of(tar).items() if n.partition(".")[2] == suffix)
    data = bytearray(tar.read_bytes())
    data[offset + size // 2] ^= 255
    tar.write_bytes(data)
    index = load_index(str(top / "out"))
    found = list(check(index, [8], workers=1))
    assert len(found) == 1
    assert "checksum mismatch" in found[0]
    assert f"{int(name.partition('.')[0]):02d}.png" in found[0]


def test_a_value_that_is_damaged_names_its_field(source, dataset, tmp_path):
    top = copied(source, tmp_path)
    table = load_index(str(top / "out")).table(16)
    table.members["caption"].crc32[0] += 1
    with pytest.raises(CorruptSample, match="checksum mismatch"):
        table.value("caption", 0)
