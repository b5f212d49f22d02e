"""Snapshots, and sampling and measuring them: a file gives the same generator on every machine."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import stylegan_pg
from stylegan_pg.__main__ import main
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.config.families import fields_of
from stylegan_pg.data.classes import labels_to_c, parse_numbers
from stylegan_pg.data.pack.pack import pack
from stylegan_pg.errors import UsageError
from stylegan_pg.images import tile, to_uint8
from stylegan_pg.inference.generate import images_of, latents
from stylegan_pg.networks import NETWORKS, NetworkShape

NAMES = ["cat", "dog", "owl"]


def built(
    resolution: int = 16, *, name: str = "stylegan2", fade: bool = False, c_dim: int = 0, **model
) -> tuple[Any, dict[str, Any]]:
    """Return a generator whose weights all differ from their initial values, and its description."""
    small = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
    small = {key: value for key, value in small.items() if key in fields_of(MODELS[name])}
    config = MODELS[name](**{**small, **model})
    pair = NETWORKS[name]
    kwargs = pair.g_kwargs(config, NetworkShape(resolution, 16, fade, 3, c_dim, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = pair.G(**kwargs)
        for tensor in G.state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape)
    names = NAMES[:c_dim]
    return G.eval(), {"network": name, "kwargs": kwargs, "alpha": 1.0, "nimg": 5000, "label_names": names}


def saved(path: Path, changes: dict[str, Any] | None = None, **how) -> tuple[Any, Path]:
    G, description = built(**how)
    save_snapshot(path, G, {**description, **(changes or {})})
    return G, path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Any, Path]:
    return saved(tmp_path_factory.mktemp("plain") / "new" / "G.safetensors")


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> tuple[Any, Path]:
    return saved(tmp_path_factory.mktemp("conditional") / "G.safetensors", c_dim=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    (folder / "in").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "in" / f"{i}.png")
    pack(folder / "in", folder / "out", resolution=16, workers=0, progress=False)
    return folder / "out"


# --- the file ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["stylegan2", "stylegan", "progan"])
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


def test_a_failing_write_leaves_no_file(tmp_path, plain, monkeypatch):
    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_snapshot(tmp_path / "G.safetensors", plain[0], {})
    assert not list(tmp_path.iterdir())


class Boom:
    """An object whose pickle would write a file when loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_not_snapshots(tmp_path, plain):
    path = tmp_path / "other.safetensors"

    def refused(what: str) -> None:
        with pytest.raises(UsageError, match=what) as error:
            load_snapshot(path)
        assert str(path) in str(error.value)

    refused("no such file")
    whole = plain[1].read_bytes()
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


# --- from a generator to pictures -------------------------------------------------------------------------------------


def test_parse_numbers():
    assert parse_numbers("0-3,8") == [0, 1, 2, 3, 8]
    assert parse_numbers(" 5 , 7-7,5") == [5, 7, 5]
    for text in ("", "a", "1,", "-1", "3-1", "1.5", "1--2", "0-3;8", "5-", "5,9-4", "٣"):
        with pytest.raises(UsageError, match="no list of numbers"):
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


def test_labels_to_c(plain, conditional):
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
        "3": r"place 3 .* 3 classes \(cat, dog, owl\)",
        "cow": r"cow.*\(cat, dog, owl\)",
        "-1": "-1",
    }.items():
        with pytest.raises(UsageError, match=message):
            labels_to_c(G, text, 2)
    assert labels_to_c(load_snapshot(plain[1]), None, 2) is None
    with pytest.raises(UsageError, match="unconditional"):
        labels_to_c(load_snapshot(plain[1]), "0", 2)


def test_images_do_not_depend_on_the_batch(plain):
    z = latents(range(7), 8)
    whole = torch.cat(list(images_of(plain[0], z, batch=7, psi=0.7)))
    assert whole.dtype == torch.uint8
    for batch in (1, 3):
        parts = list(images_of(plain[0], z, batch=batch, psi=0.7))
        assert [len(part) for part in parts] == [batch] * (7 // batch) + [7 % batch] * bool(7 % batch)
        near(torch.cat(parts).numpy(), whole.numpy())


# --- the command line -------------------------------------------------------------------------------------------------


def command(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of the command. It runs in this process, which avoids importing torch
    each time."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return (end.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]  # exits with a number


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def near(a: np.ndarray, b: np.ndarray) -> None:
    """Check equality up to one grey level, because batches of other sizes may be rounded differently."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


@torch.no_grad()
def expected_images(G: Any, seeds, c: torch.Tensor | None = None, **how) -> list[np.ndarray]:
    """Return the images as [H, W, C] arrays, computed directly."""
    z = torch.tensor(np.concatenate([np.random.RandomState(s).randn(1, 8) for s in seeds]), dtype=torch.float32)
    x = G(z, c, **how).numpy()
    return list(np.clip(np.floor(x * 127.5 + 128), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


@pytest.mark.slow
def test_commands_in_separate_processes(plain, tmp_path):
    def run(*arguments) -> subprocess.CompletedProcess:
        return harness.command(*arguments, cwd=tmp_path)

    result = run("sample", plain[1], "--out", "pictures", "--seeds", "0-2")
    assert result.returncode == 0, result.stderr
    files = [f"pictures/seed{i:06d}.png" for i in range(3)]
    assert result.stdout.split() == files
    for file, image in zip(files, expected_images(plain[0], range(3), psi=0.7), strict=True):
        near(pixels(tmp_path / file), image)
    result = run("sample", "nothing.safetensors", "--out", "other")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing.safetensors: no such file")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "other").exists()


def test_sampling_single_files(plain, tmp_path, capsys, monkeypatch):
    options = ["--seeds", "5,1-3,100000", "--psi", "0.5", "--cutoff", "2"]
    images = expected_images(plain[0], [5, 1, 2, 3, 100000], psi=0.5, cutoff=2)
    for batch in (1, 2, 16):
        out = tmp_path / str(batch)
        code, printed, _ = command(capsys, monkeypatch, "sample", plain[1], "--out", out, "--batch", batch, *options)
        assert code == 0
        names = [f"seed{i:06d}.png" for i in (5, 1, 2, 3, 100000)]
        assert printed.split() == [str(out / name) for name in names]
        assert sorted(p.name for p in out.iterdir()) == sorted(names)
        for name, image in zip(names, images, strict=True):
            near(pixels(out / name), image)


def test_sampling_a_grid_and_an_interpolation(plain, tmp_path, capsys, monkeypatch):
    sample = ["sample", plain[1], "--out", tmp_path, "--seeds", "0-4"]
    images = expected_images(plain[0], range(5), psi=0.7)
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


def test_noise_on_the_command_line(plain, tmp_path, capsys, monkeypatch):
    for noise in ("const", "none", "random"):
        sample = ["sample", plain[1], "--out", tmp_path / noise, "--seeds", "0-1", "--grid", "--noise", noise]
        assert command(capsys, monkeypatch, *sample)[0] == 0
    images = {noise: pixels(tmp_path / noise / "grid.png") for noise in ("const", "none", "random")}
    near(images["none"], np.hstack(expected_images(plain[0], [0, 1], psi=0.7, noise="none")))
    assert (images["const"] != images["none"]).any()
    assert (images["const"] != images["random"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "x"], "'x' is no list of numbers"),
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
def test_errors_of_sample(plain, tmp_path, capsys, monkeypatch, arguments, message):
    (tmp_path / "FILE").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, monkeypatch, "sample", plain[1], "--seeds", "0-3", "--out", "x", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_metrics(plain, conditional, dataset, tmp_path, capsys, monkeypatch):
    measure = ["metrics", plain[1], "--data", dataset]
    code, printed, _ = command(capsys, monkeypatch, *measure, "--metrics", "swd", "--images", 4, "--batch", 3)
    assert code == 0
    result = json.loads(printed)
    assert (result["snapshot"], result["resolution"], result["images"], result["psi"]) == (str(plain[1]), 16, 4, 1)
    assert result["swd"] == pytest.approx(result["swd_16"])
    assert 0 < result["swd"] < 1e4
    again = json.loads(command(capsys, monkeypatch, *measure, "--images", 4)[1])
    assert again["swd"] == pytest.approx(result["swd"], rel=1e-3)
    assert json.loads(command(capsys, monkeypatch, *measure)[1])["images"] == 6  # the whole dataset
    mean = json.loads(command(capsys, monkeypatch, *measure, "--psi", 0)[1])
    assert mean["swd_psi0"] != pytest.approx(result["swd"], rel=1e-3)

    low = saved(tmp_path / "low.safetensors", resolution=4)[1]
    faults = {
        "unknown metric 'beauty'": ["metrics", plain[1], "--data", dataset, "--metrics", "swd,beauty"],
        "no such folder": ["metrics", plain[1], "--data", tmp_path / "nothing"],
        "no such file": ["metrics", tmp_path / "nothing", "--data", dataset],
        "knows 3 classes": ["metrics", conditional[1], "--data", dataset],
        "8 pixels or more": ["metrics", low, "--data", dataset],
    }
    for message, arguments in faults.items():
        code, printed, err = command(capsys, monkeypatch, *arguments)
        assert (code, printed) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert len(err.splitlines()) == 1
