"""Directions in w: how they are found, their file, and how `sample` applies them and files of latents."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import snapshots
import torch
from sklearn.linear_model import Ridge

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.editing import directions as finding
from stylegan_pg.editing.directions import between_classes, factorized, parse_layers, principal, sampled_w, scored
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import latents
from stylegan_pg.inference.latent_files import (
    KEY,
    Directions,
    Latents,
    Moved,
    load_directions,
    load_latents,
    parse_directions,
    save_directions,
    save_latents,
)


@pytest.fixture(scope="module")
def G(tmp_path_factory):
    folder = tmp_path_factory.mktemp("G")
    return load_snapshot(snapshots.saved(folder / "G.safetensors")[1])


@pytest.fixture
def run_command(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: snapshots.command(capsys, monkeypatch, *arguments)


# ---------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", ["stylegan2", "stylegan", "stylegan3"])
def test_affines_are_those_of_the_layers(tmp_path, name):
    """A layer's styles depend on the w whose number is given, and change by the matrix times the change of w."""
    G = load_snapshot(snapshots.saved(tmp_path / "G.safetensors", name=name)[1]).double()
    affines = finding.style_affines(G)
    modules = [module.affine for module in G.synthesis.modules() if hasattr(module, "affine")]
    assert len(affines) == len(modules)
    w = torch.randn(1, G.w_dim, dtype=torch.float64)
    for _, matrix in affines:
        fits = [
            torch.allclose(m(w) - m(0 * w), w @ matrix.t(), atol=1e-9) for m in modules if len(m.bias) == len(matrix)
        ]
        assert sum(fits) == 1
    # Images depend on exactly those ws that some layer takes.
    ws = torch.randn(1, G.num_ws, G.w_dim, dtype=torch.float64)
    base = G.synthesis(ws, noise="none")
    for i in range(G.num_ws):
        moved = ws.clone()
        moved[:, i] += 1
        assert ((G.synthesis(moved, noise="none") - base).abs().max() > 1e-12) == (i in {place for place, _ in affines})


def test_factorization_finds_what_lengthens_styles_most(G):
    ranges = [(0, 2), (2, 6)]
    found = factorized(G, ranges, 3, sampled_w(G, 500, 0))
    assert found.vectors.shape == (6, 1, 8)
    assert found.layers == [(0, 2)] * 3 + [(2, 6)] * 3
    assert found.names[:2] == ["factor 0 layers 0-1", "factor 1 layers 0-1"]
    for k, (first, end) in enumerate(ranges):
        rows = np.concatenate([m.numpy() for place, m in finding.style_affines(G) if first <= place < end])
        _, values, right = np.linalg.svd(rows)
        for i in range(3):
            vector = found.vectors[3 * k + i, 0].numpy()
            assert abs(right[i] @ vector) == pytest.approx(1, abs=1e-5)
            assert found.facts["eigenvalues"][3 * k + i] == pytest.approx(values[i] ** 2, rel=1e-6)
            assert vector[np.abs(vector).argmax()] > 0
    w = sampled_w(G, 500, 0).w
    assert found.scales[0] == pytest.approx(float((w @ found.vectors[0, 0]).std()), rel=1e-5)


def test_principal_components(G):
    samples = sampled_w(G, 2000, 1)
    found = principal(G, [(0, 6)], 4, samples)
    centred = samples.w.numpy() - samples.w.numpy().mean(axis=0)
    _, values, right = np.linalg.svd(centred, full_matrices=False)
    for i in range(4):
        assert abs(right[i] @ found.vectors[i, 0].numpy()) == pytest.approx(1, abs=1e-4)
        assert found.scales[i] == pytest.approx(values[i] / np.sqrt(1999), rel=1e-4)
    assert found.names == ["pc 0", "pc 1", "pc 2", "pc 3"]
    assert sum(found.facts["variance"]) < 1
    assert len(principal(G, [(0, 6)], 99, samples).names) == 8


def test_towards_classes(tmp_path):
    G = load_snapshot(snapshots.saved(tmp_path / "G.safetensors", c_dim=3)[1])
    samples = sampled_w(G, 900, 0, [0, 1, 2])
    found = between_classes(G, [(0, 6)], samples, snapshots.NAMES)
    assert found.names == ["to cat", "to dog", "to owl"]
    z = latents(range(300), G.z_dim)
    means = [G.mapping(z, c.expand(300, -1)).mean(dim=0) for c in torch.eye(3)]
    for i in range(3):
        way = means[i] - torch.stack(means).mean(dim=0)
        step = found.step(i, 6)[0]
        assert torch.nn.functional.cosine_similarity(way, step, dim=0) > 0.95
        assert step.norm() == pytest.approx(float(way.norm()), rel=0.2)
    pair = between_classes(G, [(0, 2)], samples, snapshots.NAMES, (2, 0))
    assert pair.names == ["owl to cat layers 0-1"]
    assert torch.nn.functional.cosine_similarity(means[0] - means[2], pair.vectors[0, 0], dim=0) > 0.95
    with pytest.raises(UsageError, match="two or more"):
        between_classes(G, [(0, 6)], sampled_w(G, 50, 0, [1]), snapshots.NAMES)


def test_direction_of_a_score(G):
    """The regression equals scikit-learn's, and moving along it raises the score of other images."""
    samples = sampled_w(G, 1000, 0)

    def brightness(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[1, 2, 3])

    scores = torch.cat(list(finding.scores_of(G, samples.w, brightness, "brightness", 100)))
    assert scores.shape == (1000,)
    again = torch.cat(list(finding.scores_of(G, samples.w, brightness, "brightness", 7)))
    assert (again - scores).abs().max() < 0.1
    found, correlation = scored(G, [(0, 6)], samples, scores, "brightness")
    w = samples.w.double().numpy()
    penalty = finding.RIDGE * np.cov(w.T, bias=True).diagonal().mean() * len(w)
    expected = Ridge(alpha=penalty).fit(w, scores.numpy()).coef_
    vector = found.vectors[0, 0].double().numpy()
    assert expected @ vector / np.linalg.norm(expected) == pytest.approx(1, abs=1e-6)
    assert correlation > 0.3
    z = latents(range(1000, 1032), G.z_dim)
    means = [brightness(to_uint8(Moved(G, s * found.step(0, 6))(z))).mean() for s in (-1.0, 0.0, 1.0)]
    assert means[0] < means[1] < means[2]
    with pytest.raises(UsageError, match="same number"):
        scored(G, [(0, 6)], samples, torch.ones(1000))
    with pytest.raises(UsageError, match="not finite"):
        scored(G, [(0, 6)], samples, scores / 0 - scores / 0)


def test_samples_do_not_depend_on_how_many_are_mapped_at_a_time(G, monkeypatch):
    whole = sampled_w(G, 50, 3).w
    monkeypatch.setattr(finding, "AT_A_TIME", 7)
    torch.testing.assert_close(sampled_w(G, 50, 3).w, whole)
    assert not torch.allclose(sampled_w(G, 50, 4).w, whole)


@pytest.mark.parametrize("text", ["", "3-1", "0-6", "a", "0--2", "0-1,0-1", "1,", "-1", "9999999999"])
def test_ranges_of_layers_that_are_none(text):
    with pytest.raises(UsageError, match="--layers"):
        parse_layers(text, 6)
    assert parse_layers("0-1,2, 3 - 5", 6) == [(0, 2), (2, 3), (3, 6)]
    assert parse_layers(None, 6) == [(0, 6)]


# ---------------------------------------------------------------------------------------------------- commands


def test_directions_are_found_shown_and_applied(tmp_path, run_command):
    _, path = snapshots.saved(tmp_path / "G.safetensors")
    code, printed, told = run_command(
        "directions", path, "--layers", "0-2,3-5", "--count", 2, "--out", "d", "--seeds", "5-7"
    )
    assert (code, told) == (0, "")
    assert len(printed.splitlines()) == 5
    assert {p.name for p in Path("d").glob("*.png")} == {Path(line).name for line in printed.splitlines()[1:]}
    strip = snapshots.pixels(Path("d/00-factor-0-layers-0-2.png"))
    assert strip.shape == (3 * 16, 7 * 16, 3)
    # The strip's last column is what `sample` makes with the same strength, and the middle is unchanged.
    how = ("--seeds", "5-7", "--psi", 0.7, "--grid", "--columns", 1)
    assert (
        run_command("sample", path, "--direction", "d/directions.safetensors", "--strength", 3, *how, "--out", "a")[0]
        == 0
    )
    snapshots.near(snapshots.pixels(Path("a/grid.png")), strip[:, -16:])
    assert run_command("sample", path, *how, "--out", "b")[0] == 0
    snapshots.near(snapshots.pixels(Path("b/grid.png")), strip[:, 48:64])
    for which in ("#2", "#factor 0 layers 3-5"):
        file = f"d/directions.safetensors{which}"
        assert run_command("sample", path, "--direction", file, "--strength", -3, *how, "--out", "c")[0] == 0
        other = snapshots.pixels(Path("d/02-factor-0-layers-3-5.png"))
        snapshots.near(snapshots.pixels(Path("c/grid.png")), other[:, :16])
    # Several are added up, and interpolations move, too.
    loaded = load_snapshot(path)
    both = parse_directions(["d/directions.safetensors#0", "d/directions.safetensors#3"], [2.0, -1.0], loaded)
    saved = load_directions(Path("d/directions.safetensors"), loaded)
    torch.testing.assert_close(both, 2 * saved.step(0, 6) - saved.step(3, 6))
    assert torch.count_nonzero(saved.step(0, 6)[3:]) == 0
    again = (
        "--direction",
        "d/directions.safetensors",
        "--strength",
        3,
        "--interpolate",
        2,
        "--seeds",
        "5,6",
        "--psi",
        0.7,
    )
    assert run_command("sample", path, *again, "--out", "e")[0] == 0
    moved = snapshots.pixels(Path("e/interpolation.png"))
    snapshots.near(moved[:, :16], strip[:16, -16:])
    snapshots.near(moved[:, 32:], strip[16:32, -16:])


SCORER = """
import torch
def red():
    return lambda images: images[:, 0].float().mean(dim=[1, 2])
class Shown(torch.nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 16, 16)
        return images.float().mean(dim=[1, 2, 3])[:, None]
module = Shown
def fails():
    return lambda images: 1 / 0
def wrong():
    return lambda images: torch.zeros(3)
def text():
    return lambda images: "ten"
def none():
    return 5
def raises():
    raise RuntimeError("no weights")
"""


def test_scorers_of_users(tmp_path, run_command, monkeypatch):
    _, path = snapshots.saved(tmp_path / "G.safetensors")
    (tmp_path / "my_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_scorer", None)
    for name in ("red", "module"):
        code, printed, told = run_command(
            "directions", path, "--scorer", f"my_scorer:{name}", "--samples", 200, "--out", name, "--seeds", "1"
        )
        assert (code, told) == (0, ""), told
        assert "correlation of the prediction" in printed
        assert Path(name, f"00-{name}.png").is_file()
    for name, message in {
        "my_scorer:fails": "my_scorer:fails failed: ZeroDivisionError",
        "my_scorer:wrong": "must return 16 numbers, not a tensor [3]",
        "my_scorer:text": "my_scorer:text failed: TypeError",
        "my_scorer:none": "must return a function of images, not int",
        "my_scorer:raises": "cannot be loaded: RuntimeError: no weights",
        "my_scorer:missing": "cannot be loaded: AttributeError",
        "no_such_module:x": "cannot be loaded: ModuleNotFoundError",
        "os.system('x')": "is no importable name such as",
    }.items():
        code, printed, told = run_command("directions", path, "--scorer", name, "--samples", 20, "--out", "no")
        assert (code, printed, len(told.splitlines())) == (2, "", 1)
        assert message in told
    assert not Path("no").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "sefa"], "method 'sefa' is unknown"),
        (["--method", "scorer"], "belong together"),
        (["--method", "pca", "--scorer", "a:b"], "belong together"),
        (["--method", "classes"], "needs a conditional generator"),
        (["--layers", "0-9"], "within 0 to 5"),
        (["--labels", "cat"], "unconditional"),
        (["--psi", "nan"], "psi=nan"),
        (["--seeds", "0-99"], "at most 64"),
        (["--out", "FILE"], "cannot be written"),
    ],
)
def test_wrong_options(tmp_path, run_command, arguments, message):
    _, path = snapshots.saved(tmp_path / "G.safetensors")
    Path("FILE").write_text("in the way")
    code, printed, told = run_command("directions", path, *arguments)
    assert (code, printed, len(told.splitlines())) == (2, "", 1)
    assert message in told


@pytest.mark.parametrize("name", ["r3gan", "progan"])
def test_generators_without_w(tmp_path, run_command, name):
    how = {"channels_at": {4: 8, 8: 8, 16: 8}, "group_width": 4} if name == "r3gan" else {}
    _, path = snapshots.saved(tmp_path / "G.safetensors", name=name, **how)
    code, _, told = run_command("directions", path)
    assert (code, len(told.splitlines())) == (2, 1)
    assert "no mapping from z to w" in told


# ---------------------------------------------------------------------------------------------------- files


def test_saved_latents_are_rendered(tmp_path, run_command):
    G, path = snapshots.saved(tmp_path / "G.safetensors")
    G = load_snapshot(path)
    ws = G.styles(latents(range(3), 8)).detach()
    noise = {name: torch.randn(3, *b.shape) for name, b in G.synthesis.named_buffers() if name.endswith("noise_const")}
    names = ["a/b", "..", "a:b"]
    save_latents(Path("plain.safetensors"), Latents(names, ws))
    save_latents(Path("noise.safetensors"), Latents(names, ws, noise=noise))
    assert run_command("sample", path, "--ws", "plain.safetensors", "--out", "a")[1].splitlines() == [
        "a/a_b-0.png",
        "a/_.png",
        "a/a_b-2.png",
    ]
    snapshots.near(snapshots.pixels(Path("a/_.png")), to_uint8(G.synthesis(ws[1:2]))[0].permute(1, 2, 0).numpy())
    # Optimised noise belongs to its picture, whatever the batch.
    for batch in (1, 2):
        run_command("sample", path, "--ws", "noise.safetensors", "--out", f"n{batch}", "--batch", batch, "--grid")
    snapshots.near(snapshots.pixels(Path("n1/grid.png")), snapshots.pixels(Path("n2/grid.png")))
    run_command("sample", path, "--ws", "plain.safetensors", "--out", "p", "--grid")
    assert np.abs(snapshots.pixels(Path("p/grid.png")).astype(int) - snapshots.pixels(Path("n1/grid.png"))).max() > 5
    for name, one in noise.items():
        G.synthesis.get_buffer(name).copy_(one[2])
    last = to_uint8(G.synthesis(ws[2:]))[0].permute(1, 2, 0).numpy()
    snapshots.near(snapshots.pixels(Path("n1/grid.png"))[16:, :16], last)
    # Truncation, interpolation, directions.
    run_command("sample", path, "--ws", "plain.safetensors", "--out", "t", "--psi", 0, "--grid")
    run_command("sample", path, "--seeds", "0", "--out", "t0", "--psi", 0)
    snapshots.near(snapshots.pixels(Path("t/grid.png"))[:16, :16], snapshots.pixels(Path("t0/seed000000.png")))
    run_command("sample", path, "--ws", "plain.safetensors", "--out", "i", "--interpolate", 3)
    run_command("sample", path, "--seeds", "0-2", "--psi", 1, "--out", "i0", "--interpolate", 3)
    snapshots.near(snapshots.pixels(Path("i/interpolation.png")), snapshots.pixels(Path("i0/interpolation.png")))
    save_directions(Path("d.safetensors"), Directions(["x"], torch.eye(8)[:1, None], [2.0], [(0, 6)]))
    more = ("--direction", "d.safetensors", "--strength", 1.5, "--psi", 1)
    run_command("sample", path, "--ws", "plain.safetensors", "--out", "m", "--grid", *more)
    run_command("sample", path, "--seeds", "0-2", "--out", "m0", "--grid", *more)
    snapshots.near(snapshots.pixels(Path("m/grid.png")), snapshots.pixels(Path("m0/grid.png")))
    for arguments, message in {
        ("--ws", "plain.safetensors", "--seeds", "1"): "no --seeds",
        ("--ws", "plain.safetensors", "--class-grid"): "no --seeds, --labels, --condition or --class-grid",
        ("--ws", "none.safetensors"): "none.safetensors: no such file",
        ("--ws", path): "holds no latents",
        ("--ws", "d.safetensors"): "holds no latents",
        ("--direction", "plain.safetensors"): "holds no directions",
        ("--direction", "d.safetensors#y"): "there is no direction 'y'",
        ("--direction", "d.safetensors#1"): "there is no direction '1'",
        ("--direction", "d.safetensors", "--strength", "nan"): "--strength nan",
        ("--direction", "d.safetensors", "--strength", 1, "--strength", 2): "1 directions and 2 strengths",
        ("--strength", 2): "--strength is of a direction",
    }.items():
        code, printed, told = run_command("sample", path, *arguments, "--out", "no")
        assert (code, printed, len(told.splitlines())) == (2, "", 1), arguments
        assert message in told


def altered(path: Path, to: Path, *, tensors=None, **changes) -> Path:
    """A copy of a file with other tensors or changes of its description, whose checksum fits."""
    with tensor_file.opened(path) as file:
        described = json.loads(file.metadata[KEY]) | changes
        kept = file.read() if tensors is None else tensors
    text = json.dumps(described)
    with to.open("wb") as file:
        tensor_file.write(file, kept, {KEY: text, "blake2b": tensor_file.digest(kept, text)})
    return to


def test_files_that_do_not_fit(G, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    save_directions(good, Directions(["x", "y"], torch.eye(8)[:2, None], [1.0, 2.0], [(0, 6), (1, 3)]))
    assert load_directions(good, G).layers == [(0, 6), (1, 3)]
    each = torch.randn(2, 6, 8)
    save_directions(bad, Directions(["x", "y"], each, [1.0, 2.0], [(0, 6), (1, 3)]))
    assert torch.equal(load_directions(bad, G).step(1, 6)[1:3], 2 * each[1, 1:3])
    wrong = [
        {"names": ["x", "x"]},
        {"names": ["x"]},
        {"names": ["x", 5]},
        {"names": ["x", "y" * 999]},
        {"names": []},
        {"names": {}},
        {"scales": [1.0]},
        {"scales": [1.0, "2"]},
        {"scales": [1.0, 1e300]},
        {"layers": [[0, 6], [3, 3]]},
        {"layers": [[0, 6], [0, 7]]},
        {"layers": [[0, 6], [-1, 2]]},
        {"layers": [[0, 6], [0, True]]},
        {"layers": 5},
        {"format": 2},
        {"kind": "latents"},
        {"tensors": {"directions": torch.zeros(2, 1, 7)}},
        {"tensors": {"directions": torch.zeros(2, 5, 8)}},
        {"tensors": {"directions": torch.zeros(2, 8)}},
        {"tensors": {"directions": torch.zeros(2, 1, 8, dtype=torch.int32)}},
        {"tensors": {"directions": torch.full((2, 1, 8), float("nan"))}},
        {"tensors": {"directions": torch.zeros(2, 1, 8), "more": torch.zeros(1)}},
        {"tensors": {}},
    ]
    for changes in wrong:
        with pytest.raises(UsageError) as error:
            load_directions(altered(good, bad, **changes), G)
        assert len(str(error.value).splitlines()) == 1
        assert str(bad) in str(error.value)
    for damage in (lambda data: data[:-1], lambda data: data[:-1] + b"\x01", lambda data: b"", lambda data: data[:5]):
        bad.write_bytes(damage(good.read_bytes()))
        with pytest.raises(UsageError, match="directions"):
            load_directions(bad, G)
    with pytest.raises(UsageError):
        load_directions(tmp_path, G)


def test_latents_of_another_generator(G, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    ws = torch.randn(2, 6, 8)
    noise = {"b16.conv1.noise_const": torch.randn(2, 16, 16)}
    save_latents(good, Latents(["a", "b"], ws, noise=noise, facts={"space": "w"}))
    found = load_latents(good, G)
    assert found.ws is not None
    assert torch.equal(found.ws, ws)
    assert torch.equal(found.noise["b16.conv1.noise_const"], noise["b16.conv1.noise_const"])
    assert found.facts == {"space": "w"}
    for tensors in (
        {"ws": torch.zeros(2, 5, 8)},
        {"ws": torch.zeros(3, 6, 8)},
        {"z": torch.zeros(2, 8)},
        {"ws": ws, "c": torch.zeros(2, 3)},
        {"ws": ws, "noise/b16.conv1.noise_const": torch.zeros(2, 8, 8)},
        {"ws": ws, "noise/b64.conv1.noise_const": torch.zeros(2, 64, 64)},
        {"ws": ws, "noise/b16.conv1.filter": torch.zeros(2, 4, 4)},
    ):
        with pytest.raises(UsageError, match="does not fit this generator"):
            load_latents(altered(good, bad, tensors=tensors), G)
    conditional = load_snapshot(snapshots.saved(tmp_path / "C.safetensors", c_dim=3)[1])
    with pytest.raises(UsageError, match="lacks c"):
        load_latents(good, conditional)
    with pytest.raises(UsageError, match="holds no latents"):
        load_latents(tmp_path / "C.safetensors", conditional)


def test_a_header_that_promises_terabytes_takes_no_memory(G, tmp_path):
    """Shapes are compared before anything is allocated; here the file is sparse and as large as it says."""
    path = tmp_path / "huge"
    size = 8 * 10**12
    described = {"format": 1, "kind": "latents", "names": ["a"], "facts": {}}
    header = {
        "__metadata__": {KEY: json.dumps(described), "blake2b": "0"},
        "ws": {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + size)
    except OSError:
        pytest.skip("this file system has no sparse files of this size")
    with pytest.raises(UsageError, match="ws is"):
        load_latents(path, G)


def test_moved_generators_keep_their_fade(tmp_path):
    G, description = snapshots.built(fade=True)
    save_snapshot(tmp_path / "G", G, {**description, "alpha": 0.3})
    G = load_snapshot(tmp_path / "G")
    z = latents(range(2), 8)
    torch.testing.assert_close(Moved(G, torch.zeros(6, 8))(z, psi=0.5), G(z, psi=0.5))
    assert Moved(G, torch.zeros(6, 8)).z_dim == 8
    with pytest.raises(AttributeError):
        Moved(G, torch.zeros(6, 8)).nothing  # noqa: B018
