"""status.json in a run's folder, and what `stylegan-pg status` makes of it."""

import dataclasses
import json
import logging
import os
import shutil
import time
from pathlib import Path

import harness
import pytest

from stylegan_pg.checkpoint import status_file
from stylegan_pg.checkpoint.status_file import Status
from stylegan_pg.monitoring import logs
from stylegan_pg.monitoring.status import collect, render
from stylegan_pg.monitoring.status_writer import StatusWriter

EARLIER = Path(__file__).parent / "fixtures" / "v0_1" / "run-fade"
log = logging.getLogger("stylegan_pg.some.module")


@pytest.fixture
def writer():
    made = StatusWriter()
    yield made
    made.close()


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> tuple[Path, Status]:
    """A run that was stopped after two steps and then finished, and its status in between."""
    run = tmp_path_factory.mktemp("runs") / "run"
    how = {"growth__start": "null", "resolution": 8, "output__grid_kimg": 0}
    harness.finish(harness.start(harness.arguments(run, tiny_data, **how, train__total_kimg=0.016)))
    between = status_file.read(run)
    changed = {**how, "train__total_kimg": 0.032, "ema__kimg": 5}
    harness.finish(harness.start(harness.arguments(run, tiny_data, **changed)))
    return run, between


@pytest.mark.distributed
def test_a_run_and_its_continuation_in_the_status_file(finished):
    run, between = finished
    status = status_file.read(run)
    assert (between.state, between.starts, between.nimg, between.end, between.faults) == ("done", 1, 16, 16, 0)
    assert (status.state, status.starts, status.nimg, status.end, status.checkpoint) == ("done", 2, 32, 32, 32)
    assert (status.phase, status.alpha) == ("8x8 stable", 1.0)
    assert between.updated < status.started < status.updated <= time.time()
    assert status.img_per_sec == json.loads((run / "stats.jsonl").read_text().splitlines()[-1])["img_per_sec"]
    (rank,) = status.ranks
    assert rank["device"] == "cpu"
    assert rank["img_per_sec"] > 0
    warnings = [line for line in (run / "log.txt").read_text().splitlines() if " warning: " in line]
    assert status.faults == len(warnings) > 0  # the end and the EMA are others than before
    assert status.last_faults == warnings[-5:]
    content = json.loads((run / "status.json").read_text())
    assert content["format"] == 1
    assert content.keys() == {"format", "stylegan_pg", *(f.name for f in dataclasses.fields(Status))}


@pytest.mark.distributed
def test_status_reads_no_log(finished, tmp_path):
    """The texts in log.txt change nothing."""
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    before = collect(run)
    assert before["state"] == "done"
    assert before["starts"] == 2
    (run / "log.txt").write_text("2026-01-01 00:00:00 error: the disk is full\n2026-01-01 00:00:00 continuing from x\n")
    for changing in ("silent_sec", "checkpoint_age_sec"):
        before.pop(changing)
    after = collect(run)
    assert {key: after[key] for key in before} == before
    assert harness.command("status", run, expected=0).stdout.splitlines()[0].startswith(f"{run}: done")
    assert json.loads(harness.command("status", run, "--json", expected=0).stdout)["starts"] == 2


@pytest.mark.parametrize(
    ("state", "age", "expected"),
    [
        ("training", 1, "training"),
        ("training", 10**6, "silent: killed, or hanging"),
        ("stopped", 10**6, "stopped, to be continued"),
        ("done", 10**6, "done"),
        ("failed", 1, "failed"),
    ],
)
def test_a_state_holds_whatever_time_has_passed_but_training_must_show_signs_of_life(state, age, expected, tmp_path):
    shutil.copy(EARLIER / "config.yaml", tmp_path)
    status_file.write(tmp_path, Status(state=state, nimg=8, updated=time.time() - age))
    os.utime(tmp_path / "status.json", (time.time() - age,) * 2)
    assert collect(tmp_path)["state"] == expected


def test_a_run_of_an_earlier_version(tmp_path):
    """It has log.txt and ranks.json; what they do not say is left out."""
    run = Path(shutil.copytree(EARLIER, tmp_path / "run"))
    facts = collect(run)
    assert facts["damaged"] == facts["last_faults"] == []
    assert facts["nimg"] == 96
    assert facts["phase"] == json.loads((run / "stats.jsonl").read_text().splitlines()[-1])["phase"]
    assert facts["ranks"] == json.loads((run / "ranks.json").read_text())["ranks"]
    assert facts["img_per_sec"] > 0
    assert facts["starts"] is facts["faults"] is facts["started"] is facts["updated"] is None
    assert facts["state"] in ("training", "silent: killed, or hanging")
    shown = render(facts)
    assert "rank 0" in shown
    assert "faults " not in shown
    assert "starts " not in shown


def test_a_run_without_anything_has_not_started(tmp_path):
    shutil.copy(EARLIER / "config.yaml", tmp_path)
    assert collect(tmp_path)["state"] == "not started"


def test_the_writer_counts_starts_and_faults_over_all_starts(writer, tmp_path):
    log.warning("before the folder is known")
    log.info("no fault")
    assert not (tmp_path / "status.json").exists()
    writer.open(tmp_path, 0, 1000)
    log.error("at its end", extra=logs.FILE_ONLY)
    log.warning("only shown", extra=logs.CONSOLE_ONLY)
    writer.update(state="failed", nimg=8, checkpoint=8)
    first = status_file.read(tmp_path)
    assert (first.state, first.nimg, first.checkpoint, first.starts, first.faults) == ("failed", 8, 8, 1, 2)
    assert [text[20:] for text in first.last_faults] == ["warning: before the folder is known", "error: at its end"]
    writer.close()
    for number in range(2, 5):
        again = StatusWriter()
        for i in range(number):
            log.warning(f"{number} {i}")
        again.open(tmp_path, 0, 1000)
        again.update(checkpoint=None)
        again.close()
        log.warning("of nobody's run")
    last = status_file.read(tmp_path)
    assert (last.state, last.nimg, last.checkpoint, last.starts, last.faults) == ("training", 0, 8, 4, 2 + 2 + 3 + 4)
    assert [text[20:] for text in last.last_faults] == [f"warning: {x}" for x in ("3 2", "4 0", "4 1", "4 2", "4 3")]
    assert not list(tmp_path.glob(".*"))


def test_starts_that_nobody_counted_are_unknown(writer, tmp_path):
    (tmp_path / "log.txt").write_text("of an earlier version\n")
    writer.open(tmp_path, 8, 1000)
    assert (status_file.read(tmp_path).starts, status_file.read(tmp_path).checkpoint) == (None, 8)
    (tmp_path / "status.json").write_text("{")
    writer.open(tmp_path, 8, 1000)
    status = status_file.read(tmp_path)
    assert status.starts is None
    assert "its counts begin anew" in status.last_faults[-1]


def test_a_status_that_cannot_be_written_costs_one_warning(writer, tmp_path, caplog):
    writer.open(tmp_path / "nowhere", 0, 1000)
    writer.update(nimg=8)
    log.warning("something else")
    assert [record.getMessage()[:27] for record in caplog.records] == ["could not write status.json", "something else"]


def test_a_folder_that_is_not_the_runs_any_more_gets_no_status(writer, tmp_path):
    writer.open(tmp_path, 0, 1000, lambda: "it was moved away")
    assert not list(tmp_path.iterdir())
    writer.move(tmp_path)
    writer.update(state="failed")
    assert status_file.read(tmp_path).state == "failed"
