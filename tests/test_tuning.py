"""model.low_precision=auto and train.channels_last=null: measured once, stored in the run, and never measured again."""

import dataclasses

import harness
import pytest
import torch

from stylegan_pg.config import Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.training import autotune

CPU = torch.device("cpu")


def config_with(name: str = "stylegan2", **model) -> Config:
    length = ["growth.start=null", "train.total_kimg=1"] if name == "stylegan3" else ["growth.start=8"]
    given = ["run=none", "data.url=none", "resolution=64", "train.batch=4", f"model.name={name}", *length]
    config = load_config(None, given)
    small = {"channel_base": 256, "channel_max": 16, "low_precision": "auto"}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **(small | model)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "has_bf16_instructions", lambda: True)


def pretend(monkeypatch, seconds) -> list:
    """Replace the measurements. Return the list to which requested measurements are added."""
    asked: list = []

    def measure(config, device, cases):
        asked.extend(cases)
        return {case: seconds(*case) for case in cases}

    monkeypatch.setattr(autotune, "_measure", measure)
    return asked


def bf16_helps_at_64(r, layout, precision):
    return {64: 0.5, 32: 1.2, 16: 0.96}.get(r, 1.0) if precision == "bf16" else 1.0


def test_the_faster_choice_is_made_and_stored(monkeypatch):
    asked = pretend(monkeypatch, bf16_helps_at_64)
    chosen, why = autotune.choose_precision(config_with(low_precision_resolutions=3), CPU)
    assert chosen == [64]
    assert why == "bf16 at [64]; its time over that of fp32: 64: 0.50, 32: 1.20, 16: 0.96"
    assert autotune.choose_precision(config_with(low_precision_resolutions=2), CPU)[0] == [64]
    assert len(asked) == 6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # simulates another machine
        autotune.choose_precision(config_with(low_precision_resolutions=1), CPU)
    finally:
        torch.set_num_threads(threads)
    assert len(asked) == 8


def test_a_cpu_without_bf16_tries_large_resolutions_only(monkeypatch):
    """There, convolutions with fewer products may be faster than float32. At small resolutions, they are not worth the
    rounding errors."""
    asked = pretend(monkeypatch, bf16_helps_at_64)
    monkeypatch.setattr(autotune, "has_bf16_instructions", lambda: False)
    chosen, why = autotune.choose_precision(config_with(), CPU)
    assert (chosen, why) == ([64], "bf16 at [64]; its time over that of fp32: 64: 0.50")
    assert len(asked) == 2
    small = dataclasses.replace(config_with(channel_base=4096, channel_max=128), resolution=32)
    planes = config_with()
    planes = dataclasses.replace(planes, train=dataclasses.replace(planes.train, channels_last=False))
    for config in (small, planes):
        chosen, why = autotune.choose_precision(config, CPU)
        assert not chosen
        assert why.startswith(
            "bf16 at no resolution: this CPU has no instructions for it, and needs 64x64, kernels and"
        )
    assert len(asked) == 2


@pytest.mark.parametrize("faster", ["nhwc", "nchw"])
def test_the_layout_has_the_least_time_over_all_resolutions(monkeypatch, faster):
    pretend(monkeypatch, lambda r, layout, precision: r / 10 if layout == faster and r == 64 else r / 9)
    config = config_with(low_precision="fp32")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, channels_last=None))
    settled, why = autotune.resolve(config, CPU, None)
    assert settled.train.channels_last == (faster == "nhwc")
    assert why.startswith(f"layout {faster}: ")
    again = autotune.resolve(config, CPU, {"train": {"channels_last": False}, "model": {}})
    assert again[0].train.channels_last is False
    assert again[1] == ""


@pytest.mark.parametrize("damage", ['{"64 nhwc fp32": "fast"}', "[1]", "{", ""])
def test_a_damaged_table_is_measured_again(monkeypatch, tmp_path, damage):
    pretend(monkeypatch, bf16_helps_at_64)
    config = config_with(low_precision_resolutions=1)
    autotune.choose_precision(config, CPU)
    (table,) = (tmp_path / "cache").glob("tuning-*.json")
    table.write_text(damage)
    assert autotune.choose_precision(config, CPU)[0] == [64]


@pytest.mark.parametrize("name", ["stylegan2", "stylegan", "stylegan3", "progan"])
def test_a_real_measurement(name):
    """On any machine, the choice follows from the printed ratios."""
    width = {"channel_base": 1024, "channel_max": 32} if name == "stylegan3" else {}  # it has more layers
    how = {"channel_base": 4096, "channel_max": 128, "low_precision_resolutions": 2, "base": [4, 6], **width}
    config = config_with(name=name, **how)
    chosen, why = autotune.choose_precision(config, CPU)
    ratios = dict(part.split(": ") for part in why.split("fp32: ")[1].split(", "))
    assert list(ratios) == ["64", "32"]
    assert all(0.02 < float(v) < 50 for v in ratios.values())
    for r, value in ratios.items():
        if abs(float(value) - 0.95) > 0.01:
            assert (int(r) in chosen) == (float(value) < 0.95)
    assert autotune.choose_layout(config, CPU)[1].startswith("layout n")


def test_candidates():
    assert autotune.candidates(config_with()) == [64, 32, 16, 8]
    assert autotune.candidates(config_with(low_precision_resolutions=2)) == [64, 32]


TOLD = """
import sys
from stylegan_pg.training import autotune as tuning
from stylegan_pg.__main__ import main
how = sys.argv.pop(1)
def measure(config, device, cases):
    assert how != "never", "measured again"
    return {case: 0.5 if case[::2] == (16, "bf16") else 1.0 for case in cases}
tuning._measure = measure
tuning.has_bf16_instructions = lambda: True
main()
"""


@pytest.mark.distributed
def test_a_run_stores_its_choice(tiny_data, tmp_path):
    """The choice is in its configuration and its checkpoints, and a continued run does not measure."""
    run = tmp_path / "run"
    half = {"train__total_kimg": 0.064, "model__low_precision": "auto", "train__channels_last": "null"}
    script, outputs = tmp_path / "told.py", []
    script.write_text(TOLD)
    for how, changes in (("first", half), ("never", half | {"train__total_kimg": 0.096})):
        (tmp_path / "cache").mkdir(exist_ok=True)
        for table in (tmp_path / "cache").glob("tuning-*"):
            table.unlink()
        words = [how, *harness.arguments(run, tiny_data, **changes)]
        outputs.append(harness.finish(harness.start(words, script=script)))
    assert outputs[0].count("measured: layout nhwc: channels_last takes 1.00 of the other's time; bf16 at [16]") == 1
    assert "measured:" not in outputs[1]
    assert "continuing from" in outputs[1]
    settled = load_config(run / "config.yaml")
    assert (settled.model.low_precision_at, settled.train.channels_last) == ([16], True)
    _, state = harness.newest(run)
    assert state["config"]["model"]["low_precision_at"] == [16]
    more = ["never", "train", str(run / "config.yaml"), "train.total_kimg=0.104"]
    harness.finish(harness.start(more, script=script))
