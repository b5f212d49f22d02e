"""Snapshots: a file gives the same generator on every machine, and wrong files are rejected."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from snapshots import NAMES, built, command, near, pixels, saved

import stylegan_pg
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.errors import UsageError
from stylegan_pg.images import tile, to_uint8
from stylegan_pg.inference.generate import latents


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"resolution": 8},
        {"resolution": 4},
        {"c_dim": 3},
        {"g_architecture": "resnet", "conv_clamp": 256.0},
        {"g_architecture": "orig", "noise": False},
        {"resample_filter": [1.0, 2.0, 1.0]},
        {"low_precision": "bf16", "low_precision_resolutions": 1},
        {"base": [4, 6]},
        {"name": "progan"},
        {"name": "progan", "c_dim": 3},
        {"name": "stylegan", "c_dim": 3},
        {"name": "stylegan", "noise": False, "base": [3, 5], "resample_filter": [1.0, 2.0, 1.0]},
        {"name": "stylegan3", "c_dim": 3, "conv_clamp": 256.0},
        {"name": "stylegan3", "equivariance": "rotation", "base": [3, 5]},
    ],
)
@torch.no_grad()
def test_a_snapshot_gives_the_same_generator_bit_for_bit(how, tmp_path):
    G, path = saved(tmp_path / "G.safetensors", **how)
    assert [p.name for p in tmp_path.iterdir()] == ["G.safetensors"]
    before = torch.get_rng_state()
    loaded = load_snapshot(path)
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = G.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.description["nimg"] == 5000
    z, c = latents([0, 1], loaded.z_dim), torch.eye(3)[:2] if how.get("c_dim") else None
    for psi in (1.0, 0.7):
        assert torch.equal(loaded(z, c, psi=psi), G(z, c, psi=psi))


@torch.no_grad()
def test_snapshots_from_before_base_grids_load(tmp_path):
    G, description = built()
    kwargs = {name: value for name, value in description["kwargs"].items() if name != "base"}
    assert kwargs.keys() == {
        *("resolution", "img_channels", "c_dim", "channel_base", "channel_max", "fade", "resample_filter"),
        *("conv_clamp", "low_precision", "low_precision_at", "z_dim", "w_dim", "mapping_layers", "architecture"),
        "use_noise",
    }
    save_snapshot(tmp_path / "G.safetensors", G, {**description, "kwargs": kwargs})
    z = latents([0, 1], 8)
    assert torch.equal(load_snapshot(tmp_path / "G.safetensors")(z), G(z))


@pytest.mark.parametrize("name", ["stylegan2", "stylegan", "progan", "stylegan3"])
@torch.no_grad()
def test_snapshots_of_double_precision_are_used_in_single(tmp_path, name):
    G, description = built(name=name)
    save_snapshot(tmp_path / "G.safetensors", copy.deepcopy(G).double(), description)
    loaded = load_snapshot(tmp_path / "G.safetensors")
    assert {t.dtype for t in [*loaded.parameters(), *loaded.buffers()]} == {torch.float32}
    assert torch.equal(loaded(z := latents([0], 8)), G(z))


@torch.no_grad()
def test_half_precision_snapshots_run_on_cpus(tmp_path):
    path = saved(tmp_path / "G.safetensors", low_precision="fp16", low_precision_resolutions=2)[1]
    z = latents([0], 8)
    loaded = load_snapshot(path, "cpu")
    assert torch.equal(loaded(z), built()[0](z))
    assert loaded.description["kwargs"]["low_precision"] == "fp16"


@torch.no_grad()
def test_one_call_loads_a_generator(conditional):
    G = stylegan_pg.load_snapshot(str(conditional[1]))
    z, c = torch.randn([2, G.z_dim]), torch.eye(G.c_dim)[:2]
    images = G(z, c, psi=0.7)
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()
    assert not torch.equal(images, G(z, c, psi=0.5))
    assert G.description["label_names"] == NAMES


@torch.no_grad()
def test_a_snapshot_within_a_fade_keeps_its_alpha(tmp_path, capsys, monkeypatch):
    G, path = saved(tmp_path / "G.safetensors", {"alpha": 0.25}, fade=True)
    loaded, z = load_snapshot(path), latents([3, 4], 8)
    assert torch.equal(loaded(z), G(z, alpha=0.25))
    assert not torch.equal(loaded(z), G(z))
    assert torch.equal(loaded(z, alpha=1.0), G(z))  # unless another alpha is given
    copied = copy.deepcopy(loaded)
    copied.synthesis.b4.learned_input.zero_()
    assert not torch.equal(copied(z), loaded(z))  # an independent copy with the same alpha
    copied.load_state_dict(loaded.state_dict())
    assert torch.equal(copied(z), loaded(z))
    command(capsys, monkeypatch, "sample", path, "--out", tmp_path, "--seeds", "3,4", "--interpolate", 1, "--psi", 1)
    strip = pixels(tmp_path / "interpolation.png")
    near(strip, tile(to_uint8(G(z, alpha=0.25)), 2).numpy().transpose(1, 2, 0))


def test_a_failing_write_leaves_no_file(tmp_path, unconditional, monkeypatch):
    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_snapshot(tmp_path / "G.safetensors", unconditional[0], {})
    assert not list(tmp_path.iterdir())


class Boom:
    """An object whose pickle would write a file when loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_not_snapshots(tmp_path, unconditional):
    path = tmp_path / "other.safetensors"

    def refused(what: str) -> None:
        with pytest.raises(UsageError, match=what) as error:
            load_snapshot(path)
        assert str(path) in str(error.value)

    refused("no such file")
    whole = unconditional[1].read_bytes()
    for content in (b"", b"not a snapshot\n", whole[:-100], whole[: len(whole) // 2], whole[:100], whole[:5]):
        path.write_bytes(content)
        refused("no snapshot, or a damaged one")
    save_file({"G.weight": torch.zeros(3)}, path, {"stylegan_pg_checkpoint": "{}"})
    refused("not a snapshot")
    save_file({"weight": torch.zeros(3)}, path)
    refused("not a snapshot")
    trap = tmp_path / "executed"
    path.write_bytes(pickle.dumps(Boom(trap)))
    refused("no snapshot")
    torch.save(Boom(trap), path)
    refused("no snapshot")
    assert not trap.exists()
    path.unlink()
    path.mkdir()
    refused("no such file")


def test_descriptions_that_do_not_fit(tmp_path):
    G, description = built()
    path = tmp_path / "G.safetensors"
    kwargs = description["kwargs"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"format": 99}, "format 99.*update"),
        ({"kwargs": {**kwargs, "channel_base": 128}}, "does not fit the weights"),
        ({"kwargs": {**kwargs, "resolution": 32}}, "does not fit the weights"),
        ({"kwargs": {**kwargs, "resolution": 16.0}}, "does not fit the weights"),
        ({"kwargs": {**kwargs, "surprise": 1}}, "does not fit the weights"),
        ({"kwargs": 5}, "does not fit the weights"),
        ({"network": "stylegan9"}, "class stylegan9, .*network=CLASS"),
        ({"network": "__import__('os')"}, "network=CLASS"),
        ({"alpha": "much"}, "does not fit the weights"),
        ({"alpha": None}, "does not fit the weights"),
    ]
    for changes, message in cases:
        save_snapshot(path, G, {**description, **changes})
        with pytest.raises(UsageError, match=message) as error:
            load_snapshot(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    for meta in ("{", "[]", "5", "null", "{}"):
        save_file(G.state_dict(), path, {"stylegan_pg": meta})
        with pytest.raises(UsageError, match="does not fit the weights"):
            load_snapshot(path)
