"""What every system must do, tried with each of configs/systems: it loads, trains, is resumed bit for bit, computes the
same on any number of ranks and micro-batches, leaves out a step that is not finite, and its snapshots are usable."""

import json
import os
import random
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
from configuring import SYSTEMS
from PIL import Image

from stylegan_pg import load_snapshot, pack
from stylegan_pg.config import SYSTEMS as CLASSES
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.loader.loader import batches
from stylegan_pg.planning.plan import Machine, report
from stylegan_pg.systems.catalogue import system_of
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

COUNT, CLASS_COUNT = 48, 3
# Small changes of each configuration, so that a step takes milliseconds; what is not given here is for all.
SMALL = {
    "train.batch": 8,
    "train.threads": 1,
    "model.channel_max": 8,
    "model.mbstd_group": 4,
    "data.workers": 0,
    "output.tick_kimg": 0.008,
    "output.grid_kimg": 0,
    "output.snapshot_kimg": 0,
    "output.trackers": "[]",
    "checkpoint.every_kimg": 0.008,
    "metrics.every_kimg": 0,
}
OWN: dict[str, dict[str, object]] = {  # further ones by configuration
    "anime": {"resolution": 16, "model.g_channels": 4, "model.blocks": 1, "model.d_blocks": 1},
    "scrubber": {"model.d_width": 16},
    "improved": {"resolution": 16, "model.channel_base": 128, "model.references": 4, "model.minibatch_kernels": 4},
    "improved-grid": {"model.minibatch_kernels": 4},
    "text": {"model.length": 12, "optim.d_steps": 2},
    "began": {"resolution": 16, "system.k_rate": 0.5},  # so that k moves within few steps
    "ebgan": {"resolution": 16},
    "ddgan": {"model.mapping_layers": 2},
    # The last layers begin almost at 0, where the gradients of real and generated pictures cancel in part. A small
    # epsilon would turn their rounding into steps.
    "ddgan-digits": {"resolution": 8, "model.attention_at": "[4]", "model.w_dim": 8, "loss.r1_every": 2,
                     "optim.eps": 0.0001},
    "ddgan-cifar10": {"resolution": 8, "model.multipliers": "[1,2]", "model.attention_at": "[4]", "model.blocks": 1,
                      "model.w_dim": 8, "loss.r1_every": 2, "optim.eps": 0.0001},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of datasets named by resolution and channels, with everything that a system may read: three classes,
    captions, a vector of attributes."""
    return tmp_path_factory.mktemp("systems")


def dataset(folder: Path, resolution: int, channels: int) -> Path:
    """Pack random pictures with all fields, once."""
    out = folder / f"{resolution}x{channels}"
    if not out.exists():
        dice = np.random.default_rng(5)
        source = folder / f"pictures{resolution}x{channels}"
        for i in range(COUNT):
            place = source / f"class{i % CLASS_COUNT}" / f"{i:03d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            shape = [resolution, resolution] + ([3] if channels == 3 else [])
            Image.fromarray(dice.integers(0, 255, shape, dtype=np.uint8)).save(place)
            place.with_suffix(".txt").write_text(f"picture {i} of class {i % CLASS_COUNT}")
        rows = [f"class{i % CLASS_COUNT}/{i:03d}.png,{i % 2},{i // 2 % 2},{i // 4 % 2}" for i in range(COUNT)]
        (vectors := folder / "attributes.csv").write_text("\n".join(["path,dark,round,smiling", *rows]))
        pack(source, out, resolution=resolution, channels=channels, labels="folders", captions="auto", format="png",
             vector={"attributes": vectors}, progress=False)  # fmt: skip
    return out


def changes(name: str, folder: Path) -> dict[str, object]:
    """What makes a configuration small, with a dataset that fits it."""
    config = load_config(f"systems/{name}")
    given = SMALL | {"train.micro_batch": 0} | OWN.get(name, {})
    if "data.url" not in given and not config.data.url.startswith("points:"):
        channels = 1 if "digits" in config.data.url else 3
        given["data.url"] = dataset(folder, int(str(given.get("resolution", config.resolution))), channels)
    return given


def overrides(name: str, folder: Path, **more: object) -> list[str]:
    given = changes(name, folder) | {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in given.items()]


def engine_of(name: str, folder: Path, **more: object) -> Engine:
    config = load_config(f"systems/{name}", ["run=unused", *overrides(name, folder, **more)])
    state = TrainState(config, load_dataset(config), Devices(config))
    state.enter(phases(config)[0])
    return Engine(state)


def trained(engine: Engine, steps: int) -> dict[str, torch.Tensor]:
    state, p = engine.state, engine.state.current
    how = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    how["derived"] = state.config.data.derived
    data = batches(state.table, state.index.order(seed=0), start=0, end=p.end, batch=p.batch, **how)
    for _, batch in zip(range(steps), data, strict=False):
        assert not engine.step(batch).faults
    return {name: t.clone() for name, t in state.tensors().items()}


def test_every_system_has_a_configuration():
    assert {load_config(f"systems/{name}").system.name for name in SYSTEMS} == set(CLASSES)


@pytest.mark.parametrize("name", SYSTEMS)
def test_it_loads_and_is_planned(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(f"systems/{name}")
    assert load_config(f"configs/systems/{name}.yaml") == config
    assert type(system_of(config)).__module__.startswith("stylegan_pg.systems.")
    assert "GiB" in report(config, Machine(devices=1))


@pytest.mark.parametrize("name", SYSTEMS)
def test_micro_batches_change_nothing(name, data):
    double = {"train__dtype": "float64"}
    whole = trained(engine_of(name, data, **double), 4)
    parts = trained(engine_of(name, data, **double, train__micro_batch=4), 4)
    assert harness.largest_difference(whole, parts) < 1e-9


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_that_is_not_finite_is_left_out(name, data):
    engine = engine_of(name, data)
    trained(engine, 1)
    before = {name: t.clone() for name, t in engine.state.tensors().items()}
    state, p = engine.state, engine.state.current
    how = {"share": state.micro_batches.share, "fields": state.fields, "workers": 0}
    how["derived"] = state.config.data.derived
    batch = next(iter(batches(state.table, state.index.order(seed=0), start=p.batch, end=p.end, batch=p.batch, **how)))
    with torch.no_grad():
        for weights in state.system.net.values():
            next(iter(weights.parameters())).fill_(float("nan"))
    broken = {name: t.clone() for name, t in state.tensors().items()}
    assert engine.step(batch).faults
    after = state.tensors()
    untouched = [name for name in before if torch.equal(broken[name], before[name]) and not name.startswith("G_ema")]
    assert untouched
    assert all(torch.equal(after[name], broken[name]) for name in untouched)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_killed_run_continues_bit_for_bit(name, data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def arguments(run: Path) -> list[str]:
        return ["train", f"systems/{name}", f"run={run}", *overrides(name, data, train__total_kimg=0.064)]

    harness.finish(harness.start(arguments(whole)))
    assert harness.kill_until_done(arguments(killed), killed, random.Random(3), most=2) > 0
    harness.assert_same_run(whole, killed)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SYSTEMS)
def test_two_ranks_compute_the_same_as_one(name, data, tmp_path):
    how = {"train__dtype": "float64", "train__total_kimg": 0.032, "train__check_ranks_every": 1}
    for ranks in (0, 2):
        given = ["train", f"systems/{name}", f"run={tmp_path / f'run{ranks}'}", *overrides(name, data, **how)]
        harness.finish(harness.start(given, ranks=ranks))
    one, two = (harness.newest(tmp_path / f"run{ranks}")[0] for ranks in (0, 2))
    assert harness.largest_difference(one, two) < 1e-9


@pytest.mark.parametrize("name", SYSTEMS)
def test_snapshots_are_sampled_and_measured(name, data, tmp_path):
    """By the commands that users have; a system of points has no pictures."""
    run = tmp_path / "run"
    given = overrides(name, data, train__total_kimg=0.016)
    harness.command("train", f"systems/{name}", f"run={run}", *given, expected=0)
    (snapshot,) = (run / "snapshots").glob("*.safetensors")
    G = load_snapshot(snapshot)
    config = load_config(run)
    if config.data.url.startswith("points:"):
        assert G(torch.randn(2, G.z_dim)).shape == (2, 2, 1, 1)
        return
    harness.command("sample", snapshot, "--seeds", "0-3", "--out", tmp_path / "pictures", expected=0)
    if config.system.name == "text":
        assert len((tmp_path / "pictures" / "samples.txt").read_text().splitlines()) == 4
        return
    sizes = {Image.open(path).size for path in (tmp_path / "pictures").glob("*.png")}
    assert sizes == {(config.resolution, config.resolution)}
    measured = harness.command(
        "metrics", snapshot, "--data", config.data.url, "--images", "32", "--metrics", "swd", expected=0,
        env=harness.environment() | {"STYLEGAN_PG_CACHE": os.fspath(tmp_path / "cache")},
    )  # fmt: skip
    assert json.loads(measured.stdout)["swd"] > 0
