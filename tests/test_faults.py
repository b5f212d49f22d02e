"""Ranks that do not match, are lost or hang; kills at random times; and the report of `status`."""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import harness
import pytest
import torch
from campaigns import kills

from stylegan_pg.checkpoint import status_file
from stylegan_pg.config import Config
from stylegan_pg.distributed import consistency, launcher
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring import status
from stylegan_pg.monitoring.step_clock import stragglers

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SLURM_NTASKS": "2"}, ["SLURM_NTASKS=2", "a world of one", "WORLD_SIZE=1"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, ["OMPI_COMM_WORLD_SIZE=4"]),
        ({"MASTER_ADDR": "127.0.0.1"}, ["accelerate launch --cpu", "a world of one"]),
        ({"STYLEGAN_PG_WORLD": "2"}, ["a world of 1", "2 were asked for"]),
        ({"WORLD_SIZE": "2", "RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["without MASTER_ADDR"]),
        ({"WORLD_SIZE": "2", "RANK": "x"}, ["RANK='x'"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}, ["nowhere.invalid"]),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}, ["MASTER_PORT=0"]),
    ],
)
def test_impossible_ranks_and_world_sizes(env, words):
    with pytest.raises(UsageError) as caught:
        launcher.place(env)
    for word in words:
        assert word in str(caught.value)


def test_a_host_name_that_resolves_to_loopback(monkeypatch):
    """With several nodes, gloo would wait for connections that cannot be made."""
    env = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    monkeypatch.setattr(launcher.socket, "gethostname", lambda: "localhost")
    with pytest.raises(UsageError, match="GLOO_SOCKET_IFNAME"):
        launcher.place(env)
    assert launcher.place(env | {"GLOO_SOCKET_IFNAME": "eth0"}).rank == 1
    assert launcher.place(env | {"LOCAL_WORLD_SIZE": "4"}).rank == 1  # one node
    assert launcher.place({"WORLD_SIZE": "1", "SLURM_NTASKS": "8"}).world == 1  # the message names this remedy


def test_differences_between_ranks_are_named():
    mine: dict[str, Any] = consistency.facts(Config(run="/a"), "data") | {"host": "first"}
    assert consistency.differences([mine, mine | {"host": "second"}]) == ([], [])
    elsewhere = mine | {
        "config": consistency.facts(Config(run="/b"), "data")["config"]
    }  # paths may differ between ranks
    assert consistency.differences([mine, elsewhere]) == ([], [])
    seeds = mine | {"config": mine["config"] | {"seed": 5}}
    ((fault,), _) = consistency.differences([mine, mine, seeds])
    assert fault == "rank 2 (first) has another configuration: seed=5 where rank 0 has 0"
    ((fault,), _) = consistency.differences([mine, mine | {"dataset": "other"}])
    assert "other data" in fault
    faults, _ = consistency.differences([mine, mine | {"code": {"stylegan_pg": "0.0", "torch": mine["code"]["torch"]}}])
    assert "runs stylegan_pg 0.0" in faults[0]
    faults, (warning,) = consistency.differences([mine, mine | {"host": "late", "time": mine["time"] - 3600}])
    assert not faults
    assert "the clock of late is 3600 seconds behind that of first" in warning


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def ranks(commands: list[tuple[int, list[str]]], **env: str) -> list[tuple[int, str]]:
    """Start one process for each command line as the ranks of one run, without a launcher. Return their exit codes and
    output."""
    port = free_port()
    base = harness.environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | env
    started = [harness.start(args, env=base | {"RANK": str(rank)}) for rank, args in commands]
    return [(p.wait(), o) for p in started for o in (p.communicate(timeout=240)[0],)]


def test_ranks_with_different_configurations(tiny_data, tmp_path):
    args = harness.arguments(tmp_path / "run", tiny_data, train__timeout_sec=60)
    for code, output in ranks([(0, args), (1, [*args, "optim.g_lr=0.1"])]):
        assert code == 2, output
        assert "optim.g_lr=0.1 where rank 0 has 0.002" in output
        assert "Traceback" not in output


def test_ranks_with_different_engines(tiny_data, tmp_path):
    """Their first collective calls would not match."""
    args = harness.arguments(tmp_path / "run", tiny_data, train__timeout_sec=60)
    for code, output in ranks([(0, args), (1, [*args, "train.engine=deepspeed"])]):
        assert code == 2, output
        assert "train.engine=deepspeed where rank 0 has accelerate" in output


def test_two_processes_of_one_rank(tiny_data, tmp_path):
    """Two processes have rank 0 on one node, or two have rank 1. One of them gets the rank, and the other reports the
    conflict."""
    args = harness.arguments(tmp_path / "run", tiny_data, train__join_sec=40)
    results = ranks([(0, args), (0, args)])
    assert sorted(code for code, _ in results) == [1, 2], results
    (told,) = [output for code, output in results if code == 2]
    assert "the port is taken" in told
    (waited,) = [output for code, output in results if code == 1]
    assert "did not find each other within train.join_sec=40" in waited
    assert "Traceback" not in told + waited


def test_a_rank_that_hangs_ends_the_step_everywhere(tiny_data, tmp_path):
    """SIGSTOP closes no connection. The other rank gives up after the configured time."""
    run = tmp_path / "run"
    args = harness.arguments(run, tiny_data, train__timeout_sec=8, growth__stable_kimg_at="{16: 9}")
    port = free_port()
    env = harness.environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (harness.start(args, env=env | {"RANK": str(rank)}) for rank in range(2))
    try:
        end = time.time() + 180
        while harness.lines_of(run) < 3:
            assert time.time() < end
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.05)
        speeds = status_file.read(run).ranks
        assert [r["device"] for r in speeds] == ["cpu", "cpu"]
        assert all(r["img_per_sec"] > 0 for r in speeds)
        os.kill(second.pid, signal.SIGSTOP)
        stopped = time.time()
        output = harness.finish(first, 1, timeout=60)
        assert 4 < time.time() - stopped < 8 + 20
        assert "rank 0 lost the other ranks" in output
        facts = status.collect(run)
        assert facts["state"] == "failed"
        assert "lost the other ranks" in facts["last_faults"][-1]
    finally:
        second.kill()
        second.communicate()


@pytest.mark.slow
def test_kills_at_random_times(tiny_data, tmp_path):
    """These are six kills of tests/campaigns/kills.py, some of which occur while a file is written."""
    hits = kills.campaign(tmp_path, tiny_data, 6, seed=1)
    assert hits["checkpoints"] >= 1
    assert hits["snapshots"] >= 1


def test_usr1_stops_a_run_and_status_reports_it(tiny_data, tmp_path):
    run = tmp_path / "run"
    process = harness.start(harness.arguments(run, tiny_data, growth__stable_kimg_at="{16: 9}"))
    end = time.time() + 180
    while harness.lines_of(run) < 6:
        assert time.time() < end
        time.sleep(0.05)
    training = status.collect(run)
    assert training["state"] == "training"
    assert training["phase"] in ("8x8 stable", "16x16 fade")
    process.send_signal(signal.SIGUSR1)
    harness.finish(process, 75)
    result = harness.command("status", run, expected=0)
    nimg = harness.newest(run)[1]["nimg"]
    for word in ("stopped, to be continued", f"{nimg:012d}.safetensors", "img/s", "rank 0", "faults      0", "to go"):
        assert word in result.stdout, result.stdout
    harness.command("status", tmp_path, expected=2)


@pytest.mark.parametrize("world", ["1", "2"])
def test_remaining_threads_do_not_change_the_exit_code(world):
    """A process ends with its exit code, alone or as one of several ranks, whatever threads do when the interpreter
    exits. Its output and its exit handlers are not lost."""
    code = """if True:
        import atexit, ctypes, sys, torch
        libc = ctypes.CDLL(None)
        libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
        atexit.register(print, "handled")
        sys.argv = ["stylegan-pg", "train", "nowhere.yaml"]
        from stylegan_pg.__main__ import run
        run()
    """
    env = harness.environment() | {"WORLD_SIZE": world, "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode == 2
    assert "handled" in done.stdout
    assert "nowhere.yaml" in done.stderr


@pytest.mark.slow
def test_a_slow_rank_is_reported(tiny_data, tmp_path):
    """The other rank waits for it and is not reported as a straggler, except briefly on a busy machine."""
    assert harness.slowed(tiny_data, tmp_path).count([0]) <= 1
    facts = status.collect(tmp_path / "run")
    assert status.render(facts | {"stragglers": [1]}).count("STRAGGLER") == 1


class Event:
    """A CUDA event of an idle stream."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other) -> float:
        return 1000 * (other.at - self.at)


def test_waiting_time_of_a_gpu_is_measured_on_its_stream(monkeypatch):
    """It is measured between events of the stream, and only within steps, while the CPU continues."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    waiting, cuda, cpu = dist.Waiting(), torch.device("cuda"), torch.device("cpu")
    for counting, device, seconds in ((True, cuda, 3.0), (False, cuda, 5.0), (True, cuda, 4.0), (False, cpu, 1.0)):
        (waiting.go if counting else waiting.pause)()
        with waiting.within(device):
            Event.now += seconds
    assert waiting.take() == 7.0
    waiting.go()
    with waiting.within(cpu):
        time.sleep(0.05)
    assert 0.05 <= waiting.take() < 0.5
    assert waiting.take() == 0.0


def test_stragglers():
    def rank(seconds: float) -> dict:
        return {"own_sec_per_img": seconds}

    assert stragglers([rank(0.1), rank(0.11), rank(0.2), rank(0.1)]) == [2]
    assert stragglers([rank(0.1), rank(0.2)]) == [1]
    assert stragglers([rank(0.1), rank(0.0)]) == []
    assert stragglers([]) == []
