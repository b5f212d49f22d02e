"""`stylegan-pg data check|info|bench`, run from outside."""

import os
import shutil
from pathlib import Path

import harness
import numpy as np
import pytest
from packing import files_of, packed
from PIL import Image

from stylegan_pg.data.datasets.opening import load_index

COUNT = 30


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    random = np.random.default_rng(0)
    for i in range(COUNT):
        file = folder / "in" / ("cat" if i % 3 else "dog") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(file)
    packed(folder / "in", folder / "out", resolution=64, lowest=16, shard_size="20kB")
    return folder / "out"


@pytest.fixture
def dataset(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def data(*args: object, expected: int = 0) -> str:
    done = harness.command("data", *args, expected=expected)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def flip(dataset: Path, resolution: int, ordinal: int) -> None:
    table = load_index(str(dataset)).table(resolution)
    with open(table.paths[table.shard[ordinal]], "r+b") as file:
        file.seek(int(table.offset[ordinal] + table.size[ordinal] // 2))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
def test_check_reports_all_damage(dataset):
    assert "30 images, all good" in data("check", dataset, "--workers", 2)
    flip(dataset, 32, 7)
    flip(dataset, 64, 29)
    (dataset / "r0016" / "00000.tar").write_bytes(b"")
    before = files_of(dataset)
    said = data("check", dataset, "--workers", 2, expected=1)
    assert "sample 7 in r0032/" in said
    assert "checksum mismatch (cat/11.png)" in said  # the cats precede the dogs
    assert "sample 29 in r0064/" in said
    assert "resolution 16: " in said
    assert "00000.tar has 0 bytes" in said
    assert "30 images, faults: 3" in said
    assert files_of(dataset) == before
    assert "faults: 1" in data("check", dataset, "--resolution", 64, "--workers", 1, expected=1)
    assert "no resolution 128" in data("check", dataset, "--resolution", 128, expected=2)
    assert "no such folder" in data("check", dataset / "none", expected=2)


@pytest.mark.slow
def test_info_prints_counts_and_draws_a_sheet(dataset, tmp_path):
    sheet = tmp_path / "pictures" / "sheet.png"
    said = data("info", dataset, "--out", sheet)
    assert "30 images in " in said
    assert "RGB, up to 64x64" in said
    assert "2 classes: cat 20, dog 10" in said
    for resolution in (16, 32, 64):
        assert f"resolution {resolution}: {resolution}x{resolution}, " in said
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (3 * 64, 10 * 64, 3)
    table = load_index(str(dataset)).table(64)
    for i in (0, 9, 10, 29):
        row, column = divmod(i, 10)
        tile = pixels[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        np.testing.assert_array_equal(tile, table.image(i).transpose(1, 2, 0))


@pytest.mark.slow
def test_bench_and_foreign_tars(dataset):
    said = data("bench", dataset, "--seconds", 0.5, "--workers", 1, "--batch", 8)
    assert "first batch after" in said
    assert "resolution 64, batches of 8, 1 workers: " in said
    assert float(said.split("workers: ")[1].split()[0]) > 10
    tars = f"{dataset}/r0064/*.tar"  # these tars are read as if another program had written them
    assert "30 images, all good" in data("check", tars, "--workers", 1)
    assert "2 classes: 0 20, 1 10" in data("info", tars)
    assert "base = 4by4" in data("info", tars, "--base", "4by4", expected=2)
