"""Metrics of pictures that are not square or not RGB, compared with Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packing import packed
from shapes import Painter, by_hand, random_images, save_small_snapshot

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.errors import UsageError
from stylegan_pg.images import over_white, save_image
from stylegan_pg.metrics import classifiers, features, gather
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.command import evaluate_snapshot
from stylegan_pg.metrics.evaluate import Evaluator
from stylegan_pg.metrics.ms_ssim import ms_ssim
from stylegan_pg.metrics.path_length import path_lengths
from stylegan_pg.metrics.real import RealSide
from stylegan_pg.metrics.registry import parse
from stylegan_pg.metrics.swd import PatchCollector, sliced_wasserstein

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((64, 96), ["64x96", "32x48", "16x24"]),
        ((96, 64), ["96x64", "48x32", "24x16"]),
        ((48, 48), ["48", "24"]),
        ((80, 48), ["80x48", "40x24"]),
        ((66, 34), ["66x34", "33x17"]),
        ((8, 64), ["8x64"]),
    ],
)
def test_levels_of_the_sliced_distance(size, levels):
    descriptors = []
    for seed in (0, 1):
        collector = PatchCollector(size, 3, patches_per_image=20)
        collector.add(random_images(6, 3, *(4 * -(-s // 4) for s in size), seed=seed)[:, :, : size[0], : size[1]])
        descriptors.append(collector.result())
    found = sliced_wasserstein(*descriptors)
    assert list(found) == [*(f"swd_{level}" for level in levels), "swd"]
    assert all(0 < value < 1000 for value in found.values())
    assert sliced_wasserstein(descriptors[0], descriptors[0])["swd"] == 0


def test_neighbourhoods_cover_the_whole_picture():
    """On ramps, the mean of a window gives its position."""
    for axis, span in ((0, 16 - 6), (1, 24 - 6)):
        ramp = torch.arange(24, dtype=torch.uint8).expand(1, 1, 16, 24)
        if axis == 0:
            ramp = torch.arange(16, dtype=torch.uint8)[:, None].expand(1, 1, 16, 24)
        collector = PatchCollector((16, 24), 1, patches_per_image=600)
        collector.add(ramp.contiguous())
        means = collector.result()[16, 24].mean(dim=1)
        assert len({round(v, 3) for v in means.tolist()}) == span


def test_metrics_use_the_visible_colours(shaped_dataset, monkeypatch, tmp_path):
    """Every metric of a dataset and a generator equals the metric of RGB images that were made from them by hand."""
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path))
    index, images = shaped_dataset
    names = [parse(name) for name in ("fid12_full", "pr123_full", "swd12", "ms_ssim6")]
    settings = Settings(CPU, extractor="pixels", batch=5)
    values = Evaluator(index, 64, names, settings)(Painter(index.channels, (64, 96), 64))
    swd = {"swd12", "swd12_64x96", "swd12_32x48", "swd12_16x24"}
    assert swd | {"ms_ssim6", "fid12_full@pixels", "pr123_full_recall@pixels"} <= set(values)

    folder = tmp_path / "rgb"
    for i, image in enumerate(by_hand(images) if index.channels == 4 else over_white(images)):
        shown = image.expand(3, -1, -1) if index.channels == 1 else image
        save_image(shown, folder / "in" / f"{i:02d}.png")
    packed(folder / "in", folder / "out", 64, base="4x6", format="png")

    class Seen(Painter):
        def forward(self, *args, **how):
            x = ((super().forward(*args, **how) * 127.5 + 127.5).round().clamp(0, 255)).to(torch.uint8)
            return by_hand(x).float() / 127.5 - 1

    rgb = Evaluator(load_index(str(folder / "out")), 64, names, settings)(Seen(index.channels, (64, 96), 64))
    assert rgb.keys() == values.keys()
    for name, value in values.items():
        # Grey neighbourhoods have a third of the dimensions, so random directions differ. The expectation is equal.
        close = 0.25 if name in swd and index.channels == 1 else 0.01
        assert value == pytest.approx(rgb[name], rel=close), name


@pytest.mark.parametrize("channels", [1, 4])
def test_classifiers_get_three_channels_of_a_square(channels):
    """Inception and VGG16 resize their input. Here, Pillow resizes each channel."""
    images = random_images(2, channels, 24, 40)
    seen: list[torch.Tensor] = []

    class Network(classifiers._Resized):
        size = 32

        def forward(self, x):
            seen.append(self.prepare(x))
            return {"pool": seen[-1].flatten(1)}

    found = features.Extractor(Network(), "test", "", CPU)(images)["pool"]
    assert found.shape == (2, 3 * 32 * 32)
    hand = by_hand(images).float()
    expected = torch.empty(2, 3, 32, 32)
    for i in range(32):  # the definition: at i * size / 32
        for j in range(32):
            y, x = i * 24 / 32, j * 40 / 32
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, 23), min(x0 + 1, 39)
            top = hand[:, :, y0, x0] * (1 - x + x0) + hand[:, :, y0, x1] * (x - x0)
            low = hand[:, :, y1, x0] * (1 - x + x0) + hand[:, :, y1, x1] * (x - x0)
            expected[:, :, i, j] = top * (1 - y + y0) + low * (y - y0)
    torch.testing.assert_close(seen[0], expected, atol=1.01, rtol=0)


@pytest.mark.parametrize(("channels", "size", "seen"), [(1, (24, 32), (24, 32)), (4, (512, 640), (256, 320))])
def test_path_lengths_of_any_kind(channels, size, seen):
    shapes: list[torch.Size] = []

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.append(a.shape)
        return ((a - b) ** 2).mean(dim=(1, 2, 3))

    z = torch.randn([2, 3, 16], generator=torch.Generator().manual_seed(0))
    lengths = path_lengths(Painter(channels, size, 32), distance, z, torch.zeros(3), None, space="w")
    assert shapes == [(3, 3, *seen)]
    assert (lengths > 0).all()


def test_similarity_of_other_shapes():
    images = random_images(4, 3, 40, 72).float()
    assert ms_ssim(images, images) == pytest.approx(1, abs=1e-5)
    ours = ms_ssim(images, images.flip(0))
    assert torch.equal(ours.round(decimals=4), ms_ssim(images.mT, images.flip(0).mT).round(decimals=4))


def test_cached_features_depend_on_the_shape(shaped_dataset):
    index, _ = shaped_dataset
    side = RealSide(index, 64, gather.Networks(Settings(CPU)))
    assert index.identity in side.name
    assert ("over white" in side.name) == (index.channels == 4)


def test_unusable_metrics_give_the_reason(shaped_dataset, tmp_path):
    index, _ = shaped_dataset
    G = Painter(index.channels, (4, 6), 4)
    with pytest.raises(UsageError, match="swd12 needs images of 8 pixels or more on each side, not 4x6"):
        Evaluator(index, 4, [parse("swd12")], Settings(CPU))(G)
    square = save_small_snapshot(tmp_path / "G.safetensors", 8, index.channels)
    how: dict[str, Any] = {"names": ["swd"], "images": 4, "psi": "1", "per_class": False, "neighbours": 0, "out": None}
    with pytest.raises(UsageError, match=r"images of 8x8 \(rows x columns\), .* has 8x12: pack .* --base"):
        next(evaluate_snapshot(square, index.path, settings=Settings(CPU), **how))
    (same,) = evaluate_snapshot(Path(index.path), index.path, settings=Settings(CPU), **how)
    assert same["swd"] < 100
