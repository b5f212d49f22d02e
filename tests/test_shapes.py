"""Pictures that are not square, not RGB, or have classes, in the stream, in grids and in logs, and in a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from packing import packed
from PIL import Image
from shapes import COUNT, MODES, Painter, by_hand, random_images
from snapshots import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.images import over_white, save_image, tile
from stylegan_pg.inference.generate import grid_ordinals, images_of, interpolation, latents
from stylegan_pg.monitoring.loggers import Means, RunLogger


def test_the_stream_returns_the_packed_pictures(shaped_dataset):
    index, images = shaped_dataset
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
                fields=["class"],
                mirror=True,
                workers=workers,
            )
        )
        found = torch.cat([batch.image for batch in shown])
        known = {x.numpy().tobytes(): i for i, x in enumerate(images)}
        known |= {x.flip(2).numpy().tobytes(): i for i, x in enumerate(images)}
        order = [known[x.numpy().tobytes()] for x in found]
        assert sorted(order) == list(range(COUNT))
        labels = torch.cat([batch.fields["class"] for batch in shown])
        assert labels.tolist() == [i // 6 for i in order]


def test_grids_have_the_mode_of_the_dataset(shaped_dataset, tmp_path):
    """Both the files in the run folder and the images in TensorBoard have it."""
    index, images = shaped_dataset
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


def test_labels_from_end_to_end(shaped_dataset):
    index, _ = shaped_dataset
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
