"""Style mixing, interpolations and videos: which pictures they consist of."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from snapshots import command, near, pixels, saved
from test_readme import commands

from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.editing import mix, video, walks
from stylegan_pg.editing.interpolate import interpolate, interpolate_styles
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import between, images_of, latents
from stylegan_pg.inference.look import look_for
from stylegan_pg.networks import NETWORKS, NetworkShape

# One snapshot of each kind: classes and a fade are spread over them.
KINDS: dict[str, dict[str, Any]] = {
    "stylegan2": {"c_dim": 3},
    "stylegan": {"fade": True},
    "stylegan3": {"channel_base": 128, "channel_max": 8},
    "progan": {"c_dim": 3},
}
WITH_LAYERS = ("stylegan2", "stylegan", "stylegan3")


def save_r3gan(path: Path) -> None:
    """Save a generator of R3GAN, which has other options than those of `saved`, with three classes."""
    config = MODELS["r3gan"]()
    kwargs = NETWORKS["r3gan"].g_kwargs(config, NetworkShape(16, 16, False, 3, 3, 4))
    kwargs |= {"z_dim": 8, "widths": [8, 8, 8], "groups": [4, 4, 4], "blocks": [1, 1, 1], "embedding": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = NETWORKS["r3gan"].G(**kwargs)
        for tensor in G.state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape)
    description = {"network": "r3gan", "kwargs": kwargs, "alpha": 1.0, "label_names": ["cat", "dog", "owl"]}
    save_snapshot(path, G, description)


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("kinds")
    for name, how in KINDS.items():
        saved(folder / f"{name}.safetensors", {"alpha": 0.4} if how.get("fade") else None, name=name, **how)
    save_r3gan(folder / "r3gan.safetensors")
    return {
        name: (load_snapshot(path), path) for name in [*KINDS, "r3gan"] for path in [folder / f"{name}.safetensors"]
    }


def images(G: Any, seeds: list[int], classes: list[int] | None = None, **how: Any) -> np.ndarray:
    """The images of `sample`."""
    c = None if classes is None else torch.eye(G.c_dim)[classes]
    return torch.cat(list(images_of(G, latents(seeds, G.z_dim), c, **how))).numpy()


def classes_of(G: Any, count: int) -> tuple[torch.Tensor | None, list[int] | None]:
    """Classes 0, 1, 2, 0, ... of a conditional generator, as conditions and as numbers."""
    numbers = [i % 3 for i in range(count)]
    return (torch.eye(3)[numbers], numbers) if G.c_dim else (None, None)


def stacked(frames: Any) -> np.ndarray:
    return torch.stack(list(frames)).numpy()


# Mixing


def test_layers_by_name_and_number(tmp_path, generators):
    G = generators["stylegan2"][0]  # 16x16: six layers
    assert mix.layer_groups(G) == {"coarse": [0, 1], "middle": [2, 3], "fine": [4, 5]}
    assert mix.parse_layers(G, "4-5,0, COARSE") == [0, 1, 4, 5]
    large = load_snapshot(saved(tmp_path / "large.safetensors", resolution=64)[1])
    assert mix.layer_groups(large) == {"coarse": [0, 1, 2, 3], "middle": [4, 5, 6, 7], "fine": [8, 9]}
    with torch.device("meta"):
        full = NETWORKS["stylegan2"].G(resolution=1024, img_channels=3, channel_base=1024, channel_max=4)
    assert [len(group) for group in mix.layer_groups(full).values()] == [4, 4, 10]  # as in the paper
    third = mix.layer_groups(generators["stylegan3"][0])
    assert [layer for group in third.values() for layer in group] == list(range(16))
    assert [len(group) for group in third.values()] == [5, 6, 5]
    for text, message in (("6", "there is no layer 6"), ("x", "'x' is none of the layers 0 to 5"), ("", "'' is none")):
        with pytest.raises(UsageError, match=message):
            mix.parse_layers(G, text)
    for name in ("progan", "r3gan"):
        with pytest.raises(UsageError, match=rf"\({name}\) has no styles to mix"):
            mix.parse_layers(generators[name][0], "coarse")


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_the_matrix_mixes_layers_of_its_rows_and_columns(generators, name):
    G, rows, columns, layers = generators[name][0], [3, 4], [5, 6, 7], [0, 2, 3]
    (row_c, row_k), (column_c, column_k) = classes_of(G, 2), classes_of(G, 3)
    look = look_for(G, psi=0.6, cutoff=4, batch=2)
    picture = mix.mixing_matrix(
        G, rows, columns, layers, row_conditions=row_c, column_conditions=column_c, look=look
    ).numpy()
    assert picture.shape == (3, 48, 64)
    cells = picture.reshape(3, 3, 16, 4, 16).transpose(1, 3, 0, 2, 4)
    assert (cells[0, 0] == 255).all()
    near(cells[0, 1:], images(G, columns, column_k, psi=0.6, cutoff=4))
    near(cells[1:, 0], images(G, rows, row_k, psi=0.6, cutoff=4))
    z = [latents(seeds, G.z_dim) for seeds in (rows, columns)]
    a, b = (G.styles(*x, psi=0.6, cutoff=4) for x in zip(z, (row_c, column_c), strict=True))
    alpha = 0.4 if name == "stylegan" else 1.0
    for i in range(2):
        for j in range(3):
            ws = a[i].clone()
            for layer in layers:
                ws[layer] = b[j, layer]
            near(cells[i + 1, j + 1], to_uint8(G.synthesis(ws[None], alpha=alpha))[0].numpy())
    assert len({cell.tobytes() for cell in cells.reshape(12, -1)}) == 12


def test_mix_from_the_command_line(generators, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    G, path = generators["stylegan2"]
    given = ("--rows", "3,4", "--cols", "5-7", "--layers", "middle", "--row-labels", "owl", "--psi", 1)
    for out, more in (("a/m.png", ()), ("b.png", ("--batch", 1, "--col-labels", "cat,dog,owl"))):
        code, printed, told = command(capsys, monkeypatch, "mix", path, *given, "--out", out, *more)
        assert (code, printed) == (0, f"{out}\n"), told
    near(pixels(Path("a/m.png")), pixels(Path("b.png")))
    near(pixels(Path("b.png"))[16:32, :16], images(G, [3], [2])[0].transpose(1, 2, 0))
    assert (
        command(capsys, monkeypatch, "mix", path, "--rows", 1, "--cols", 2)[1] == f"{path.parent}/stylegan2-mix.png\n"
    )
    for wrong, message in (
        (["--rows", "3-1"], "'3-1' is not a list of numbers"),
        (["--rows", 2**32], "seeds lie between"),
        (["--layers", "0-9"], "there is no layer 9; give the layers 0 to 5, or coarse, middle, fine"),
        (["--cutoff", 7], "--cutoff 7 is not one of 0 to 6"),
        (["--noise", "loud"], "noise 'loud' is not possible"),
        (["--psi", "nan"], "psi=nan"),
        (["--out", "x.jpg"], "x.jpg: the picture is a PNG file"),
        (["--row-labels", "cow"], "'cow' is unknown"),
        (["--rows", "0-9999", "--cols", "0-9999"], "a matrix of 10000 x 10000 images"),
        (["--out", "b.png/c.png"], "cannot be written"),
    ):
        code, printed, told = command(capsys, monkeypatch, "mix", path, *wrong)
        assert (code, printed, len(told.splitlines())) == (2, "", 1), told
        assert message in told
    code, _, told = command(capsys, monkeypatch, "mix", generators["progan"][1])
    assert (code, told.count("\n")) == (2, 1)
    assert "has no styles to mix" in told


# Interpolation


@pytest.mark.parametrize("name", ["stylegan2", "stylegan", "stylegan3", "progan", "r3gan"])
@pytest.mark.parametrize("space", ["w", "z", "slerp"])
def test_frames_lie_between_their_keyframes(generators, name, space):
    G = generators[name][0]
    c, classes = classes_of(G, 3)
    how: dict[str, Any] = {"space": space, "look": look_for(G, psi=0.8 if hasattr(G, "styles") else None)}
    psi = {"psi": how["look"].psi}
    if space == "w" and name not in WITH_LAYERS:
        with pytest.raises(UsageError, match="space w: this generator has no ws"):
            interpolate(G, [1, 2, 9], c, frames=5, **how)
        return
    keys = images(G, [1, 2, 9], classes, **psi)
    frames = stacked(interpolate(G, [1, 2, 9], c, frames=9, **how))
    assert frames.dtype == np.uint8
    near(frames[[0, 4, 8]], keys)
    closed = stacked(interpolate(G, [1, 2, 9], c, frames=12, loop=True, easing="smooth", **how))
    near(closed[[0, 4, 8]], keys)
    # The frame at a quarter of the way, computed from the definition.
    z = latents([1, 2], G.z_dim)
    quarter = None if c is None else torch.lerp(c[0], c[1], 0.25)[None]
    if space == "w":
        ws = G.styles(z, None if c is None else c[:2], psi=0.8)
        alpha = 0.4 if name == "stylegan" else 1.0
        there = to_uint8(G.synthesis(torch.lerp(ws[:1], ws[1:], 0.25), alpha=alpha))[0].numpy()
    else:
        t = torch.tensor([[0.25]])
        mixture = torch.lerp(z[:1], z[1:], 0.25) if space == "z" else between(z[0], z[1], t)
        (there,) = torch.cat(list(images_of(G, mixture, quarter, **psi))).numpy()
    near(frames[1], there)


@pytest.mark.parametrize(("name", "noise"), [("stylegan2", "random"), ("stylegan", "const"), ("r3gan", "const")])
def test_frames_do_not_depend_on_the_batch(generators, name, noise):
    G = generators[name][0]
    c = classes_of(G, 3)[0]
    runs = []
    for batch in (1, 4, 100):
        look = look_for(G, batch=batch, noise=noise, seed=5)
        runs.append(stacked(interpolate(G, [0, 1, 2], c, frames=10, easing="cubic", loop=True, look=look)))
    near(runs[0], runs[1])
    near(runs[0], runs[2])
    if noise == "random":
        plain = stacked(interpolate(G, [0, 1, 2], c, frames=10, easing="cubic", loop=True, look=look_for(G)))
        assert np.abs(plain.astype(int) - runs[0]).max() > 5  # there is noise, and it differs from frame to frame
        still = stacked(interpolate(G, [0, 0], None if c is None else c[:1].expand(2, -1), frames=3, look=look))
        assert np.abs(still[0].astype(int) - still[1]).max() > 5


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".png", ""])
def test_interpolate_from_the_command_line(generators, capsys, monkeypatch, tmp_path, suffix):
    path, out = generators["stylegan2"][1], tmp_path / f"new/out{suffix}"
    given = ("--seeds", "0-2", "--labels", "cat,owl", "--frames", 7, "--loop", "--fps", 10, "--easing", "sine")
    code, printed, told = command(capsys, monkeypatch, "interpolate", path, *given, "--out", out, "--scale", 2)
    assert (code, printed) == (0, f"{out}\n"), told
    assert "7/7" in told  # of the progress bar
    if suffix in (".mp4", ".webm"):
        av = pytest.importorskip("av")
        with av.open(str(out)) as container:
            stream = container.streams.video[0]
            sizes = [(frame.width, frame.height) for frame in container.decode(stream)]
            assert (sizes, float(stream.average_rate)) == ([(32, 32)] * 7, 10)
    elif suffix == ".gif":
        with Image.open(out) as gif:
            assert (gif.n_frames, gif.size) == (7, (32, 32))  # type: ignore[attr-defined]
    elif suffix == ".png":
        assert pixels(out).shape == (32, 7 * 32, 3)
    else:
        assert len(os.listdir(out)) == 7
        near(
            pixels(out / "frame000000.png")[::2, ::2],
            images(generators["stylegan2"][0], [0], [0], psi=0.7)[0].transpose(1, 2, 0),
        )


def test_defaults_and_errors_of_interpolate(generators, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = generators["r3gan"][1]
    code, printed, _ = command(capsys, monkeypatch, "interpolate", path, "--seeds", "0-1", "--format", "strip")
    assert (code, printed) == (0, f"{path.parent}/r3gan-interpolation.png\n")
    assert pixels(path.parent / "r3gan-interpolation.png").shape == (16, 60 * 16, 3)
    for wrong, message in (
        (["--seeds", 4], "two seeds or more, or two labels for one seed"),
        (["--space", "w"], "space w: this generator has no ws of its layers"),
        (["--space", "x"], "space 'x' is not possible: w, z, slerp"),
        (["--easing", "x"], "easing 'x' is not possible: linear, smooth, smoother, sine, cubic"),
        (["--psi", 0.5], "psi=0.5: this generator has no ws"),
        (["--cutoff", 2], "--cutoff 2: this generator has no ws"),
        (["--labels", "#9"], "position 9 is not one of"),
        (["--frames", 10**9], "frames=1000000000"),
        (["--fps", "nan"], "fps=nan"),
        (["--format", "x"], "format 'x' is not possible"),
        (["--out", "x.avi"], "x.avi: the suffix decides"),
        (["--device", "gpu"], "device 'gpu'"),
    ):
        code, printed, told = command(capsys, monkeypatch, "interpolate", path, *wrong)
        assert (code, printed, len(told.splitlines())) == (2, "", 1), told
        assert message in told
    assert not list(tmp_path.iterdir())
    code, _, _ = command(capsys, monkeypatch, "interpolate", path, "--seed", 4, "--labels", "cat,dog", "--out", "x.gif")
    assert code == 0


def test_shapes_and_colours(tmp_path):
    """Non-square grey and RGBA generators."""
    for name, channels, base in (("stylegan2", 1, (4, 6)), ("stylegan3", 4, (5, 4))):
        how: dict[str, Any] = {"z_dim": 8, "w_dim": 8, "mapping_layers": 1, "channel_base": 128, "channel_max": 8}
        config = MODELS[name](base=list(base), **how)
        kwargs = NETWORKS[name].g_kwargs(config, NetworkShape(16, 16, False, channels, 0, 4))
        path = tmp_path / f"{name}.safetensors"
        save_snapshot(path, NETWORKS[name].G(**kwargs), {"network": name, "kwargs": kwargs, "alpha": 1.0})
        G = load_snapshot(path)
        shape = (channels, 4 * base[0], 4 * base[1])
        assert [f.shape for f in interpolate(G, [0, 1], frames=2)] == [shape] * 2
        picture = mix.mixing_matrix(G, [0], [1, 2], [0], look=look_for(G))
        assert picture.shape == (channels, 2 * shape[1], 3 * shape[2])
        keys = video.walk_latents([0], 2, 3, G.z_dim)
        assert [f.shape[1:] for f in video.video(G, keys, columns=2, frames=2)] == [(shape[1], 2 * shape[2])] * 2


def test_a_diverged_generator_is_reported(generators, tmp_path, capsys, monkeypatch):
    G = load_snapshot(generators["stylegan2"][1])
    for parameter in G.synthesis.parameters():
        parameter.fill_(1e30)
    save_snapshot(tmp_path / "huge.safetensors", G, G.description)
    with pytest.raises(RunError, match="not finite"):
        list(interpolate(G, [0, 1], classes_of(G, 2)[0], frames=2))
    for name in ("mix", "interpolate", "video"):
        out = tmp_path / f"{name}.png" if name == "mix" else tmp_path / f"{name}.gif"
        code, printed, told = command(capsys, monkeypatch, name, tmp_path / "huge.safetensors", "--out", out)
        assert (code, printed) == (1, "")
        assert "images that are not finite" in told
    assert os.listdir(tmp_path) == ["huge.safetensors"]


# Videos


def cells(frame: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[C, rows 16, columns 16] -> [rows * columns, C, 16, 16]."""
    return frame.reshape(-1, rows, 16, columns, 16).transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1, 16, 16)


@pytest.mark.parametrize("name", ["stylegan2", "stylegan3", "progan", "r3gan"])
def test_walks_pass_their_keyframes_and_close_smoothly(generators, name):
    G = generators[name][0]
    keys = video.walk_latents([10], 6, 4, G.z_dim)
    c = video.walk_conditions(G, None, 6, 4)
    frames = stacked(video.video(G, keys, c, columns=3, rows=2, frames=40))
    assert frames.shape == (40, 3, 32, 48)
    for k in range(4):
        seeds = [10 + 4 * w + k for w in range(6)]
        classes = [w % 3 for w in range(6)] if G.c_dim else None
        near(cells(frames[10 * k], 2, 3), images(G, seeds, classes, psi=0.7 if hasattr(G, "styles") else 1.0))
    path = frames.astype(float)
    steps = np.abs(path - np.roll(path, -1, 0)).mean(axis=(1, 2, 3))
    assert steps[-1] <= 2 * steps[:-1].mean()
    assert steps.min() > 0  # it never stands still


def test_styles_are_mixed_over_time(generators):
    G = generators["stylegan2"][0]
    layers = mix.parse_layers(G, "coarse")
    keys = video.walk_latents([0], 5, 3, G.z_dim)  # two rows, three columns
    c = video.walk_conditions(G, "cat,owl", 5, 3, "keyframe")
    for walk in video.WALKS:
        frames = stacked(video.video(G, keys, c, columns=3, rows=2, frames=6, walk=walk, layers=layers))
        if walk == "gaussian":
            mixture = walks.filtered_weights(torch.tensor([0.0]).double(), 3)[0].float()
            z = torch.einsum("k,wkd->wd", mixture, keys)
        else:
            z = keys[:, 0]
        ws = G.styles(z, c[:, 0] if c is not None else None, psi=0.7)
        for i in range(2):
            for j in range(3):
                mixture = ws[i].clone()
                mixture[layers] = ws[2 + j][layers]
                near(cells(frames[0], 2, 3)[3 * i + j], to_uint8(G.synthesis(mixture[None]))[0].numpy())


def test_latents_of_walks_keep_their_variance(generators):
    """In z, a frame between keyframes is that of a mixture whose weights are scaled, and of a mixture of classes."""
    for name in ("r3gan", "progan"):
        G = generators[name][0]
        look = look_for(G)
        keys, c = video.walk_latents([3], 1, 4, G.z_dim), video.walk_conditions(G, None, 1, 4, "keyframe")
        assert c is not None
        frames = stacked(video.video(G, keys, c, frames=12, look=look))
        for frame in (1, 5, 10):
            at = torch.tensor([frame / 3]).double()
            mixture = walks.weights(at, 4, "cubic", True).float()
            assert mixture.norm() < 0.95
            z = mixture @ keys[0] / mixture.norm()
            classes = walks.weights(at, 4, "smooth", True).float() @ c[0]
            near(frames[frame], next(images_of(G, z, classes, psi=look.psi))[0].numpy())


def test_styles_from_elsewhere_are_interpolated(generators):
    G = generators["stylegan2"][0]
    ws = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    frames = stacked(interpolate_styles(G, ws, frames=3))
    near(frames, to_uint8(G.synthesis(torch.stack([ws[0], ws.mean(0), ws[1]]))).numpy())
    for wrong in (ws[:, :5], ws[..., :4]):
        with pytest.raises(UsageError, match="are not those of this generator"):
            interpolate_styles(G, wrong, frames=3)
    with pytest.raises(UsageError, match="are not those of this generator"):
        interpolate_styles(generators["r3gan"][0], ws, frames=3)
    with pytest.raises(UsageError, match="of 0 keyframes"):
        interpolate_styles(G, ws[:0], frames=3)


def test_gaussian_walks_and_batches(generators):
    for name in ("stylegan2", "r3gan"):
        G = generators[name][0]
        keys, c = video.walk_latents([0, 1, 2], 2, 3, G.z_dim), video.walk_conditions(G, "dog", 2, 3)
        runs = [
            stacked(video.video(G, keys, c, columns=2, frames=15, walk="gaussian", look=look_for(G, batch=batch)))
            for batch in (1, 5, 64)
        ]
        near(runs[0], runs[1])
        near(runs[0], runs[2])
        path = runs[0].astype(float)
        steps = np.abs(path - np.roll(path, -1, 0)).mean(axis=(1, 2, 3))
        assert steps[-1] <= 2 * steps[:-1].mean()


def test_seeds_and_classes_of_walks(generators):
    G = generators["stylegan2"][0]
    assert torch.equal(video.walk_latents([7], 2, 3, 8).flatten(0, 1), latents(range(7, 13), 8))
    several = video.walk_latents([1, 2, 3, 4], 3, 2, 8)
    assert torch.equal(several.flatten(0, 1), latents([1, 2, 3, 4, 1, 2], 8))
    few = video.walk_latents([1, 2], 2, 3, 8)
    assert torch.equal(few.flatten(0, 1), latents([1, 2, 1, 2, 1, 2], 8))
    with pytest.raises(UsageError, match="they lie below"):
        video.walk_latents([2**32 - 2], 1, 3, 8)
    by_walk = video.walk_conditions(G, "cat,owl", 3, 2)
    assert by_walk is not None
    assert by_walk.argmax(2).tolist() == [[0, 0], [2, 2], [0, 0]]
    by_key = video.walk_conditions(G, "cat,owl", 2, 3, "keyframe")
    assert by_key is not None
    assert by_key.argmax(2).tolist() == [[0, 2, 0]] * 2


def test_video_from_the_command_line(generators, capsys, monkeypatch, tmp_path):
    av = pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    path = generators["stylegan2"][1]
    for out, fps, more, count in (
        ("a.mp4", 24, ("--mix", "fine"), 12),
        ("b.webm", 12.5, ("--walk", "gaussian"), 6),
    ):
        given = ("--seconds", 0.5, "--fps", fps, "--keyframes", 2, "--grid", "3x2")
        code, printed, told = command(capsys, monkeypatch, "video", path, *given, "--out", out, *more)
        assert (code, printed) == (0, f"{out}\n"), told
        with av.open(out) as container:
            stream = container.streams.video[0]
            sizes = [(frame.width, frame.height) for frame in container.decode(stream)]
            assert (sizes, float(stream.average_rate)) == ([(48, 32)] * count, fps)
    for wrong, message in (
        (["--grid", "3"], "grid '3': give columns x rows"),
        (["--grid", "9999x9999"], "at most 1024 cells"),
        (["--seconds", 0], "seconds=0.0"),
        (["--seconds", "nan"], "seconds=nan"),
        (["--walk", "x"], "walk 'x' is not possible: spline, gaussian"),
        (["--mix", "x"], "'x' is none of"),
        (["--labels-by", "x"], "labels by 'x' is not possible"),
        (["--keyframes", 10**6], "1000000 keyframes of 1 walks: give at most 2000 of each, and 10000 of all"),
        (["--format", "strip"], "a strip shows single frames"),
        (["--grid", "32x32", "--scale", 64], "32768x32768 pixels are too large: give a smaller grid"),
        (["--seed", 2**32 - 1], "they lie below"),
    ):
        code, printed, told = command(capsys, monkeypatch, "video", path, *wrong)
        assert (code, printed, len(told.splitlines())) == (2, "", 1), told
        assert message in told
    code, _, told = command(capsys, monkeypatch, "video", generators["r3gan"][1], "--mix", "coarse")
    assert code == 2
    assert "has no styles to mix" in told
    assert sorted(os.listdir()) == ["a.mp4", "b.webm"]


# Documents


def test_commands_and_lines_of_the_documents(capsys, monkeypatch, tmp_path):
    """All of them are run, for shorter times and fewer images."""
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/ffhq1024/snapshots")
    folder.mkdir(parents=True)
    saved(folder / "025000kimg.safetensors", resolution=64)
    lines = [line for name in ("mix", "interpolate", "video") for line in commands(f"stylegan-pg {name}")]
    shards = [line for line in [*commands("stylegan-pg sample"), *commands("torchrun")] if "--out-shards" in line]
    assert (len(lines) >= 8, len(shards)) == (True, 2)
    for line in [*lines, *(re.sub(r".*(stylegan.pg sample.*--count) \d+", r"\1 5", line) for line in shards)]:
        words = shlex.split(line.replace("--seconds 20", "--seconds 0.2").replace("--frames 240", "--frames 5"))
        more = ["--frames", 6] if words[1] == "interpolate" and "--frames" not in words else []
        code, printed, told = command(capsys, monkeypatch, *words[1:], *more)
        assert (code, bool(printed)) == (0, True), f"{line}\n{told}"
        out = words[words.index("--out-shards" if "--out-shards" in words else "--out") + 1]
        assert Path(out).exists()
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "editing.md").read_text("utf-8"), re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["picture"].shape == (3, 3 * 64, 4 * 64)
    with Image.open("walk.gif") as gif:
        assert gif.n_frames == 90  # type: ignore[attr-defined]
