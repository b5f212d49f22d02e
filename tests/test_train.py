"""Whole training runs, observed from outside: killed, stopped, continued, damaged or misused."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import harness
import pytest
import torch
from safetensors import safe_open

from stylegan_pg import load_snapshot
from stylegan_pg.checkpoint import checkpoint

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def whole_run(tiny_data, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    harness.finish(harness.start(harness.arguments(run, tiny_data)))
    return run


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, f"ended early:\n{process.communicate()[0]}"
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def test_files_of_a_run(whole_run, tiny_data):
    lines = harness.stats(whole_run)
    assert [line["nimg"] for line in lines] == list(range(8, 97, 8))
    assert {line["phase"] for line in lines} == {"8x8 stable", "16x16 fade", "16x16 stable"}
    assert [line["alpha"] for line in lines[4:8]] == [0.0, 0.25, 0.5, 0.75]
    for key in ("loss_g", "loss_d", "score_real", "score_fake", "pl_mean"):
        assert all(key in line for line in lines), key
    assert "r1_penalty" in lines[0]
    assert "r1_penalty" not in lines[1]  # only in every second step
    names = {p.name for p in (whole_run / "samples").iterdir()}
    assert "reals-r0008.png" in names
    assert "reals-r0016.png" in names
    assert (whole_run / "log.txt").exists()
    assert len(checkpoint.found(whole_run / "checkpoints")) == 2  # older ones were removed
    (snapshot,) = (whole_run / "snapshots").iterdir()
    G = load_snapshot(snapshot)
    tensors, _ = harness.newest(whole_run)
    for name, t in G.state_dict().items():
        assert torch.equal(t, tensors[f"G_ema/{name}"])
    with safe_open(snapshot, "pt") as file:
        assert json.loads(file.metadata()["stylegan_pg"])["nimg"] == 96


def test_running_again_after_the_end_changes_nothing(whole_run, tiny_data, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "whole")
    before = (run / "stats.jsonl").read_bytes()
    harness.finish(harness.start(harness.arguments(run, tiny_data)))
    assert (run / "stats.jsonl").read_bytes() == before
    harness.assert_same_run(run, whole_run)


@pytest.mark.slow
def test_killed_at_random_steps(whole_run, tiny_data, tmp_path):
    """SIGKILL several times, across the growth boundary and within the fade. The end is that of the uninterrupted
    run."""
    run = tmp_path / "killed"
    kills = harness.kill_until_done(harness.arguments(run, tiny_data), run, random.Random(5))
    assert kills >= 2
    harness.assert_same_run(run, whole_run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_on_request(number, whole_run, tiny_data, tmp_path):
    """Exit code 75, a checkpoint of that step, and the same end as without the stop."""
    run = tmp_path / "stopped"
    process = harness.start(harness.arguments(run, tiny_data, data__workers=1), start_new_session=True)
    wait_for(lambda: harness.lines_of(run) >= 5, process)  # within the fade
    os.killpg(process.pid, number)  # like a terminal or a scheduler, also to the loader's workers
    output = harness.finish(process, 75)
    assert "to continue, run the same command again" in output
    assert "Traceback" not in output
    assert 0 < harness.newest(run)[1]["nimg"] < harness.newest(whole_run)[1]["nimg"]
    output = harness.finish(harness.start(harness.arguments(run, tiny_data, data__workers=1)))
    assert "continuing from" in output
    harness.assert_same_run(run, whole_run)


def test_damaged_newest_checkpoint(whole_run, tiny_data, tmp_path):
    """The previous checkpoint is used, both are named in messages, and the run has the same end."""
    for damage in ("truncated", "flipped"):
        run = shutil.copytree(whole_run, tmp_path / damage)
        new, old = checkpoint.found(run / "checkpoints")
        data = bytearray(new.read_bytes())
        if damage == "truncated":
            data = data[: len(data) // 2]
        else:
            data[len(data) * 3 // 4] ^= 1
        new.write_bytes(data)
        output = harness.finish(harness.start(harness.arguments(run, tiny_data)))
        assert new.name in output
        assert f"continuing from {old}" in output
        harness.assert_same_run(run, whole_run)
        assert new.with_name(new.name + ".bad").exists()  # renamed, and not one of those that are kept


def test_no_readable_checkpoint(whole_run, tiny_data, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "bad")
    for path in checkpoint.found(run / "checkpoints"):
        path.write_bytes(b"nothing")
    output = harness.finish(harness.start(harness.arguments(run, tiny_data)), 2)
    assert output.count("error:") == 1
    assert "Traceback" not in output
    empty = harness.start([*harness.arguments(tmp_path / "empty", tiny_data), "--resume"])
    assert "no checkpoint" in harness.finish(empty, 2)


def limit_files(size: int):
    def apply() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return apply


def test_full_disk(whole_run, tiny_data, tmp_path):
    """Failing writes give warnings, the last good checkpoint remains, and training continues until exit code 1. When
    there is room again, the run continues to the same end."""
    run = tmp_path / "full"
    first = harness.arguments(run, tiny_data, train__total_kimg=0.032)
    harness.finish(harness.start(first))
    (good,) = [p for p in checkpoint.found(run / "checkpoints") if p.stem.endswith("32")]
    size = good.stat().st_size
    args = harness.arguments(run, tiny_data, checkpoint__max_failures=3)
    output = harness.finish(harness.start(args, preexec_fn=limit_files(size // 2)), 1)
    assert output.count("could not be written") >= 3
    assert "failure 3 of 3" in output
    assert "Traceback" not in output
    assert good in checkpoint.found(run / "checkpoints")
    assert not list((run / "checkpoints").glob(".*"))
    harness.finish(harness.start(harness.arguments(run, tiny_data)))
    (tensors, _), (expected, _) = harness.newest(run), harness.newest(whole_run)
    assert all(torch.equal(t, expected[name]) for name, t in tensors.items())


# The checkpoint before the last one fails slowly, so that the failure is noticed at the end.
LATE = """
import sys, time
from stylegan_pg import __main__
from stylegan_pg.checkpoint import checkpoint

real = checkpoint.write
def write(path, tensors, state):
    if state["nimg"] == 80:
        time.sleep(4)
        raise OSError("injected")
    real(path, tensors, state)
checkpoint.write = write
sys.argv = ["stylegan-pg", *sys.argv[1:]]
__main__.run()
"""


def test_a_checkpoint_that_fails_late(whole_run, tiny_data, tmp_path):
    """The failure is reported, and the checkpoint at the end determines the outcome."""
    (tmp_path / "late.py").write_text(LATE)
    args = harness.arguments(tmp_path / "run", tiny_data)
    told = harness.finish(harness.start(args, script=tmp_path / "late.py"))
    assert "the checkpoint at 0.080 kimg could not be written (injected)" in told
    harness.assert_same_run(tmp_path / "run", whole_run)


def test_disk_that_gets_room_again(tiny_data, tmp_path):
    """On a file system of a few blocks, the run fails to write. When there is room again, the run continues by
    itself."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        ballast = mount / "ballast"
        run = mount / "run"
        args = harness.arguments(run, tiny_data, checkpoint__max_failures=1000, growth__stable_kimg_at="{16: 3}")
        process = harness.start(args)
        wait_for(lambda: harness.lines_of(run) >= 3, process)
        with open(ballast, "wb", buffering=0) as file:  # fill the remaining space
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        log = Path(mount / "run" / "log.txt")
        wait_for(lambda: not any(mount.glob("run/checkpoints/.*")) and harness.lines_of(run) >= 3, process)
        time.sleep(3)
        assert process.poll() is None
        ballast.unlink()
        seen = harness.lines_of(run)
        wait_for(lambda: harness.lines_of(run) > seen + 2, process)
        process.terminate()
        output = harness.finish(process, 75)
        assert "could not be written" in output
        assert checkpoint.read(checkpoint.found(run / "checkpoints")[0])[1]["nimg"] > 0
        assert log.exists()
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


def test_another_run_in_the_same_folder(whole_run, tiny_data, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    output = harness.finish(harness.start(harness.arguments(run, tiny_data, model__channel_max=16)), 2)
    assert "model.channel_max was 8, is 16" in output
    assert output.count("\n") == 1


def test_one_process_at_a_time(tiny_data, tmp_path):
    """A second process in the same folder is rejected while the first one runs, and can start afterwards."""
    run = tmp_path / "run"
    args = harness.arguments(run, tiny_data, growth__stable_kimg_at="{16: 100}")
    first = harness.start(args)
    wait_for(lambda: harness.lines_of(run) >= 1, first)
    output = harness.finish(harness.start(args), 2)
    assert "another process" in output
    assert output.count("\n") == 1
    first.terminate()
    harness.finish(first, 75)
    nimg = harness.newest(run)[1]["nimg"]
    second = harness.start([*args, f"train.total_kimg={nimg / 1000}"])
    assert "continuing" in harness.finish(second)


def test_wrong_input(tiny_data, tmp_path):
    """One message, exit code 2, no traceback."""

    def fails(*words: str, data: Path = tiny_data, into: Path = tmp_path / "run", **changes: object) -> None:
        args = [*harness.arguments(tmp_path / "run", data, **changes), f"run={into}"]
        output = harness.finish(harness.start(args), 2)
        assert output.startswith("error: ")
        assert output.count("\n") == 1, output
        for word in words:
            assert word in output

    fails("index.json", "pack", data=tmp_path)
    fails("64", "4, 8, 16, 32", resolution=64)
    fails("data.conditonal", "data.conditional", data__conditonal="true")
    fails("loss.terms", "nonsense", loss__terms="[{name: nonsense}]")
    fails("swdd", "swd", metrics__names="[swdd]")
    (tmp_path / "file").write_text("")
    fails("file", "folder", into=tmp_path / "file")
    fails("file", "folder", into=tmp_path / "file" / "below")


def test_metrics_and_conditional_labels(tiny_data, tmp_path):
    """Class labels and the sliced Wasserstein distance during training."""
    run = tmp_path / "labels"
    changes = {"data__conditional": "true", "metrics__every_kimg": 0.032, "metrics__images": 32, "train__batch": 16}
    harness.finish(harness.start(harness.arguments(run, tiny_data, **changes)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["nimg"] for line in lines] == [32, 64, 96]
    assert all(line["swd"] > 0 for line in lines)
    (last,) = (path for path in (run / "snapshots").iterdir() if not path.name.startswith("best"))
    G = load_snapshot(last)
    assert load_snapshot(run / "snapshots" / "best.safetensors").description["nimg"] in (32, 64, 96)
    assert G.c_dim == 3
    assert G.description["label_names"] == ["a", "b", "c"]


@pytest.mark.slow
def test_compiled_passes_train_like_eager_ones(tiny_data, tmp_path):
    """In a fade as well. If compilation is impossible, one message says so and training continues."""
    short = {"growth__start": 4, "growth__stable_kimg": 0, "growth__fade_kimg": 0.064, "train__total_kimg": 0.032}
    small = {"resolution": 8, "loss__r1_gamma": 1, **short}
    runs = {}
    for name, compile_ in (("eager", "false"), ("compiled", "true"), ("broken", "true")):
        run = tmp_path / name
        env = harness.environment() | ({"CXX": "/nowhere/c++"} if name == "broken" else {})
        args = harness.arguments(run, tiny_data, **small, train__compile=compile_)
        output = harness.finish(harness.start(args, env=env), timeout=400)
        runs[name] = harness.stats(run)
        twice = output.count("note: train.compile: what differentiates twice cannot be compiled and runs eagerly: r1")
        cannot = output.count("note: train.compile: 8x8 fade cannot be compiled here and runs eagerly")
        assert (twice, cannot) == {"eager": (0, 0), "compiled": (1, 0), "broken": (0, 1)}[name], output
        assert "recompile_limit" not in output
    for other in (runs["compiled"], runs["broken"]):
        for a, b in zip(runs["eager"], other, strict=True):
            for key in ("loss_g", "loss_d", "r1_penalty", "pl_length"):
                if key in a:
                    assert b[key] == pytest.approx(a[key], rel=1e-3)
