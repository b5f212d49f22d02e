"""Reading packed datasets: complete datasets are read correctly, and damage is reported with the name of the file."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from stylegan_pg.config import Config
from stylegan_pg.data.datasets.index import check_base, identity_of
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.datasets.table import CorruptSample, SampleTable
from stylegan_pg.data.images.decode import decode
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.errors import UsageError

COUNT = 12


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A labelled dataset of 12 pictures at 4 ... 64 pixels in several shards."""
    folder = tmp_path_factory.mktemp("original")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        file = folder / "in" / f"class{i % 2}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    pack(folder / "in", folder / "out", resolution=64, shard_size="40kB", workers=0, progress=False)
    return folder / "out"


@pytest.fixture
def dataset(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def flip(file: Path, offset: int) -> None:
    with open(file, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 1]))


def hash_of_images(table: SampleTable) -> list[bytes]:
    return [table.image(i).tobytes() for i in range(len(table))]


def encoded(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def test_index_describes_the_dataset(original):
    index = load_index(str(original))
    assert (index.count, index.resolutions, index.channels) == (COUNT, (4, 8, 16, 32, 64), 3)
    assert index.label_names == ("class0", "class1")
    assert len(index.identity) == 64
    assert len(index.shards) > 1
    assert load_index(str(original / "index.json")) == index
    assert load_index(f"file://{original}") == index
    assert index.source_of(0) == "class0/00.png"
    assert index.source_of(COUNT) == ""


def test_all_resolutions_have_the_same_samples(original):
    index = load_index(str(original))
    tables = [index.table(resolution) for resolution in index.resolutions]
    for table in tables:
        assert len(table) == COUNT
        assert [a.dtype for a in (table.shard, table.offset, table.size, table.label, table.crc32)] == [
            np.int32, np.int64, np.int64, np.int64, np.uint32,
        ]  # fmt: skip
        assert table.label.tolist() == [0] * 6 + [1] * 6
        np.testing.assert_array_equal(table.shard, tables[0].shard)
        images = np.stack([table.image(i) for i in range(COUNT)])
        assert images.dtype == np.uint8
        assert images.shape == (COUNT, 3, table.resolution, table.resolution)
    small, large = ([t.image(i).mean((1, 2)) for i in range(COUNT)] for t in (tables[0], tables[-1]))
    assert np.abs(np.subtract(small, large)).max() < 1.5


def test_decoding_is_deterministic_across_processes(original):
    table = load_index(str(original)).table(64)
    here = hash_of_images(table)  # opens files that the child processes inherit
    assert hash_of_images(pickle.loads(pickle.dumps(table))) == here
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            assert list(pool.map(hash_of_images, [table] * 4)) == [here] * 4


def test_invalid_datasets_are_refused(tmp_path, dataset):
    with pytest.raises(UsageError, match="no such folder"):
        load_index(str(tmp_path / "missing"))
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"x\.tar\.gz is no uncompressed tar and no folder: unpack"):
        load_index(str(tmp_path / "x.tar.gz"))
    with pytest.raises(UsageError, match="interrupted: run stylegan-pg pack again"):
        load_index(str(tmp_path))
    with pytest.raises(UsageError, match="ftp:// is not supported"):
        load_index("ftp://server/data")
    text = (dataset / "index.json").read_text()
    content = json.loads(text)
    for changed, message in {
        "{": "damaged or not an index",
        "[]": "damaged or not an index",
        "{}": "damaged or not an index",
        text[: len(text) // 2]: "damaged or not an index",
        json.dumps({**content, "format": 3}): "format version 3, this program reads 1 and 2",
        json.dumps({**content, "count": 13}): "identity does not match",
        json.dumps({"format": 1}): "is damaged",
    }.items():
        (dataset / "index.json").write_text(changed)
        with pytest.raises(UsageError, match=message):
            load_index(str(dataset))
    (dataset / "index.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read"):
        load_index(str(dataset))


DESCRIPTION = {
    "format": 1, "count": 3, "resolutions": [4, 8], "channels": 3,
    "labels": {"names": ["cat", "dog"], "counts": [2, 1]},
    "source": "pictures", "crop": "center", "filter": "lanczos", "quality": 95, "lossless_up_to": 32,
    "shards": [{"name": "00000", "count": 3, "index_sha256": {"4": "ab" * 32, "8": "cd" * 32}}],
    "unreadable": 0, "pack": {},
}  # fmt: skip


def test_identity_of_square_datasets_is_stable():
    golden = "e875a9a82f212717f9ac7ac09ff3c409d067cba74561066de8b43369eaffc5f9"
    assert identity_of(DESCRIPTION) == identity_of(DESCRIPTION | {"base": [4, 4]}) == golden
    others = {identity_of(DESCRIPTION | {"base": base}) for base in ([4, 6], [6, 4], [8, 8])}
    assert len(others | {golden}) == 4


def test_datasets_without_base_are_square(original, dataset):
    content = json.loads((dataset / "index.json").read_text())
    del content["base"], content["pack"]["base"]  # the format of versions that supported only squares
    (dataset / "index.json").write_text(json.dumps(content))
    old, new = load_index(str(dataset)), load_index(str(original))
    assert (old.base, old.size_at(64), old.identity) == ((4, 4), (64, 64), new.identity)
    np.testing.assert_array_equal(old.table(32).image(5), new.table(32).image(5))
    source = original.parent / "in"
    again = pack(source, dataset, resolution=64, shard_size="40kB", workers=0, progress=False)
    assert again.was_complete
    for base in ([4, 6], [4], "4x6", [0, 4], 5):
        (dataset / "index.json").write_text(json.dumps(content | {"base": base}))
        with pytest.raises(UsageError, match="is damaged"):
            load_index(str(dataset))


def test_model_and_dataset_must_agree_in_shape(original):
    index = load_index(str(original))
    config = Config(run="x", resolution=64)
    check_base(index, config)
    other = replace(config, model=replace(config.model, base=[4, 6]))
    with pytest.raises(UsageError, match=r"model.base=\[4, 6\] .* base is 4x4 .*model.base=\[4,4\].*--base 4x6"):
        check_base(index, other)
    check_base(replace(index, base=(4, 6)), other)


def test_a_resolution_that_was_not_packed(original):
    with pytest.raises(UsageError, match="no resolution 128, only 4, 8, 16, 32, 64"):
        load_index(str(original)).table(128)


def test_missing_truncated_and_modified_files(dataset):
    index = load_index(str(dataset))
    folder = dataset / "r0032"
    (folder / "00000.tar").rename(folder / "away")
    with pytest.raises(UsageError, match=r"r0032/00000.tar is missing"):
        index.table(32)
    shutil.copy(folder / "away", folder / "00000.tar")
    os.truncate(folder / "00000.tar", 5000)
    with pytest.raises(UsageError, match=r"r0032/00000.tar has 5000 bytes where \d+ were packed"):
        index.table(32)
    flip(dataset / "r0016" / "00001.index.json", 100)
    with pytest.raises(UsageError, match=r"00001.index.json is not the one that was packed"):
        index.table(16)
    (dataset / "r0008" / "00000.index.json").unlink()
    with pytest.raises(UsageError, match=r"r0008/00000.index.json is missing"):
        index.table(8)
    assert len(index.table(64)) == COUNT


@pytest.mark.parametrize("resolution", [32, 64])
def test_a_flipped_bit_is_one_corrupt_sample(dataset, resolution):
    table = load_index(str(dataset)).table(resolution)
    victim = COUNT - 2
    flip(Path(table.paths[table.shard[victim]]), int(table.offset[victim] + table.size[victim] // 2))
    with pytest.raises(CorruptSample, match="checksum mismatch") as caught:
        table.image(victim)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.ordinal, error.reason) == (victim, "checksum mismatch")
    assert error.shard == f"r{resolution:04d}/{table.shard[victim]:05d}.tar"
    assert str(error) == str(caught.value)
    for i in set(range(COUNT)) - {victim}:
        table.image(i)


def test_a_tar_that_shrinks_while_in_use_is_corrupt(dataset):
    table = load_index(str(dataset)).table(64)
    table.image(0)
    os.truncate(table.paths[0], int(table.offset[0]) + 10)
    with pytest.raises(CorruptSample, match="bytes too early"):
        table.read(0)


def test_read_succeeds_after_os_errors(dataset, monkeypatch):
    table = load_index(str(dataset)).table(64)
    expected = table.read(0)

    def failing(*_args):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        with pytest.raises(OSError, match="Stale"):
            table.read(0)
    assert table.read(0) == expected
    os.rename(table.paths[1], table.paths[1] + ".away")
    last = COUNT - 1
    with pytest.raises(FileNotFoundError):
        [table.read(i) for i in range(COUNT)]
    os.rename(table.paths[1] + ".away", table.paths[1])
    assert len(table.read(last)) == table.size[last]


def test_short_reads_are_continued(original, monkeypatch):
    table = load_index(str(original)).table(64)
    expected = table.read(3)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 1000), offset))
    assert table.read(3) == expected


def test_open_files_stay_bounded(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "in").mkdir()
    for i in range(100):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    pack(tmp_path / "in", tmp_path / "out", resolution=4, shard_size=1, workers=0, progress=False)
    table = load_index(str(tmp_path / "out")).table(4)
    assert len(table.paths) == 100
    before = len(os.listdir("/proc/self/fd"))
    for i in range(100):
        table.read(i)
    assert len(os.listdir("/proc/self/fd")) <= before + 64


def test_decode_is_strict():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    jpeg = simplejpeg.encode_jpeg(colour, 95, "RGB", "444")
    for data, channels in [
        (encoded(colour), 3),
        (jpeg, 3),
        (encoded(colour, "WEBP"), 3),
        (encoded(colour[:, :, 0]), 1),
        (simplejpeg.encode_jpeg(colour[:, :, :1].copy(), 95, "GRAY", "GRAY"), 1),
    ]:
        assert decode(data, (16, 16), channels).shape == (channels, 16, 16)
        with pytest.raises(ValueError, match="16x16, not 8x8"):
            decode(data, (8, 8), channels)
    np.testing.assert_array_equal(decode(encoded(colour), (16, 16), 3), colour.transpose(2, 0, 1))
    assert decode(encoded(colour[:12]), (12, 16), 3).shape == (3, 12, 16)
    with pytest.raises(ValueError, match=r"is 12x16, not 16x12 \(rows x columns\)"):
        decode(encoded(colour[:12]), (16, 12), 3)
    for data, channels, message in [
        (encoded(colour), 1, "mode is RGB, not L"),
        (encoded(colour[:, :, 0]), 3, "mode is L, not RGB"),
        (jpeg, 1, "does not give 1 channels"),
        (jpeg[:-60], 3, "(?i)premature end|corrupt"),
        (encoded(colour)[:-60], 3, "does not decode"),
        (encoded(colour, "BMP"), 3, "does not decode"),
        (b"", 3, "does not decode"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode(data, (16, 16), channels)
