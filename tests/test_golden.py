"""Training computes the same numbers as when expected.json was recorded (tests/golden/record.py)."""

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest
import torch
from golden import reading

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """A folder with a recording of each case in expected.json."""
    out = tmp_path_factory.mktemp("golden")
    command = [sys.executable, str(GOLDEN / "record.py"), "--out", str(out), "--only", *EXPECTED]
    done = subprocess.run(command, capture_output=True, text=True, env=harness.environment())
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_stay_the_same(recordings, name):
    """Weights, their mean, optimizer state and losses of a small float64 run are equal up to rounding."""
    then, now = EXPECTED[name], reading.summary(json.loads((recordings / f"{name}.json").read_text()))
    # The draws are float32, whose last bits depend on the processor: between AVX2 and AVX-512 the sums differ by up to
    # 4e-7, and by more where there is no AVX2.
    tolerance = 1e-5 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 1e-4
    assert reading.unlike(then.pop("sums"), now.pop("sums"), tolerance) == []
    before, line = then.pop("last_line"), now.pop("last_line")  # to which statistics may have been added
    assert {key: line.get(key) for key in before} == pytest.approx(before, rel=100 * tolerance, abs=tolerance)
    assert now == then


def test_a_comparison_reports_differences():
    """Differences of numbers are separated from keys that only one version has, and from how a run was made."""
    tensors = {"G/a": {"shape": [2], "sha256": "1"}, "G/b": {"shape": [3], "sha256": "2"}}
    one = {"nimg": 8, "tensors": tensors, "state": {"pl_mean": 0.5, "old": 1}, "about": {"torch": "1"}}
    other = {"nimg": 8, "tensors": {"G/a": {"shape": [2], "sha256": "3"}}, "state": {"pl_mean": 0.25}, "about": {}}
    assert reading.differences(one, one) == ([], [])
    numbers, others = reading.differences(one, other)
    assert [line.partition(":")[0] for line in numbers] == [
        "state/pl_mean",
        "tensors/G/a/sha256",
        "tensors/G/b/sha256",
        "tensors/G/b/shape/0",
    ]
    assert [line.partition(":")[0] for line in others] == ["about/(empty)", "about/torch", "state/old"]


def test_sums_are_compared_with_a_tolerance():
    then = {"a": [4, 1e-9, 4.0], "b": [2, 1.0, 1.0]}
    assert (
        reading.unlike(then, {"a": [4, 2e-9, 4.0], "b": [2, 1.0, 1.0]}, 1e-9) == []
    )  # the difference is within the cancellation error
    for other in ([4, 1e-6, 4.0], [4, 1e-9, 4.00001], [3, 1e-9, 4.0], [4, float("nan"), 4.0]):
        (line,) = reading.unlike(then, then | {"a": other}, 1e-9)
        assert line.startswith("a: ")
    assert reading.unlike(then, {"a": then["a"]}, 1e-9) == ["b is in one of them only"]
