"""Processes whose parent was killed, and requests to stop that arrive before training has begun."""

import errno
import io
import json
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time

import harness
import psutil
import pytest
from conftest import ROOT
from PIL import Image

from stylegan_pg.data.images.decode import decode, decode_to_fit
from stylegan_pg.distributed import launcher, stopping
from stylegan_pg.errors import UsageError
from stylegan_pg.files import allow_open_files
from stylegan_pg.monitoring import loggers, status

pytestmark = pytest.mark.distributed


def wait_until(condition, seconds: float, what: str) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun", "script"])
def test_ranks_whose_launcher_was_killed(tiny_data, tmp_path, kind):
    """The ranks write a checkpoint and exit, and so do their loader workers. The same command, started at once,
    continues the run."""
    run = tmp_path / "run"
    common = {"growth__stable_kimg_at": "{16: 9}", "checkpoint__every_kimg": 50}
    args = harness.arguments(run, tiny_data, data__workers=1, **common)
    if kind == "torchrun":
        process = harness.start(args, ranks=2, fresh=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    else:
        env = harness.environment() | {"PYTHON": sys.executable, "NPROC": "1"}
        command = [str(ROOT / "launch" / "single.sh"), *args[1:]]
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: harness.lines_of(run) >= 3, 240, "training")
        started = psutil.Process(process.pid)
        wait_until(lambda: len(started.children(recursive=True)) >= 3, 60, "ranks and workers")  # between phases less
        family = started.children(recursive=True)
        process.kill()
        process.wait()
        wait_until(lambda: gone(family), 45, f"{family} to end")
    finally:
        process.kill()
    nimg = harness.newest(run)[1]["nimg"]
    assert nimg % 50000 != 0  # no checkpoint was due
    log = (run / "log.txt").read_text()
    assert "is gone; stopping with a checkpoint" in log
    assert f"stopped; to continue, run the same command again: {run} at " in log.splitlines()[-1]
    harness.finish(harness.start([*args, f"train.total_kimg={nimg / 1000}"]))


def test_a_hanging_rank_exits_as_well(tmp_path):
    """Its main thread waits in a call that never returns, so no Python signal handler runs."""
    stuck = """
        import ctypes, os, sys
        from stylegan_pg.distributed import stopping
        stopping.LEAVE_SEC = 1.0
        stopping.listen()
        stopping.begin(lambda: None, lambda: False)
        print(os.getpid(), flush=True)
        ctypes.CDLL(None).sleep(1000)  # as a collective call: outside of Python
    """
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {textwrap.dedent(stuck)!r}])"
    env = harness.environment() | {"TORCHELASTIC_RUN_ID": "test"}
    parent = subprocess.Popen([sys.executable, "-c", start], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1.5)
    assert not gone([child])
    parent.kill()
    parent.wait()
    wait_until(lambda: gone([child]), 15, "the child to end")


def test_a_signal_to_a_worker_does_not_reach_its_parent():
    """Processes that are forked before training begins inherit the parent's handlers, but must not write to its
    pipe."""
    program = """
        import multiprocessing, time
        from stylegan_pg.distributed import stopping
        stopping.listen()
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3,))
        worker.start()
        time.sleep(0.5)
        worker.terminate()
        time.sleep(1.0)
        print("still here")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, env=harness.environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "still here\n", done.stderr


def test_workers_whose_parent_was_killed(tmp_path):
    program = """
        import multiprocessing, os, sys, time
        from concurrent.futures import ProcessPoolExecutor
        from stylegan_pg.distributed import stopping
        if __name__ == "__main__":
            with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), stopping.be_worker) as pool:
                list(pool.map(time.sleep, [0.5, 0.5]))
                print("ready", flush=True)
                time.sleep(1000)
    """
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    env = harness.environment() | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    assert parent.stdout.readline() == "ready\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(family), 15, f"{family} to end")


def test_which_processes_have_a_launcher(monkeypatch):
    """A process that a shell started under nohup may outlive the shell. torchrun's ranks are of no use without
    torchrun."""
    assert not launcher.is_launched(False, {})
    assert not launcher.is_launched(False, {"WORLD_SIZE": "1"})
    assert launcher.is_launched(False, {"WORLD_SIZE": "2"})
    assert not launcher.is_launched(True, {"WORLD_SIZE": "2"})
    assert launcher.is_launched(True, {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"})
    assert launcher.is_launched(True, {launcher.SCRIPTS: "12"})
    parents = [p.pid for p in psutil.Process().parents()]
    assert stopping.lineage({}) == parents[:1]
    assert stopping.lineage({launcher.SCRIPTS: "999999999"}) == parents[:1]
    assert stopping.lineage({launcher.SCRIPTS: f"{parents[-1]} {parents[0]}"}) == parents


@pytest.mark.parametrize(("delay", "number"), [(0.4, signal.SIGTERM), (1.5, signal.SIGINT), (3.0, signal.SIGTERM)])
def test_stopped_before_training_begins(tiny_data, tmp_path, delay, number):
    """Most of this time is spent on imports. The run is so long that a fast machine does not end it before."""
    process = harness.start(harness.arguments(tmp_path / "run", tiny_data, train__total_kimg=100), fresh=True)
    time.sleep(delay)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    assert "to continue, run the same command again" in output


def test_stopped_while_it_waits_for_other_ranks(tiny_data, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = harness.environment() | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    process = harness.start(harness.arguments(tmp_path / "run", tiny_data), fresh=True, env=env)

    def listens() -> bool:
        return any(c.status == psutil.CONN_LISTEN for c in psutil.Process(process.pid).net_connections())

    wait_until(listens, 120, "the rank to wait for the other one")
    time.sleep(0.5)
    process.terminate()
    assert "stopped before training began" in harness.finish(process, 75, timeout=20)


def test_too_few_file_descriptors(tiny_data, tmp_path):
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    output = harness.finish(harness.start(harness.arguments(tmp_path / "run", tiny_data), preexec_fn=few), 2)
    assert "this process may open 64 files (ulimit -n)" in output
    assert "run `ulimit -n 4096`" in output
    assert output.count("\n") == 1
    with pytest.raises(UsageError, match="10000000000"):
        allow_open_files(10**10)


def test_too_few_file_descriptors_are_not_reported_as_a_bad_picture(monkeypatch):
    """Otherwise it would be replaced by another picture during the whole run."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, format="PNG")

    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    assert decode(data.getvalue(), (8, 8), 3).shape == (3, 8, 8)
    monkeypatch.setattr(Image, "open", refuse)
    for to_pixels in (decode, decode_to_fit):
        with pytest.raises(OSError, match="Too many open files"):
            to_pixels(data.getvalue(), (8, 8), 3)


def test_the_limit_of_file_descriptors_is_raised_where_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        allow_open_files(200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    """Speeds are measured with a monotonic clock, and `status` does not take a time in the future as a sign of
    activity."""
    import torch

    reporter = loggers.RunLogger(tmp_path, 0, 1000, means=loggers.Means())
    monkeypatch.setattr(time, "time", lambda: -1e6)
    time.sleep(0.05)
    reporter.tick(100, {"phase": "8x8 stable", "alpha": 1.0}, torch.device("cpu"))
    monkeypatch.undo()
    line = json.loads((tmp_path / "stats.jsonl").read_text())
    assert 0 < line["img_per_sec"] < 100 / 0.05
    assert 0.05 <= line["elapsed_sec"] < 100
    assert line["eta_sec"] >= 0
    assert status._age([900.0, 5000.0], 1000.0) == 100.0
    assert status._age([5000.0], 1000.0) == 0.0
    assert status._age([], 1000.0) is None


def test_a_demo_that_is_stopped_ends_its_training(tmp_path):
    """The running part receives the signal. The demo ends after it and can be continued."""
    part = tmp_path / "part.py"
    part.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('checkpoint', flush=True), time.sleep(1), sys.exit(75)))\n"
        "print('training', flush=True)\n"
        "time.sleep(1000)\n"
    )
    program = f"""
        import signal, sys
        sys.path.insert(0, {str(ROOT / "demo")!r})
        import run
        signal.signal(signal.SIGTERM, run.stop)
        run.call({str(part)!r})
        print("next part")
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, **pipes)
    assert process.stdout
    while process.stdout.readline() != "training\n":
        assert process.poll() is None
    (child,) = psutil.Process(process.pid).children()
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert output == "checkpoint\n"
    assert gone([child])
