"""Sampling and measuring snapshots: latents, labels and grids, and the commands."""

import json
import subprocess
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from PIL import Image
from snapshots import command, near, pixels, saved

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.classes import labels_to_c, parse_numbers
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.errors import UsageError
from stylegan_pg.images import tile, to_uint8
from stylegan_pg.inference.generate import images_of, latents


def test_parse_numbers():
    assert parse_numbers("0-3,8") == [0, 1, 2, 3, 8]
    assert parse_numbers(" 5 , 7-7,5") == [5, 7, 5]
    for text in ("", "a", "1,", "-1", "3-1", "1.5", "1--2", "0-3;8", "5-", "5,9-4", "٣"):
        with pytest.raises(UsageError, match="not a list of numbers"):
            parse_numbers(text)
    with pytest.raises(UsageError, match="more than 1000000"):
        parse_numbers("1,0-99999999999999999999")


def test_seeds_give_the_latents_of_the_published_tools():
    z = latents([0, 7, 2**32 - 1], 8)
    assert z.dtype == torch.float32
    for row, seed in zip(z, (0, 7, 2**32 - 1), strict=True):
        np.testing.assert_array_equal(row, np.random.RandomState(seed).randn(1, 8)[0].astype(np.float32))
    with pytest.raises(UsageError, match="seeds lie between"):
        latents([2**32], 8)


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-9, -1.0, -1 + 0.6 / 127.5, 0.0039, 1.0, 9, 1 - 0.4 / 127.5, 1 - 0.6 / 127.5])
    assert to_uint8(x).tolist() == [0, 0, 1, 128, 255, 255, 255, 254]
    assert to_uint8(x).dtype == torch.uint8
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1).long(), levels)


def test_tile_fills_row_by_row():
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 4)
    tiled = tile(images, 3)
    assert tiled.shape == (3, 4, 12)
    np.testing.assert_array_equal(tiled[1, ::2, ::4], [[1, 2, 3], [4, 5, 0]])
    np.testing.assert_array_equal(tiled[0], np.kron([[1, 2, 3], [4, 5, 0]], np.ones([2, 4])))
    assert tile(images, 5).shape == (3, 2, 20)


def test_labels_to_c(unconditional, conditional):
    G = load_snapshot(conditional[1])

    def classes(text: str | None, count: int) -> list[int]:
        c = labels_to_c(G, text, count)
        assert c is not None
        assert c.shape == (count, 3)
        assert c.sum(dim=1).tolist() == [1.0] * count
        return c.argmax(dim=1).tolist()

    assert classes(None, 5) == [0, 1, 2, 0, 1]
    assert classes("owl, cat", 3) == [2, 0, 2]
    assert classes("1", 2) == [1, 1]
    assert classes("0-2", 4) == [0, 1, 2, 0]
    for text, message in {
        "3": r"position 3 .* 3 classes \(cat, dog, owl\)",
        "cow": r"cow.*\(cat, dog, owl\)",
        "-1": "-1",
    }.items():
        with pytest.raises(UsageError, match=message):
            labels_to_c(G, text, 2)
    assert labels_to_c(load_snapshot(unconditional[1]), None, 2) is None
    with pytest.raises(UsageError, match="unconditional"):
        labels_to_c(load_snapshot(unconditional[1]), "0", 2)


def test_images_do_not_depend_on_the_batch(unconditional):
    z = latents(range(7), 8)
    whole = torch.cat(list(images_of(unconditional[0], z, batch=7, psi=0.7)))
    assert whole.dtype == torch.uint8
    for batch in (1, 3):
        parts = list(images_of(unconditional[0], z, batch=batch, psi=0.7))
        assert [len(part) for part in parts] == [batch] * (7 // batch) + [7 % batch] * bool(7 % batch)
        near(torch.cat(parts).numpy(), whole.numpy())


@torch.no_grad()
def expected_images(G: Any, seeds, c: torch.Tensor | None = None, **how) -> list[np.ndarray]:
    """Return the images as [H, W, C] arrays, computed directly."""
    z = torch.tensor(np.concatenate([np.random.RandomState(s).randn(1, 8) for s in seeds]), dtype=torch.float32)
    x = G(z, c, **how).numpy()
    return list(np.clip(np.floor(x * 127.5 + 128), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


@pytest.mark.slow
def test_commands_in_separate_processes(unconditional, tmp_path):
    def run(*arguments) -> subprocess.CompletedProcess:
        return harness.command(*arguments, cwd=tmp_path)

    result = run("sample", unconditional[1], "--out", "pictures", "--seeds", "0-2")
    assert result.returncode == 0, result.stderr
    files = [f"pictures/seed{i:06d}.png" for i in range(3)]
    assert result.stdout.split() == files
    for file, image in zip(files, expected_images(unconditional[0], range(3), psi=0.7), strict=True):
        near(pixels(tmp_path / file), image)
    result = run("sample", "nothing.safetensors", "--out", "other")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing.safetensors: no such file")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "other").exists()


def test_sampling_single_files(unconditional, tmp_path, capsys, monkeypatch):
    options = ["--seeds", "5,1-3,100000", "--psi", "0.5", "--cutoff", "2"]
    images = expected_images(unconditional[0], [5, 1, 2, 3, 100000], psi=0.5, cutoff=2)
    for batch in (1, 2, 16):
        out = tmp_path / str(batch)
        code, printed, _ = command(
            capsys, monkeypatch, "sample", unconditional[1], "--out", out, "--batch", batch, *options
        )
        assert code == 0
        names = [f"seed{i:06d}.png" for i in (5, 1, 2, 3, 100000)]
        assert printed.split() == [str(out / name) for name in names]
        assert sorted(p.name for p in out.iterdir()) == sorted(names)
        for name, image in zip(names, images, strict=True):
            near(pixels(out / name), image)


def test_sampling_a_grid_and_an_interpolation(unconditional, tmp_path, capsys, monkeypatch):
    sample = ["sample", unconditional[1], "--out", tmp_path, "--seeds", "0-4"]
    images = expected_images(unconditional[0], range(5), psi=0.7)
    black = np.zeros_like(images[0])
    assert command(capsys, monkeypatch, *sample, "--grid") == (0, f"{tmp_path / 'grid.png'}\n", "")
    near(pixels(tmp_path / "grid.png"), np.vstack([np.hstack(images[:3]), np.hstack([*images[3:], black])]))
    assert command(capsys, monkeypatch, *sample, "--grid", "--columns", 5, "--batch", 2)[0] == 0
    near(pixels(tmp_path / "grid.png"), np.hstack(images))
    assert command(capsys, monkeypatch, *sample, "--interpolate", 3)[0] == 0
    strip = pixels(tmp_path / "interpolation.png")
    assert strip.shape == (16, 16 * (4 * 3 + 1), 3)
    for i, image in enumerate(images):
        near(strip[:, 48 * i : 48 * i + 16], image)
    between = strip[:, 16:32].astype(int)
    assert np.abs(between - images[0]).max() > 1
    assert np.abs(between - images[1]).max() > 1


def test_sampling_by_label(conditional, tmp_path, capsys, monkeypatch):
    G, path = conditional
    sample = ["sample", path, "--out", tmp_path, "--seeds", "0-3", "--grid", "--columns", 4, "--psi", 1]
    for given, numbers in (([], [0, 1, 2, 0]), (["--labels", "owl,dog"], [2, 1, 2, 1]), (["--labels", "0"], [0] * 4)):
        assert command(capsys, monkeypatch, *sample, *given, "--batch", 3)[0] == 0
        near(pixels(tmp_path / "grid.png"), np.hstack(expected_images(G, range(4), torch.eye(3)[numbers])))


def test_noise_on_the_command_line(unconditional, tmp_path, capsys, monkeypatch):
    for noise in ("const", "none", "random"):
        sample = ["sample", unconditional[1], "--out", tmp_path / noise, "--seeds", "0-1", "--grid", "--noise", noise]
        assert command(capsys, monkeypatch, *sample)[0] == 0
    images = {noise: pixels(tmp_path / noise / "grid.png") for noise in ("const", "none", "random")}
    near(images["none"], np.hstack(expected_images(unconditional[0], [0, 1], psi=0.7, noise="none")))
    assert (images["const"] != images["none"]).any()
    assert (images["const"] != images["random"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "x"], "'x' is not a list of numbers"),
        (["--seeds", "4294967296"], "seeds lie between"),
        (["--noise", "loud"], "noise 'loud'"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--labels", "cat"], "unconditional"),
        (["--batch", "0"], "batch"),
        (["--columns", "-3", "--grid"], "columns"),
        (["--interpolate", "-2"], "interpolate"),
        (["--out", "FILE/x"], "cannot be written"),
    ],
)
def test_errors_of_sample(unconditional, tmp_path, capsys, monkeypatch, arguments, message):
    (tmp_path / "FILE").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    code, out, err = command(
        capsys, monkeypatch, "sample", unconditional[1], "--seeds", "0-3", "--out", "x", *arguments
    )
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    (folder / "in").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "in" / f"{i}.png")
    pack(folder / "in", folder / "out", resolution=16, workers=0, progress=False)
    return folder / "out"


def test_metrics(unconditional, conditional, dataset, tmp_path, capsys, monkeypatch):
    measure = ["metrics", unconditional[1], "--data", dataset]
    code, printed, _ = command(capsys, monkeypatch, *measure, "--metrics", "swd", "--images", 4, "--batch", 3)
    assert code == 0
    result = json.loads(printed)
    assert (result["snapshot"], result["resolution"], result["images"], result["psi"]) == (
        str(unconditional[1]),
        16,
        4,
        1,
    )
    assert result["swd"] == pytest.approx(result["swd_16"])
    assert 0 < result["swd"] < 1e4
    again = json.loads(command(capsys, monkeypatch, *measure, "--images", 4)[1])
    assert again["swd"] == pytest.approx(result["swd"], rel=1e-3)
    assert json.loads(command(capsys, monkeypatch, *measure)[1])["images"] == 6  # the whole dataset
    mean = json.loads(command(capsys, monkeypatch, *measure, "--psi", 0)[1])
    assert mean["swd_psi0"] != pytest.approx(result["swd"], rel=1e-3)

    low = saved(tmp_path / "low.safetensors", resolution=4)[1]
    faults = {
        "unknown metric 'beauty'": ["metrics", unconditional[1], "--data", dataset, "--metrics", "swd,beauty"],
        "no such folder": ["metrics", unconditional[1], "--data", tmp_path / "nothing"],
        "no such file": ["metrics", tmp_path / "nothing", "--data", dataset],
        "was trained with 3 classes": ["metrics", conditional[1], "--data", dataset],
        "8 pixels or more": ["metrics", low, "--data", dataset],
    }
    for message, arguments in faults.items():
        code, printed, err = command(capsys, monkeypatch, *arguments)
        assert (code, printed) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert len(err.splitlines()) == 1
