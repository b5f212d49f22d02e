"""The code of docs/extending.md runs exactly as it is written there."""

import re
import signal
import subprocess
import sys

import harness
import pytest
from conftest import ROOT

from stylegan_pg import load_snapshot
from stylegan_pg.data.datasets.opening import load_index


@pytest.fixture(scope="module")
def code():
    """The names that the code blocks of the document define, which are run in order."""
    text = (ROOT / "docs" / "extending.md").read_text("utf-8")
    names: dict = {"__name__": "extending"}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    return names


def test_a_dataset(code, tmp_path):
    index = load_index(str(code["example_dataset"](tmp_path)))
    assert (index.count, list(index.label_names)) == (16, ["dark", "light"])


@pytest.mark.parametrize(
    ("example", "network"),
    [
        ("example_pair", "Generator"),
        ("example_loss", "Generator"),
        ("example_system", "Generator"),
        ("example_fields", "Enlarger"),
        ("example_heads", "Conditional"),
        ("example_state", "Generator"),
    ],
)
def test_an_example(code, tiny_data, tmp_path, example, network):
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    assert code[example](run, tiny_data) == 0
    assert signal.getsignal(signal.SIGINT) is before  # the caller's handler is restored
    (snapshot,) = (run / "snapshots").glob("*.safetensors")
    G = load_snapshot(snapshot, network=code[network])
    assert G.description["network"] == f"extending.{network}"
    assert list((run / "samples").glob("fakes-*.png"))
    numbers = [line for line in (run / "stats.jsonl").read_text().splitlines() if "loss_g" in line]
    assert numbers


def test_the_example_of_sixty_lines(tmp_path):
    """It runs on real digits for a few steps, and is resumed."""
    command = [sys.executable, str(ROOT / "examples" / "minimal_gan.py"), str(tmp_path / "digits"), "data.workers=0"]
    for kimg in (0.64, 1.28):
        how = {"capture_output": True, "text": True, "env": harness.environment(), "timeout": 240}
        done = subprocess.run([*command, f"train.total_kimg={kimg}"], **how)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].endswith("images of shape [4, 1, 8, 8]")
    assert "continuing from" in done.stderr
