"""Grids with a row for each class: of samples, during a run, and of real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import Painter, save_small_snapshot
from snapshots import command

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.classes import parse_classes
from stylegan_pg.images import name_rows
from stylegan_pg.inference.generate import class_rows, grid_inputs, grid_ordinals, images_of, latents
from stylegan_pg.inference.sampling import MOST_ROWS

NAMES = ["cat", "dog", "a long name with more than forty letters in it"]


@pytest.fixture(scope="module")
def class_snapshot(tmp_path_factory) -> Path:
    """Return a snapshot of three classes whose images, of 16 rows and 24 columns, differ by class."""
    return save_small_snapshot(tmp_path_factory.mktemp("conditional") / "G.safetensors", 16, 3, 3, (4, 6), NAMES)


@pytest.mark.parametrize(("labels", "classes"), [(None, [0, 1, 2]), ("dog,cat", [1, 0]), ("2", [2])])
def test_a_row_for_each_class(class_snapshot, tmp_path, capsys, monkeypatch, labels, classes):
    seeds = [4, 0, 9, 5]
    chosen = ["--labels", labels] if labels else []
    arguments = [
        "sample",
        class_snapshot,
        "--out",
        tmp_path,
        "--class-grid",
        "--seeds",
        "4,0,9,5",
        "--batch",
        3,
        *chosen,
    ]
    assert command(capsys, monkeypatch, *arguments) == (0, f"{tmp_path / 'classes.png'}\n", "")
    picture = np.asarray(Image.open(tmp_path / "classes.png")).astype(int)
    assert picture.shape[0] == 16 * len(classes)
    margin = picture.shape[1] - 24 * len(seeds)
    G = load_snapshot(class_snapshot)
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


def test_errors_of_class_grids(class_snapshot, tmp_path, capsys, monkeypatch):
    sample = ["sample", class_snapshot, "--out", tmp_path, "--class-grid"]
    plain = save_small_snapshot(tmp_path / "plain.safetensors", 4, 1)
    save_small_snapshot(tmp_path / "many.safetensors", 4, 1, MOST_ROWS + 1)
    many = [sample[0], tmp_path / "many.safetensors", *sample[2:]]
    for arguments, message in (
        ([*sample, "--labels", "cow"], "--labels: 'cow' is unknown; the generator has"),
        ([*sample, "--labels", "cow"], "3 classes (cat, dog, a long name"),
        ([*sample, "--labels", "cat,cow"], "--labels: 'cow' is unknown; the generator has 3 classes (cat, dog, "),
        ([*sample, "--labels", "1-"], "'1-' is unknown"),
        ([*sample, "--labels", "2-1"], "'2-1' goes backwards"),
        ([*sample, "--labels", "0-3"], "position 3 is not one of the 3 classes"),
        ([*sample, "--labels", "0-9999999"], "position 9999999 is not one of"),
        ([*sample, "--interpolate", 3], "no --interpolate or --columns"),
        ([sample[0], plain, *sample[2:]], "is unconditional; --grid shows"),
        (many, f"of {MOST_ROWS + 1} classes has more than {MOST_ROWS} rows: choose with --labels"),
        ([*sample, "--labels", "cow", "--seeds", ""], "'' is not a list of numbers"),
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
