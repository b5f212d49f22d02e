"""model.low_precision=auto: measured once, kept in the run, never measured again."""

import dataclasses
import subprocess
import sys

import harness
import pytest
import torch

from stylegan_pg import precision
from stylegan_pg.config import Config, load_config

CPU = torch.device("cpu")


def config_with(**model) -> Config:
    config = load_config(None, ["run=none", "data.url=none", "resolution=64", "growth.start=8", "train.batch=4"])
    small = {"channel_base": 256, "channel_max": 16, "low_precision": "auto"}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **(small | model)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))


def test_what_is_faster_is_chosen_and_remembered(monkeypatch):
    asked = []
    monkeypatch.setattr(
        precision, "_ratio", lambda config, r, device: asked.append(r) or {64: 0.5, 32: 1.2, 16: 0.96}[r]
    )
    chosen, why = precision.choose(config_with(low_precision_resolutions=3), CPU)
    assert chosen == [64]
    assert why == "bf16 at [64]; its time over that of fp32: 64: 0.50, 32: 1.20, 16: 0.96"
    assert precision.choose(config_with(low_precision_resolutions=2), CPU)[0] == [64]
    assert asked == [64, 32, 16]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # another machine, as it were
        precision.choose(config_with(low_precision_resolutions=1), CPU)
    finally:
        torch.set_num_threads(threads)
    assert asked == [64, 32, 16, 64]


@pytest.mark.parametrize("damage", ['{"64": "fast"}', "[1]", "{", ""])
def test_a_damaged_table_is_measured_anew(monkeypatch, tmp_path, damage):
    monkeypatch.setattr(precision, "_ratio", lambda *_: 0.5)
    config = config_with(low_precision_resolutions=1)
    precision.choose(config, CPU)
    (table,) = (tmp_path / "cache").glob("precision-*.json")
    table.write_text(damage)
    assert precision.choose(config, CPU)[0] == [64]


def test_a_real_measurement():
    """Whatever this machine is good at: the choice is what the printed ratios say."""
    config = config_with(channel_base=4096, channel_max=128, low_precision_resolutions=2)
    chosen, why = precision.choose(config, CPU)
    ratios = dict(part.split(": ") for part in why.split("fp32: ")[1].split(", "))
    assert list(ratios) == ["64", "32"]
    assert chosen == [int(r) for r, value in ratios.items() if float(value) < 0.95]
    assert all(0.02 < float(v) < 50 for v in ratios.values())


def test_candidates():
    assert precision.candidates(config_with()) == [64, 32, 16, 8]
    assert precision.candidates(config_with(low_precision_resolutions=2)) == [64, 32]


TOLD = """
import sys
from stylegan_pg import precision
from stylegan_pg.__main__ import main
def choose(config, device):
    assert sys.argv[1] != "never", "measured again"
    return [16], "as told"
precision.choose = choose
sys.argv[1:2] = []
main()
"""


@pytest.mark.distributed
def test_a_run_keeps_what_it_chose(tiny_data, tmp_path):
    """In its configuration and its checkpoints; a continued run does not measure."""
    run = tmp_path / "run"
    half = {"train__total_kimg": 0.064, "model__low_precision": "auto"}
    outputs = []
    for how, changes in (("first", half), ("never", half | {"train__total_kimg": 0.096})):
        command = [sys.executable, "-c", TOLD, how, *harness.arguments(run, tiny_data, **changes)]
        done = subprocess.run(command, env=harness.environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout + done.stderr)
    assert outputs[0].count("precision: as told") == 1
    assert "precision:" not in outputs[1]
    assert "continuing from" in outputs[1]
    assert load_config(run / "config.yaml").model.low_precision_at == [16]
    _, state = harness.newest(run)
    assert state["config"]["model"]["low_precision_at"] == [16]
    done = subprocess.run(
        [sys.executable, "-c", TOLD, "never", "train", str(run / "config.yaml"), "train.total_kimg=0.104"],
        env=harness.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
