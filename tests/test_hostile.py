"""A small sample of the campaign against hostile files; tests/campaigns/hostile.py says what it looks for."""

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "campaigns" / "hostile.py"
CASES = {
    "tar": 300,
    "zip": 100,
    "index": 300,
    "labels": 150,
    "fields": 200,
    "parts": 150,
    "captions": 100,
    "configuration": 60,
    "checkpoint": 40,
    "snapshot": 150,
    "weights": 300,
    "pickle": 600,
    "torch": 400,
    "public": 200,
    "pictures": 100,
    "run": 150,
    "server": 40,
    "again": 100,
    "netrc": 200,
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_hostile_files_end_in_one_message(name):
    done = subprocess.run(
        [sys.executable, CAMPAIGN, name, "--cases", str(CASES[name]), "--seed", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{CASES[name]} cases" in done.stdout
    assert "refused 0," not in done.stdout, done.stdout  # otherwise nothing was mutated
