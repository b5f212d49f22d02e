"""The disk cache of statistics of real images, and damaged images."""

import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from measuring import Painter, evaluator
from packing import encoded, tar_of
from PIL import Image

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.metrics import real_cache
from stylegan_pg.metrics.evaluate import DatasetAsGenerator


@pytest.mark.usefixtures("_own_cache")
def test_a_damaged_cache_entry_is_computed_again(pictures, capsys):
    first = evaluator(pictures[1], "fid20_full,kid20_full", extractor="pixels")(Painter())
    entries = sorted((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())
    assert len(entries) == 2
    for spoil in (lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"\x01" * 9, lambda data: b"junk"):
        for path in entries:
            path.write_bytes(spoil(path.read_bytes()))
        capsys.readouterr()
        assert evaluator(pictures[1], "fid20_full,kid20_full", extractor="pixels")(Painter()) == first
        assert capsys.readouterr().err.count("damaged and is computed again") == 2
    assert evaluator(pictures[1], "fid20_full,kid20_full", extractor="pixels")(Painter()) == first
    assert capsys.readouterr().err == ""
    with mock.patch.object(real_cache, "save", side_effect=OSError("No space left on device")):
        other = evaluator(pictures[1], "fid20_full_mirror", extractor="pixels")
        assert other(Painter())
    assert "could not be cached: No space left" in capsys.readouterr().err


@pytest.mark.usefixtures("_own_cache")
def test_metrics_work_without_a_cache_folder(pictures, capsys):
    def fails():
        raise PermissionError("/tmp/x could be written by others: set STYLEGAN_PG_CACHE")

    with mock.patch.object(real_cache, "cache_folder", fails):
        assert evaluator(pictures[1], "fid20_full", extractor="pixels")(Painter())
    (warning,) = capsys.readouterr().err.splitlines()
    assert "could not be cached: /tmp/x could be written by others" in warning


@pytest.mark.usefixtures("_own_cache")
def test_damaged_images_are_reported_and_not_cached(pictures, tmp_path, capsys):
    data = Path(shutil.copytree(pictures[1], tmp_path / "data"))
    table = load_index(str(data)).table(64)
    for ordinal in (3, 50):
        path = Path(table.paths[table.shard[ordinal]])
        content = bytearray(path.read_bytes())
        content[int(table.offset[ordinal]) + 20] ^= 1
        path.write_bytes(content)
    evaluator(data, "fid40_full,kid40_full,swd40", extractor="pixels")(Painter())
    warnings = capsys.readouterr().err
    assert warnings.count("warning: 2 of the real images are damaged") == warnings.count("warning:") == 1
    assert not list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").glob("*"))
    evaluator(pictures[1], "fid64_full", extractor="pixels")(DatasetAsGenerator(table, 0))
    assert capsys.readouterr().err.count("warning: 2 of the measured images are damaged") == 1


@pytest.mark.usefixtures("_own_cache")
def test_foreign_tars_with_equal_layout_have_separate_cache_entries(tmp_path):
    """The tars have the same member names and sizes but contain other pictures."""
    found = []
    for seed, folder in ((0, "a"), (1, "b"), (1, "a")):
        (tmp_path / folder).mkdir(exist_ok=True)
        rng, members = np.random.default_rng(seed), {}
        for i in range(8):
            levels = rng.integers(0, 256, [3], dtype=np.uint8)
            members[f"{i}.png"] = encoded(Image.fromarray(np.tile(levels, (64, 64, 1))), compress_level=0)
        path = tar_of(tmp_path / folder / "0.tar", members)
        os.utime(path, (1e9 + len(found), 1e9 + len(found)))
        found.append(evaluator(tmp_path / folder, "fid8_full", extractor="pixels")(Painter()))
    assert found[1] == found[2]
    assert found[0] != found[1]
    assert len(list((Path(os.environ["STYLEGAN_PG_CACHE"]) / "metrics").iterdir())) == 3
