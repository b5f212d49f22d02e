"""Keys of earlier versions in files, in overrides and in stored configurations."""

import logging
from pathlib import Path

import pytest

from stylegan_pg.config import renamed
from stylegan_pg.config.keys import did_you_mean
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.renamed import RENAMED, Renamed, translated
from stylegan_pg.errors import UsageError
from stylegan_pg.planning.advice import without_effect

NEEDED = ["run=runs/x", "data.url=data/x", "train.total_kimg=1"]


@pytest.fixture(autouse=True)
def _names(monkeypatch, caplog):
    """Rename three keys: one unchanged, one table, and one whose values have a different type now."""
    monkeypatch.setitem(RENAMED, "train.minibatch", Renamed("train.batch"))
    monkeypatch.setitem(RENAMED, "train.minibatch_at", Renamed("train.batch_at"))
    monkeypatch.setitem(RENAMED, "output.kernel_swd", Renamed("metrics.names", bool, lambda on: ["kid"] if on else []))
    renamed.announce.cache_clear()
    caplog.set_level(logging.INFO, "stylegan_pg")


def test_overrides_by_old_names(caplog):
    old = ["train.minibatch=8", "train.minibatch_at.16=4", "output.kernel_swd=true"]
    config = load_config(None, [*NEEDED, *old])
    assert (config.train.batch, config.train.batch_at, config.metrics.names) == (8, {16: 4}, ["kid"])
    assert caplog.messages == [
        "note: key train.minibatch is now train.batch",
        "note: key train.minibatch_at is now train.batch_at",
        "note: key output.kernel_swd is now metrics.names",
    ]
    load_config(None, [*NEEDED, *old])  # commands load a configuration more than once
    assert len(caplog.messages) == 3
    assert load_config(None, [*NEEDED, "train={minibatch: 8, threads: 2}"]).train.batch == 8
    assert load_config(None, [*NEEDED, "train.batch=2", "train.minibatch=8"]).train.batch == 8
    assert load_config(None, [*NEEDED, "output.kernel_swd=no"]).metrics.names == []


def test_files_by_old_names(tmp_path, caplog):
    path = tmp_path / "old.yaml"
    text = "run: r\ndata: {url: u}\ntrain: {total_kimg: 1, minibatch: 8, minibatch_at: {16: 4}}\n"
    path.write_text(text + "output: {kernel_swd: true}\n")
    config = load_config(path)
    assert (config.train.batch, config.train.batch_at, config.metrics.names) == (8, {16: 4}, ["kid"])
    assert len(caplog.records) == 3
    assert all(record.levelno >= logging.INFO for record in caplog.records)
    assert load_config(path, ["train.batch=3"]).train.batch == 3
    path.write_text(text.replace("minibatch: 8", "minibatch: 8, batch: 4"))
    with pytest.raises(UsageError, match=r"train\.minibatch is now train\.batch, and both are given"):
        load_config(path)


def test_values_of_old_names_are_checked(tmp_path):
    path = tmp_path / "old.yaml"
    for key, value in (("train.minibatch", "x"), ("output.kernel_swd", "5"), ("train.minibatch", "0")):
        with pytest.raises(UsageError, match=r"train|output"):
            load_config(None, [*NEEDED, f"{key}={value}"])
        section, name = key.split(".")
        given = f"{{{name}: {value}, total_kimg: 1}}" if section == "train" else f"{{{name}: {value}}}"
        path.write_text(f"run: r\ndata: {{url: u}}\n{section}: {given}\n")
        with pytest.raises(UsageError, match=r"train|output"):
            load_config(path)


def test_stored_configurations_by_old_names():
    stored = {"train": {"minibatch": 8}, "output": {"kernel_swd": True}, "seed": 1, "odd": 5}
    now = {"train": {"batch": 8}, "output": {}, "metrics": {"names": ["kid"]}, "seed": 1, "odd": 5}
    assert translated(stored) == now
    assert stored["train"] == {"minibatch": 8}
    both = {"train": {"minibatch": 8, "batch": 4}}
    assert translated(both) == {"train": {"batch": 4}}
    assert translated({"train": None, "metrics": 3, "output": {"kernel_swd": True}})["metrics"] == 3


def test_messages_name_the_new_key():
    assert did_you_mean("train.minibatch") == "; did you mean 'train.batch'?"
    lines = without_effect(None, [*NEEDED, "train.minibatch=4", "train.batch=8"])
    assert lines == ["train.minibatch=4 changes nothing: train.batch is given once more after it"]


def test_every_new_name_is_a_key():
    from stylegan_pg.config.keys import known

    assert {entry.new for entry in RENAMED.values()} <= set(known())
    assert not RENAMED.keys() & set(known())


def test_run_folders_of_earlier_versions(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: elsewhere\ndata: {url: u}\ntrain: {total_kimg: 1, minibatch: 8}\n")
    config = load_config(run)
    assert (config.run, config.train.batch) == (str(run), 8)
