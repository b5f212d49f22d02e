"""Arithmetic with latents: `stylegan-pg sample --arithmetic` and the function behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from snapshots import command, near, pixels, saved

from stylegan_pg import load_snapshot
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.arithmetic import Group, latent_arithmetic, parse, picture_of
from stylegan_pg.inference.generate import latents


def test_expressions():
    assert parse("1,2,3 - 4,5,6 + 7,8,9") == [Group(1, [1, 2, 3]), Group(-1, [4, 5, 6]), Group(1, [7, 8, 9])]
    assert parse(" 1 , 2  -  4-6 ") == [Group(1, [1, 2]), Group(-1, [4, 5, 6])]
    assert [group.name for group in parse("1,2 - 3")] == ["+ 1,2", "- 3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no list of seeds"),
        ("1,2,3", "has one group only"),
        ("1+2", "'1+2' is no list of seeds"),
        ("1 -", "'1 -' is no list of seeds"),
        ("1 - x", "'x' is no list of seeds"),
        ("1 * 2 + 3", "'1 * 2' is no list of seeds"),
        ("1 + 5-2", "'5-2' is no list of seeds"),
        ("1 + 4294967296", "seeds lie between 0 and 4294967295"),
        ("0-64 + 1", "a group has 65 seeds; give at most 64"),
        (" + ".join("1" * 33), "has 33 groups; give at most 32"),
        ("1 + \x1b[31m", "is no list of seeds"),
    ],
)
def test_bad_expressions_get_one_message(text, message):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", ["stylegan2", "dcgan"])
def test_the_sum_of_the_means_equals_the_formula(name, tmp_path):
    """In w where there is a w, in z where there is none."""
    own = {"normalization": "virtual", "references": 4} if name == "dcgan" else {}
    _, path = saved(tmp_path / "g.safetensors", name=name, **own)
    G = load_snapshot(path)
    found = latent_arithmetic(G, parse("1,2 - 3 + 4,5,6"), psi=0.6 if name == "stylegan2" else 1.0)
    z = latents(range(7), G.z_dim)
    codes = G.styles(z, psi=0.6) if name == "stylegan2" else z
    wanted = (codes[1] + codes[2]) / 2 - codes[3] + (codes[4] + codes[5] + codes[6]) / 3
    with torch.no_grad():
        image = G.synthesis(wanted[None]) if name == "stylegan2" else G(wanted[None])
        single = G.synthesis(codes[3:4]) if name == "stylegan2" else G(codes[3:4])
    near(found.image.numpy(), to_uint8(image).numpy())
    near(found.means[1:2].numpy(), to_uint8(single).numpy())
    near(found.operands[1].numpy(), to_uint8(single).numpy())
    assert [len(images) for images in found.operands] == [2, 1, 3]
    assert found.image.float().std() > 1


def test_what_cancels(tmp_path):
    """5 - 5 + 7 is 7."""
    _, path = saved(tmp_path / "g.safetensors")
    G = load_snapshot(path)
    found = latent_arithmetic(G, parse("5 - 5 + 7"))
    near(found.image.numpy(), found.operands[2].numpy())
    assert np.abs(found.image.numpy().astype(int) - found.operands[0].numpy()).max() > 1


def test_the_picture_of_the_operands(tmp_path):
    _, path = saved(tmp_path / "g.safetensors")
    found = latent_arithmetic(load_snapshot(path), parse("1,2 - 3"))
    picture, names = picture_of(found)
    assert picture.shape == (3, 48, 48)
    assert names == ["+ 1,2", "- 3", "="]
    parts = picture.reshape(3, 3, 16, 3, 16).permute(1, 3, 0, 2, 4)
    assert torch.equal(parts[0, 0], found.operands[0][0])
    assert torch.equal(parts[0, 2], found.means[0])
    assert torch.equal(parts[1, 0], found.operands[1][0])
    assert (parts[1, 1] == 255).all()
    assert torch.equal(parts[2, 2], found.image[0])


def test_the_command(tmp_path, capsys, monkeypatch):
    _, path = saved(tmp_path / "g.safetensors", c_dim=3)
    out = tmp_path / "out"
    code, printed, _ = command(
        capsys, monkeypatch, "sample", path, "--arithmetic", "1,2 - 3 + 4", "--labels", "dog", "--out", out
    )
    assert (code, printed.split()) == (0, [f"{out}/arithmetic.png", f"{out}/arithmetic-operands.png"])
    assert pixels(out / "arithmetic.png").shape == (16, 16, 3)
    height, width, _ = pixels(out / "arithmetic-operands.png").shape
    assert (height, width > 48) == (64, True)
    # A group of one seed is what the seed alone gives, of the same class.
    command(capsys, monkeypatch, "sample", path, "--seeds", "4", "--labels", "dog", "--out", out)
    command(capsys, monkeypatch, "sample", path, "--arithmetic", "1 - 1 + 4", "--labels", "dog", "--out", out)
    near(pixels(out / "arithmetic.png"), pixels(out / "seed000004-dog.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arithmetic", "1 + x"], "'x' is no list of seeds"),
        (["--arithmetic", "1 + 2", "--seeds", "3"], "--arithmetic names its own seeds"),
        (["--arithmetic", "1 + 2", "--grid"], "--arithmetic names its own seeds"),
        (["--arithmetic", "1 + 2", "--labels", "cat,dog"], "--labels cat,dog stands for several"),
        (["--arithmetic", "1 + 2", "--out-shards", "x"], "--arithmetic: --out-shards writes a dataset"),
        (["--arithmetic", "1 + 2", "--psi", "nan"], "psi=nan"),
    ],
)
def test_wrong_options(tmp_path, capsys, monkeypatch, arguments, message):
    _, path = saved(tmp_path / "g.safetensors", c_dim=3)
    out = tmp_path / "out"
    code, printed, told = command(capsys, monkeypatch, "sample", path, "--out", out, *arguments) if (
        "--out-shards" not in arguments
    ) else command(capsys, monkeypatch, "sample", path, *arguments)  # fmt: skip
    assert (code, printed) == (2, "")
    assert message in told
    assert len(told.splitlines()) == 1
    assert not Path(out).exists()
