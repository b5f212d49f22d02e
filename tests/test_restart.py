"""Run folders whose checkpoints are missing, on another node, or moved aside: no run silently starts again."""

import dataclasses
import shutil

import harness
import pytest
from test_faults import ranks

from stylegan_pg.checkpoint import checkpoint, history, status_file
from stylegan_pg.errors import UsageError
from stylegan_pg.monitoring.status_writer import StatusWriter

QUIET = {"growth__start": "null", "output__grid_kimg": 0, "output__snapshot_kimg": 1, "train__total_kimg": 0.024}


@pytest.fixture(scope="module")
def source(tiny_data, tmp_path_factory):
    """Return a finished short run at 16x16."""
    run = tmp_path_factory.mktemp("source") / "run"
    harness.finish(harness.start(harness.arguments(run, tiny_data, **QUIET)))
    return run


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.distributed
def test_a_run_without_its_checkpoints_is_rejected_or_moved_aside(source, tiny_data, tmp_path):
    run = shutil.copytree(source, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "notes.txt").write_text("the user's own")
    before, args = contents(run), harness.arguments(run, tiny_data, **QUIET)
    told = harness.finish(harness.start(args), expected=2)
    assert "Traceback" not in told
    assert "stats.jsonl up to 0.024 kimg" in told
    assert f"init={next((run / 'snapshots').glob('*.safetensors'))}" in told
    assert f"--restart, which moves all of this into {run / 'before-1'}" in told
    assert contents(run) == before

    told = harness.finish(harness.start([*args, "--restart"]))
    assert f"what was here is in {run / 'before-1'} now" in told
    assert contents(run / "before-1") == {path: data for path, data in before.items() if path.name != "notes.txt"}
    assert (run / "notes.txt").exists()
    assert [line["nimg"] for line in harness.stats(run)] == [8, 16, 24]

    told = harness.finish(
        harness.start([*args, "--restart"])
    )  # as after an interruption, when the same command is run again
    assert "--restart has been done with these settings, and the run goes on" in told
    assert not (run / "before-2").exists()
    assert harness.newest(run)[1]["nimg"] == 24


def test_what_counts_as_a_run_that_lost_its_checkpoints(source, tmp_path):
    def copy(name):
        return shutil.copytree(source, tmp_path / name)

    assert history.check(tmp_path / "new") == []
    assert not history.lost_its_checkpoints(source)

    aside = copy("aside")
    count = len(checkpoint.found(aside / "checkpoints"))
    for path in checkpoint.found(aside / "checkpoints"):
        path.rename(path.with_name(path.name + ".bad"))
    with pytest.raises(UsageError, match=f"{count} are put aside as NAME.bad, damaged or diverged"):
        history.check(aside)

    earlier = ["checkpoints", "status.json"]  # what a run of an earlier version has not, once it lost its checkpoints
    for name, gone in (("deleted", ["checkpoints"]), ("earlier", earlier), ("no log", [*earlier, "log.txt"])):
        run = copy(name)
        for part in gone:
            shutil.rmtree(run / part) if (run / part).is_dir() else (run / part).unlink()
        with pytest.raises(UsageError, match=r"snapshots/ with 1 file,.* no checkpoint to continue from"):
            history.check(run)

    killed = copy("killed before the first checkpoint")
    shutil.rmtree(killed / "checkpoints")
    status = status_file.read(killed)
    again = ["note: an earlier start ended before its first checkpoint; its steps are made again"]
    for changes, lost in (
        ({"state": "training"}, False),
        ({"state": "failed"}, False),
        ({"state": "stopped", "nimg": 0}, False),
        ({"state": "stopped"}, True),  # where its steps had led to no good state
        ({"state": "training", "checkpoint": 8}, True),
    ):
        status_file.write(killed, dataclasses.replace(status, **({"checkpoint": None} | changes)))
        assert history.lost_its_checkpoints(killed) == lost
        if not lost:
            assert history.check(killed) == again

    (killed / "status.json").unlink()  # as earlier versions left it
    log = (killed / "log.txt").read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(log) if "the checkpoint at" in line)
    (killed / "log.txt").write_text("".join(log[:first]))
    assert history.check(killed) == again
    (killed / "log.txt").write_text(
        "".join([*log[:first], f"2026-01-01 00:00:00 stopped; again: {killed} at 0.0 kimg\n"])
    )
    assert len(history.check(killed)) == 1  # stopped before its first step
    (killed / "log.txt").write_text("".join([*log[:first], "2026-01-01 00:00:00 continuing from x at 0.0 kimg\n"]))
    with pytest.raises(UsageError, match="no checkpoint to continue from"):
        history.check(killed)

    fresh = tmp_path / "own file"
    fresh.mkdir()
    shutil.copy(source / "config.yaml", fresh)
    assert history.check(fresh) == []


def test_restarting_again(source, tmp_path):
    """A restart with other settings, or after checkpoints were lost again, is a new restart. Otherwise it is the
    same."""
    run = shutil.copytree(source, tmp_path / "run")
    anew, line = history.restart(run, {"a": 1})
    assert anew
    (run / "log.txt").write_text(f"2026-01-01 00:00:00 {line}\n")
    assert history.restart(run, {"a": 1})[0] is False  # it was killed before its first checkpoint
    anew, other = history.restart(run, {"a": 2})
    assert anew
    assert other.endswith(f"what was here is in {run / 'before-2'} now")
    assert other.split(":")[0] != line.split(":")[0]
    measured = {"a": 1, "model": {"low_precision_at": [8]}, "train": {"channels_last": True}}
    (tmp_path / "auto").mkdir()
    assert history.restart(tmp_path / "auto", measured)[0] is True
    assert history.restart(tmp_path / "auto", measured | {"model": {"low_precision_at": None}})[0] is False
    (run / "log.txt").write_text(f"2026-01-01 00:00:00 {line}\n2026-01-01 00:00:00 the checkpoint at 8 kimg: written\n")
    assert history.restart(run, {"a": 1})[0] is True  # from {"a": 2}
    assert (run / "before-3" / "log.txt").exists()
    assert checkpoint.found(run / "before-1" / "checkpoints")
    status_file.write(run, dataclasses.replace(status_file.read(run), checkpoint=8))
    assert history.restart(run, {"a": 1})[0] is True  # as its checkpoints are gone
    assert (run / "before-4" / "status.json").exists()


def test_a_restart_that_an_earlier_version_has_made_is_not_made_again(tmp_path):
    """Its log alone says so, also after this version has continued the run."""
    _, line = history.restart(tmp_path, {"a": 1})
    (tmp_path / "status.json").unlink()
    (tmp_path / "log.txt").write_text(f"2026-01-01 00:00:00 {line}\n")
    assert history.restart(tmp_path, {"a": 1})[0] is False
    writer = StatusWriter()
    writer.open(tmp_path, 0, 100)
    writer.close()
    assert history.restart(tmp_path, {"a": 1})[0] is False
    (tmp_path / "log.txt").write_text(
        f"2026-01-01 00:00:00 {line}\n2026-01-01 00:00:00 the checkpoint at 8 kimg: written\n"
    )
    (tmp_path / "status.json").unlink()
    assert history.restart(tmp_path, {"a": 1})[0] is True


@pytest.mark.distributed
def test_ranks_whose_run_folders_differ(tiny_data, tmp_path):
    """As on two nodes with separate disks, whose ranks are numbered differently at the second start. Rank 0 then finds
    nothing and continues from rank 1's checkpoint."""
    how = harness.COMPARABLE | QUIET | {"output__snapshot_kimg": 0}
    a, b, whole = (tmp_path / name / "run" for name in ("a", "b", "whole"))
    for folder in (a, b, whole):
        folder.parent.mkdir()

    def train(first, second, total, *more):
        args = [harness.arguments(run, tiny_data, **(how | {"train__total_kimg": total})) for run in (first, second)]
        return ranks([(i, [*given, *more]) for i, given in enumerate(args)])

    for code, told in train(a, b, 0.016):
        assert code == 0, told
    told = (a / "log.txt").read_text()
    assert "the run's folder is not shared: rank 1 (" in told
    assert not b.exists()

    for code, told in train(b, a, 0.032):
        assert code == 0, told
    log = (b / "log.txt").read_text()
    newest = checkpoint.path_for(a / "checkpoints", 16)
    assert f"continuing from {newest} in {a} of rank 1 (" in log
    assert [line["nimg"] for line in harness.stats(b)] == [24, 32]
    assert [int(p.stem) for p in checkpoint.found(b / "checkpoints")] == [32, 24]
    assert [int(p.stem) for p in checkpoint.found(a / "checkpoints")] == [16, 8]  # unchanged

    for code, told in train(whole, whole, 0.032):
        assert code == 0, told
    assert "not shared" not in (whole / "log.txt").read_text()
    (one, _), (two, _) = harness.newest(whole), harness.newest(b)
    assert harness.largest_difference(one, two) == 0

    for code, told in train(tmp_path / "whole" / "other", a, 0.032, "seed=4"):
        assert code == 2
        assert f"the checkpoints in {a} of rank 1 (" in told
        assert "are of another run: seed was 3, is 4" in told
