"""The names of a run's files: they sort by time, no file replaces another, and a folder stands for its best
snapshot."""

import itertools
from pathlib import Path

import pytest

from stylegan_pg.checkpoint.names import config_of, in_order, kimg, meant_snapshot, moment_name
from stylegan_pg.errors import UsageError


def written(moments: list[tuple[int, int, bool]], suffix: str = ".safetensors") -> list[str]:
    """Return the names of files at these times of a run: (nimg, batch, whether they are due at whole kimg)."""
    names: list[str] = []
    for nimg, batch, whole in moments:
        names.append(moment_name(nimg, batch, whole, list(names)) + suffix)
    return names


@pytest.mark.parametrize(
    ("moments", "names"),
    [
        ([(0, 32, True), (10_016, 32, True), (20_000, 32, True)], ["000000kimg", "000010kimg", "000020kimg"]),
        ([(500, 32, False), (1024, 32, False)], ["000000500img", "000001024img"]),
        # A short run: the first grid, the end, and the end after the run was extended.
        ([(0, 8, True), (64, 8, True), (104, 8, True)], ["000000kimg", "000000kimg064img", "000000kimg104img"]),
        ([(32_000, 16, True), (32_048, 16, True)], ["000032kimg", "000032kimg048img"]),
        # An interval that was changed while a run was interrupted.
        (
            [(1024, 32, True), (1504, 32, False), (2016, 32, False)],
            ["000001kimg", "000001kimg504img", "000002kimg016img"],
        ),
        ([(1504, 32, False), (2016, 32, True), (2400, 32, True)], ["000001504img", "000002kimg", "000002kimg400img"]),
    ],
)
def test_names_of_times(moments, names):
    assert [Path(name).stem for name in written(moments)] == names
    assert sorted(written(moments)) == written(moments)


def test_names_of_different_times_differ():
    """For any batch sizes and changed intervals, every step has its own name, which sorts after the previous one."""
    for batch, changes in itertools.product(
        (1, 7, 64, 300, 1000, 2500), ([True], [False], [True, False], [False, True])
    ):
        steps = range(batch, 12 * max(batch, 100), batch)
        moments = [(nimg, batch, changes[i * len(changes) // len(steps)]) for i, nimg in enumerate(steps)]
        names = written(moments)
        assert len(set(names)) == len(names)
        assert sorted(names) == names
        paths = [Path(name) for name in names]
        assert in_order(reversed(paths)) == paths


def test_formatting_of_amounts():
    assert [kimg(n) for n in (0, 16, 100, 104, 2000, 9999, 10_016, 25_000_000)] == [
        *("0.0", "0.016", "0.1", "0.104", "2.0", "9.999", "10.0", "25000.0")
    ]


def test_the_snapshot_of_a_folder(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "run" / "snapshots"
    with pytest.raises(UsageError, match="folder without snapshots"):
        meant_snapshot(tmp_path)
    folder.mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(UsageError, match=r"no snapshot in .* yet"):
        meant_snapshot(run)
    (folder / "000010kimg-pictures").mkdir()
    for name in ("000002kimg", "000010kimg", "000010kimg400img", "000001504img", ".000011kimg"):
        (folder / f"{name}.safetensors").touch()
    newest = folder / "000010kimg400img.safetensors"
    for given in (run, folder):
        path, told = meant_snapshot(given)
        assert path == newest
        assert told == f"{given}: its newest snapshot is taken, {newest}"
    (folder / "best-000002kimg.safetensors").touch()
    (folder / "best.safetensors").symlink_to("best-000002kimg.safetensors")
    path, told = meant_snapshot(run)
    assert path == folder / "best-000002kimg.safetensors"
    assert "its best snapshot is taken" in told
    assert newest.name in told
    (folder / "best-000002kimg.safetensors").unlink()
    assert meant_snapshot(run)[0] == newest  # a broken link is ignored
    (folder / "best.safetensors").unlink()
    (folder / "best.safetensors").touch()  # on file systems without links it is a copy
    assert meant_snapshot(run)[0] == folder / "best.safetensors"
    assert meant_snapshot(newest) == (newest, "")
    assert config_of(run) == config_of(newest) == run / "config.yaml"
    assert config_of(tmp_path / "elsewhere.safetensors") is None
