"""Pairs of networks without a mapping, with buffers that forward passes change, or with several scores."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from plain_pairs import PlainDiscriminator, PlainGenerator, pair_of
from torch import nn

from stylegan_pg import GAN, load_snapshot
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import deal, phases
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import images_of
from stylegan_pg.losses import OBJECTIVES, per_image
from stylegan_pg.networks.normalization import GroupedBatchNorm, group_batch_norms
from stylegan_pg.systems.base import Loss
from stylegan_pg.training.buffers import BufferMeans, changing_buffers
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

PLAIN = {
    "resolution": 8,
    "growth.start": "null",
    "train.total_kimg": 0.064,
    "model.z_dim": 8,
    "loss.pl_weight": 0,
    "train.batch": 16,
    "checkpoint__every_kimg": 0.016,
    "output__grid_kimg": 0.064,
    "checkpoint__keep": 1,
}


def program(kind: str, run: Path, data: Path, **changes: object) -> list[str]:
    args = harness.arguments(run, data, **(PLAIN | changes))
    return [str(Path(__file__).parent / "plain_pairs.py"), kind, *args[1:]]


def started(command: list[str], ranks: int = 0, **how) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": harness.environment()}
    return subprocess.Popen([sys.executable, *launcher, *command], **(pipes | how))


def engine_of(data, kind: str, *overrides: str) -> Engine:
    given = [f"data.url={data}", "run=unused", "resolution=8", "train.total_kimg=1", "train.batch=8", "model.z_dim=8"]
    config = load_config(None, [*given, "loss.pl_weight=0", "loss.r1_every=2", "train.dtype=float64", *overrides])
    state = TrainState(config, load_index(str(data)), Devices(config), GAN(config, pair_of(kind)))
    state.enter(phases(config)[0])
    return Engine(state)


def trained(engine: Engine, steps: int) -> dict[str, torch.Tensor]:
    state, p = engine.state, engine.state.current
    how = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    data = batches(state.table, state.index.order(seed=0), start=0, end=p.end, batch=p.batch, **how)
    for _, batch in zip(range(steps), data, strict=False):
        done = engine.step(batch)
        assert not done.faults
    return {name: t.clone() for name, t in state.tensors().items()}


@pytest.mark.distributed
def test_a_killed_run_continues_bit_for_bit(tiny_data, tmp_path):
    whole, killed, kind = tmp_path / "whole", tmp_path / "killed", "batch"
    harness.finish(started(program(kind, whole, tiny_data)))
    process = started(program(kind, killed, tiny_data), start_new_session=True)
    while harness.lines_of(killed) < 3 and process.poll() is None:
        pass
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    harness.finish(started(program(kind, killed, tiny_data)))
    harness.assert_same_run(whole, killed)
    (snapshot,) = (whole / "snapshots").glob("*.safetensors")
    G = load_snapshot(snapshot, network=PlainGenerator)
    assert G(torch.zeros(2, 8)).shape == (2, 3, 8, 8)
    with pytest.raises(UsageError, match=r"is of class .*PlainGenerator, which is none of this package's"):
        load_snapshot(snapshot)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["batch", "spectral"])
def test_two_ranks_compute_the_same_as_one(tiny_data, tmp_path, kind):
    """Compared after every step in float64, with running statistics that depend on the global batch."""
    how = {"train__dtype": "float64", "train__check_ranks_every": 1}
    for ranks in (0, 2):
        harness.finish(started(program(kind, tmp_path / f"run{ranks}", tiny_data, **how), ranks))
    one, two = (harness.newest(tmp_path / f"run{ranks}")[0] for ranks in (0, 2))
    assert harness.largest_difference(one, two) < 1e-9


@pytest.mark.parametrize("kind", ["plain", "batch", "spectral", "patches", "conditional"])
def test_micro_batches_change_nothing(tiny_data, kind):
    extra = ["data.conditional=true"] if kind == "conditional" else []
    whole = trained(engine_of(tiny_data, kind, *extra), 3)
    parts = trained(engine_of(tiny_data, kind, "train.micro_batch=4", *extra), 3)
    assert harness.largest_difference(whole, parts) < 1e-9


def test_statistics_are_updated_once_per_batch(tiny_data):
    """The running mean of a batch normalisation has changed, and was updated once by each pass over a whole batch."""
    engine = engine_of(tiny_data, "batch", "train.micro_batch=4", "loss.r1_gamma=0")
    tensors = trained(engine, 3)
    assert float(tensors["G/norm.running_mean"].abs().max()) > 1e-4
    assert int(tensors["G/norm.num_batches_tracked"]) == 6  # once in each step of G and of D
    assert int(tensors["D/norm.num_batches_tracked"]) == 9  # generated images twice, real ones once
    for name in ("running_mean", "running_var"):
        assert torch.equal(tensors[f"G_ema/norm.{name}"], tensors[f"G/norm.{name}"])


def test_spectral_norms_are_updated_once_per_step(tiny_data):
    whole, parts = (trained(engine_of(tiny_data, "spectral", f"train.micro_batch={m}"), 1) for m in (8, 4))
    name = "D/conv.parametrizations.weight.0._u"
    assert torch.equal(whole[name], parts[name])


def test_grouped_batch_norm_agrees_with_batch_norm_of_each_group():
    """Compared with torch's own layer for each group, with first and second derivatives."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3).double()
    nn.init.normal_(plain.weight)
    grouped = GroupedBatchNorm(plain, group=4)
    x = torch.randn(12, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    places = deal(12, 4, 3)  # the groups of a batch of 12
    result = grouped(x)
    reference = nn.BatchNorm2d(3).double()
    reference.load_state_dict(plain.state_dict())
    reference.momentum = None  # averages over all groups
    reference.reset_running_stats()
    for rows in places:
        torch.testing.assert_close(result[rows], reference(x[rows]))
    torch.testing.assert_close(grouped.running_mean, 0.1 * reference.get_buffer("running_mean"))
    torch.testing.assert_close(grouped.running_var, 0.9 + 0.1 * reference.get_buffer("running_var"))
    small = torch.randn(4, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    frozen = GroupedBatchNorm(nn.BatchNorm2d(3, track_running_stats=False).double(), group=2)
    assert torch.autograd.gradcheck(frozen, [small])
    assert torch.autograd.gradgradcheck(frozen, [small])


def test_all_batch_norms_are_replaced_and_keep_their_names():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    before = net.state_dict()
    net = group_batch_norms(net, 4)
    assert [type(m) for m in net.modules() if isinstance(m, nn.BatchNorm1d)] == []
    assert net.state_dict().keys() == before.keys()
    assert len(changing_buffers([net])) == 6
    net.eval()
    assert net(torch.randn(1, 2)).shape == (1, 3)


def test_scores_are_weighted_by_image():
    """A patch's score has a weight inversely proportional to the image's number of scores. All scales have the same
    weight."""
    patches, single = torch.randn(5, 1, 4, 4), torch.randn(5, 1)
    objective = OBJECTIVES["logistic"]
    found = per_image(objective.g, [patches, single], None)
    expected = (objective.g(patches).mean(dim=[1, 2, 3]) + objective.g(single)[:, 0]) / 2
    torch.testing.assert_close(found, expected)


def test_missing_features_of_a_plain_generator_are_reported(tiny_data):
    with pytest.raises(UsageError, match=r"loss\.pl_weight: the generator has no ws"):
        engine_of(tiny_data, "plain", "loss.pl_weight=2")
    with pytest.raises(UsageError, match="nothing to truncate; take psi=1"):
        list(images_of(PlainGenerator(), torch.zeros(1, 8), psi=0.7))
    assert len(next(images_of(PlainGenerator(), torch.zeros(3, 8), psi=1.0, alpha=1.0))) == 3
    assert PlainDiscriminator()(torch.zeros(2, 3, 8, 8)).shape == (2, 1)


def test_two_losses_of_one_update_move_buffers_once():
    """Each begins with the values from before, and their mean is what remains."""
    norm = torch.nn.BatchNorm1d(3)
    means, x = BufferMeans([norm]), torch.randn(8, 3)
    means.begin()
    for images in (x, x + 1):
        means.restore()
        norm(images)
        means.add(8, 8)
    means.finish(torch.zeros([]), means.exchange(True))
    torch.testing.assert_close(norm.running_mean, 0.1 * (x.mean(dim=0) + 0.5))
    for twice, given, expected in ((True, None, False), (False, None, True), (True, True, True), (False, False, False)):
        assert Loss("any", lambda x: {}, 1, twice=twice, counts=given).changes_buffers is expected
