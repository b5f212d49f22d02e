"""Public checkpoints become snapshots with the same tensors and images, whatever protocol and layout they have."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import public_layout as layout
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from snapshots import built, command

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.errors import UsageError
from stylegan_pg.interchange import importing
from stylegan_pg.interchange.command import import_file
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.networks.public_names import to_public

GENERAL = {"z_dim": 8, "w_dim": 8, "img_resolution": 16, "img_channels": 3}
R3 = {"channels_at": {4: 16, 8: 16, 16: 8}, "group_width": 8}
STYLEGAN3 = {"channel_base": 64, "channel_max": 8, "conv_kernel": 3, "use_radial_filters": False}


def nested(c_dim=0, **synthesis):
    """Arguments as in StyleGAN2-ADA."""
    inner = layout.EasyDict(channel_base=64, channel_max=8, **synthesis)
    return {**GENERAL, "c_dim": c_dim, "mapping_kwargs": layout.EasyDict(num_layers=2), "synthesis_kwargs": inner}


def flat(c_dim=0, **synthesis):
    """Arguments as in StyleGAN3's repository."""
    general = {**GENERAL, "c_dim": c_dim, "mapping_kwargs": layout.EasyDict(num_layers=2)}
    return {**general, "channel_base": 64, "channel_max": 8, **synthesis}


def of_r3gan(stages=()):
    own = {"NoiseDimension": 8, "WidthPerStage": [16, 16, 8], "CardinalityPerStage": [4, 4, 2], "ExpansionFactor": 2}
    return {"c_dim": 0, "img_resolution": 16, "BlocksPerStage": [2, 2, 2], "FP16Stages": list(stages), **own}


# name: (how our generator is built, arguments in the file, what the snapshot's arguments must have, protocol)
CASES = {
    "ada": ({}, nested(), {"conv_clamp": None, "low_precision": "fp32"}, 3),
    "ada-protocol-2": ({}, nested(), {"conv_clamp": None}, 2),
    "ada-fp16": (
        {},
        nested(num_fp16_res=1, conv_clamp=256),
        {"conv_clamp": 256, "low_precision": "fp16", "low_precision_at": [16]},
        4,
    ),
    "ada-classes": ({"c_dim": 3}, nested(3), {"c_dim": 3, "z_dim": 8}, 5),
    "ada-resnet": ({"g_architecture": "resnet"}, nested(architecture="resnet"), {"architecture": "resnet"}, 4),
    "ada-orig": ({"g_architecture": "orig"}, nested(architecture="orig"), {"architecture": "orig"}, 4),
    "no-noise": ({"noise": False}, nested(use_noise=False), {"use_noise": False}, 4),
    "filter": ({"resample_filter": [1.0, 2.0, 1.0]}, nested(resample_filter=[1, 2, 1]), {}, 4),
    "later": ({}, flat(), {"conv_clamp": 256, "low_precision_at": [16, 8]}, 4),
    "later-fp32": ({}, flat(num_fp16_res=0, conv_clamp=None), {"conv_clamp": None, "low_precision": "fp32"}, 5),
    "stylegan3-t": (
        {"name": "stylegan3"},
        flat(num_fp16_res=0, conv_clamp=256),
        {"kernel": 3, "radial": False, "conv_clamp": 256},
        4,
    ),
    "stylegan3-defaults": (
        {"name": "stylegan3"},
        {**GENERAL, "c_dim": 0},
        {"conv_clamp": 256, "low_precision": "fp16", "low_precision_at": [16]},
        4,
    ),
    "stylegan3-r": (
        {"name": "stylegan3", "equivariance": "rotation", "c_dim": 3},
        flat(3, conv_kernel=1, use_radial_filters=True),
        {"kernel": 1, "radial": True, "low_precision": "fp16", "low_precision_at": [16]},
        2,
    ),
    "r3gan": ({"name": "r3gan", **R3}, of_r3gan(), {"widths": [16, 16, 8], "low_precision": "fp32"}, 4),
    "r3gan-bf16": (
        {"name": "r3gan", **R3},
        of_r3gan([1, 2]),
        {"low_precision": "bf16", "low_precision_at": [16, 8]},
        3,
    ),
}


def content(how, kwargs, **more):
    G, _ = built(16, **how)
    made = layout.module(to_public(G), kwargs, "Generator", inner=how.get("name") == "r3gan", **more)
    given = {"path": "/data/faces", "use_labels": bool(kwargs.get("c_dim")), "resolution": 16}
    return G, {"G": made, "D": None, "G_ema": made, "augment_pipe": None, "training_set_kwargs": layout.EasyDict(given)}


@pytest.mark.parametrize("case", CASES)
def test_a_pickle_gives_the_same_generator(case, tmp_path):
    how, kwargs, expected, protocol = CASES[case]
    G, whole = content(how, kwargs)
    path = layout.write(tmp_path / "network-snapshot.pkl", whole, protocol)
    lines = list(import_file(path, None))
    loaded = load_snapshot(tmp_path / "network-snapshot.safetensors")
    ours, theirs = loaded.state_dict(), G.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = loaded.description["kwargs"]
    assert expected.items() <= found.items(), found
    imported = loaded.description["imported"]
    assert imported["file"] == "network-snapshot.pkl"
    assert len(imported["sha256"]) == 64
    assert "licence" in imported["licence"]
    assert imported["training_set_kwargs"]["path"] == "/data/faces"
    assert imported["kwargs"] == json.loads(json.dumps(kwargs))
    assert any(line.startswith("G_ema: Generator, ") for line in lines)
    assert any("path=/data/faces" in line for line in lines)
    if found["low_precision"] == "fp32":
        z, c = torch.randn(2, 8), torch.eye(3)[:2] if loaded.c_dim else None
        reference, _ = built(16, **how, conv_clamp=256.0 if found["conv_clamp"] else None)
        assert torch.equal(loaded(z, c), reference(z, c))


PARITY = ["stylegan2_cond_64", "stylegan2_orig_orig_16", "stylegan2_resnet_skip_32", "stylegan2_skip_resnet_32"]
PARITY += ["stylegan3_t_32", "stylegan3_r_32", "r3gan_uncond_16", "r3gan_cond_8"]


@pytest.mark.parametrize("name", PARITY)
@torch.no_grad()
def test_images_of_reference_networks(name, parity_dir, tmp_path):
    folder = parity_dir.parent / "parity-systems" if name.startswith("r3gan") else parity_dir
    if not (folder / f"{name}.safetensors").is_file():
        pytest.skip(f"no reference numbers: {name} is not beside this checkout")
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        t = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    kwargs = {"num_fp16_res": 0, "conv_clamp": meta.get("conv_clamp", 256), "channel_base": meta.get("channel_base", 1)}
    parts = {}
    for part in ("G", "D"):
        state = {key.removeprefix(f"{part}."): v for key, v in t.items() if key.startswith(f"{part}.")}
        if state:
            given = {} if name.startswith("r3gan") else kwargs
            parts[part] = layout.module(state, given, part, inner=name.startswith("r3gan"))
    path = layout.write(tmp_path / "reference.pkl", {**parts, "G_ema": parts["G"]}, 4)
    list(import_file(path, tmp_path / "out.safetensors"))
    G = load_snapshot(tmp_path / "out.safetensors")
    image, expected = G(t["in.z"], t.get("in.c")), t.get("out.image_const_noise", t.get("out.image"))
    assert expected is not None
    assert float((image - expected).abs().max() / expected.abs().max()) <= 1e-5
    if "D" not in parts:
        return
    weights, family, _ = importing.weights(importing.read(path))
    if family == "stylegan2":
        how = {
            key: meta[key]
            for key in ("resolution", "c_dim", "channel_base", "channel_max", "conv_clamp", "mbstd_group")
        }
        D = NETWORKS[family].D(architecture=meta["d_architecture"], **how)
        D.load_state_dict(weights["D"])
        score = D(expected, t.get("in.c"))
        assert float((score - t["out.fake_logits"]).abs().max()) <= 1e-5 * float(t["out.fake_logits"].abs().max())


def test_attributes_tell_more_than_defaults(tmp_path):
    """The public classes keep what they do beside their tensors; arguments that were not given have other defaults in
    each version."""
    general = {**GENERAL, "c_dim": 0}
    facts = {"synthesis.b16": {"use_fp16": True}, "synthesis.b8": {"use_fp16": False}}
    facts |= {f"synthesis.b{r}.conv1": {"conv_clamp": 128, "activation": "lrelu"} for r in (4, 8, 16)}
    facts |= {"synthesis.b8.conv1.affine": {"activation": "linear"}, "mapping.fc0": {"bias_gain": 0.01}}
    _, whole = content({}, general, attributes=facts)
    G, about = importing.read(layout.write(tmp_path / "a.pkl", whole, 4)).generator("G")
    assert about["kwargs"]["conv_clamp"] == 128
    assert about["kwargs"]["low_precision_at"] == [16]
    assert G.synthesis.b16.conv1.weight.shape == (4, 4, 3, 3)


def test_attributes_of_r3gan(tmp_path):
    """Its stages compute in the type that they keep, whatever the arguments were called."""
    facts = {"Model.MainLayers.1": {"DataType": torch.bfloat16}, "Model.MainLayers.0": {"DataType": torch.float32}}
    _, whole = content({"name": "r3gan", **R3}, {"c_dim": 0, "img_resolution": 16}, attributes=facts)
    _, about = importing.read(layout.write(tmp_path / "a.pkl", whole, 4)).generator("G")
    assert about["kwargs"]["low_precision_at"] == [8]


@pytest.mark.parametrize(
    ("how", "kwargs", "facts", "message"),
    [
        ({}, nested(activation="relu"), {}, "activation='relu'"),
        ({}, nested(), {"synthesis.b8.conv0": {"activation": "relu"}}, "activation 'relu'"),
        ({}, nested() | {"mapping_kwargs": {"lr_multiplier": 1}}, {}, "lr_multiplier=1"),
        ({}, nested(), {"mapping.fc0": {"bias_gain": 0.5}}, "learns at 0.5"),
        ({}, nested() | {"img_resolution": 32}, {}, "img_resolution is 32, its tensors have 16"),
        ({}, nested() | {"c_dim": 7}, {}, "c_dim is 7, its tensors have 0"),
        ({}, nested(conv_clamp="much"), {}, "conv_clamp is 'much'"),
        ({"name": "stylegan3"}, flat(margin_size=4), {}, "margin_size=4"),
        ({"name": "stylegan3"}, flat(), {"synthesis": {"output_scale": 1.0}}, "output_scale=1.0"),
    ],
)
def test_what_would_give_other_images_is_refused(how, kwargs, facts, message, tmp_path):
    _, whole = content(how, kwargs, attributes=facts)
    with pytest.raises(UsageError, match=message) as error:
        importing.read(layout.write(tmp_path / "a.pkl", whole, 4)).generator("G")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["synthesis.b8.conv1.resample_filter", "synthesis.L3_36_8.up_filter"])
def test_other_filters_are_refused(name, tmp_path):
    G, _ = built(16, name="stylegan3" if ".L" in name else "stylegan2")
    state = to_public(G)
    key = name if name in state else next(key for key in state if key.endswith("up_filter"))
    state[key] = state[key] + 0.01
    whole = {"G_ema": layout.module(state, {}, "Generator")}
    with pytest.raises(UsageError, match="other filters"):
        importing.read(layout.write(tmp_path / "a.pkl", whole, 4)).generator("G_ema")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("synthesis.b8.conv1.bias"), "lacks synthesis.b8.conv1.bias|lacks"),
        (lambda s: s.update({"synthesis.b8.extra.weight": torch.zeros(2)}), "has synthesis.b8.extra.weight"),
        (lambda s: s.update({"mapping.fc1.weight": torch.zeros(8, 9)}), "mapping.fc1.weight of shape"),
        (lambda s: s.update({"mapping.fc1.weight": torch.full((8, 8), float("nan"))}), "not finite"),
        (lambda s: s.update({"synthesis.b8.conv1.bias": torch.zeros(5)}), "channels do not follow"),
        (lambda s: s.update({"mapping.w_avg": torch.zeros([])}), "impossible shapes"),
        (lambda s: s.update({"mapping.fc0.weight": torch.zeros(8)}), "impossible shapes"),
        (lambda s: s.pop("synthesis.b4.const"), "none of StyleGAN2, StyleGAN3 and R3GAN"),
    ],
)
def test_networks_that_do_not_fit_are_refused(change, message, tmp_path):
    state = to_public(built(16)[0])
    change(state)
    path = layout.write(tmp_path / "a.pkl", {"G_ema": layout.module(state, nested(), "Generator")}, 4)
    with pytest.raises(UsageError, match=message):
        importing.read(path).generator("G_ema")


def test_files_of_torch_save_and_safetensors(tmp_path):
    G, _ = built(16, c_dim=3)
    public = to_public(G)
    prefixed = {f"G_ema.{name}": t for name, t in public.items()} | {"D.b4.out.weight": torch.zeros(1, 8)}
    files = []
    for zipped in (True, False):
        for i, whole in enumerate([public, {"G_ema": public, "kwargs": {"conv_clamp": 64}}, prefixed]):
            files.append(tmp_path / f"{zipped}{i}.pt")
            torch.save(whole, files[-1], _use_new_zipfile_serialization=zipped)
    files.append(tmp_path / "public.safetensors")
    save_file({name: t.clone() for name, t in public.items()}, files[-1], {"conv_clamp": "256", "by": "somebody"})
    files.append(tmp_path / "prefixed.safetensors")
    save_file({name: t.clone() for name, t in prefixed.items()}, files[-1])
    clamps = []
    for path in files:
        loaded, about = importing.read(path).generator("G_ema")
        assert all(torch.equal(t, G.state_dict()[name]) for name, t in loaded.state_dict().items())
        clamps.append(about["kwargs"]["conv_clamp"])
        assert about["kwargs"]["low_precision"] == "fp32"
    assert clamps == [None, None, None] * 2 + [256, None]
    list(import_file(files[-2], None))
    assert (tmp_path / "public-snapshot.safetensors").exists()


@pytest.mark.parametrize("how", [{"c_dim": 3}, {"name": "stylegan3"}, {"name": "r3gan", **R3}])
def test_safetensors_that_also_describe_a_snapshot(how, tmp_path):
    """An export of this package has public names, and the description of its snapshot in the metadata."""
    how = how | {"conv_clamp": 32.0}
    G, about = built(16, **how)
    tensors = {name: t.clone() for name, t in to_public(G).items()}
    path = tmp_path / "exported.safetensors"
    told = {"stylegan_pg": json.dumps(about)}
    if not how.get("name"):
        told["init_kwargs"] = json.dumps({"z_dim": 8, "synthesis_kwargs": {"conv_clamp": 32.0, "num_fp16_res": 0}})
    save_file(tensors, path, told)
    list(import_file(path, None))
    loaded = load_snapshot(tmp_path / "exported-snapshot.safetensors")
    assert all(torch.equal(t, G.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert loaded.description["label_names"] == about["label_names"]
    assert loaded.description["kwargs"]["conv_clamp"] == 32


@pytest.mark.parametrize(
    "names",
    [
        ["Model.MainLayers.99999999999.Layers.0.LinearLayer1.Layer.weight"],
        [f"synthesis.b{i}.conv1.bias" for i in range(4, 3000)] + ["synthesis.b4.const", "mapping.w_avg"],
        [f"synthesis.L{i}_36_8.weight" for i in range(999)] + ["synthesis.input.freqs", "mapping.w_avg"],
        ["synthesis.b4.const", "mapping.w_avg", "synthesis.b99999.conv1.bias", "synthesis.b4.conv1.bias"],
        ["Model.MainLayers.x.Layers"],
        ["x" * 1000],
    ],
)
def test_names_beyond_all_bounds(names, tmp_path):
    path = tmp_path / "net.pt"
    torch.save({name: torch.zeros(8) for name in names}, path)
    with pytest.raises(UsageError) as error:
        importing.read(path).generator("G_ema")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_strides_shared_storages_and_half_precision(tmp_path):
    state = to_public(built(16)[0])
    weight = "synthesis.b8.conv1.weight"
    expected = {name: t.clone() for name, t in state.items()}
    state[weight] = state[weight].contiguous(memory_format=torch.channels_last)
    padded = torch.randn(10, 10)
    padded[1:9, 2:10] = state["mapping.fc0.weight"]
    state["mapping.fc0.weight"] = padded[1:9, 2:10]  # not from the beginning of its storage, and with gaps
    state["mapping.fc1.bias"] = state["mapping.fc0.bias"]
    expected["mapping.fc1.bias"] = expected["mapping.fc0.bias"]
    half = "synthesis.b16.conv1.weight"
    state[half] = state[half].half()
    expected[half] = expected[half].half().float()
    fc = state["mapping.fc0.bias"]
    state["synthesis.b8.conv1.noise_strength"] = torch.as_strided(torch.tensor([0.5]), [], [])
    expected["synthesis.b8.conv1.noise_strength"] = torch.tensor(0.5)
    state["synthesis.b4.conv1.affine.bias"] = torch.as_strided(fc, [8, 1], [1, 9])  # any stride fits a size of 1
    expected["synthesis.b4.conv1.affine.bias"] = fc.clone()[:, None]
    double = "synthesis.b16.conv0.weight"
    state[double] = state[double].double()
    for protocol in (2, 5):
        path = layout.write(tmp_path / "a.pkl", {"G_ema": layout.module(state, nested(), "Generator")}, protocol)
        found = importing.read(path).state("G_ema")
        for name, t in expected.items():
            assert torch.equal(found[name], t), name
            assert found[name].dtype == torch.float32
            assert found[name].stride() == torch.empty(t.shape).stride()


def test_the_command(tmp_path, capsys, monkeypatch):
    G, whole = content({"c_dim": 3}, nested(3))
    other = built(16, c_dim=3)[0]
    with torch.no_grad():
        other.synthesis.b4.learned_input += 1
    whole |= {"G": layout.module(to_public(other), nested(3), "Generator"), "augment_pipe": layout.augment_pipe(0.375)}
    path = layout.write(tmp_path / "net.pkl", whole, 4)
    code, output, _ = command(capsys, monkeypatch, "import", path)
    assert code == 0
    assert "augmentation probability: 0.375" in output
    assert f"snapshot of G_ema: {tmp_path / 'net.safetensors'}" in output
    assert command(capsys, monkeypatch, "import", path)[0] == 0  # the same again
    (tmp_path / "mine").mkdir()
    assert command(capsys, monkeypatch, "import", path, "--out", tmp_path / "mine", "--part", "G")[0] == 0
    loaded = load_snapshot(tmp_path / "mine" / "net-G.safetensors")
    assert torch.equal(loaded.state_dict()["synthesis.b4.learned_input"], other.synthesis.b4.learned_input)
    assert not torch.equal(other.synthesis.b4.learned_input, G.synthesis.b4.learned_input)
    taken = tmp_path / "taken.safetensors"
    taken.write_text("something else")
    for more, message in (
        (("--out", taken), "exists already"),
        (("--out", tmp_path / "nowhere" / "x.safetensors"), "there is no folder"),
        (("--out", tmp_path / "x.pkl"), r"must end in .safetensors"),
        (("--part", "D"), "is no generator"),
    ):
        code, _, errors = command(capsys, monkeypatch, "import", path, *more)
        assert code == 2
        assert message in errors
        assert "Traceback" not in errors
    assert taken.read_text() == "something else"
    assert command(capsys, monkeypatch, "sample", tmp_path / "net.safetensors", "--seeds", "1", "--labels", "2")[0] == 0


@pytest.mark.parametrize(
    ("pipe", "expected"),
    [
        *[(layout.augment_pipe(0.375), 0.375), ({"p": 0.5}, 0.5), ({"p": torch.tensor([0.25])}, 0.25)],
        *[(layout.augment_pipe(7.0), None), ({"p": "much"}, None), ({"p": torch.zeros(3)}, None), ({}, None)],
    ],
)
def test_the_probability_of_augmentation(pipe, expected, tmp_path):
    whole = content({}, nested())[1] | {"augment_pipe": pipe, "cur_nimg": 25_000_000}
    found = importing.read(layout.write(tmp_path / "a.pkl", whole, 4)).found
    assert found.augment_p == expected
    assert found.nimg == 25_000_000


def test_the_documented_command(tmp_path, capsys, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "import.md").read_text("utf-8")
    (line,) = re.findall("^stylegan-pg import (.*)$", page, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    layout.write(tmp_path / "network-snapshot.pkl", content({}, nested())[1], 4)
    code, output, errors = command(capsys, monkeypatch, "import", *line.split())
    assert (code, errors) == (0, "")
    assert "snapshot of G_ema: faces.safetensors" in output
    assert load_snapshot(tmp_path / "faces.safetensors").resolution == 16


def test_files_that_are_no_models(tmp_path):
    cases = {
        "empty.pkl": (b"", "is empty"),
        "page.pkl": (b"<!DOCTYPE html><html>", "is a web page"),
        "pointer.pkl": (b"version https://git-lfs.github.com/spec/v1\n", "pointer of git-lfs"),
        "text.pkl": (b"hello", "is no model file"),
        "tensorflow.pkl": (b"\x80\x03cdnnlib.tflib.network\nNetwork\n.", "TensorFlow version"),
        "list.pkl": (pickle.dumps([1, 2]), "no table of networks"),
        "nothing.pkl": (pickle.dumps({"G": None}), "holds no networks"),
        "old.pkl": (pickle.dumps({"G": 1.5}, 0), "is no model file"),
        "number.pkl": (pickle.dumps({"G_ema": 5}), "no network"),
        "more.pkl": (pickle.dumps({"a": 5}) + b"x", "1 bytes follow"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match=message) as error:
            importing.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
        assert "\n" not in str(error.value)
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "none.pkl", "does not exist")):
        with pytest.raises(UsageError, match=message):
            importing.read(path)


@pytest.mark.parametrize("name", ["stylegan2", "stylegan", "progan", "stylegan3", "r3gan"])
def test_discriminators_under_public_names(name, tmp_path):
    """A file with both networks starts a run; families without a public form cannot be in one."""
    if name in ("stylegan", "progan"):
        with pytest.raises(UsageError, match="public form"):
            to_public(built(16, name=name)[0])
        return
    how = {"name": name, **(R3 if name == "r3gan" else {})}
    G, _ = built(16, **how)
    small: dict[str, Any] = {"z_dim": 8, "channel_base": 64, "channel_max": 8, **how}
    small |= {"w_dim": 8} if name != "r3gan" else {}
    model = MODELS[name](**{key: value for key, value in small.items() if key != "name"})
    D = NETWORKS[name].D(**NETWORKS[name].d_kwargs(model, NetworkShape(16, 16, False, 3, 0, 4)))
    inner = name == "r3gan"
    parts = {part: layout.module(to_public(net), {}, part, inner=inner) for part, net in {"G": G, "D": D}.items()}
    weights, family, _ = importing.weights(importing.read(layout.write(tmp_path / "a.pkl", parts, 4)))
    assert family == name
    assert weights["G"].keys() == weights["G_ema"].keys() == G.state_dict().keys()
    assert weights["D"].keys() == D.state_dict().keys()
    assert all(torch.equal(t, D.state_dict()[key]) for key, t in weights["D"].items())
