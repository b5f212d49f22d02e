"""From packing further fields to batches that hold them, and to a generator whose conditions are vectors."""

from __future__ import annotations

import json
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from packing import folder_of, noise, packed
from PIL import Image

from stylegan_pg import load_snapshot
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.errors import UsageError

COUNT, FIELDS = 12, ["B", "seg", "caption", "labels", "seg@next"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Twelve pictures; B is the same picture inverted, seg is half of its red channel, the vector its number."""
    top = tmp_path_factory.mktemp("training")
    names = [f"{i:02d}" for i in range(COUNT)]
    folder_of(top / "in", [f"{name}.png" for name in names])
    for i, name in enumerate(names):
        pixels = np.asarray(noise(i))
        for folder, picture in {"in": pixels, "B": 255 - pixels, "seg": pixels[:, :, 0] // 2}.items():
            (top / folder).mkdir(exist_ok=True)
            Image.fromarray(picture).save(top / folder / f"{name}.png")
        (top / "in" / f"{name}.txt").write_text(f"picture {i}")
    (top / "labels.json").write_text(json.dumps({f"{name}.png": [i, -i, 0.5] for i, name in enumerate(names)}))
    how = {"labels": top / "labels.json", "captions": "auto", "pair": [f"B={top / 'B'}"]}
    packed(top / "in", top / "out", 16, **how, mask=[f"seg={top / 'seg'}"], format="png", shard_size="5kB")
    return top / "out"


@pytest.mark.parametrize("workers", [0, 2])
def test_fields_of_a_batch_belong_to_their_pictures(dataset, workers):
    """Whatever lies on the picture's pixels is flipped with it."""
    index = load_index(str(dataset))
    table, order = index.table(16), index.order(0)
    how = {"start": 0, "end": 48, "batch": 4, "share": [0, 1, 2, 3], "fields": FIELDS, "mirror": True}
    turned = 0
    for n, batch in enumerate(batches(table, order, **how, workers=workers)):
        values = batch.fields
        assert torch.equal(values["B"], 255 - batch.image)
        assert torch.equal(values["seg"], batch.image[:, :1] // 2)
        assert batch.masks == {"seg", "seg@next"}
        assert torch.equal(values["seg@next"], values["seg"].roll(-1, dims=0))
        numbers = [order.at(4 * n + i)[1] for i in range(4)]
        assert values["caption"] == [f"picture {i}" for i in numbers]
        assert values["labels"].tolist() == [[i, -i, 0.5] for i in numbers]
        turned += sum(
            not torch.equal(image, torch.tensor(table.image(i))) for i, image in zip(numbers, batch.image, strict=True)
        )
    assert 0 < turned < 48


@pytest.mark.distributed
def test_vectors_condition_a_generator(dataset, tmp_path):
    """Training, continuing, sampling from examples, metrics and the Python interface."""
    run = tmp_path / "run"
    keys = {"data__conditional": "true", "resolution": 16, "growth__start": "null", "growth__stable_kimg_at": "{}"}
    keys |= {"growth__fade_kimg_at": "{}", "train__total_kimg": 0.064, "metrics__every_kimg": 0.064}
    keys |= {"metrics__names": "[swd64]", "data__mirror": "true"}
    harness.finish(harness.start(harness.arguments(run, dataset, **keys)))
    assert any("swd64" in line for line in (run / "metrics.jsonl").read_text().splitlines())
    (path,) = (run / "snapshots").glob("0*.safetensors")
    G = load_snapshot(path)
    assert (G.c_dim, G.description["condition"]) == (3, "labels")
    z = torch.zeros(2, G.z_dim)
    one, other = G(z, torch.tensor([3.0, -3.0, 0.5])), G(z, np.array([[3, -3, 0.5], [9, -9, 0.5]]))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])
    for wrong in (torch.zeros(2, 2), [[1, 2, float("nan")]] * 2, "a", None):
        with pytest.raises(UsageError, match="c "):
            G(z, wrong)
    done = harness.command("sample", path, "--out", tmp_path / "samples", "--seeds", "0-2", expected=0)
    assert [Path(line).name for line in done.stdout.split()] == [f"seed{i:06d}-{i}.png" for i in range(3)]
    harness.command("sample", path, "--out", tmp_path / "grid", "--class-grid", "--labels", "#0-3", expected=0)
    measured = harness.command("metrics", path, "--metrics", "swd64", "--data", dataset, expected=0)
    assert "swd64" in measured.stdout
