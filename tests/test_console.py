"""A console that disappears, TensorBoard that fails, a last snapshot that cannot be written: training continues and
reports it if possible."""

import os
import pty
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import harness
import pytest
import torch
from conftest import ROOT

from stylegan_pg.monitoring.trackers import Trackers

GONE = "the console is gone"


def count(run: Path, words: str) -> int:
    return (run / "log.txt").read_text().count(words)


def wait_for_lines(run: Path, lines: int, process: subprocess.Popen) -> None:
    end = time.time() + 180
    while harness.lines_of(run) < lines:
        assert time.time() < end
        assert process.poll() is None, process.returncode
        time.sleep(0.05)


def test_output_that_cannot_be_written_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        process = harness.start(
            ["train", "demo", f"run={tmp_path}", "--dry-run"], fresh=True, stdout=full, stderr=subprocess.PIPE
        )
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert told.startswith("error: the output cannot be written: ")
    assert told.count("\n") == 1


def test_lack_of_memory_gives_one_message():
    program = "from stylegan_pg import __main__, cli\ndef app(): bytearray(1 << 62)\ncli.app = app\n__main__.run()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is not enough memory for this")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_failures_of_output_do_not_end_training(tiny_data, tmp_path):
    """Standard error is on a full disk, and TensorBoard raises the exception of a protobuf version conflict. A run
    without its last snapshot is not complete, and running the same command again writes it."""
    run = tmp_path / "run"
    broken = tmp_path / "broken" / "tensorboard" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise TypeError('Descriptors cannot be created directly.')")
    run.mkdir()
    (run / "snapshots").symlink_to("nowhere")  # it simulates a disk that is not mounted
    args = harness.arguments(run, tiny_data, output__trackers="tensorboard")
    env = harness.environment() | {"PYTHONPATH": f"{broken.parents[1]}{os.pathsep}{ROOT}"}
    with open("/dev/full", "w") as full:
        process = harness.start(args, env=env, stdout=full, stderr=full)
        assert process.wait(timeout=240) == 1
    log = (run / "log.txt").read_text()
    assert log.count(GONE) == 1
    assert "standard error: No space left on device" in log
    assert log.count("warning: no TensorBoard log from here on (Descriptors cannot be created") == 1
    assert log.count("could not be written") == 1
    assert "error: training is complete, but its last snapshot" in log.splitlines()[-1]
    (run / "snapshots").unlink()
    closed = 'exec "$@" 1>&- 2>&- 0<&-'
    process = harness.start(args, fresh=True)  # a new process is needed for its command line
    process.kill()
    process.communicate()
    command = ["sh", "-c", closed, "sh", *process.args]  # type: ignore[misc]
    assert subprocess.run(command, env=harness.environment(), timeout=240).returncode == 0
    log = (run / "log.txt").read_text()
    assert log.count(GONE) == 2
    assert "standard error: it was closed at the start" in log
    assert "done" in log.splitlines()[-1]
    (snapshot,) = (run / "snapshots").glob("*.safetensors")
    assert snapshot.stat().st_size > 1000


@pytest.mark.distributed
def test_closing_the_terminal(tiny_data, tmp_path):
    """It stops the run with a checkpoint, as SIGTERM does. A run under nohup continues to its end."""
    run = tmp_path / "run"
    changes = {"data__workers": 1, "growth__stable_kimg_at": "{16: 3}"}
    for ignored, expected, more in ((False, 75, {}), (True, 0, {"train__total_kimg": 0.8})):
        args = harness.arguments(run, tiny_data, **(changes | more))
        leader, follower = pty.openpty()
        how = signal.SIG_IGN if ignored else signal.SIG_DFL
        prepare = f"import os, signal, sys, fcntl, termios; signal.signal(signal.SIGHUP, signal.Handlers({int(how)})); "
        prepare += "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        process = subprocess.Popen(
            [sys.executable, "-c", prepare, "-m", "stylegan_pg", *args],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            env=harness.environment(),
        )
        os.close(follower)
        wait_for_lines(run, harness.lines_of(run) + 2, process)
        os.close(leader)
        assert process.wait(timeout=120) == expected
        assert count(run, "a loader worker was killed") == 0
    assert harness.newest(run)[1]["nimg"] == 800
    assert count(run, f"{GONE} (standard error: Input/output error)") >= 1
    assert count(run, "continuing from") == 1


def test_a_blocked_console():
    """A pipe whose reader waits behaves like a stopped terminal. Output that cannot be written in time is dropped, and
    this is reported once. If the reader has exited, prints, progress bars, warnings and logging continue without
    error."""
    program = """
        import logging, sys, time, warnings
        from tqdm import tqdm
        from stylegan_pg.monitoring import console
        console.STUCK_MS = 200
        console.tolerate("stdout", "stderr")
        start = time.monotonic()
        for i in range(3000):
            print("x" * 99, file=sys.stderr)
        assert time.monotonic() - start < 10
        (stuck,) = console.lost()
        assert "standard error: nothing was accepted" in stuck, stuck
        sys.stdin.readline()  # the reader has left
        bar = tqdm(range(3), mininterval=0)
        for _ in bar:
            tqdm.write("line", file=sys.stderr)
            warnings.warn("w")
            logging.getLogger("l").error("e")
            print("gone")
        assert len(console.lost()) == 1  # standard output; standard error was told before
        sys.exit(7)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=harness.environment(),
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    time.sleep(6)
    taken = os.read(process.stderr.fileno(), 1 << 16)
    assert taken.startswith(b"xxx")
    process.stderr.close()
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 7


def test_closed_standard_streams_are_not_reused_for_files(tmp_path):
    """Otherwise, output of libraries would be written to the next opened file."""
    program = f"""
        import os, sys
        from stylegan_pg.monitoring import console
        console.tolerate("stderr")
        file = open({str(tmp_path / "file")!r}, "w")
        os.write(2, b"a library's message")
        sys.exit(file.fileno())
    """
    command = ["sh", "-c", 'exec "$@" 2>&- 0<&-', "sh", sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode >= 3
    assert (tmp_path / "file").read_text() == ""


def test_tensorboard_on_a_full_disk(tmp_path, caplog, capfd):
    """There is one warning, no traceback of its thread, no exception and no waiting."""
    board = Trackers(["tensorboard"], tmp_path, 0, {})
    assert not caplog.messages
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        picture = torch.randint(0, 256, [3, 64, 64], dtype=torch.uint8)
        for nimg in range(50):
            board.image("reals", picture, nimg)
            board.scalars({"loss": float(nimg)}, nimg)
            time.sleep(0.01)
        board.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (warning,) = caplog.messages
    assert "no TensorBoard log from here on" in warning
    assert "File too large" in warning
    assert "Traceback" not in capfd.readouterr().err
