"""The included configurations for small datasets: from a folder to a snapshot with a few steps on the CPU."""

import json

import harness
import numpy as np
import pytest
from packing import packed
from PIL import Image

from stylegan_pg.config.loading import load_config


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("resolution", [64, 128])
def test_a_few_pictures_train_with_augmentation(tmp_path, resolution):
    name = f"ada-small-data{resolution}"
    config = load_config(name)
    assert (config.resolution, config.augment.mode, config.growth.start) == (resolution, "ada", None)
    dice = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        small = Image.fromarray(dice.integers(0, 256, [5, 6, 3], dtype=np.uint8))
        small.resize((resolution + 20, resolution + 9)).save(tmp_path / "pictures" / f"{i}.png")
    packed(tmp_path / "pictures", tmp_path / "data", resolution)
    command = ["train", name, f"data.url={tmp_path / 'data'}"]
    command += [f"run={tmp_path / 'run'}", "train.device=cpu", "train.batch=4", "train.total_kimg=0.012"]
    command += ["output.tick_kimg=0.004", "output.grid=[2,2]", "metrics.images=4", "data.workers=0"]
    command += ["model.low_precision=fp32"]  # auto would spend much time on measurements
    harness.command(*command, expected=0)
    stats = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert stats[-1]["nimg"] == 12
    assert all(np.isfinite(value) for value in stats[-1].values() if isinstance(value, float))
    assert "augment_p" in stats[-1]
    assert list((tmp_path / "run" / "snapshots").glob("*.safetensors"))
