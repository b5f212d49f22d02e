"""Training gives the numbers that it gave when expected.json was recorded (tests/golden/record.py)."""

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
    """Weights, their mean, optimiser state and losses of a small float64 run, to rounding."""
    then, now = EXPECTED[name], reading.summary(json.loads((recordings / f"{name}.json").read_text()))
    # The draws are float32, whose last bits depend on the processor where it has no AVX2.
    tolerance = 1e-9 if torch.backends.cpu.get_cpu_capability().startswith("AVX") else 1e-4
    assert reading.unlike(then.pop("sums"), now.pop("sums"), tolerance) == []
    assert now.pop("last_line") == pytest.approx(then.pop("last_line"), rel=100 * tolerance, abs=tolerance)
    assert now == then
