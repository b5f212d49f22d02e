"""Small training runs in separate processes, for tests that observe them from outside."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import forkserver
import torch

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.config import MODELS
from stylegan_pg.config.families import fields_of
from stylegan_pg.monitoring import status

# The run grows from 8x8 over a fade to 16x16. Every kind of step occurs within the first batches.
TINY = {
    "resolution": 16,
    "seed": 3,
    "data.workers": 0,
    "model.z_dim": 16,
    "model.w_dim": 16,
    "model.mapping_layers": 2,
    "model.channel_base": 128,
    "model.channel_max": 8,
    "growth.start": 8,
    "growth.stable_kimg": 0.032,
    "growth.fade_kimg": 0.032,
    "train.batch": 8,
    "train.threads": 1,
    "loss.r1_every": 2,
    "loss.r1_gamma": 1,
    "loss.pl_every": 2,
    "output.tick_kimg": 0.008,
    "output.grid_kimg": 0.032,
    "output.grid": "[2,2]",
    "output.snapshot_kimg": 0,
    "output.trackers": "[]",
    "checkpoint.every_kimg": 0.016,
}
# On top of that, where runs are compared step by step: nothing depends on how a batch is dealt out, and each step's
# checkpoint is kept.
COMPARABLE = {
    "model__noise": "false",
    "output__grid_kimg": 0,
    "checkpoint__keep": 100,
    "checkpoint__every_kimg": 0.008,
}
TIMES = ("img_per_sec", "eta_sec", "elapsed_sec", "memory_mib")


def arguments(run: Path, data: Path, **changes: object) -> list[str]:
    """Return `train` and its overrides for a tiny run. A double underscore stands for a dot."""
    config = run.parent / f"{run.name}.yaml"
    config.write_text(f"run: {run}\ndata: {{url: {data}}}\n")
    given = {k.replace("__", "."): v for k, v in changes.items()}
    values = own_keys(TINY | given, str(given.get("model.name", "stylegan2")))
    return ["train", str(config), *(f"{k}={v}" for k, v in values.items())]


def own_keys(values: dict[str, Any], model: str) -> dict[str, Any]:
    """`values` without those keys of `model` that the networks of that name do not have."""
    sections = {key: key.partition(".")[2] for key in values if key.startswith("model.")}
    foreign = {key for key, name in sections.items() if name not in fields_of(MODELS[model])}
    return {key: value for key, value in values.items() if key not in foreign}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(
    args: list[str], ranks: int = 0, fresh: bool = False, script: Path | None = None, **popen: Any
) -> subprocess.Popen[str]:
    """Start the command line, with `ranks` processes under a launcher. With `fresh`, use a new interpreter, and
    torchrun. `script` is a Python program that runs instead, and may import the same modules as the command line."""
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()}
    how |= popen
    if not fresh and forkserver.can_start(**how):
        return cast("subprocess.Popen[str]", forkserver.start(args, ranks=ranks, script=str(script or ""), **how))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    program = [str(script)] if script else ["-m", "stylegan_pg"]
    return subprocess.Popen([sys.executable, *launcher, *program, *args], **how)


def command(*args: object, expected: int | None = None, **popen) -> subprocess.CompletedProcess[str]:
    """Run the command line as `start` does, wait for its end, and return output and errors separately."""
    how: dict[str, Any] = {"stderr": subprocess.PIPE} | popen
    process = start([str(arg) for arg in args], **how)
    try:
        output, errors = process.communicate(timeout=300)
    except BaseException:
        process.kill()
        raise
    assert expected in (None, process.returncode), f"exit code {process.returncode}:\n{output}\n{errors}"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def finish(process: subprocess.Popen[str], expected: int = 0, timeout: float = 240) -> str:
    """Wait for a process, check its exit code, and return its output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout} s:\n{output}") from None
    assert process.returncode == expected, f"exit code {process.returncode}:\n{output}"
    return output


def lines_of(run: Path) -> int:
    """Return the number of ticks that a run has logged."""
    file = run / "stats.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def kill_until_done(args: list[str], run: Path, dice: random.Random, most: int = 1000) -> int:
    """Start a run repeatedly, and kill it each time (SIGKILL, with its workers) after a few random steps, until it
    ends. Return the number of kills."""
    kills = 0
    while True:
        process = start(args, start_new_session=True)
        goal = lines_of(run) + dice.randint(1, 4) if kills < most else 1 << 30
        while process.poll() is None and lines_of(run) < goal:
            time.sleep(0.02)
        time.sleep(dice.random() * 0.1)
        if process.poll() is not None:
            finish(process)
            return kills
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1


def slowed(data: Path, folder: Path, **changes: object) -> list[list[int]]:
    """Run two ranks of which rank 1 is stopped half of the time, as if it shared its core. Return the stragglers that
    `status` reports at each tick, until this has been rank 1 three times."""
    run = folder / "run"
    args = arguments(run, data, **{"growth__stable_kimg_at": "{16: 99}", "output__tick_kimg": 0.16} | changes)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = environment() | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(args, env=env | {"RANK": f"{i}", "LOCAL_RANK": f"{i}"}) for i in range(2)]
    told: list[list[int]] = []
    end = time.time() + 240
    try:
        while told.count([1]) < 3:
            seen = lines_of(run)
            while lines_of(run) == seen:
                assert time.time() < end, told
                ended = [process for process in ranks if process.poll() is not None]
                assert not ended, ended[0].communicate()[0]
                for sign in (signal.SIGSTOP, signal.SIGCONT) if seen > 1 else (signal.SIGCONT,):
                    ranks[1].send_signal(sign)
                    time.sleep(0.05)
            told.append(status.collect(run)["stragglers"] if seen > 1 else [])
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    return told


def newest(run: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return checkpoint.read(checkpoint.found(run / "checkpoints")[0])


def stats(run: Path) -> list[dict]:
    """Return the lines of stats.jsonl without values that measure time and memory."""
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Check that weights, EMA, optimizers, running means and logs of two runs are equal, bit for bit."""
    (tensors_a, state_a), (tensors_b, state_b) = newest(a), newest(b)
    assert tensors_a.keys() == tensors_b.keys()
    different = [name for name, t in tensors_a.items() if not torch.equal(t, tensors_b[name])]
    assert not different, f"{len(different)} tensors differ, such as {different[:3]}"
    for key in ("nimg", "phase", "training", "system", "means", "bad_samples"):
        assert state_a[key] == state_b[key], key
    assert stats(a) == stats(b)
    pictures = sorted(p.name for p in (a / "samples").glob("*"))
    assert pictures == sorted(p.name for p in (b / "samples").glob("*"))
    for name in pictures:
        assert (a / "samples" / name).read_bytes() == (b / "samples" / name).read_bytes(), name


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], part: str = "") -> float:
    """Return the largest difference of all tensors whose names start with `part`, relative to each tensor's largest
    magnitude."""
    worst = 0.0
    for name, t in a.items():
        if name.startswith(part):
            scale = max(float(t.abs().max()), 1e-12)
            worst = max(worst, float((t.double() - b[name].double()).abs().max()) / scale)
    return worst
