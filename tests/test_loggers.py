"""Where log records go: the console, log.txt in a run's folder, and which ranks are heard."""

import logging
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.monitoring import logs

log = logging.getLogger("stylegan_pg.some.module")


@pytest.fixture
def log_file(tmp_path):
    file = logs.LogFile()
    yield file
    file.close()


def lines(run) -> list[str]:
    """The lines of a run's log.txt without their times."""
    written = (run / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in written)
    return [line[20:] for line in written]


def test_levels_have_their_words_on_the_console_and_in_the_file(log_file, tmp_path, capsys):
    log_file.open(tmp_path)
    log.debug("a detail")
    log.info("0.0 kimg: 8x8 stable")
    log.info("note: 3 classes, 100% of them named")
    log.warning("the disk is slow")
    log.error("the disk is full")
    expected = ["0.0 kimg: 8x8 stable", "note: 3 classes, 100% of them named"]
    expected += ["warning: the disk is slow", "error: the disk is full"]
    assert capsys.readouterr().err.splitlines() == expected
    assert lines(tmp_path) == expected


def test_records_can_go_to_one_handler_only(log_file, tmp_path, capsys):
    log_file.open(tmp_path)
    log.info("for the file", extra=logs.FILE_ONLY)
    log.info("for the console", extra=logs.CONSOLE_ONLY)
    assert capsys.readouterr().err == "for the console\n"
    assert lines(tmp_path) == ["for the file"]


def test_records_wait_until_the_folder_is_known(log_file, tmp_path, capsys):
    log.warning("before")
    assert not list(tmp_path.iterdir())
    log_file.open(tmp_path)
    log.info("after")
    assert lines(tmp_path) == ["warning: before", "after"]
    log_file.close()
    log.info("too late")
    assert lines(tmp_path) == ["warning: before", "after"]
    assert capsys.readouterr().err.splitlines() == ["warning: before", "after", "too late"]


def test_only_rank_0_is_heard_unless_a_record_asks_for_all_ranks(monkeypatch, capsys):
    monkeypatch.setattr(dist, "is_joined", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "is_main", lambda rank=rank: rank == 0)
        log.info(f"from {rank}")
        log.warning(f"damage on {rank}", extra={"all_ranks": True})
    assert capsys.readouterr().err.splitlines() == ["from 0", "warning: damage on 0", "warning: damage on 1"]


@pytest.mark.parametrize(("rank", "heard"), [("0", True), ("1", False)])
def test_before_there_is_a_process_group_the_launcher_says_which_rank_it_is(rank, heard, monkeypatch, capsys):
    place = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    log.info("starting")
    assert bool(capsys.readouterr().err) == heard


def test_a_folder_that_cannot_be_written_costs_one_warning(log_file, tmp_path, capsys):
    log_file.open(tmp_path / "nowhere")
    log.info("one")
    log.info("two")
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if not line.startswith("warning:")] == ["one", "two"]
    (warning,) = [line for line in shown if line.startswith("warning:")]
    assert re.fullmatch(r"warning: could not write to the log \(.*No such file.*\); training goes on", warning)


def test_nothing_is_written_into_a_folder_that_is_not_the_runs_any_more(log_file, tmp_path):
    reason = ""
    log_file.open(tmp_path, lambda: reason)
    log.info("one")
    reason = "the run's folder was moved away"
    log.info("two")
    assert lines(tmp_path) == ["one"]
    moved = tmp_path / "moved"
    moved.mkdir()
    log_file.open(moved)
    log.error(reason, extra=logs.FILE_ONLY)
    assert lines(moved) == ["error: the run's folder was moved away"]


def test_a_program_that_handles_the_logs_itself_is_left_alone():
    program = """
        import logging
        from stylegan_pg.monitoring import logs

        heard = []
        class Own(logging.Handler):
            def emit(self, record):
                heard.append(record.getMessage())
        logger = logging.getLogger("stylegan_pg")
        logger.addHandler(Own())
        with logs.to_console():
            logging.getLogger("stylegan_pg.x").warning("once")
        assert heard == ["once"], heard
        logger.handlers.clear()
        with logs.to_console(), logs.to_console():
            logging.getLogger("stylegan_pg.x").info("shown")
        assert not logger.handlers
        assert logger.propagate
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stderr == "shown\n"
