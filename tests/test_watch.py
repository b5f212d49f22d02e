"""The watch for collapse and memorisation: which generators it warns of, and that a run goes on as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from configuring import config_of
from PIL import Image

from stylegan_pg import pack
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.metrics import watch
from stylegan_pg.metrics.watch import Signs, Watch, compare, thumbnails

COUNT, SIZE = 120, 16


def pictures_of(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 16, 16, 3] that follow smoothly from codes [n, 24]: sums of plane waves."""
    dice = np.random.default_rng(0)
    places = np.stack(np.meshgrid(np.linspace(0, 1, SIZE), np.linspace(0, 1, SIZE)), axis=-1)
    waves = [np.sin(6 * places @ dice.standard_normal(2) + dice.uniform(0, 6)) for _ in range(codes.shape[1])]
    colours = dice.standard_normal([codes.shape[1], 3])
    values = np.einsum("nk,kij,kc->nijc", codes, np.stack(waves), colours)
    return (255 / (1 + np.exp(-values / 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    (folder / "source").mkdir()
    for i, picture in enumerate(pictures_of(np.random.default_rng(1).standard_normal([COUNT, 24]))):
        Image.fromarray(picture).save(folder / "source" / f"{i:03d}.png")
    pack(folder / "source", folder / "packed", resolution=SIZE, format="png", progress=False)
    return folder / "packed"


class Generator(torch.nn.Module):
    """A generator that makes `pictures` of latents."""

    z_dim, resolution, img_size = 24, SIZE, (SIZE, SIZE)

    def __init__(self, make: Any):
        super().__init__()
        self.img_channels = 3
        self.make, self.nothing = make, torch.nn.Parameter(torch.zeros([]))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        images = torch.from_numpy(self.make(z.double().numpy())).permute(0, 3, 1, 2)
        return images.float() / 127.5 - 1


def real(data: Path) -> np.ndarray:
    table = load_index(str(data)).table(SIZE)
    return np.stack([table.image(i).transpose(1, 2, 0) for i in range(len(table))])


def signs(data: Path, make: Any, *overrides: str) -> Signs:
    config = config_of(f"data.url={data}", f"resolution={SIZE}", *overrides)
    return Watch(config, load_index(str(data))).look(Generator(make), SIZE, 1.0, None)


def places(z: np.ndarray, count: int) -> np.ndarray:
    """Numbers below `count` that follow from latents."""
    return (z[:, 0] * 1e6).astype(np.int64) % count


def test_a_good_generator_is_not_warned_of(data):
    found = signs(data, pictures_of)
    assert found.warning() == ""
    assert 0.7 < found.nearest < 1.3
    assert (found.duplicates, found.copies) == (0, 0)


def test_a_generator_of_one_picture_is_warned_of(data):
    grey = signs(data, lambda z: np.full([len(z), SIZE, SIZE, 3], 128, np.uint8))
    assert grey.duplicates == 1
    assert "collapse: 100% of the samples nearly equal another one" in grey.warning()
    assert "memorisation" not in grey.warning()
    few = signs(data, lambda z: pictures_of(np.random.default_rng(2).standard_normal([9, 24]))[places(z, 9)])
    assert few.duplicates > 0.9
    half = signs(data, lambda z: pictures_of(np.where(z[:, :1] > 0, z, 1.0)))
    assert 0.25 < half.duplicates < 0.75


def test_a_generator_that_returns_training_pictures_is_warned_of(data):
    known = real(data)
    found = signs(data, lambda z: known[places(z, COUNT)])
    assert found.copies > 0.95
    assert found.nearest < 0.05
    assert "memorisation: 100% of the samples nearly equal a real picture" in found.warning()
    noisy = signs(data, lambda z: (known[places(z, COUNT)].astype(int) + 3).clip(0, 255).astype(np.uint8))
    assert noisy.copies > 0.95


def test_mirrored_training_pictures_count_where_a_run_mirrors(data):
    known = real(data)[:, :, ::-1]

    def flipped(z: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(known[places(z, COUNT)])

    assert signs(data, flipped).copies < 0.25
    assert signs(data, flipped, "data.mirror=true").copies > 0.95


def test_duplicates_in_the_data_are_no_collapse(monkeypatch):
    """The same shares of real pictures are subtracted."""
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(64, 12, generator=g), torch.randn(64, 12, generator=g)
    reals = torch.cat([one, one + 1e-3 * torch.randn(64, 12, generator=g), two, torch.randn(64, 12, generator=g)])
    reals = reals[torch.randperm(len(reals), generator=g)]
    samples = torch.cat([t := torch.randn(64, 12, generator=g), t + 1e-3, torch.randn(128, 12, generator=g)])
    found = compare(samples, reals, len(reals))
    assert found.duplicates < 0.1
    assert found.warning() == ""
    only = compare(samples, torch.randn(256, 12, generator=g), 256)
    assert only.duplicates == pytest.approx(0.5, abs=0.05)


def test_copies_are_estimated_for_the_whole_dataset():
    """A generator that returns pictures of a dataset, a quarter of which is compared."""
    g = torch.Generator().manual_seed(0)
    whole = torch.randn(800, 12, generator=g)
    samples = whole[torch.randperm(800, generator=g)[:128]]
    assert compare(samples, whole[:200], 800).copies == pytest.approx(1, abs=0.3)
    assert compare(torch.randn(128, 12, generator=g), whole[:200], 800).copies < 0.1


def test_thumbnails():
    images = torch.randint(0, 256, [2, 3, 128, 64], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small = thumbnails(images)
    assert small.shape == (2, 3 * 32 * 16)
    wanted = images.float().reshape(2, 3, 32, 4, 16, 4).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(small, wanted)
    assert thumbnails(images[:, :, :8, :8]).shape == (2, 3 * 64)


def test_it_is_the_same_twice_and_follows_the_seed(data):
    assert signs(data, pictures_of) == signs(data, pictures_of)
    assert signs(data, pictures_of) != signs(data, pictures_of, "seed=1")


@pytest.mark.distributed
def test_a_run_is_watched_and_goes_on_as_before(data, tmp_path):
    """It warns of a new generator, whose images are all the same; on two ranks with the same values."""
    rows, printed = {}, {}
    how = {"train__total_kimg": 0.032, "growth__start": "null", "train__check_ranks_every": 1}
    how |= {"model__name": "dcgan", "model__normalization": "none", "loss__pl_weight": 0, "loss__style_mixing": 0}
    for name, ranks, every in (("off", 0, 0), ("on", 0, 0.016), ("two", 2, 0.016)):
        run = tmp_path / name
        args = harness.arguments(run, data, **how, metrics__watch_kimg=every, seed=5)
        printed[name] = harness.finish(harness.start(args, ranks=ranks))
        log = run / "metrics.jsonl"
        rows[name] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    harness.assert_same_run(tmp_path / "off", tmp_path / "on")
    assert rows["off"] == []
    values = {name: [{k: v for k, v in row.items() if k != "seconds"} for row in rows[name]] for name in ("on", "two")}
    assert [row["nimg"] for row in values["on"]] == [16, 32]
    assert all(row["watch_duplicates"] > 0.5 for row in values["on"])
    assert {"watch_nearest", "watch_copies"} <= values["on"][0].keys()
    for one, two in zip(values["on"], values["two"], strict=True):  # weights differ by rounding
        assert one == pytest.approx(two, abs=0.05)
    assert printed["on"].count("signs of collapse: ") == 2
    assert "metrics.watch_kimg=0 stops looking" in printed["on"]


def test_what_cannot_be_watched(data):
    index = load_index("points:ring")
    G = Generator(pictures_of)
    assert not Watch(config_of("data.url=points:ring"), index).possible(G)
    pictures = Watch(config_of(f"data.url={data}"), load_index(str(data)))
    assert pictures.possible(G)
    G.img_channels = 1
    assert not pictures.possible(G)
    assert watch.FEWEST <= COUNT
