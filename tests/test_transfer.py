"""Starting from the weights of another run."""

import harness
import pytest
import torch
from nets import CLASSES, close, generator, labels, normal

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config import ProGANConfig, StyleGAN2Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NETWORKS
from stylegan_pg.training.transfer import adopt, read

SHORT = {"output__grid_kimg": 0, "output__snapshot_kimg": 1, "train__total_kimg": 0.032, "growth__start": "null"}


@pytest.fixture(scope="module")
def source(tiny_data, tmp_path_factory):
    """Return the checkpoint and the snapshot of a short run at 16x16."""
    run = tmp_path_factory.mktemp("source") / "run"
    harness.finish(harness.start(harness.arguments(run, tiny_data, **SHORT)))
    return checkpoint.found(run / "checkpoints")[0], next((run / "snapshots").glob("*.safetensors"))


def started(tmp_path, data, init, **changes):
    """Return the state of a run after one batch with a tiny learning rate, and its output."""
    still = {"optim__g_lr": 1e-30, "optim__d_lr": 1e-30, "ema__kimg": 1e9, "model__w_avg_beta": 1, "init": init}
    args = harness.arguments(tmp_path / "new", data, **(SHORT | still | {"train__total_kimg": 0.008} | changes))
    told = harness.finish(harness.start(args))
    return harness.newest(tmp_path / "new")[0], told


def test_from_a_checkpoint(source, tiny_data, tmp_path):
    tensors, told = started(tmp_path, tiny_data, source[0])
    old, _ = checkpoint.read(source[0])
    players = [k for k in old if k.split("/")[0] in ("G", "D", "G_ema")]
    assert len(players) > 20
    for name in players:
        assert torch.equal(tensors[name], old[name]), name
    assert f"started from {source[0]}; new: nothing" in told


def test_d_is_new_when_starting_from_a_snapshot(source, tiny_data, tmp_path):
    tensors, told = started(tmp_path, tiny_data, source[1])
    G = load_snapshot(source[1]).state_dict()
    for name, t in G.items():
        assert torch.equal(tensors[f"G/{name}"], t)
        assert torch.equal(tensors[f"G_ema/{name}"], t)
    line = next(text for text in told.splitlines() if "started from" in text)
    assert "D/b16.fromrgb.weight" in line
    assert "G/" not in line


def test_to_a_growing_run_of_a_lower_resolution(source, tiny_data, tmp_path):
    tensors, told = started(tmp_path, tiny_data, source[0], growth__start=8, train__total_kimg=0.016)
    old, _ = checkpoint.read(source[0])
    assert {k for k in tensors if k.startswith("G/")} < {k for k in old if k.startswith("G/")}
    assert all(torch.equal(t, old[k]) for k, t in tensors.items() if k.startswith("G/"))
    assert "new: D/b8.fromrgb" in told
    assert "not used of it: b16; what grows later is drawn anew" in told


def test_a_conditional_run_starts_like_the_unconditional_generator(source, tiny_data, tmp_path):
    _, told = started(tmp_path, tiny_data, source[0], data__conditional="true", output__snapshot_kimg=1)
    line = next(text for text in told.splitlines() if "started from" in text)
    assert "G/mapping.embed.weight" in line
    assert "D/b4.out.weight" in line
    assert "mapping.fc0" not in line.replace("D/mapping.fc0", "")
    G = load_snapshot(next((tmp_path / "new" / "snapshots").glob("*.safetensors")))
    old = load_snapshot(source[1])
    z, c = torch.randn(4, G.z_dim, generator=torch.Generator().manual_seed(0)), torch.eye(G.c_dim)[[0, 1, 0, 1]]
    torch.testing.assert_close(G(z, c), old(z), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["skip", "stylegan", "progan"])
@torch.no_grad()
def test_generators_that_become_conditional_give_the_same_images(kind):
    old, new = generator(16, kind=kind), generator(16, 1, kind=kind, c_dim=CLASSES)
    assert {name.split(".")[1] for name in adopt(new, old.state_dict())} <= {"embed"}
    z = normal(6, old.z_dim)
    sphere = z * (z.shape[1] / z.square().sum(dim=1, keepdim=True)).sqrt()  # on this sphere, ProGAN's norms are equal
    close(new(sphere, labels(6)), old(sphere), 1e-6)
    assert float((new(z, labels(6)) - old(z)).std()) < 0.1 * float(old(z).std())


@torch.no_grad()
def test_perceptrons_that_become_conditional_give_the_same_outputs():
    pair, size = NETWORKS["mlp"], {"resolution": 4, "img_size": (2, 3), "width": 8}
    z, x = torch.randn(5, 6), torch.randn(5, 2, 2, 3)
    c = torch.eye(3)[[0, 1, 2, 0, 1]]
    for build, given, more in ((pair.G, z, {"z_dim": 6}), (pair.D, x, {})):
        old, new = build(**size, **more), build(**size, **more, c_dim=3)
        assert adopt(new, old.state_dict()) == []
        torch.testing.assert_close(new(given, c), old(given))


def test_other_layers_of_different_shapes_are_new():
    """With more classes, a longer latent or another base, layers that would be filled up with zeros are initialised
    randomly and named."""
    shape = {"resolution": 8, "channel_base": 64, "channel_max": 8}
    pair = NETWORKS["stylegan2"]
    G = {"z_dim": 4, "w_dim": 4, "mapping_layers": 2, **shape}
    for old, new, name in (
        (pair.G(**G, c_dim=3), pair.G(**G, c_dim=5), "mapping.embed.weight"),
        (pair.G(**G), pair.G(**(G | {"z_dim": 8})), "mapping.fc0.weight"),
        (pair.D(**shape), pair.D(**shape, base=(4, 6)), "b4.fc.weight"),
    ):
        before = new.state_dict()[name].clone()
        assert name in adopt(new, old.state_dict())
        assert torch.equal(new.state_dict()[name], before)


def test_frozen_layers_need_weights(source, tiny_data, tmp_path):
    how = SHORT | {"train__freeze_d": 1, "init": source[1]}
    told = harness.finish(harness.start(harness.arguments(tmp_path / "run", tiny_data, **how)), expected=2)
    assert "does not hold D/b16.fromrgb.weight" in told
    assert "Traceback" not in told
    tensors, _ = started(tmp_path, tiny_data, source[0], train__freeze_d=1, optim__d_lr=0.01)
    old, _ = checkpoint.read(source[0])
    kept = {k for k in old if k.startswith("D/") and torch.equal(tensors[k], old[k])}
    assert kept == {k for k in old if k.startswith("D/b16.")}


@pytest.mark.parametrize(("resolution", "count"), [(8, 1), (32, 2)])
def test_frozen_layers_of_another_resolution(source, tiny_data, tmp_path, resolution, count):
    """Layers that the other run did not have are trained, also when the run is continued, although the file is not read
    then."""
    init = tmp_path / "init.safetensors"
    init.write_bytes(source[0].read_bytes())
    old, _ = checkpoint.read(init)
    how = SHORT | {"resolution": resolution, "growth__start": resolution, "train__freeze_d": count, "init": init}
    for kimg in (0.008, 0.016):
        args = harness.arguments(tmp_path / "run", tiny_data, **(how | {"train__total_kimg": kimg}))
        harness.finish(harness.start(args))
        init.unlink(missing_ok=True)
        tensors, state = harness.newest(tmp_path / "run")
        assert state["nimg"] == 1000 * kimg
        kept = {k for k in old.keys() & tensors.keys() if k.startswith("D/") and torch.equal(tensors[k], old[k])}
        block = min(resolution, 16)
        assert kept == {k for k in old.keys() & tensors.keys() if k.startswith(f"D/b{block}.")}
        assert f"D/b{block}.conv0.weight" in kept
        assert not any(f"b{block}.conv0" in k for k in tensors if k.startswith("opt_D/"))
        assert any(f"b{resolution}.fromrgb" in k for k in tensors if k.startswith("opt_D/"))


@pytest.mark.parametrize("given", ["train.freeze_d=1", "train.freeze_d=1 init=x growth.start=8"])
def test_freezing_without_init_is_rejected(given):
    with pytest.raises(UsageError, match=r"train\.freeze_d=1 is not possible"):
        load_config(None, ["run=r", "data.url=d", "train.total_kimg=1", *given.split()])


def test_init_is_used_only_at_the_start(source, tiny_data, tmp_path):
    """A run with its own checkpoint continues from it and does not need the file."""
    gone = tmp_path / "gone.safetensors"
    gone.write_bytes(source[1].read_bytes())
    run = tmp_path / "run"
    harness.finish(harness.start(harness.arguments(run, tiny_data, **SHORT, init=gone)))
    gone.unlink()
    longer = SHORT | {"train__total_kimg": 0.064}
    assert "continuing from" in harness.finish(harness.start(harness.arguments(run, tiny_data, **longer, init=gone)))


def test_errors(source, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read(str(tmp_path / "nothing"), StyleGAN2Config())
    with pytest.raises(UsageError, match=r"is a folder; give a snapshot, .* or a checkpoint"):
        read(str(tmp_path), StyleGAN2Config())
    with pytest.raises(UsageError, match=r"holds stylegan2 networks, model.name is progan"):
        read(str(source[1]), ProGANConfig())
    broken = tmp_path / "broken.safetensors"
    data = bytearray(source[0].read_bytes())
    data[-100] ^= 1
    broken.write_bytes(data)
    with pytest.raises(UsageError, match="checksum"):
        read(str(broken), StyleGAN2Config())
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(UsageError, match=r"init=.*text.safetensors"):
        read(str(text), StyleGAN2Config())
