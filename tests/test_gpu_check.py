"""benchmarks/gpu_check.py, which asks a GPU everything, on a CPU with the smallest sizes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


def checked(*options: str) -> tuple[int, list[dict], str]:
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, rows, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "cases"),
    [
        ("resume", ["resume deterministic"]),
        ("train", ["train 16 batch 4", "train 16 batch 4 replayed"]),
        ("replay", ["replay bits"]),
        ("recipes", ["recipe stylegan3-t-256 batch 4", "recipe r3gan-ffhq256 batch 4"]),
        ("tests", ["tests gpu"]),
    ],
)
def test_a_check(check, cases):
    code, rows, text = checked("--device", "cpu", "--tiny", "--only", check)
    assert [row["case"] for row in rows] == cases, text
    assert all(row["ratio"] > 0 for row in rows), text
    assert code == 0


def test_what_fails_or_takes_too_long_is_a_row():
    code, rows, text = checked("--device", "cpu", "--tiny", "--only", "resume", "--minutes", "0.1")
    assert code == 1
    assert [row["about"] for row in rows] == ["stopped after 6 s"], text
    code, rows, _ = checked("--device", "cpu", "--tiny", "--only", "resume", "--minutes", "0")
    assert (code, rows[0]["about"]) == (1, "not begun: no time was left")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_one_message():
    code, rows, text = checked()
    assert (code, rows) == (2, [])
    assert text == "there is no CUDA device here; --device cpu --tiny tries the script\n"
