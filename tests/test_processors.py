"""How many processors there are, and that threads sleep while they wait where processors are shared."""

import os
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
import torch

from stylegan_pg import processors
from stylegan_pg.monitoring.step_clock import IdleDevice, Shortage, shortage
from stylegan_pg.processors import Snapshot

ALLOWED = len(os.sched_getaffinity(0))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/cpu.max": "max 100000\n"}
V1 = {"proc/self/cgroup": "3:cpu,cpuacct:/job\n2:memory:/other\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ALLOWED),
        (V2, ALLOWED),
        (V2 | {"sys/fs/cgroup/job/cpu.max": "50000 100000\n"}, 0.5),  # the group above has the quota
        ({"sys/fs/cgroup/cpu.max": "75000 50000\n"}, min(1.5, ALLOWED)),  # as in a container
        (V2 | {"sys/fs/cgroup/cpu.max": "damaged\n"}, ALLOWED),
        (V1 | {"sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "-1"}, ALLOWED),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "20000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            },
            0.2,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "60000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.6,
        ),
    ],
)
def test_quotas_of_control_groups_count(tmp_path, files, expected):
    root = write(tmp_path, files)
    assert processors.limit(root) == pytest.approx(expected)
    assert processors.count(root) == max(int(expected), 1)


def test_the_affinity_mask_counts():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from stylegan_pg import processors; print(processors.count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def chosen(
    monkeypatch, tmp_path, environment: dict[str, str], busy: float | None, allowed: int = 4, files=None
) -> tuple[str, dict[str, str]]:
    """What is decided on a machine on which other processes have used so many processors."""
    monkeypatch.setattr(processors, "_allowed", lambda: list(range(allowed)))
    monkeypatch.setattr(processors, "snapshot", lambda root: Snapshot(10.0, busy, 0.0))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    environment = dict(environment)
    reason = processors.choose_waiting(Snapshot(9.0, 0.0, 0.0), environment, write(tmp_path, files or {}))
    return reason, environment


@pytest.mark.parametrize(
    ("environment", "busy", "sleeps"),
    [
        ({}, 0.0, False),
        ({}, 0.2, False),  # the machine's usual noise
        ({}, 1.0, True),
        ({}, 4.0, True),
        ({}, None, False),
        ({"OMP_NUM_THREADS": "2"}, 1.0, False),  # the others leave enough
        ({"OMP_NUM_THREADS": "2"}, 3.0, True),
        ({"OMP_NUM_THREADS": "1"}, 4.0, False),  # one thread waits for nobody
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "2"}, 4.0, False),  # the others may be the other rank
        ({"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "3"}, 0.0, True),
    ],
)
def test_threads_sleep_where_processors_are_shared(monkeypatch, tmp_path, environment, busy, sleeps):
    reason, after = chosen(monkeypatch, tmp_path, environment, busy)
    assert after.get("OMP_WAIT_POLICY") == ("passive" if sleeps else None)
    assert bool(reason) == sleeps


@pytest.mark.parametrize("name", processors.CHOSEN_BY_USER)
def test_the_user_s_own_setting_wins(monkeypatch, tmp_path, name):
    reason, after = chosen(monkeypatch, tmp_path, {name: "active"}, 4.0)
    assert (reason, after) == ("", {name: "active"})


def test_a_quota_sets_the_number_of_threads(monkeypatch, tmp_path):
    files = {"sys/fs/cgroup/cpu.max": "200000 100000\n"}
    assert chosen(monkeypatch, tmp_path, {}, 0.0, files=files) == ("", {"OMP_NUM_THREADS": "2"})
    given = {"OMP_NUM_THREADS": "4"}
    reason, after = chosen(monkeypatch, tmp_path, given, 0.0, files=files)
    assert reason == "4 threads share 2 processors"
    assert after == given | {"OMP_WAIT_POLICY": "passive"}


@pytest.fixture
def competitors():
    """One busy process for each processor."""
    found = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(ALLOWED)]
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.mark.distributed
def test_busy_processes_are_seen(competitors):
    """By the readings of the kernel, and by a thread that has to wait for them."""
    before, waiting = processors.snapshot(), processors.ProcessorQueue()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    free = processors.idle(before, processors.snapshot())
    assert free is not None
    assert free < ALLOWED - 0.5
    assert 0 < waiting.take() < 1
    assert processors.idle(before, before) is None  # too short a time to count in


@pytest.mark.skipif(ALLOWED < 2, reason="needs two processors, for two threads that wait for each other")
@pytest.mark.distributed
def test_a_command_beside_busy_processes_tells_its_threads_to_sleep(competitors):
    """The setting is in the environment of the process before PyTorch is imported."""
    code = "import os, sys; sys.argv = ['stylegan-pg', 'configs']\nfrom stylegan_pg import __main__ as m, processors\n"
    code += "try:\n    m.main()\nexcept SystemExit:\n    print(os.environ.get('OMP_WAIT_POLICY'), processors.reason)"
    environment = {k: v for k, v in harness.environment().items() if k not in processors.CHOSEN_BY_USER}
    environment["OMP_NUM_THREADS"] = str(ALLOWED)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1].startswith("passive other processes leave")


def test_a_lasting_shortage_is_noted_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    noted, ranks = Shortage(), [{"queued": 0.1}, {"queued": 0.6}]
    noted.look(ranks)
    assert not caplog.messages  # the run has just begun
    noted.since -= 61
    noted.look([{"queued": 0.2}, {}])
    noted.look(ranks)
    noted.look(ranks)
    (message,) = caplog.messages
    assert message.startswith("note: the threads of rank 1 wait 60 % of their time for a processor")
    assert "OMP_WAIT_POLICY=passive, " in message


def test_a_device_that_waits_for_its_host(monkeypatch):
    idle, answers = IdleDevice(torch.device("cuda")), [True, False, False, True, True]

    class Stream:
        def query(self) -> bool:
            return answers.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for _ in range(5):
        idle.look()
    assert (idle.take(), idle.take()) == (0.6, 0.0)
    IdleDevice(torch.device("cpu")).look()
    assert shortage([{"queued": 0.1, "idle": 0.1}, {"idle": 0.6}]).startswith(
        "the device of rank 1 waits 60 % of its time for the host: train.graphs=auto"
    )
    assert shortage([{"idle": 0.2}, {}]) == shortage([]) == ""
