"""`stylegan-pg export`: files of other programs make the images of the snapshot, and nothing wrong stays behind."""

import fcntl
import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from exporting import NAMES, VECTORS, snapshot
from PIL import Image
from snapshots import command

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.classes import one_hot
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.export import checking, formats, outputs
from stylegan_pg.export.command import export
from stylegan_pg.export.program import Wanted, program_of, traced
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import between, latents
from stylegan_pg.networks.public_names import from_public
from stylegan_pg.ops import bias_act, filtered_lrelu, grouped_conv, plain_operations, reference, upfirdn2d

THREE = {"name": "stylegan3", "more": {"layers": 4}}  # StyleGAN3 with few layers, which take less time
PAIRS: dict[str, dict[str, Any]] = {
    "stylegan2 with vectors, RGBA": {"vectors": True, "channels": 4},
    "stylegan2 resnet, wide, with a clamp": {"g_architecture": "resnet", "base": [3, 5], "conv_clamp": 2.0},
    "stylegan2 orig in a fade, grey": {"g_architecture": "orig", "fade": True, "channels": 1},
    "stylegan2 skip in a fade": {"fade": True},
    "stylegan with classes": {"name": "stylegan", "classes": 3},
    "stylegan in a fade": {"name": "stylegan", "fade": True, "resample_filter": [1.0, 2.0, 1.0]},
    "progan with classes, wide": {"name": "progan", "classes": 3, "base": [4, 6]},
    "stylegan3-t": THREE,
    "stylegan3-r with classes": {**THREE, "equivariance": "rotation", "classes": 3},
    "r3gan with classes in a fade": {"name": "r3gan", "classes": 3, "fade": True},
    "r3gan, bf16": {"name": "r3gan", "low_precision": "bf16", "low_precision_resolutions": 1},
    "srresnet with vectors": {"name": "srresnet", "vectors": True, "g_channels": 4, "blocks": 2, "start_resolution": 4},
    "mlp": {"name": "mlp", "channels": 2},
}


def differences(lines: list[str]) -> float:
    """The difference that an export has printed."""
    found = re.search(r"largest difference from PyTorch: (\S+) of the range", "\n".join(lines))
    assert found, lines
    return float(found[1])


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("up", "down", "padding", "size"),
    [
        (1, 1, 0, (4, 4)),
        (2, 1, 1, (4, 4)),
        (2, 2, (3, 1, -2, 5), (3, 4)),
        ((2, 3), (1, 4), 4, (5, 2)),
        (1, 2, -1, (1, 3)),
    ],
)
def test_plain_upfirdn2d_is_the_definition(up, down, padding, size, dtype):
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 11, generator=dice, dtype=dtype)
    f = torch.randn(size, generator=dice)
    for flip in (False, True):
        expected = upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=1.5)
        with plain_operations():
            found = upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=1.5)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_plain_operators_are_the_definitions_and_refuse_what_they_refuse():
    dice = torch.Generator().manual_seed(0)
    x, taps = torch.randn(2, 6, 8, 9, generator=dice), torch.rand(12, generator=dice) / 6
    bias, scale = torch.randn(6, generator=dice), torch.randn(2, 6, generator=dice)
    noise, weight = torch.randn(1, 1, 8, 9, generator=dice), torch.randn(4, 3, 3, 3, generator=dice)
    padding = (9, 10, 11, 8)
    radial = taps[:, None] * taps
    expected = [
        reference.bias_act(x, bias, scale, noise, "lrelu", 1.4, 0.8, 1),
        reference.filtered_lrelu(x, taps, radial, bias, 2, 2, padding, 1.4, 0.2, 0.9),
        reference.filtered_lrelu(x, None, taps, None, 1, 2, padding, 1.0, 0.2, None),
        torch.nn.functional.conv2d(x, weight, padding=1, groups=2),
    ]
    with plain_operations():
        found = [
            bias_act(x, bias, scale=scale, noise=noise, act="lrelu", gain=1.4, clamp=0.8),
            filtered_lrelu(x, taps, radial, bias, up=2, down=2, padding=padding, gain=1.4, clamp=0.9),
            filtered_lrelu(x, None, taps, up=1, down=2, padding=padding, gain=1.0),
            grouped_conv(x, weight, groups=2, padding=1),
        ]
        with pytest.raises(ValueError, match="smaller than the filter"):
            upfirdn2d(x, torch.ones(20, 20))
        with pytest.raises(ValueError, match="bias"):
            bias_act(x, torch.ones(5))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_a_program_of_torch_makes_the_images_of_every_pair(pair, tmp_path):
    path = snapshot(tmp_path / "G.safetensors", resolution=8, **PAIRS[pair])
    lines = list(export(path, "torch"))
    assert differences(lines) < 1e-5
    module = torch.export.load(tmp_path / "G.pt2").module()
    G = load_snapshot(path)
    z = latents([3, 4, 5], G.z_dim)
    c = torch.tensor(VECTORS)[[0, 1, 0]] if PAIRS[pair].get("vectors") else one_hot([2, 0, 1], 3) if G.c_dim else None
    given = {"z": z, **({} if c is None else {"c": c})}
    if hasattr(G, "styles"):
        first = torch.arange(G.num_ws) < 1
        given |= {"psi": torch.tensor(0.25), "mask": first.float()}
        expected = G(z, c, psi=0.25, cutoff=1)
        assert not torch.allclose(expected, G(z, c, psi=0.25, cutoff=0), atol=1e-4)
    else:
        expected = G(z, c)
    tolerance = 3e-2 if "bf16" in pair else 1e-4  # the snapshot itself computes in bf16
    assert float((module(**given) - expected).abs().max()) < tolerance * float(expected.max() - expected.min())


def test_a_program_has_no_operators_of_this_package_and_any_batch(tmp_path):
    G = load_snapshot(snapshot(tmp_path / "G.safetensors", resolution=8))
    exported = traced(program_of(G, Wanted()))
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert names
    assert not [name for name in names if not name.startswith(("aten.", "<built-in", "sym_size"))]
    assert "VR[1, int_oo]" in str(exported.range_constraints)


@pytest.mark.slow
def test_a_program_runs_where_this_package_is_not_imported(tmp_path):
    path = snapshot(tmp_path / "G.safetensors", resolution=8)
    list(export(path, "torch", tmp_path / "other.pt2", noise="none"))
    code = (
        "import sys, torch\n"
        "extra = {'stylegan_pg.json': ''}\n"
        "module = torch.export.load(sys.argv[1], extra_files=extra).module()\n"
        "images = module(z=torch.randn(7, 8), psi=torch.tensor(1.0), mask=torch.ones(4))\n"
        "assert 'stylegan_pg' not in sys.modules\n"
        "print(list(images.shape), extra['stylegan_pg.json'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other.pt2")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    shape, _, facts = done.stdout.partition("] ")
    assert shape == "[7, 3, 8, 8"
    facts = json.loads(facts)
    assert facts["noise"] == "none"
    assert facts["description"]["nimg"] == 5000
    assert facts["inputs"] == {"z": ["batch", 8], "psi": [], "mask": [4]}


@pytest.mark.slow
def test_onnx_has_a_free_batch_standard_operators_and_the_description(tmp_path, capsys, monkeypatch):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = snapshot(tmp_path / "G.safetensors", resolution=8, classes=3, channels=4, base=[4, 6])
    code, said, errors = command(capsys, monkeypatch, "export", path, "--to", "onnx", "--out", tmp_path / "x.onnx")
    assert (code, errors) == (0, "")
    assert differences([said]) < 1e-5
    assert "opset 18" in said
    model = onnx.load(tmp_path / "x.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain for o in model.opset_import} == {""}
    assert not model.functions
    kept = {p.key: p.value for p in model.metadata_props}
    assert kept["opset"] == "18"
    facts = json.loads(kept["stylegan_pg"])
    assert facts["description"]["label_names"] == NAMES[:3]
    assert facts["outputs"] == {"images": ["batch", 4, 8, 12]}
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("z", ["batch", 8]), ("c", ["batch", 3]), ("psi", []), ("mask", [4])
    ]  # fmt: skip
    G = load_snapshot(path)
    z, c = latents(range(4), 8), one_hot([0, 1, 2, 1], 3)
    feed = {
        "z": z.numpy(),
        "c": c.numpy(),
        "psi": np.array(-0.5, np.float32),
        "mask": np.array([0, 1, 0, 1], np.float32),
    }
    (images,) = session.run(None, feed)
    ws, low = G.styles(z, c), G.styles(z, c, psi=-0.5)
    ws[:, [1, 3]] = low[:, [1, 3]]
    expected = G.synthesis(ws)
    assert np.abs(images - expected.numpy()).max() < 1e-4 * float(expected.max() - expected.min())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"name": "stylegan", "channels": 1}, {"precision": "fp16"}),
        ({"name": "r3gan", "vectors": True}, {}),
        ({"name": "progan"}, {"inputs": "w"}),
    ],
)
def test_onnx_of_other_pairs(given, options, tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path = snapshot(tmp_path / "G.safetensors", resolution=8, **given)
    difference = differences(list(export(path, "onnx", **options)))
    half = options.get("precision") == "fp16"
    assert difference < (5e-3 if half else 1e-5)
    types = {t.data_type for t in onnx.load(tmp_path / "G.onnx").graph.initializer}
    assert (onnx.TensorProto.FLOAT16 in types or difference > 1e-5) == half


@pytest.mark.slow
def test_aoti_compiles_for_this_processor(tmp_path):
    """The smallest generator: compilation takes a C++ compiler most of the time."""
    path = snapshot(tmp_path / "G.safetensors", "progan", resolution=4)
    lines = list(export(path, "aoti"))
    assert differences(lines) < 1e-5
    run = formats.FORMATS["aoti"].load(tmp_path / "G.aoti.pt2", "cpu")
    G = load_snapshot(path)
    z = latents(range(9), 8)
    images = run({"z": z, "psi": torch.tensor(0.5), "mask": torch.ones(1)})
    torch.testing.assert_close(images, G(z, psi=0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["stylegan2", "r3gan"])
def test_a_walk_goes_from_one_picture_to_the_other(kind, tmp_path):
    G = load_snapshot(snapshot(tmp_path / "G.safetensors", kind, 8, classes=3))
    program = program_of(G, Wanted(walk=True))
    z, to, c, c_to = latents([1], 8), latents([2], 8), one_hot([0], 3), one_hot([2], 3)
    more = {"psi": torch.tensor(0.7), "mask": torch.ones(G.num_ws)} if kind == "stylegan2" else {}
    how: dict[str, Any] = {"psi": 0.7} if more else {}

    def at(t: float) -> torch.Tensor:
        return program(z=z, c=c, to=to, c_to=c_to, t=torch.tensor(t), **more)

    torch.testing.assert_close(at(0.0), G(z, c, **how), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at(1.0), G(to, c_to, **how), rtol=1e-4, atol=1e-5)
    if kind == "stylegan2":
        halfway = G.synthesis(torch.lerp(G.styles(z, c, psi=0.7), G.styles(to, c_to, psi=0.7), 0.25))
    else:
        halfway = G(between(z[0], to[0], torch.tensor([[0.25]])), torch.lerp(c, c_to, 0.25))
    torch.testing.assert_close(at(0.25), halfway, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- checks and refusals


def test_a_wrong_result_is_removed_and_an_older_file_stays(tmp_path, capsys, monkeypatch):
    path = snapshot(tmp_path / "G.safetensors", "progan", resolution=4)
    out = tmp_path / "G.pt2"
    out.write_bytes(b"older")
    right = formats.FORMATS["torch"]
    wrong = right._replace(load=lambda file, device: lambda inputs: right.load(file, device)(inputs) * 1.01)
    monkeypatch.setitem(formats.FORMATS, "torch", wrong)
    code, said, errors = command(capsys, monkeypatch, "export", path, "--to", "torch")
    assert (code, said) == (1, "")
    assert re.fullmatch(
        r"error: G\.pt2 differs from PyTorch by \S+ of the range of the images, more than 0\.0001.*\n", errors
    )
    assert out.read_bytes() == b"older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["G.pt2", "G.safetensors"]


def test_images_that_are_not_numbers_or_of_another_shape_are_differences():
    images = torch.rand(2, 3, 4, 4)
    assert checking.difference(images * torch.nan, images) == float("inf")
    assert checking.difference(images, images) == 0
    with pytest.raises(RunError, match="instead of"):
        checking.difference(images[:1], images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tflite"], "'tflite' is unknown: choose from onnx, torch, aoti, public, hub, web"),
        (["--to", "torch", "--precision", "int8"], "--precision 'int8' is not possible: fp32, fp16"),
        (["--to", "torch", "--noise", "random"], "--noise 'random' is not possible: const, none"),
        (["--to", "torch", "--inputs", "x"], "--inputs 'x' is not possible"),
        (["--to", "hub", "--precision", "fp16"], "--precision has no effect on --to hub"),
        (
            ["--to", "onnx", "--device", "cuda"],
            "--device has no effect on --to onnx: it is an option of torch and aoti",
        ),
        (["--to", "onnx", "--license", "mit"], "--license has no effect on --to onnx"),
        (["--to", "torch", "--out", "G.onnx"], "a file of --to torch is named *.pt2"),
        (["--to", "torch", "--device", "cuda:77"], "finds"),
        (["--to", "web", "--ort-web", "none"], "there is no ort.wasm.min.mjs"),
    ],
)
def test_wrong_options_get_one_message(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = snapshot(tmp_path / "G.safetensors", "progan", resolution=4)
    code, said, errors = command(capsys, monkeypatch, "export", path, *options)
    assert (code, said) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["G.safetensors"]


def test_what_a_generator_does_not_have_is_refused(tmp_path):
    r3gan = snapshot(tmp_path / "r.safetensors", "r3gan", resolution=4)
    with pytest.raises(UsageError, match="no ws"):
        list(export(r3gan, "torch", inputs="w"))
    points = snapshot(tmp_path / "p.safetensors", "mlp", resolution=4, channels=2)
    with pytest.raises(UsageError, match="no layers for it"):
        list(export(points, "torch", precision="fp16"))
    with pytest.raises(UsageError, match="points, not pictures"):
        list(export(points, "web"))
    with pytest.raises(UsageError, match="have a public form"):
        list(export(snapshot(tmp_path / "g.safetensors", "progan", resolution=4), "public"))
    with pytest.raises(UsageError, match="within a fade"):
        list(export(snapshot(tmp_path / "f.safetensors", resolution=8, fade=True), "public"))
    with pytest.raises(UsageError, match="only square networks"):
        list(export(snapshot(tmp_path / "w.safetensors", resolution=8, base=[3, 5]), "public"))
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".safetensors"]


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = snapshot(tmp_path / "G.safetensors", "progan", resolution=4)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        UsageError, match=re.escape("needs onnxscript, which is not installed: pip install 'stylegan-pg[export]'")
    ):
        list(export(path, "onnx"))


def test_a_diverged_generator_is_not_exported(tmp_path):
    path = snapshot(tmp_path / "G.safetensors", "stylegan2", resolution=8)
    G = load_snapshot(path)
    for t in G.state_dict().values():
        t *= 1e30
    from stylegan_pg.checkpoint.snapshot import save_snapshot

    save_snapshot(path, G, G.description)
    with pytest.raises(RunError, match="not finite"):
        list(export(path, "torch"))
    assert [p.name for p in tmp_path.iterdir()] == ["G.safetensors"]


def test_outputs_appear_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a[1]"
    killed, busy = tmp_path / ".a[1].00000000.export", tmp_path / ".a[1].11111111.export"
    for folder in (killed, busy):
        folder.mkdir()
        (folder / ".lock").touch()
    with open(busy / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with outputs.making(out) as inside:
            inside.mkdir()
            (inside / "x").write_text("x")
            assert not out.exists()
    assert (out / "x").read_text() == "x"
    assert not killed.exists()
    assert busy.exists()
    with pytest.raises(UsageError, match="a folder with content"), outputs.making(out):
        pass
    file = tmp_path / "b"

    def write_half() -> None:
        with outputs.making(file) as inside:
            inside.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert not file.exists()
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------------------- public and hub


@pytest.mark.parametrize(
    "given", [{}, {"classes": 3, "g_architecture": "resnet"}, {"name": "stylegan3"}, {"name": "r3gan"}]
)
def test_public_tensors_load_into_the_same_generator(given, tmp_path):
    path = snapshot(tmp_path / "G.safetensors", resolution=8, **given)
    lines = list(export(path, "public"))
    assert len([line for line in lines if "images are equal" in line]) == 2
    from safetensors import safe_open

    plain = torch.load(tmp_path / "G-public.pt", weights_only=True)
    with safe_open(tmp_path / "G-public.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = file.metadata()
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(t, plain[name]) for name, t in tensors.items())
    G = load_snapshot(path)
    back, ours = from_public(tensors), G.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(t, back[name]) for name, t in ours.items())
    if not given.get("name"):
        assert "synthesis.b4.const" in tensors
        assert tensors["synthesis.b8.conv0.noise_strength"].shape == ()
        arguments = json.loads(metadata["init_kwargs"])
        assert (arguments["img_resolution"], arguments["c_dim"]) == (8, G.c_dim)
        assert arguments["synthesis_kwargs"]["channel_max"] == 8


def test_public_with_a_name_writes_that_file(tmp_path):
    path = snapshot(tmp_path / "G.safetensors", resolution=4)
    list(export(path, "public", tmp_path / "new" / "one.pt"))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["one.pt"]
    assert "mapping.w_avg" in torch.load(tmp_path / "new" / "one.pt", weights_only=True)


def test_a_hub_folder_is_complete(tmp_path):
    run = tmp_path / "run"
    (run / "snapshots").mkdir(parents=True)
    path = snapshot(run / "snapshots" / "000005kimg.safetensors", resolution=8, classes=4, channels=4)
    rows = [
        {"nimg": 4000, "resolution": 8, "images": 10, "seconds": 1, "fid50k_full": 99.0},
        {"nimg": 5000, "resolution": 8, "images": 10, "seconds": 1, "fid50k_full": 12.5, "swd": 3.25},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = list(export(path, "hub", tmp_path / "hub", title="Owls | [x](y)", licence="cc-by-4.0"))
    assert "README.md" in lines[0]
    folder = tmp_path / "hub"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert (folder / "model.safetensors").read_bytes() == path.read_bytes()
    text = (folder / "README.md").read_text("utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc-by-4.0"
    (result,) = front["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"fid50k_full": 12.5, "swd": 3.25}
    assert "# Owls \\| \\[x\\](y)" in text
    assert "## Intended use" in text
    assert "5.0 thousand" in text
    assert "\\<owl\\>" in text
    assert "99" not in text
    assert json.loads((folder / "config.json").read_text())["network"] == "stylegan2"
    with Image.open(folder / "samples.png") as picture:
        assert picture.height == 4 * 8 * 2  # a row for each class, enlarged for its name
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    here: dict[str, Any] = {}
    exec(code[1].replace("model.safetensors", str(folder / "model.safetensors")), here)
    assert here["images"].shape == (4, 4, 8, 8)


def test_a_hub_folder_without_metrics_or_classes(tmp_path):
    path = snapshot(tmp_path / "G.safetensors", "r3gan", resolution=8, vectors=True)
    list(export(path, "hub"))
    text = (tmp_path / "G-hub" / "README.md").read_text("utf-8")
    assert "None are recorded for this snapshot." in text
    assert "vectors of 3 numbers (pose)" in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"
    code, here = re.search(r"```python\n(.*?)```", text, re.DOTALL), {}
    assert code
    exec(code[1].replace("model.safetensors", str(tmp_path / "G-hub" / "model.safetensors")), here)
    images: Any = here["images"]
    assert to_uint8(images).shape == (4, 3, 8, 8)
    with pytest.raises(UsageError, match="a folder with content"):
        list(export(path, "hub"))


def test_help_answers_and_a_folder_of_a_run_is_understood(tmp_path, capsys, monkeypatch):
    (tmp_path / "run" / "snapshots").mkdir(parents=True)
    snapshot(tmp_path / "run" / "snapshots" / "000005kimg.safetensors", "r3gan", resolution=4)
    given = ["export", tmp_path / "run", "--to", "public", "--out", tmp_path / "x.pt"]
    assert command(capsys, monkeypatch, *given)[0] == 0
    assert (tmp_path / "x.pt").is_file()
    assert command(capsys, monkeypatch, "export", "--help")[0] == 0
    assert command(capsys, monkeypatch, "export", tmp_path / "none", "--to", "torch")[0] == 2
