"""Metrics that cannot be measured are omitted one by one, with a reason; at the start of training if possible."""

import csv
import json
import sys
from pathlib import Path

import harness
import pytest

from stylegan_pg.__main__ import main

# Extractors of a user, each with a different mistake.
WRONG = """
import torch

def nan(): return lambda x: torch.full([len(x), 4], float("nan"))
def flat(): return lambda x: torch.zeros(len(x))
def listed(): return lambda x: [1.0] * len(x)
def imaginary(): return lambda x: torch.zeros(len(x), 4, dtype=torch.complex64)
def few(): return lambda x: torch.zeros(3, 4)
def fails():
    def call(x): raise ValueError("boom")
    return call
def growing():
    seen = []
    def call(x):
        seen.append(x)
        return torch.zeros(len(x), len(seen))
    return call
"""


@pytest.fixture
def measured(capsys, monkeypatch, tmp_path):
    """A function that runs the command and returns its exit code, the printed rows, and its messages."""
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(*arguments: object) -> tuple[int, list[dict], str]:
        monkeypatch.setattr(sys, "argv", ["stylegan-pg", "metrics", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed, messages = capsys.readouterr()
        assert "Traceback" not in messages
        assert (
            messages.count("error: ")
            == messages.count("\n") - messages.count("snapshot is taken")
            == bool(ended.value.code)
        )
        return int(ended.value.code or 0), [json.loads(line) for line in printed.splitlines()], messages

    return call


@pytest.mark.usefixtures("_own_cache")
def test_a_metric_that_cannot_be_measured_does_not_affect_the_others(tiny_data: Path, snapshot: Path, measured):
    how = [snapshot, "--data", tiny_data, "--extractor", "pixels", "--images", 8]
    code, (row,), messages = measured(*how, "--metrics", "swd,fid10k,kid8")
    assert code == 2
    assert {"swd", "kid8@pixels"} <= row.keys()
    assert messages.startswith("error: fid10k needs 10000 real images, the dataset has 96")
    code, rows, messages = measured(*how, "--metrics", "fid33,swd", "--per-class")  # each class has 32 images
    assert (code, [row["class"] for row in rows]) == (2, ["a", "b", "c"])
    assert all("swd" in row for row in rows)
    for name in "abc":
        assert f"class {name}: fid33 needs 33 real images, the class has 32" in messages


@pytest.mark.usefixtures("_own_cache")
def test_wrong_extractors(tiny_data: Path, snapshot: Path, measured):
    for name, message in {
        "nan": "not finite (NaN or infinity), for 8 of 8 images",
        "flat": "must return features of shape [8, d], not {'pool': [8]}",
        "listed": "tensors of real numbers, not list",
        "imaginary": "tensors of real numbers",
        "few": "must return features of shape [8, d], not {'pool': [3, 4]}",
        "fails": "the extractor wrong:fails failed: ValueError: boom",
        "growing": "of the same width d in every call, not 2 after 1",
        "absent": "cannot be loaded",
    }.items():
        names = ["--metrics", "fid8_full,swd", "--images", 8, "--extractor", f"wrong:{name}"]
        code, (row,), messages = measured(snapshot, "--data", tiny_data, *names)
        assert code == 2, name
        assert "swd" in row
        assert messages.startswith("error: fid8_full: ")
        assert message in messages


@pytest.mark.usefixtures("_own_cache")
def test_a_sweep_with_a_metric_whose_name_begins_another_name(tiny_data: Path, snapshot: Path, measured, tmp_path):
    names = "swd8,fid8_full,fid8_full_psi0.7,fid99"
    how = ["--data", tiny_data, "--extractor", "pixels", "--out", tmp_path, "--psi", "0:1:0.5"]
    code, (*rows, picture, table), messages = measured(snapshot, *how, "--metrics", names)
    assert code == 2
    assert "fid99 needs 99 real images" in messages
    assert len({row["fid8_full_psi0.7@pixels"] for row in rows}) == 1
    lines = list(csv.DictReader(Path(table["table"]).read_text().splitlines()))
    assert Path(picture["picture"]).is_file()
    assert [float(line["psi"]) for line in lines] == [0, 0.5, 1]
    for line, row, end in zip(lines, rows, ("_psi0", "_psi0.5", ""), strict=True):
        assert float(line["fid8_full@pixels"]) == row[f"fid8_full{end}@pixels"]
        assert float(line["fid8_full_psi0.7@pixels"]) == row["fid8_full_psi0.7@pixels"]
        assert float(line["swd8"]) == row[f"swd8{end}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1-2"], "a measurement has one seed"),
        (["--seeds", 2**32], "seeds lie between"),
        (["--metrics", "fid8", "--images", 5], "--images applies only to swd and ms_ssim"),
        (["--metrics", "fid" + "9" * 5000], "more than 10000000 images"),
        (["--metrics", ""], "unknown metric ''"),
        (["--neighbours", 10**9], "at most 1000 samples"),
        (["--psi", "0:1:0.5", "--out", __file__], "cannot be written"),
        (["--precision", "fp4"], "precision 'fp4'"),
        (["--device", "gpu"], "device 'gpu'"),
    ],
)
def test_invalid_options(tiny_data: Path, snapshot: Path, measured, arguments, message):
    code, rows, messages = measured(snapshot, "--data", tiny_data, *arguments)
    assert (code, rows) == (2, [])
    assert message in messages


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_a_run_warns_at_its_start_and_can_be_measured_by_its_folder(tiny_data: Path, tmp_path: Path, measured):
    """With a small dataset, a metric that can never be measured is named at the start, and file names contain images
    instead of kimg. Afterwards `metrics RUN` needs no --data."""
    run = tmp_path / "run"
    how = {"resolution": 8, "train__total_kimg": 0.016, "output__grid_kimg": 1, "output__snapshot_kimg": 1}
    how |= {"metrics__every_kimg": 1, "metrics__names": "[fid10k,swd]", "metrics__images": 8}
    printed = harness.finish(harness.start(harness.arguments(run, tiny_data, **how)))
    before, _, after = printed.partition("0.008/0.016 kimg")
    assert before.count("metrics.names: fid10k needs 10000 real images, the dataset has 96") == 1
    assert "fid10k" not in after
    assert '"swd"' in (run / "metrics.jsonl").read_text()
    names = sorted(path.name for path in run.glob("s*/*[0-9]*img.*"))
    assert names == [
        "000000kimg016img.safetensors",
        *("best-000000kimg016img.safetensors", "fakes-000000kimg.png", "fakes-000000kimg016img.png"),
    ]
    code, (row,), messages = measured(run, "--images", 8)
    assert code == 0
    assert row["snapshot"] == str(run / "snapshots" / "best-000000kimg016img.safetensors")
    assert "its best snapshot is taken" in messages
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_data), f"pipe:touch {tmp_path}/executed"))
    code, rows, messages = measured(run)
    assert (code, rows) == (2, [])
    assert not (tmp_path / "executed").exists()
