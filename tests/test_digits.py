"""The program that packs real digits, demo/digits.py."""

import subprocess
import sys

import harness
from conftest import ROOT

from stylegan_pg.data.datasets.opening import load_index


def test_digits_are_packed_in_two_parts_with_their_classes(tmp_path):
    command = [sys.executable, str(ROOT / "demo" / "digits.py"), str(tmp_path / "digits"), "--size", "16"]
    for _ in range(2):  # a second call changes nothing
        how = {"capture_output": True, "text": True, "env": harness.environment(), "timeout": 120}
        done = subprocess.run(command, **how)
        assert done.returncode == 0, done.stderr
        assert "CC BY 4.0" in done.stdout
    counts = {}
    for part in ("train", "held-out"):
        index = load_index(str(tmp_path / "digits" / part))
        assert list(index.label_names) == [str(i) for i in range(10)]
        assert (index.channels, index.resolutions) == (1, (16,))
        counts[part] = index.count
    assert counts == {"train": 1437, "held-out": 360}
    assert "UCI" in (tmp_path / "digits" / "CREDITS.txt").read_text()
