"""Counting operations: launches, reads by the host, and what a step of training makes of them."""

import json
import subprocess
import sys

import harness
import pytest
import torch
from conftest import ROOT

from stylegan_pg.planning.operations import Operations


def made(function) -> Operations:
    x = torch.ones(3, 4)
    with Operations() as operations:
        function(x)
    return operations


def test_what_computes_is_a_launch_and_a_view_is_none():
    operations = made(lambda x: (x.t()[1:].reshape(-1) * 2).sum())
    assert operations.made == [("clone", ((3, 3),)), ("mul", ((9,),)), ("sum", ((9,),))]
    assert operations.counts() == {"clone": 1, "mul": 1, "sum": 1}


def test_the_backward_pass_counts():
    weight = torch.ones(3, 4, requires_grad=True)
    names = [name for name, _ in made(lambda x: (x * weight).sum().backward()).made]
    assert names == ["mul", "sum", "ones_like", "mul"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: float(x[0, 0]),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_the_host_reads_is_noticed(read):
    operations = made(read)
    assert len(operations.reads) == 1, operations.reads


def test_a_step_makes_few_operations():
    """The benchmark's cases, each with its count of operations."""
    command = [sys.executable, str(ROOT / "benchmarks" / "launches.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=harness.environment(), timeout=600)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in map(json.loads, done.stdout.splitlines()[-5:])}
    assert set(rows) == {"plain 64", "plain 256", "lazy 256", "progan 64", "stylegan 64"}
    most = {"plain 64": 700, "plain 256": 900, "lazy 256": 2400, "progan 64": 800, "stylegan 64": 890}
    assert {case: row["operations"] for case, row in rows.items() if row["operations"] > most[case]} == {}
    assert rows["lazy 256"]["operations"] > rows["plain 256"]["operations"] > rows["plain 64"]["operations"] > 100
    assert all(row["transfers"] <= 3 for row in rows.values())
    assert [row["host_reads"] for row in rows.values()] == [0] * 5
