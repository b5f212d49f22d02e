"""Metrics during training: they do not change the training, select the best snapshot, and are drawn as curves."""

import json
import os
import signal
from unittest import mock

import harness
import numpy as np
import pytest

from stylegan_pg.config.loading import load_config
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.periodic import Periodic
from stylegan_pg.monitoring.figures import curves, draw_curves
from stylegan_pg.training.outputs import Outputs

# An extractor that fails on rank 1 only, and only once: at its first real image of 16x16.
FLAKY = """
import os

def make():
    state = {"done": False}

    def mean_colour(images):
        if images.shape[-1] == 16 and os.environ.get("RANK") == "1" and not state["done"]:
            state["done"] = True
            raise MemoryError("out of memory on this rank")
        return images.float().mean(dim=[2, 3])

    return mean_colour
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("_own_cache")
def test_evaluation_does_not_change_training(tiny_data, tmp_path, monkeypatch):
    """The run is the same bit for bit, also if a metric fails on one rank or lacks weights. The best snapshot and the
    curves are written."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    (tmp_path / "flaky.py").write_text(FLAKY)
    measured = {
        "metrics__every_kimg": 0.016,
        "metrics__names": "[fid32_full,swd,ppl2_wend8]",
        "metrics__extractor": "flaky:make",
        "metrics__images": 32,
    }
    runs, printed = {}, {}
    for name, changes in {"none": {}, "measured": measured}.items():
        runs[name] = tmp_path / name
        printed[name] = harness.finish(harness.start(harness.arguments(runs[name], tiny_data, **changes), ranks=2))
    harness.assert_same_run(runs["none"], runs["measured"])
    lost = "are incomplete: fid32_full: rank 1: out of memory on this rank; training goes on"
    assert printed["measured"].count(lost) == 1
    assert "are incomplete: ppl2_wend8: the weights of lpips are missing" in printed["measured"]
    assert printed["measured"].count("not measured until this is resolved: ppl2_wend8: the weights of lpips") == 1
    log = runs["measured"] / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 6
    assert all("swd" in row for row in rows)
    assert len([row for row in rows if "fid32_full@flaky:make" not in row]) == 1
    assert {row["images"] for row in rows} == {32}  # the name swd does not contain the number of images
    assert [row["nimg"] for row in rows] == [16, 32, 48, 64, 80, 96]
    last = [row for row in rows if row["resolution"] == 16 and "fid32_full@flaky:make" in row]
    best = min(last, key=lambda row: row["fid32_full@flaky:make"])
    link = runs["measured"] / "snapshots" / "best.safetensors"
    assert link.resolve().name == f"best-{best['nimg']:09d}img.safetensors"
    assert len(list(link.parent.glob("best-*"))) == 1
    draw_curves(log, tmp_path / "again.png")
    assert (runs["measured"] / "metrics.png").read_bytes() == (tmp_path / "again.png").read_bytes()


# A run with a given list of metric values. Each measurement takes the next value; None kills the process.
SCRIPTED = """
import json, os, signal, sys
from pathlib import Path
from stylegan_pg.__main__ import main
from stylegan_pg.metrics.periodic import Periodic

values, link = json.loads(sys.argv.pop(1)), Path(sys.argv.pop(1))

def measure(self, G, resolution, device, alpha):
    print("BEST", os.readlink(link) if link.is_symlink() else "", flush=True)
    value = values.pop(0)
    if value is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"fid20@pixels": value}

Periodic.measure = measure
main()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_the_best_snapshot_survives_a_kill(tiny_data, tmp_path):
    """Metrics are measured at snapshots. After a resume, only a better snapshot replaces the best one."""
    run = tmp_path / "run"
    link = run / "snapshots" / "best.safetensors"
    (tmp_path / "script.py").write_text(SCRIPTED)
    arguments = harness.arguments(
        run,
        tiny_data,
        **{"resolution": 8, "train__total_kimg": 0.08, "output__snapshot_kimg": 0.016},
        **{"metrics__at_snapshots": "true", "metrics__names": "[fid20]"},
    )

    def start(values: list[float | None], expected: int) -> list[str]:
        words = [json.dumps(values), str(link), *arguments]
        text = harness.finish(harness.start(words, script=tmp_path / "script.py"), expected)
        return [line.removeprefix("BEST").strip() for line in text.splitlines() if line.startswith("BEST")]

    first, second = "best-000000032img.safetensors", "best-000000064img.safetensors"
    assert start([3.0, 1.0, None], -signal.SIGKILL) == ["", "best-000000016img.safetensors", first]
    assert start([2.0, 0.5, 0.7], 0) == [first, first, second]
    assert link.resolve().name == second
    assert [path.name for path in link.parent.glob("best-*")] == [second]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["nimg"], row["fid20@pixels"]) for row in rows] == [
        (16, 3.0),
        (32, 1.0),
        (48, 2.0),
        (64, 0.5),
        (80, 0.7),
    ]
    assert sorted(path.name for path in link.parent.glob("0*")) == [
        f"{n:09d}img.safetensors" for n in range(16, 81, 16)
    ]


def test_a_log_that_cannot_be_read_does_not_end_training(tmp_path, caplog):
    """The values are logged, and the best snapshot stays as it is."""
    metrics, reporter, players = mock.Mock(), mock.Mock(), mock.Mock(nimg=2000, **{"current.batch": 8})
    metrics.measure.return_value, metrics.missing = {"swd": 1.0}, []
    metrics.is_best.side_effect = OSError("Input/output error")
    config = load_config(None, [f"run={tmp_path}", "data.url=y", "train.total_kimg=1", "metrics.images=50"])
    outputs = Outputs(config, mock.Mock(), players, metrics, reporter)
    outputs.measure()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "the metrics at 2.0 kimg are logged, but cannot be compared with others (Input/output error); training goes on"
    )
    assert reporter.metrics.call_args.kwargs["images"] == 50
    reporter.link_best.assert_not_called()


def test_curves_show_what_the_log_says(tmp_path):
    """There is one curve for each metric, from the lines that contain it. The figure is drawn again with each line."""
    log, picture = tmp_path / "metrics.jsonl", tmp_path / "metrics.png"
    rows = [
        {"nimg": 1000, "resolution": 8, "seconds": 1.5, "swd": 9.0, "swd_16": 8.0},
        {"nimg": 2000, "resolution": 8, "seconds": 1.5, "swd": 7.0, "swd_16": 6.0},
        {"nimg": 4500, "resolution": 16, "seconds": 1.5, "swd": 5.0, "swd_16": 4.0, "fid20@pixels": 3.0, "is20": 2.0},
    ]
    pictures = []
    for count in (1, 2, 3):
        log.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]) + '{"nim')
        figure = curves(log)
        assert figure is not None
        shown = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
        assert list(shown) == ["swd", "swd_16", *(["fid20@pixels", "is20"] if count == 3 else [])]
        for name, axes in shown.items():
            (line,) = axes.lines
            expected = [[row["nimg"] / 1000, row[name]] for row in rows[:count] if name in row]
            assert np.asarray(line.get_xydata()).tolist() == expected
        draw_curves(log, picture)
        pictures.append(picture.read_bytes())
    assert len(set(pictures)) == 3
    assert [path.name for path in tmp_path.glob("*.png*")] == ["metrics.png"]
    log.write_text('{"nimg": 1, "resolution": 8}\n')
    assert curves(log) is None


def test_the_best_value_so_far(tmp_path):
    """The first metric decides, within a resolution. Truncated lines and NaN are ignored."""
    config = load_config(
        None, ["run=x", "data.url=y", "resolution=16", "metrics.names=[fid20,swd]", "train.total_kimg=1"]
    )
    periodic, log = Periodic(config, mock.Mock()), tmp_path / "metrics.jsonl"
    best = []
    for resolution, value in ((8, 3.0), (16, 9.0), (16, float("nan")), (16, 8.0), (16, 8.0), (16, 8.5), (16, 2.0)):
        with log.open("a") as file:
            file.write(json.dumps({"nimg": 1, "resolution": resolution, "fid20@pixels": value}) + '\n{"nim\n')
        best.append(periodic.is_best(log, {"fid20_std@pixels": 0.0, "fid20@pixels": value}))
    assert best == [True, True, False, True, False, False, True]
    assert not periodic.is_best(tmp_path / "nothing", {"fid20": 1.0})
    with pytest.raises(UsageError, match=r"metrics\.best"):
        Periodic(load_config(None, ["run=x", "data.url=y", "train.total_kimg=1", "metrics.best=kid20"]), mock.Mock())
