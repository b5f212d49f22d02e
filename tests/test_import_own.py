"""Starting a run from a public checkpoint, and snapshots of this package's own checkpoints."""

import json
from typing import Any

import harness
import public_layout as layout
import pytest
import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.errors import UsageError
from stylegan_pg.interchange.command import import_file
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.networks.public_names import to_public
from stylegan_pg.training.transfer import read

SHORT = {"output__grid_kimg": 0, "output__snapshot_kimg": 0, "train__total_kimg": 0.008, "growth__start": "null"}
STILL = {"ema__rampup": "null", "optim__g_lr": 1e-30, "optim__d_lr": 1e-30, "ema__kimg": 1e9, "model__w_avg_beta": 1}
SMALL: dict[str, Any] = {
    "z_dim": 16,
    "w_dim": 16,
    "mapping_layers": 2,
    "channel_base": 128,
    "channel_max": 8,
}  # of harness.TINY


def networks(resolution=16):
    """G, D and G_ema of the form that harness.TINY has, with random weights."""
    pair, model = NETWORKS["stylegan2"], MODELS["stylegan2"](**SMALL)
    shape = NetworkShape(resolution, resolution, False, 3, 0, 4)
    made = {"G": pair.G(**pair.g_kwargs(model, shape)), "D": pair.D(**pair.d_kwargs(model, shape))}
    made["G_ema"] = pair.G(**pair.g_kwargs(model, shape))
    with torch.no_grad():
        for net in made.values():
            for t in net.state_dict().values():
                t += 0.1 * torch.randn(t.shape)
    return made


def pickled(path, nets, p=None):
    kwargs = {"channel_base": 128, "channel_max": 8}
    whole = {part: layout.module(to_public(net), kwargs, part) for part, net in nets.items()}
    return layout.write(path, whole | {"augment_pipe": None if p is None else layout.augment_pipe(p)}, 4)


def started(tmp_path, data, init, **changes):
    args = harness.arguments(tmp_path / "run", data, **(SHORT | STILL | {"init": init} | changes))
    told = harness.finish(harness.start(args))
    return *harness.newest(tmp_path / "run"), told


def test_a_run_starts_from_a_pickle(tiny_data, tmp_path):
    nets = networks()
    path = pickled(tmp_path / "net.pkl", nets, 0.25)
    how = {"augment__mode": "ada", "augment__kimg": 1e6}
    tensors, state, told = started(tmp_path, tiny_data, path, **how)
    for part, net in nets.items():
        if part == "G_ema":  # it moves a little towards G at each step, and takes its buffers
            for name, t in net.named_parameters():
                torch.testing.assert_close(tensors[f"G_ema/{name}"], t.detach(), rtol=1e-6, atol=1e-6)
            continue
        for name, t in net.state_dict().items():
            assert torch.equal(tensors[f"{part}/{name}"], t), f"{part}/{name}"
    assert f"started from {path}; new: nothing" in told
    assert state["system"]["augment_p"] == pytest.approx(0.25, abs=1e-4)
    assert "ADA's probability of augmentation starts from 0.25" in told


@pytest.mark.parametrize("given", [{}, {"augment__mode": "ada", "augment__p": 0.125, "augment__kimg": 1e6}])
def test_the_probability_of_augmentation_is_the_configured_one(given, tiny_data, tmp_path):
    _, state, told = started(tmp_path, tiny_data, pickled(tmp_path / "net.pkl", networks(), 0.25), **given)
    expected = given.get("augment__p")
    assert state["system"]["augment_p"] == (pytest.approx(expected, abs=1e-4) if expected else None)
    assert "probability of augmentation starts" not in told


def test_our_own_checkpoints_give_it_too(tiny_data, tmp_path):
    how = {"augment__mode": "ada", "augment__p": 0.5, "augment__kimg": 1e6}
    args = harness.arguments(tmp_path / "first", tiny_data, **(SHORT | how))
    harness.finish(harness.start(args))
    path = checkpoint.found(tmp_path / "first" / "checkpoints")[0]
    _, state, told = started(tmp_path, tiny_data, path, **(how | {"augment__p": 0}))
    assert state["system"]["augment_p"] == pytest.approx(0.5, abs=1e-4)
    assert "starts from 0.5" in told


def test_generators_alone_and_other_resolutions(tiny_data, tmp_path):
    nets = networks(32)
    path = pickled(tmp_path / "net.pkl", {"G_ema": nets["G_ema"]})
    tensors, _, told = started(tmp_path, tiny_data, path)
    for name, t in nets["G_ema"].state_dict().items():
        if "b32" not in name:
            assert torch.equal(tensors[f"G/{name}"], t)
            assert torch.equal(tensors[f"G_ema/{name}"], t)
    assert "not used of it: b32" in told
    assert "D starts anew" in told


def test_what_does_not_fit_is_said(tmp_path):
    path = pickled(tmp_path / "net.pkl", networks())
    with pytest.raises(UsageError, match=r"init=.*holds stylegan2 networks, model.name is progan"):
        read(str(path), MODELS["progan"]())
    _, why, _ = read(str(path), MODELS["stylegan2"](**{**SMALL, "z_dim": 64}))
    assert why == ": its resolution is 16 and model.z_dim=16"
    only_d = pickled(tmp_path / "D.pkl", {"D": networks()["D"]})
    with pytest.raises(UsageError, match="holds no generator, only D"):
        read(str(only_d), MODELS["stylegan2"](**SMALL))
    (tmp_path / "bad.pkl").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UsageError, match=r"init=.*bad.pkl is cut off"):
        read(str(tmp_path / "bad.pkl"), MODELS["stylegan2"](**SMALL))


FAMILIES = [
    {"growth__start": 8, "growth__stable_kimg": 0.008, "train__total_kimg": 0.024},  # within a fade
    {"model__name": "progan", "loss__pl_weight": 0, "data__conditional": "true"},
    {"model__name": "stylegan3", "loss__pl_weight": 0, "loss__style_mixing": 0},
    {"model__name": "r3gan", "loss__pl_weight": 0},
]


@pytest.mark.parametrize("how", FAMILIES, ids=lambda how: how.get("model__name", "within a fade"))
def test_a_snapshot_of_a_checkpoint(how, tiny_data, tmp_path):
    """It is the one that the run itself wrote at that time, and G is there, too."""
    args = harness.arguments(tmp_path / "run", tiny_data, **(SHORT | {"output__snapshot_kimg": 0.008} | how))
    harness.finish(harness.start(args))
    path = checkpoint.found(tmp_path / "run" / "checkpoints")[0]
    list(import_file(path, tmp_path / "ema.safetensors"))
    list(import_file(path, tmp_path / "g.safetensors", "G"))
    own = max((tmp_path / "run" / "snapshots").glob("*.safetensors"))
    assert ("growth__start" in how) == (checkpoint.read(path)[1]["phase"] == 1)
    one, other, raw = (load_snapshot(p) for p in (tmp_path / "ema.safetensors", own, tmp_path / "g.safetensors"))
    for key in ("kwargs", "alpha", "nimg", "network"):
        assert one.description[key] == other.description[key], key
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in one.state_dict().items())
    tensors, _ = checkpoint.read(path)
    assert all(torch.equal(t, tensors[f"G/{name}"]) for name, t in raw.state_dict().items())


def test_own_files_that_cannot_be_imported(tiny_data, tmp_path, unconditional):
    lines = list(import_file(unconditional[1], tmp_path / "copy.safetensors"))
    assert "a snapshot already" in lines[0]
    assert load_snapshot(tmp_path / "copy.safetensors").description == load_snapshot(unconditional[1]).description
    with pytest.raises(UsageError, match="holds G_ema and no G"):
        list(import_file(unconditional[1], tmp_path / "g.safetensors", "G"))
    args = harness.arguments(tmp_path / "run", tiny_data, **SHORT)
    harness.finish(harness.start(args))
    path = checkpoint.found(tmp_path / "run" / "checkpoints")[0]
    tensors, state = checkpoint.read(path)
    for change, message in (
        ({"phase": 99}, "its phase is 99"),
        ({"config": state["config"] | {"surprise": 1}}, "surprise"),
        ({"config": json.loads(json.dumps(state["config"]).replace('"w_dim": 16', '"w_dim": 17'))}, "is expected"),
        ({"nimg": -1}, "its nimg is -1"),
    ):
        checkpoint.write(tmp_path / "changed.safetensors", tensors, state | change)
        with pytest.raises(UsageError, match=message) as error:
            list(import_file(tmp_path / "changed.safetensors", tmp_path / "x.safetensors"))
        assert "\n" not in str(error.value)
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(UsageError, match="checksum"):
        list(import_file(tmp_path / "damaged.safetensors", tmp_path / "x.safetensors"))
    assert not (tmp_path / "x.safetensors").exists()
