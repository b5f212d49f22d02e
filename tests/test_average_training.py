"""Runs that keep power-function averages: what they store, how they are continued, and what the commands make of it."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import steady
import torch
from emulated_graphs import EmulatedGraphs
from PIL import Image
from snapshots import command
from test_engines import ZERO, deepspeed  # noqa: F401 - a fixture
from test_power_averages import step_profile
from test_readme import commands
from test_replay import assert_same, trained
from test_steady_steps import steps_of

from stylegan_pg.checkpoint import averages as files
from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.checkpoint.snapshot import read_snapshot, write_snapshot
from stylegan_pg.editing.averages import moment_of, post_hoc
from stylegan_pg.optim.profiles import gamma_of
from stylegan_pg.training.engine import Engine

# Phases of 24, 12 and 24 steps; averages are stored at every second step.
LONG = {"growth__stable_kimg": 0.192, "growth__fade_kimg": 0.096, "output__grid_kimg": 0}
KEPT = {"ema__profiles": "[0.05,0.08,0.1]", "ema__every_kimg": 0.016}
PHASES = {0: 0.192, 192: 0.288, 288: 0.48}  # nimg at the start: kimg at the end


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("averages") / "run"
    args = harness.arguments(folder, tiny_data, **LONG, **KEPT, checkpoint__every_kimg=0.12, checkpoint__keep=9)
    harness.finish(harness.start(args))
    return folder


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return harness.largest_difference(theirs, ours)


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_averages_are_stored_at_their_moments_and_begin_anew_with_each_phase(run):
    found = files.found(run / "averages")
    expected = [(nimg, w) for nimg in range(16, 481, 16) for w in (0.05, 0.08, 0.1)]
    assert [(one.nimg, one.width) for one in found] == expected
    for one in found:
        assert one.since == one.phase == max(start for start in PHASES if start < one.nimg)
        assert one.batch == 8
    fades = {one.nimg: one.description["alpha"] for one in found if one.since == 192}
    assert fades == pytest.approx({192 + 16 * i: i / 6 for i in range(1, 7)})


def test_the_checkpoint_holds_what_is_stored(run):
    tensors, state = harness.newest(run)
    assert state["nimg"] == 480
    assert state["averages"] == {"average0.05": 288, "average0.08": 288, "average0.1": 288}
    for width in (0.05, 0.08, 0.1):
        made, fit = post_hoc(run, width)
        assert fit.residual == 0
        assert relative(made.tensors, checkpoint.part_of(tensors, f"average{width:g}")) < 1e-6


def test_another_width_equals_the_one_that_was_tracked(run, tmp_path):
    """At the end of every phase, the fade included, 0.08 is made of the files of 0.05 and 0.1, and compared with its
    own file: parameters and buffers, to 1e-3 of the largest magnitude that each tensor has had in the phase. (Some
    begin at 0 and return there.) All together agree to 1e-6; the nearest stored width is far worse."""
    others = tmp_path / "run"
    shutil.copytree(run / "averages", others / "averages", ignore=shutil.ignore_patterns("width0.08-*"))
    for start, end in PHASES.items():
        made, fit = post_hoc(others, 0.08, end)
        assert fit.residual < 0.05
        stored = {
            (o.width, o.nimg): read_snapshot(o.path)[1] for o in files.found(run / "averages") if o.since == start
        }
        tracked, other = stored[0.08, round(end * 1000)], stored[0.1, round(end * 1000)]
        assert made.tensors.keys() == tracked.keys()
        for name, t in made.tensors.items():
            scale = max(float(state[name].abs().max()) for state in stored.values())
            assert float((t - tracked[name]).abs().max()) < 1e-3 * scale, name
        assert apart(made.tensors, tracked) < 1e-6
        assert apart(other, tracked) > 20 * apart(made.tensors, tracked)


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all parameters and buffers, relative to that of `b`."""
    squares = [[float(t.double().square().sum()) for t in (a[name] - b[name], b[name])] for name in b]
    difference, whole = map(sum, zip(*squares, strict=True))
    return (difference / whole) ** 0.5


def test_an_average_equals_the_weighted_sum_of_all_steps(tiny_data, monkeypatch):
    """By its definition, in float64, from the weights and buffers after every step."""
    seen: list[dict[str, torch.Tensor]] = []
    average = Engine.average

    def watched(self: Engine, step: Any) -> None:
        average(self, step)
        seen.append({name: t.double().clone() for name, t in self.state.G.state_dict().items()})

    monkeypatch.setattr(Engine, "average", watched)
    for dtype, near in (("float32", 1e-6), ("float64", 1e-12)):
        seen.clear()
        tensors, _, _ = trained(tiny_data, None, "ema.profiles=[0.03,0.2]", f"train.dtype={dtype}", phase=1)
        assert len(seen) == 14
        for width in (0.03, 0.2):
            profile = step_profile(gamma_of(width), 14, 14)
            mean = {n: torch.stack([w * s[n] for w, s in zip(profile, seen, strict=True)]).sum(dim=0) for n in seen[0]}
            assert relative(checkpoint.part_of(tensors, f"average{width:g}"), mean) < near


def test_averages_do_not_change_training(run, tiny_data, tmp_path):
    args = harness.arguments(tmp_path / "plain", tiny_data, **LONG)
    harness.finish(harness.start(args))
    plain, ours = harness.newest(tmp_path / "plain")[0], harness.newest(run)[0]
    assert {name for name, t in plain.items() if not torch.equal(t, ours[name])} == set()
    assert {name.partition("/")[0].partition("0")[0] for name in ours.keys() - plain.keys()} == {"average"}
    assert not (tmp_path / "plain" / "averages").exists()


# --- captured steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize(
    "overrides",
    [[], pytest.param(["model.name=r3gan", "loss.pl_weight=0"], marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_replayed_steps_have_the_same_bits(tiny_data, phase, overrides):
    graphs = assert_same(tiny_data, "ema.profiles=[0.05,0.1]", *overrides, phase=phase)
    assert isinstance(graphs, EmulatedGraphs)
    assert graphs.captures >= 5  # the averages among them
    assert graphs.replays > 0


def test_a_steady_step(tiny_data, monkeypatch):
    """The host neither reads from the device nor sends it anything within the operations of a step."""
    assert steady.problems(steps_of(tiny_data, monkeypatch, "ema.profiles=[0.05,0.1]")) == []


# --- stopping and continuing ------------------------------------------------------------------------------------------


def same_averages(a: Path, b: Path) -> None:
    names = sorted(path.name for path in (a / "averages").iterdir())
    assert names == sorted(path.name for path in (b / "averages").iterdir())
    for name in names:
        (_, ours), (_, theirs) = read_snapshot(a / "averages" / name), read_snapshot(b / "averages" / name)
        assert {n for n, t in ours.items() if not torch.equal(t, theirs[n])} == set(), name


@pytest.mark.parametrize(
    "at", [pytest.param(120, marks=pytest.mark.slow), 240, pytest.param(360, marks=pytest.mark.slow)]
)
def test_a_continued_run_has_the_same_averages(run, tiny_data, tmp_path, at):
    """From a checkpoint within each of the phases (240 is in the fade). There are files of later moments in the folder,
    one of which does not belong to the run."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in checkpoint.found(copy / "checkpoints"):
        if int(path.stem) > at:
            path.unlink()
    foreign = copy / "averages" / "width0.1-000000479img.safetensors"
    description, tensors = read_snapshot(copy / "averages" / "width0.1-000000480img.safetensors")
    write_snapshot(foreign, tensors, {**description, "nimg": 479})
    more = {"checkpoint__every_kimg": 0.12, "checkpoint__keep": 9}
    output = harness.finish(harness.start(harness.arguments(copy, tiny_data, **LONG, **KEPT, **more)))
    assert f"removed {foreign}" in output
    same_averages(run, copy)
    ours, theirs = harness.newest(run), harness.newest(copy)
    assert {name for name, t in ours[0].items() if not torch.equal(t, theirs[0][name])} == set()
    assert ours[1]["averages"] == theirs[1]["averages"]


@pytest.mark.distributed
@pytest.mark.slow
def test_kills_at_random_moments(run, tiny_data, tmp_path):
    import random

    copy = tmp_path / "run"
    args = harness.arguments(copy, tiny_data, **LONG, **KEPT)
    assert harness.kill_until_done(args, copy, random.Random(5), most=6) == 6
    same_averages(run, copy)


def test_a_width_that_is_added_begins_there(run, tiny_data, tmp_path, capsys, monkeypatch):
    """So do all averages where the checkpoint is of an earlier version or of a run without them. Widths that are taken
    away are forgotten."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in checkpoint.found(copy / "checkpoints"):
        if int(path.stem) > 360:
            path.unlink()
    changed = KEPT | {"ema__profiles": "[0.02,0.1]"}
    output = harness.finish(harness.start(harness.arguments(copy, tiny_data, **LONG, **changed)))
    assert "the average of width 0.02 begins here, as the checkpoint holds none" in output
    assert "width 0.1 begins" not in output
    found = [one for one in files.found(copy / "averages") if one.nimg > 360]
    assert {(one.width, one.since, one.phase) for one in found} == {(0.02, 360, 288), (0.1, 288, 288)}
    assert harness.newest(copy)[1]["averages"] == {"average0.02": 360, "average0.1": 288}
    assert {one.since for one in moment_of(copy).used} == {288}
    same = read_snapshot(copy / "averages" / "width0.1-000000480img.safetensors")[1]
    assert relative(same, read_snapshot(run / "averages" / "width0.1-000000480img.safetensors")[1]) == 0


def test_a_checkpoint_without_averages_is_continued(run, tiny_data, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("averages"))
    for path in checkpoint.found(copy / "checkpoints"):
        path.unlink()
    tensors, state = checkpoint.read(run / "checkpoints" / "000000000360.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.startswith("average")}
    del state["averages"], state["config"]["ema"]["profiles"], state["config"]["ema"]["every_kimg"]
    checkpoint.write(copy / "checkpoints" / "000000000360.safetensors", tensors, state)
    output = harness.finish(harness.start(harness.arguments(copy, tiny_data, **LONG, **KEPT)))
    assert output.count("begins here, as the checkpoint holds none") == 3
    ours, theirs = harness.newest(copy)[0], harness.newest(run)[0]
    different = {name.partition("/")[0] for name, t in ours.items() if not torch.equal(t, theirs[name])}
    assert all(part.startswith("average") for part in different)
    assert different
    made, _ = post_hoc(copy, 0.07)
    assert made.description["ema"]["since"] == 360


@pytest.mark.parametrize("change", ["shape", "rest", "since", "other phase"])
def test_a_checkpoint_whose_averages_do_not_fit_is_refused(run, tiny_data, tmp_path, change):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in checkpoint.found(copy / "checkpoints"):
        path.unlink()
    tensors, state = checkpoint.read(run / "checkpoints" / "000000000360.safetensors")
    name = next(name for name in tensors if name.startswith("average0.05/"))
    if change == "shape":
        tensors[name] = tensors[name][..., :0]
    elif change == "rest":
        tensors = {name: t for name, t in tensors.items() if not name.startswith("average0.05_rest/")}
    else:
        state["averages"]["average0.05"] = {"since": 361, "other phase": 191}[change]
    checkpoint.write(copy / "checkpoints" / "000000000360.safetensors", tensors, state)
    output = harness.finish(harness.start(harness.arguments(copy, tiny_data, **LONG, **KEPT)), 2)
    assert "average0.05" in output
    assert "Traceback" not in output


def test_a_run_that_is_complete_writes_what_is_missing(run, tiny_data, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    missing = copy / "averages" / "width0.08-000000480img.safetensors"
    missing.unlink()
    harness.finish(harness.start(harness.arguments(copy, tiny_data, **LONG, **KEPT)))
    same_averages(run, copy)
    output = harness.finish(harness.start(harness.arguments(copy, tiny_data, **LONG, ema__profiles="[0.2]")))
    assert "width 0.2 begins here" in output
    assert not list((copy / "averages").glob("width0.2-*"))  # it covers nothing


def test_a_disk_without_room_does_not_end_training(tiny_data, tmp_path):
    """A file stands where the folder should be."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "averages").write_text("")
    short = {"train__total_kimg": 0.032, "ema__profiles": "[0.05]", "ema__every_kimg": 0.016}
    output = harness.finish(harness.start(harness.arguments(folder, tiny_data, **short)), 1)
    assert output.count("could not be stored") == 2
    assert "training is complete, but its last snapshot" in output
    (folder / "averages").unlink()
    harness.finish(harness.start(harness.arguments(folder, tiny_data, **short)))
    assert [path.name for path in (folder / "averages").iterdir()] == ["width0.05-000000032img.safetensors"]


@pytest.mark.distributed
def test_two_ranks_equal_one_process_with_two_micro_batches(tiny_data, tmp_path):
    short = harness.COMPARABLE | {"train__total_kimg": 0.048, "ema__profiles": "[0.05,0.1]", "ema__every_kimg": 0.016}
    two = harness.arguments(tmp_path / "two", tiny_data, **short)
    one = harness.arguments(tmp_path / "one", tiny_data, train__micro_batch=4, **short)
    harness.finish(harness.start(two, ranks=2))
    harness.finish(harness.start(one))
    same_averages(tmp_path / "one", tmp_path / "two")
    assert len(list((tmp_path / "one" / "averages").iterdir())) == 6


@pytest.mark.distributed
@pytest.mark.slow
def test_deepspeed(tiny_data, tmp_path, deepspeed):  # noqa: F811 - the fixture
    short = harness.COMPARABLE | {"train__total_kimg": 0.048, "ema__profiles": "[0.05,0.1]", "ema__every_kimg": 0.016}
    for name, how in (("zero", ZERO), ("plain", {})):
        args = harness.arguments(tmp_path / name, tiny_data, **short, **how)
        harness.finish(harness.start(args, ranks=2))
    for path in (tmp_path / "zero" / "averages").iterdir():
        ours, theirs = read_snapshot(path)[1], read_snapshot(tmp_path / "plain" / "averages" / path.name)[1]
        assert relative(ours, theirs) < 1e-3


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(run, tmp_path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    return copy


def test_the_command_ema(copied, capsys, monkeypatch, tmp_path):
    code, printed, told = command(capsys, monkeypatch, "ema", copied, "--width", 0.07)
    assert (code, printed.strip()) == (0, str(copied / "snapshots" / "ema-0.07-000000480img.safetensors"))
    assert "of 36 stored averages" in told
    assert "warning" not in told
    out = tmp_path / "new" / "a.safetensors"
    code, printed, _ = command(capsys, monkeypatch, "ema", copied, "--width", 0.05, "--at", 0.192, "--out", out)
    assert (code, printed.strip()) == (0, str(out))
    stored = read_snapshot(copied / "averages" / "width0.05-000000192img.safetensors")[1]
    assert relative(read_snapshot(out)[1], stored) == 0
    folder = tmp_path / "pictures"
    code, printed, _ = command(capsys, monkeypatch, "sample", out, "--seeds", 1, "--out", folder)
    assert code == 0
    assert Image.open(printed.strip()).size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --width, such as"),
        (["--width", "0.07", "--sweep", "0.02:0.2:0.02"], "give --width, such as"),
        (["--width", "0.5"], "give a relative width from"),
        (["--width", "0.07", "--at", "9"], "there are no averages for 9 kimg"),
        (["--width", "0.07", "--at", "nan"], "--at nan is not possible"),
        (["--width", "0.07", "--out", "x.png"], "give the name of a file that ends in .safetensors"),
        (["--width", "0.07", "--out", "width0.1-000000480img.safetensors"], "would replace"),
        (["--sweep", "1:2:3"], "give FROM:TO:STEP"),
        (["--sweep", "0.05:0.1:0.05", "--metrics", "nonsense"], "unknown metric 'nonsense'"),
        (["--sweep", "0.05:0.1:0.05", "--data", "/nowhere"], "/nowhere"),
        (["--sweep", "0.05:0.1:0.05", "--metrics", "fid32"], "the weights of inception are missing"),
    ],
)
def test_wrong_options(run, capsys, monkeypatch, arguments, message):
    code, printed, told = command(capsys, monkeypatch, "ema", run, *arguments)
    assert code in (1, 2)
    assert message in told
    assert "Traceback" not in told
    assert printed == ""


def test_runs_without_averages(tmp_path, capsys, monkeypatch):
    (tmp_path / "snapshots").mkdir()
    for place, message in ((tmp_path, "holds no stored averages"), (tmp_path / "x", "no such folder")):
        code, _, told = command(capsys, monkeypatch, "ema", place, "--width", 0.07)
        assert code == 2
        assert message in told


def test_a_sweep(copied, capsys, monkeypatch):
    """The kept snapshot is the one of the best width, and `metrics` measures the same of it."""
    options = ["--sweep", "0.02:0.20:0.06", "--metrics", "swd,ms_ssim", "--images", 64, "--device", "cpu"]
    code, printed, _ = command(capsys, monkeypatch, "ema", copied, *options)
    assert code == 0
    head, *lines = [line for line in printed.splitlines() if not line.startswith(("picture", "table", "best"))]
    names = head.split()
    rows = [dict(zip(names, map(float, line.split()), strict=True)) for line in lines]
    assert names[:2] == ["width", "residual"]
    assert [row["width"] for row in rows] == [0.02, 0.08, 0.14, 0.2]
    assert rows[1]["residual"] == 0
    best = min(rows, key=lambda row: row["swd"])
    snapshot = copied / "snapshots" / f"ema-{best['width']:g}-000000480img.safetensors"
    assert f"best by swd: width {best['width']:g}, {snapshot}" in printed
    assert [path.name for path in (copied / "snapshots").glob("ema-*.safetensors")] == [snapshot.name]
    folder = copied / "snapshots" / "ema-sweep-000000480img"
    assert Image.open(folder / "widths.png").size[0] > 300
    with (folder / "widths.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["swd"]) for row in table] == pytest.approx([row["swd"] for row in rows], rel=1e-5)
    code, printed, _ = command(capsys, monkeypatch, "metrics", snapshot, "--metrics", "swd", "--images", 64)
    assert json.loads(printed)["swd"] == pytest.approx(best["swd"], rel=1e-5)


@pytest.mark.distributed
def test_a_sweep_on_two_ranks(copied, tmp_path):
    """It measures the same numbers as one process."""
    tables = []
    for ranks in (0, 2):
        out = tmp_path / f"best{ranks}.safetensors"
        args = ["ema", copied, "--sweep", "0.05:0.15:0.1", "--images", 96, "--at", 0.192, "--out", out]
        printed = harness.finish(harness.start([*map(str, args), "--device", "cpu"], ranks=ranks))
        assert f"best by swd: width 0.05, {out}" in printed or f"best by swd: width 0.15, {out}" in printed
        tables.append((tmp_path / f"best{ranks}-sweep" / "widths.csv").read_text())
    one, two = ([[*map(float, row.values())] for row in csv.DictReader(table.splitlines())] for table in tables)
    assert np.allclose(one, two, rtol=1e-5)


def test_a_sweep_in_a_fade(copied, capsys, monkeypatch):
    options = ["--sweep", "0.05:0.10:0.05", "--images", 32, "--at", 0.24, "--out", copied / "best.safetensors"]
    code, _, _ = command(capsys, monkeypatch, "ema", copied, *options)
    assert code == 0
    assert (copied / "best-sweep" / "widths.csv").is_file()
    assert read_snapshot(copied / "best.safetensors")[0]["alpha"] == 0.5


def test_the_command_average(copied, capsys, monkeypatch, tmp_path):
    paths = [copied / "averages" / f"width0.1-{nimg:09d}img.safetensors" for nimg in (432, 464, 480)]
    code, printed, _ = command(capsys, monkeypatch, "average", *paths, "--weights", "1,1,2")
    assert (code, printed.strip()) == (0, str(copied / "averages" / "average.safetensors"))
    states = [read_snapshot(path)[1] for path in paths]
    mean = {name: (states[0][name] + states[1][name] + 2 * t) / 4 for name, t in states[2].items()}
    assert relative(read_snapshot(Path(printed.strip()))[1], mean) < 1e-6
    assert len(files.found(copied / "averages")) == 90  # it is none of them
    out = tmp_path / "mean.safetensors"
    code, printed, told = command(capsys, monkeypatch, "average", copied, copied, "--out", out)
    assert (code, printed.strip()) == (0, str(out))
    assert "its newest snapshot is taken" in told
    newest = read_snapshot(copied / "snapshots" / "000000kimg480img.safetensors")[1]
    assert relative(read_snapshot(out)[1], newest) < 1e-7
    before = paths[0].read_bytes()
    for arguments, message in (
        ([paths[0], copied / "averages" / "width0.1-000000192img.safetensors"], "has another network"),
        ([paths[0], tmp_path / "none.safetensors"], "no such file"),
        ([paths[0], checkpoint.found(copied / "checkpoints")[0]], "is not a snapshot"),
        ([*paths, "--weights", "1,2"], "give 3 numbers"),
        ([*paths, "--out", paths[0]], "would replace"),
        ([*paths, "--out", tmp_path], "give the name of a file"),
    ):
        code, printed, told = command(capsys, monkeypatch, "average", *arguments)
        assert (code, printed) == (2, "")
        assert message in told
        assert "Traceback" not in told
    assert paths[0].read_bytes() == before


def test_the_commands_of_the_documents(copied, capsys, monkeypatch):
    monkeypatch.chdir(copied.parent)
    paths = [str(copied / "averages" / f"width0.1-{nimg:09d}img.safetensors") for nimg in (432, 464, 480)]
    written = commands("stylegan-pg ema") + commands("stylegan-pg average")
    assert len(written) == 7
    for line in written:
        words = [re.sub(r"^runs/\w+$", str(copied), word) for word in shlex.split(line)[1:]]
        words = [{"20000": "0.48", "15000": "0.4"}.get(word, word) for word in words]
        if words[0] == "average":
            names = iter(paths)
            words = [next(names) if word.endswith(".safetensors") else word for word in words]
        elif "--sweep" in words:
            words = ["0.02:0.20:0.09" if word == "0.02:0.20:0.02" else word for word in words] + ["--images", "32"]
        code, printed, told = command(capsys, monkeypatch, *words)
        assert code == 0, told
        assert Path(printed.split()[-1]).is_file()


def test_plans_say_what_averages_cost(tiny_data, tmp_path, capsys, monkeypatch):
    args = harness.arguments(tmp_path / "run", tiny_data, **LONG, **KEPT)[1:]
    code, printed, _ = command(capsys, monkeypatch, "plan", *args)
    assert code == 0
    assert "ema.profiles: 3 averages take" in printed
    assert "90 files in averages/" in printed
    plain = [arg for arg in args if not arg.startswith("ema.")]
    assert "ema.profiles" not in command(capsys, monkeypatch, "plan", *plain)[1]


def test_stylegan3_and_classes(tiny_data, tmp_path):
    """Mean squares of activations are averaged, too; a generator of classes keeps their names."""
    model = {"model__name": "stylegan3", "growth__start": "null", "loss__pl_weight": 0, "data__conditional": "true"}
    model |= {"train__total_kimg": 0.096, "ema__every_kimg": 0.016, "ema__profiles": "[0.05,0.1]"}
    harness.finish(harness.start(harness.arguments(tmp_path / "run", tiny_data, **model)))
    made, _ = post_hoc(tmp_path / "run", 0.07)
    squares = {name: t for name, t in made.tensors.items() if name.endswith("magnitude_ema")}
    assert squares
    assert all(bool((t > 0).all()) for t in squares.values())
    assert made.description["label_names"] == ["a", "b", "c"]
    made.save(tmp_path / "made.safetensors")
    from stylegan_pg import load_snapshot

    G = load_snapshot(tmp_path / "made.safetensors")
    images = G(torch.from_numpy(np.zeros([3, G.z_dim], np.float32)), ["a", "b", "c"])
    assert torch.isfinite(images).all()
