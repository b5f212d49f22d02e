"""Mixtures of packed datasets and tars of other programs: classes, proportions, and what does not fit together."""

import numpy as np
import pytest
import torch
from packing import packed
from PIL import Image
from test_foreign import COUNT, cache, shards

from stylegan_pg.config import Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.errors import UsageError

__all__ = ["cache", "shards"]  # fixtures


@pytest.fixture
def two(shards, tmp_path) -> dict[str, float]:
    """A packed dataset with classes "1" and "5", and the foreign one."""
    for i in range(10):
        file = tmp_path / "in" / ("1" if i % 2 else "5") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(file)
    packed(tmp_path / "in", tmp_path / "out", resolution=32, lowest=8)
    return {str(shards): 1.0, str(tmp_path / "out"): 3.0}


def configured(mixture: dict[str, float], *overrides: str) -> Config:
    given = ", ".join(f'"{url}": {weight}' for url, weight in mixture.items())
    return load_config(None, ["run=x", "train.total_kimg=1", "resolution=32", f"data.mixture={{{given}}}", *overrides])


def test_a_mixture_unites_classes_and_keeps_proportions(two, tmp_path):
    config = configured(two)
    assert config.data.mixture == two
    index = load_dataset(config)
    assert (index.count, index.resolutions, index.channels) == (COUNT + 10, (8, 16, 32), 3)
    assert index.label_names == ("0", "1", "2", "5")
    table = index.table(16)
    assert table.label.tolist() == [i % 3 for i in range(COUNT)] + [1] * 5 + [3] * 5
    alone = load_index(str(tmp_path / "out")).table(16)
    np.testing.assert_array_equal(table.image(COUNT + 3), alone.image(3))
    order = index.order(0)
    ordinals = [order.at(n)[1] for n in range(4000)]
    assert abs(sum(ordinal >= COUNT for ordinal in ordinals) - 3000) <= 64
    assert set(ordinals) == set(range(COUNT + 10))
    shown = list(batches(table, order, start=0, end=64, batch=8, share=range(8), workers=0))
    images = torch.cat([batch.image for batch in shown])
    assert torch.equal(images, read_batch(table, ordinals[:64]))
    other = load_dataset(configured(two | {str(tmp_path / "out"): 2.0}))
    assert index.identity == load_dataset(configured({url: 2 * w for url, w in two.items()})).identity != other.identity
    assert index.source_of(COUNT + 5).endswith("5/0.png")


def test_what_does_not_mix(two, shards, tmp_path):
    packed(tmp_path / "in", tmp_path / "grey", resolution=32, channels=1)
    packed(tmp_path / "in", tmp_path / "small", resolution=4, lowest=4)
    out = str(tmp_path / "out")
    for other, message in [
        (tmp_path / "grey", r"out and .*grey do not fit together: channels 3 and 1"),
        (tmp_path / "small", r"no resolution is in all of them \(.*out has 8, 16, 32; .*small has 4\)"),
        ("points:ring", "do not fit together: base 4x4 and 1x1"),
    ]:
        with pytest.raises(UsageError, match=message):
            load_dataset(configured({out: 1, str(other): 1}))
    with pytest.raises(UsageError, match=r"data\.mixture=.* above 0"):
        configured({out: 0})
    with pytest.raises(UsageError, match=r"data\.mixture=.* empty if data\.url is given"):
        configured(two, "data.url=x")
    with pytest.raises(UsageError, match="no resolution 4"):
        load_dataset(configured({out: 1})).table(4)


def test_points_alone_are_no_mixture():
    with pytest.raises(UsageError, match="cannot be mixed"):
        load_dataset(configured({"points:ring": 1}))
