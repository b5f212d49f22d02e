"""How the launch scripts interpret a cluster's variables and files: variables of other launchers, hostfiles, ports."""

import os
import socket
import subprocess
import sys

import clusters
import pytest
from clusters import LAUNCH
from test_environment import points

# A replacement of Python that prints the arguments for DeepSpeed's launcher.
STAND_IN = """#!/bin/bash
case "$*" in
*deepspeed.launcher.runner*) ;;
*) exec {python} "$@" ;;
esac
while [ $# -gt 0 ]; do
    [ "$1" != --hostfile ] || cat "$2"
    [ "$1" != --master_addr ] || echo "HEAD=$2"
    shift
done
echo "NPROC=$NPROC WORLD=$STYLEGAN_PG_WORLD"
"""


def script(name: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    how = {"capture_output": True, "text": True, "timeout": 180, "env": clusters.environment(**env)}
    return subprocess.run([str(LAUNCH / name), *args], **how)


@pytest.mark.distributed
def test_kubeflows_variables_are_hidden_from_torchrun_on_one_node(tmp_path):
    """They would make it wait forever for a second node."""
    pet = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "nowhere.invalid", "PET_MASTER_PORT": "29500"}
    pet |= {"PET_NPROC_PER_NODE": "1", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "nowhere.invalid:29500"}
    told = script("single.sh", *points(tmp_path / "run")[1:], **pet)
    assert told.returncode == 0, told.stderr
    assert "note: PET_NNODES=2 has no effect, because NNODES=1" in told.stderr
    assert "note: PET_RDZV_BACKEND has no effect here" in told.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("*.safetensors"))


def test_kubeflows_variables_are_used_on_several_nodes():
    for name in ("torchrun.sh", "accelerate.sh"):
        where = {"PET_MASTER_ADDR": "nowhere.invalid", "NAME_TIMEOUT": "0"}
        told = script(name, "demo", PET_NNODES="2", PET_NODE_RANK="1", **where)
        assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
        assert "HEAD=nowhere.invalid is not known" in told.stderr
    told = script("torchrun.sh", "demo", PET_NNODES="2", PET_RDZV_ENDPOINT="gone.invalid:29500", NAME_TIMEOUT="0")
    assert "HEAD=gone.invalid is not known" in told.stderr
    told = script("torchrun.sh", "demo", PET_NNODES="2", HEAD="ours.invalid", PET_MASTER_ADDR="x", NAME_TIMEOUT="0")
    assert "HEAD=ours.invalid is not known" in told.stderr


def test_ports_in_use_and_invalid_numbers(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (tmp_path / "hosts").write_text("127.0.0.1 slots=2\n")
        cases = [
            ("accelerate.sh", {"NPROC": "2", "PORT": port}, f"PORT={port} is taken"),
            ("accelerate.sh", {"NNODES": "2", "HEAD": "127.0.0.1", "PORT": port}, f"PORT={port} is taken"),
            ("deepspeed.sh", {"HOSTFILE": str(tmp_path / "hosts"), "NODE_RANK": "0", "PORT": port}, "is taken"),
            ("accelerate.sh", {"ACCELERATE_CONFIG": "/nowhere.yaml"}, "there is no ACCELERATE_CONFIG=/nowhere.yaml"),
            ("torchrun.sh", {"MAX_RESTARTS": "few"}, "MAX_RESTARTS=few is no whole number"),
            ("single.sh", {"STOP_GRACE": "-1"}, "STOP_GRACE=-1 is no whole number"),
            ("supervise.sh", {"TRIES": "x"}, "TRIES=x is no whole number"),
        ]
        for name, env, words in cases:
            told = script(name, "demo", **env)
            assert (told.returncode, told.stderr.count("\n")) == (2, 1), told.stderr
            assert words in told.stderr


@pytest.mark.distributed
def test_accelerate_ignores_variables_of_other_launchers(tmp_path):
    stray = {"RANK": "3", "WORLD_SIZE": "7", "MASTER_ADDR": "nowhere.invalid", "LOCAL_RANK": "2", "SLURM_NTASKS": "2"}
    told = script("accelerate.sh", *points(tmp_path / "run")[1:], NPROC="1", **stray)
    assert told.returncode == 0, told.stderr


@pytest.mark.parametrize(
    ("text", "rank", "words"),
    [
        ("# c\n\ta\t slots = 2 # x\r\n \nb slots=3\r\n#x", "", ["a slots=2", "b slots=3", "HEAD=a", "NPROC=2 WORLD=5"]),
        ("\ufeffa slots=2\nb slots=3", "1", ["HEAD=a", "NPROC=3 WORLD=5"]),
        ("a slots=2\nb\n", "", ["line 2: b: a line is like 'node1 slots=8'"]),
        ("a slots=2\nb slots=0\n", "", ["line 2: b slots=0"]),
        ("a slots=2\n\na slots=2\n", "", ["line 3: a is there twice"]),
        ("# nothing\n\t\r\n", "", ["no line like 'node1 slots=8'"]),
        ("a slots=2\n", "1", ["NODE_RANK=1, but", "has 1 nodes, counted from 0"]),
        ("a slots=2\n", "first", ["NODE_RANK=first is no whole number"]),
    ],
)  # fmt: skip
def test_hostfiles(text, rank, words, tmp_path):
    """Blanks, comments and line endings of any style are accepted. Errors name the line."""
    (tmp_path / "hosts").write_text(text, "utf-8", newline="")
    (tmp_path / "python").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    env = {"HOSTFILE": str(tmp_path / "hosts"), "PYTHON": str(tmp_path / "python"), "TMPDIR": str(tmp_path)}
    told = script("deepspeed.sh", "demo", **env, **({"NODE_RANK": rank} if rank else {}))
    good = words[-1].startswith("NPROC")
    assert told.returncode == (0 if good else 2), told.stderr
    assert told.stderr.count("\n") == (0 if good else 1)
    for word in words:
        assert word in (told.stdout.splitlines() if good else told.stderr)
    assert sorted(os.listdir(tmp_path)) == ["hosts", "python"]
