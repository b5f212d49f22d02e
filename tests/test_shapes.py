"""Pictures that are not square, not RGB, or have classes: in the stream, grids, logs and metrics, compared with
Pillow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from packing import packed
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stylegan_pg.__main__ import main
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import StyleGAN2Config
from stylegan_pg.data.classes import parse_classes
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.errors import UsageError
from stylegan_pg.images import name_rows, over_white, save_image, tile
from stylegan_pg.inference.generate import class_rows, grid_inputs, grid_ordinals, images_of, interpolation, latents
from stylegan_pg.inference.sampling import MOST_ROWS
from stylegan_pg.metrics import classifiers, features, gather
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.command import evaluate_snapshot
from stylegan_pg.metrics.evaluate import Evaluator
from stylegan_pg.metrics.ms_ssim import ms_ssim
from stylegan_pg.metrics.path_length import path_lengths
from stylegan_pg.metrics.real import RealSide
from stylegan_pg.metrics.registry import parse
from stylegan_pg.metrics.swd import PatchCollector, sliced_wasserstein
from stylegan_pg.monitoring.loggers import Means, RunLogger
from stylegan_pg.networks import NETWORKS, NetworkShape

CPU = torch.device("cpu")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
COUNT = 12


def random_images(count: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """uint8 [count, channels, height, width]: smooth, of every opacity."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand([count, channels, height // 4, width // 4], generator=g) * 255
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear").to(torch.uint8)


def snapshot(path: Path, resolution: int, channels: int, c_dim: int = 0, base=(4, 4), names=()) -> Path:
    """Save a snapshot of a small generator whose weights all differ from their initial values."""
    model = StyleGAN2Config(z_dim=8, w_dim=8, mapping_layers=2, channel_base=64, channel_max=8, base=list(base))
    kwargs = NETWORKS["stylegan2"].g_kwargs(model, NetworkShape(resolution, 16, False, channels, c_dim, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = NETWORKS["stylegan2"].G(**kwargs)
        for tensor in G.state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape)
    save_snapshot(path, G, {"network": "stylegan2", "kwargs": kwargs, "alpha": 1.0, "label_names": list(names)})
    return path


def by_hand(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 [n, 3, H, W], the visible colours computed with Pillow."""
    seen = []
    for image in images.permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        if picture.mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        seen.append(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(seen))


class Painter(torch.nn.Module):
    """A substitute for a generator of any shape: smooth images that depend only on z."""

    z_dim, w_dim, c_dim, num_ws = 16, 16, 0, 2

    def __init__(self, channels: int, size: tuple[int, int], resolution: int):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.img_channels, self.img_size, self.resolution = channels, size, resolution

    def styles(self, z, c=None, *, psi=1.0, cutoff=None):
        return (psi * z)[:, None].repeat(1, self.num_ws, 1)

    def synthesis(self, ws, *, alpha=1.0, noise="const"):
        small = ws[:, 0].reshape(-1, 4, 2, 2)[:, : self.img_channels]
        return torch.nn.functional.interpolate(small, self.img_size, mode="bilinear")

    def forward(self, z, c=None, *, psi=1.0, alpha=1.0, noise="const"):
        return self.synthesis(self.styles(z, c, psi=psi), alpha=alpha, noise=noise)


@pytest.fixture(scope="module", params=[1, 3, 4], ids=["grey", "rgb", "rgba"])
def dataset(request, tmp_path_factory) -> tuple[DatasetIndex, torch.Tensor]:
    """Return a dataset of 4 rows by 6 columns up to 64x96 with two classes, and its pictures at 64x96."""
    folder = tmp_path_factory.mktemp("shapes")
    images = random_images(COUNT, request.param, 64, 96)
    for i, image in enumerate(images):
        save_image(image, folder / "in" / "ab"[i % 2] / f"{i:02d}.png")
    packed(folder / "in", folder / "out", 64, base="4x6", channels=request.param, format="png")
    return load_index(str(folder / "out")), images[[*range(0, COUNT, 2), *range(1, COUNT, 2)]]


# --- from the dataset to pictures -------------------------------------------------------------------------------------


def test_the_stream_returns_the_packed_pictures(dataset):
    index, images = dataset
    table = index.table(64)
    assert table.image_size == index.size_at(64) == (64, 96)
    assert torch.equal(read_batch(table, range(COUNT)), images)
    for workers in (0, 1):
        shown = list(
            batches(
                table,
                index.order(seed=0),
                start=0,
                end=COUNT,
                batch=4,
                share=range(4),
                classes=2,
                mirror=True,
                workers=workers,
            )
        )
        found = torch.cat([batch.image for batch in shown])
        known = {x.numpy().tobytes(): i for i, x in enumerate(images)}
        known |= {x.flip(2).numpy().tobytes(): i for i, x in enumerate(images)}
        order = [known[x.numpy().tobytes()] for x in found]
        assert sorted(order) == list(range(COUNT))
        labels = torch.cat([batch.condition.argmax(1) for batch in shown if batch.condition is not None])
        assert labels.tolist() == [i // 6 for i in order]


def test_grids_have_the_mode_of_the_dataset(dataset, tmp_path):
    """Both the files in the run folder and the images in TensorBoard have it."""
    index, images = dataset
    reporter = RunLogger(tmp_path, 0, 10, means=Means(), trackers=["tensorboard"])
    reporter.grid("reals-r0064", 0, images[:5], 3)
    reporter.close()
    assert not reporter.complained
    with Image.open(tmp_path / "samples" / "reals-r0064.png") as grid:
        assert (grid.mode, grid.size) == (MODES[index.channels], (3 * 96, 2 * 64))
        pixels = np.asarray(grid).reshape(128, 288, index.channels)
    for i, image in enumerate(images[:5]):
        y, x = i // 3 * 64, i % 3 * 96
        np.testing.assert_array_equal(pixels[y : y + 64, x : x + 96], image.permute(1, 2, 0))
    assert (pixels[64:, 192:] == 0).all()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (tmp_path / "logged.png").write_bytes(board.Images("reals")[0].encoded_image_string)
    with Image.open(tmp_path / "logged.png") as logged:
        np.testing.assert_array_equal(np.asarray(logged.convert(MODES[index.channels])).reshape(pixels.shape), pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_strips_between_seeds(channels):
    G = Painter(channels, (8, 12), 8)
    frames = interpolation(G, [0, 1], 3)
    assert frames.shape == (4, channels, 8, 12)
    ends = torch.cat(list(images_of(G, latents([0, 1], 16))))
    assert torch.equal(frames[[0, 3]], ends)
    assert tile(frames, 4).shape == (channels, 8, 48)


def test_over_white_agrees_with_pillow():
    images = random_images(3, 4, 16, 24)
    images[0, 3], images[1, 3, :4] = 0, 255
    assert (over_white(images).int() - by_hand(images).int()).abs().max() <= 1
    assert (over_white(images)[0] == 255).all()
    assert torch.equal(over_white(images)[1, :, :4], images[1, :3, :4])
    torch.testing.assert_close(over_white(images.float()), over_white(images).float(), atol=0.51, rtol=0)
    grey = images[:, :1]
    assert over_white(grey) is grey


# --- metrics ----------------------------------------------------------------------------------------------------------


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


def test_metrics_use_the_visible_colours(dataset, monkeypatch, tmp_path):
    """Every metric of a dataset and a generator equals the metric of RGB images that were made from them by hand."""
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path))
    index, images = dataset
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


def test_cached_features_depend_on_the_shape(dataset):
    index, _ = dataset
    side = RealSide(index, 64, gather.Networks(Settings(CPU)))
    assert index.identity in side.name
    assert ("over white" in side.name) == (index.channels == 4)


def test_unusable_metrics_give_the_reason(dataset, tmp_path):
    index, _ = dataset
    G = Painter(index.channels, (4, 6), 4)
    with pytest.raises(UsageError, match="swd12 needs images of 8 pixels or more on each side, not 4x6"):
        Evaluator(index, 4, [parse("swd12")], Settings(CPU))(G)
    square = snapshot(tmp_path / "G.safetensors", 8, index.channels)
    how: dict[str, Any] = {"names": ["swd"], "images": 4, "psi": "1", "per_class": False, "neighbours": 0, "out": None}
    with pytest.raises(UsageError, match=r"images of 8x8 \(rows x columns\), .* has 8x12: pack .* --base"):
        next(evaluate_snapshot(square, index.path, settings=Settings(CPU), **how))
    (same,) = evaluate_snapshot(Path(index.path), index.path, settings=Settings(CPU), **how)
    assert same["swd"] < 100


# --- classes ----------------------------------------------------------------------------------------------------------

NAMES = ["cat", "dog", "a long name with more than forty letters in it"]


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    """Return a snapshot of three classes whose images, of 16 rows and 24 columns, differ by class."""
    return snapshot(tmp_path_factory.mktemp("conditional") / "G.safetensors", 16, 3, 3, (4, 6), NAMES)


def command(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return (int(end.value.code or 0), *capsys.readouterr())


@pytest.mark.parametrize(("labels", "classes"), [(None, [0, 1, 2]), ("dog,cat", [1, 0]), ("2", [2])])
def test_a_row_for_each_class(conditional, tmp_path, capsys, monkeypatch, labels, classes):
    seeds = [4, 0, 9, 5]
    chosen = ["--labels", labels] if labels else []
    arguments = ["sample", conditional, "--out", tmp_path, "--class-grid", "--seeds", "4,0,9,5", "--batch", 3, *chosen]
    assert command(capsys, monkeypatch, *arguments) == (0, f"{tmp_path / 'classes.png'}\n", "")
    picture = np.asarray(Image.open(tmp_path / "classes.png")).astype(int)
    assert picture.shape[0] == 16 * len(classes)
    margin = picture.shape[1] - 24 * len(seeds)
    G = load_snapshot(conditional)
    for row, k in enumerate(classes):
        (images,) = images_of(G, latents(seeds, 8), torch.eye(3)[[k] * 4], psi=0.7)
        expected = np.hstack(list(images.permute(0, 2, 3, 1).numpy())).astype(int)
        assert np.abs(picture[16 * row : 16 * row + 16, margin:] - expected).max() <= 1
        name = picture[16 * row : 16 * row + 16, :margin]
        assert 0.005 < (name < 128).mean() < 0.6  # black on white
    if len(classes) == 3:
        widths = [(picture[16 * r : 16 * r + 16, :margin] < 128).any(axis=(0, 2)).sum() for r in range(3)]
        assert widths[2] > 3 * widths[0]  # the longer name has more dark pixels


def test_rows_of_classes_without_names_and_of_tiny_pictures():
    picture = torch.arange(2 * 3 * 16, dtype=torch.uint8).reshape(1, 8, 12).expand(4, -1, -1)  # two rows of 4 pixels
    named = name_rows(picture, ["0", "1"])
    assert named.shape[:2] == (4, 32)
    enlarged = named[:, :, -48:]
    assert torch.equal(enlarged[:, ::4, ::4], picture)
    assert torch.equal(enlarged[:, 3::4, 3::4], picture)
    assert (named[3, :, :-48] == 255).all()  # the background of the names is opaque
    assert named[:3, :, :-48].min() < 100


def test_errors_of_class_grids(conditional, tmp_path, capsys, monkeypatch):
    sample = ["sample", conditional, "--out", tmp_path, "--class-grid"]
    plain = snapshot(tmp_path / "plain.safetensors", 4, 1)
    snapshot(tmp_path / "many.safetensors", 4, 1, MOST_ROWS + 1)
    many = [sample[0], tmp_path / "many.safetensors", *sample[2:]]
    for arguments, message in (
        ([*sample, "--labels", "cow"], "--labels: 'cow' is unknown; it has"),
        ([*sample, "--labels", "cow"], "3 classes (cat, dog, a long name"),
        ([*sample, "--labels", "cat,cow"], "--labels: 'cow' is unknown; it has 3 classes (cat, dog, "),
        ([*sample, "--labels", "1-"], "'1-' is unknown"),
        ([*sample, "--labels", "2-1"], "'2-1' goes backwards"),
        ([*sample, "--labels", "0-3"], "place 3 is not one of the 3 classes"),
        ([*sample, "--labels", "0-9999999"], "place 9999999 is not one of"),
        ([*sample, "--interpolate", 3], "no --interpolate or --columns"),
        ([sample[0], plain, *sample[2:]], "is unconditional; --grid shows"),
        (many, f"of {MOST_ROWS + 1} classes has more than {MOST_ROWS} rows: choose with --labels"),
        ([*sample, "--labels", "cow", "--seeds", ""], "'' is no list of numbers"),
    ):
        code, out, err = command(capsys, monkeypatch, *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "classes.png").exists()
    assert command(capsys, monkeypatch, *many, "--labels", "0,100", "--seeds", "1")[0] == 0
    with Image.open(tmp_path / "classes.png") as picture:
        assert (picture.mode, picture.height) == ("L", 32)


def test_the_grids_of_a_run_have_rows_of_classes():
    assert class_rows([0, 1, 2], 5) == [0, 1, 2, 0, 1]
    assert class_rows([4, 7], 2) == [4, 7]
    assert class_rows(range(100), 4) == [0, 25, 50, 75]
    G = Painter(3, (8, 12), 8)
    z, c = grid_inputs(G, 4, 3)
    assert c is None
    assert torch.equal(z, latents(range(12), 16))
    G.c_dim = 5
    z, c = grid_inputs(G, 3, 4, [1, 3])  # only these two classes have pictures
    assert c is not None
    assert c.shape == (12, 5)
    assert c.argmax(dim=1).tolist() == [1, 1, 1, 3, 3, 3] * 2
    assert torch.equal(z, latents([0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5], 16))
    assert parse_classes(G, None) == [0, 1, 2, 3, 4]


def test_real_images_have_the_same_rows():
    labels = np.array([3, 1, 1, 3, 1, 1, 3, 1, 1, 1])
    assert grid_ordinals(labels, 2, 2) == [0, 2, 5, 7]
    chosen = grid_ordinals(labels, 3, 4, [1, 3])
    assert labels[chosen].tolist() == [1, 1, 1, 3, 3, 3] * 2
    assert len({*chosen[:3], *chosen[6:9]}) == 6  # repeated rows of a class continue with other pictures
    assert set(chosen[3:6]) | set(chosen[9:]) == {0, 3, 6}


def test_labels_from_end_to_end(dataset):
    index, _ = dataset
    assert index.label_names == ("a", "b")
    assert json.loads(Path(index.path, "index.json").read_text())["labels"]["counts"] == [6, 6]
    ordinals = grid_ordinals(index.table(8).label, 3, 2, [0, 1])
    assert [index.source_of(i)[0] for i in ordinals] == ["a"] * 3 + ["b"] * 3


PROGAN = {
    "model__name": "progan",
    "loss__objective": "wgan",
    "loss__r1_gamma": 0,
    "loss__pl_weight": 0,
    "loss__terms": "[{name: gradient_penalty, weight: 10}]",
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("base", "channels", "changes"),
    [((4, 6), 4, {"data__conditional": "true"}), ((5, 3), 1, PROGAN)],
    ids=["rgba of classes", "grey"],
)
def test_from_pictures_to_a_trained_generator(tmp_path, capsys, monkeypatch, base, channels, changes):
    """Pack, train through a fade with metrics, sample, class grid and metrics, all in the pictures' own shape."""
    height, width = base[0] * 4, base[1] * 4
    for i, image in enumerate(random_images(16, channels, height, width)):
        save_image(image, tmp_path / "in" / "ab"[i % 2] / f"{i:02d}.png")
    packed(tmp_path / "in", tmp_path / "data", 16, base=base, channels=channels, format="png")
    wrong = harness.arguments(tmp_path / "wrong", tmp_path / "data", **changes)
    message = harness.finish(harness.start(wrong), expected=2)
    assert f"set model.base=[{base[0]},{base[1]}]" in message

    run = tmp_path / "run"
    shape = {"model__base": f"[{base[0]},{base[1]}]", "metrics__every_kimg": 0.096, "metrics__images": 8}
    printed = harness.finish(harness.start(harness.arguments(run, tmp_path / "data", **(shape | changes))))
    assert "metrics at" not in printed  # no warning about the metrics
    (line, *_) = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert line[f"swd_{height}x{width}"] > 0
    index = load_index(str(tmp_path / "data"))
    with Image.open(run / "samples" / "reals-r0016.png") as reals:
        assert (reals.mode, reals.size) == (MODES[channels], (2 * width, 2 * height))
        if channels == 4:  # one row per class
            expected = tile(read_batch(index.table(16), [0, 4, 8, 12]), 2)
            np.testing.assert_array_equal(reals, expected.permute(1, 2, 0))
    fakes = sorted((run / "samples").glob("fakes-*.png"))
    with Image.open(fakes[0]) as first, Image.open(fakes[-1]) as last:
        assert (first.mode, first.size) == (MODES[channels], (width, height))  # the size at 8x8
        assert (last.mode, last.size) == (MODES[channels], (2 * width, 2 * height))

    (snapshot,) = (p for p in (run / "snapshots").glob("*.safetensors") if "best" not in p.name)
    sample = ["sample", snapshot, "--out", tmp_path / "out", "--seeds", "0-2"]
    assert command(capsys, monkeypatch, *sample)[0] == 0
    (third,) = (tmp_path / "out").glob("seed000002*.png")  # with its class, if there are classes
    with Image.open(third) as picture:
        assert (picture.mode, picture.size) == (MODES[channels], (width, height))
    code, _, err = command(capsys, monkeypatch, *sample, "--class-grid")
    if channels == 4:
        assert code == 0
        with Image.open(tmp_path / "out" / "classes.png") as picture:
            assert (picture.mode, picture.height) == ("RGBA", 2 * height)
            assert picture.width > 3 * width
    else:
        assert (code, "unconditional" in err) == (2, True)
    code, printed, _ = command(capsys, monkeypatch, "metrics", snapshot, "--data", tmp_path / "data", "--images", 8)
    assert code == 0
    assert json.loads(printed)[f"swd_{height}x{width}"] > 0
