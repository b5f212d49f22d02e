"""Checkpoint files are complete or absent, verified, rotated, and contain no code."""

import pickle

import pytest
import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.optim import moments

TENSORS = {
    "G/weight": torch.randn(3, 4),
    "G/scalar": torch.tensor(2.5),
    "opt_G/step/weight": torch.tensor(7.0),
    "half": torch.randn(5).bfloat16(),
    "empty": torch.zeros(0),
    "strided": torch.randn(4, 6).t(),
}
STATE = {"nimg": 48, "running_means": {"pl_mean": 0.1 + 0.2}, "bad_samples": ["ä"]}


def test_round_trip_keeps_every_bit(tmp_path):
    path = checkpoint.path_for(tmp_path, 48)
    checkpoint.write(path, TENSORS, STATE)
    tensors, state = checkpoint.read(path)
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert tensors[name].dtype == t.dtype
        assert torch.equal(tensors[name], t)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_every_damaged_byte_is_detected(tmp_path):
    path = checkpoint.path_for(tmp_path, 1)
    checkpoint.write(path, TENSORS, STATE)
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        data = bytearray(good)
        data[place] ^= 4
        path.write_bytes(data)
        try:
            tensors, state = checkpoint.read(path)
        except checkpoint.BadCheckpointError:
            continue
        assert state == STATE  # the white space that pads the header has no meaning
        assert all(torch.equal(tensors[k], t) for k, t in TENSORS.items())
    for length in (0, 5, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(checkpoint.BadCheckpointError, match=path.name):
            checkpoint.read(path)


def test_bad_checkpoints_are_skipped(tmp_path):
    assert checkpoint.newest_good(tmp_path)[0] is None
    for nimg in (8, 16, 24):
        checkpoint.write(checkpoint.path_for(tmp_path, nimg), TENSORS, {"nimg": nimg})
    checkpoint.path_for(tmp_path, 24).write_bytes(b"x")
    path, _, state, problems = checkpoint.newest_good(tmp_path)
    assert path == checkpoint.path_for(tmp_path, 16)
    assert state["nimg"] == 16
    assert len(problems) == 1
    assert "24" in problems[0]
    for p in checkpoint.found(tmp_path):
        p.write_bytes(b"x")
    with pytest.raises(UsageError, match="none of the checkpoints"):
        checkpoint.newest_good(tmp_path)


def test_unreadable_checkpoint_is_not_renamed(tmp_path):
    """Faults of the file system are transient, so the newest checkpoint is not discarded."""
    checkpoint.write(checkpoint.path_for(tmp_path, 8), TENSORS, STATE)
    newer = checkpoint.path_for(tmp_path, 16)
    newer.mkdir()  # opening a folder fails even for root
    with pytest.raises(RunError, match=f"{newer} cannot be read: .*run the same command again"):
        checkpoint.newest_good(tmp_path)
    assert newer.exists()


def test_rotation(tmp_path):
    for nimg in (900, 1000, 10_000_000_000):
        checkpoint.write(checkpoint.path_for(tmp_path, nimg), TENSORS, STATE)
    leftover = tmp_path / ".000000000001.safetensors.77.tmp"
    leftover.write_bytes(b"x")
    checkpoint.rotate(tmp_path, 2)
    assert [int(p.stem) for p in checkpoint.found(tmp_path)] == [10_000_000_000, 1000]
    assert not leftover.exists()


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    path = checkpoint.path_for(tmp_path, 8)
    checkpoint.write(path, TENSORS, STATE)
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(path, TENSORS, {"nimg": 9})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_pickle_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = checkpoint.path_for(tmp_path, 8)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(checkpoint.BadCheckpointError):
        checkpoint.read(path)
    assert not (tmp_path / "sprung").exists()


def test_optimizer_state_by_name():
    def trained(net):
        optimizer = torch.optim.Adam(net.parameters(), betas=(0.0, 0.99))
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return optimizer

    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    saved = moments.optimizer_tensors(a, trained(a))
    assert set(saved) == {f"{k}/{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in ("weight", "bias")}
    fresh = torch.optim.Adam(b.parameters(), betas=(0.0, 0.99))
    moments.restore_optimizer(b, fresh, saved | {"step/gone": torch.tensor(1.0)})
    restored = moments.optimizer_tensors(b, fresh)
    assert restored.keys() == saved.keys()
    assert all(torch.equal(t, restored[k]) for k, t in saved.items())
