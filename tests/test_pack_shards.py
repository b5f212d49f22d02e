"""Packing again, packing interrupted at any time, and packing in parallel all give the same bytes."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packing import files_of, folder_of, noise, packed

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.pack import shard_writer
from stylegan_pg.errors import RunError, UsageError


def test_a_complete_dataset_is_neither_changed_nor_mixed(tmp_path):
    source, out = folder_of(tmp_path / "in", ["x/a.png", "y/b.png"]), tmp_path / "out"
    first = packed(source, out)
    before = files_of(out)
    (out / ".pack").mkdir()  # as after a kill at the end
    again = packed(source, out)
    assert files_of(out) == before
    assert not (out / ".pack").exists()
    assert again.was_complete
    assert "already complete" in again.summary()
    assert (again.identity, again.count) == (first.identity, 2)
    with pytest.raises(UsageError, match="resolution was 8, is 16"):
        packed(source, out, 16)
    with pytest.raises(UsageError, match=r"base was \[4, 4\], is \[4, 6\]"):
        packed(source, out, base="4x6")
    with pytest.raises(UsageError, match="the labels are others"):
        packed(source, out, labels="none")
    noise(9).save(source / "y" / "c.png")
    with pytest.raises(UsageError, match="pictures was 2, is 3; the pictures in SOURCE"):
        packed(source, out)
    assert files_of(out) == before
    (out / "index.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        packed(source, out)


PACK = (
    "import sys; from stylegan_pg.data.pack.pack import pack; "
    "pack(sys.argv[1], sys.argv[2], resolution=64, shard_size='60kB', workers=int(sys.argv[3]), progress=False)"
)


def start_pack(source: Path, out: Path, workers: int, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", PACK, str(source), str(out), str(workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, process: subprocess.Popen, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Return a source of 120 pictures, two of them damaged, and an uninterrupted packing of it."""
    folder = tmp_path_factory.mktemp("many")
    source = folder_of(folder / "in", [f"{i // 60}/{i:03d}.png" for i in range(120)], 96)
    for name in ("0/030.png", "1/119.png"):
        (source / name).write_bytes(b"damaged")
    report = packed(source, folder / "whole", 64, shard_size="60kB")
    assert report.count == 118
    assert len(list((folder / "whole" / "r0064").glob("*.tar"))) > 8
    return source, folder / "whole"


@pytest.mark.distributed
@pytest.mark.parametrize(("workers", "targets"), [(0, (1, 3, 6)), (2, (2,))])
def test_packing_killed_at_any_time_continues_to_the_same_bytes(tmp_path, many, workers, targets):
    source, whole = many
    out = tmp_path / "out"

    def committed() -> int:
        return len(list((out / ".pack").glob("0*.json")))

    for target in targets:
        process = start_pack(source, out, workers, start_new_session=True)
        wait_for(lambda target=target: committed() >= target, process)
        os.kill(process.pid, signal.SIGKILL)  # only the parent: its workers must notice
        process.wait()
        assert not (out / "index.json").exists()
        with pytest.raises(UsageError, match="packing was interrupted"):
            load_index(str(out))
        wait_for_group = time.monotonic() + 10
        while group_lives(process.pid) and time.monotonic() < wait_for_group:
            time.sleep(0.02)
        assert not group_lives(process.pid)
    (out / "index.json.tmp").write_text("half")
    done = committed()
    times = {path: path.stat().st_mtime_ns for path in (out / "r0064").glob("*.tar") if int(path.stem) < done}
    report = packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)
    assert all(path.stat().st_mtime_ns == old for path, old in times.items()), "committed groups are kept, not redone"
    assert len(report.unreadable) == 2


def test_damaged_records_of_an_interrupted_packing_are_named(tmp_path, many):
    (tmp_path / "out" / ".pack").mkdir(parents=True)
    (tmp_path / "out" / ".pack" / "plan.json").write_text('{"source": ')
    with pytest.raises(UsageError, match=r"plan\.json is damaged: remove .*out and pack again"):
        packed(many[0], tmp_path / "out", 64)


@pytest.mark.parametrize("name", ["index.json", "report.json", "pictures.json"])
def test_damaged_records_of_a_complete_dataset_are_named(tmp_path, name):
    source, out = folder_of(tmp_path / "in", ["a.png", "b.png"]), tmp_path / "out"
    packed(source, out)
    for content in (
        b"",
        b"x\xff",
        b"[1]",
        b"{}",
        b'"x"',
        b"[" * 5000,
        b'{"unreadable": 5, "shards": 5, "pack": 5}',
        None,
    ):
        (out / name).unlink()
        (out / name).write_bytes(content) if content is not None else os.mkfifo(out / name)
        if (name == "report.json" and content == b"{}") or (name == "pictures.json" and content == b""):
            assert packed(source, out).count == 2
        else:
            with pytest.raises(UsageError, match=f"{name} is .*: (remove|restore) .*pack"):
                packed(source, out)


def group_lives(group: int) -> bool:
    """Return whether a process group still has members that are not zombies."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


@pytest.mark.distributed
def test_ctrl_c_leaves_no_temporary_files_and_a_second_packing_is_rejected(tmp_path, many):
    source, whole = many
    out = tmp_path / "out"

    def heed():  # background processes of a script ignore SIGINT, and so do their children
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = start_pack(source, out, 2, start_new_session=True, preexec_fn=heed)
    wait_for(lambda: (out / ".pack" / "00000.json").exists(), process)
    os.killpg(process.pid, signal.SIGSTOP)  # otherwise it may be finished already
    with pytest.raises(UsageError, match="being written by another"):
        packed(source, out, 64, shard_size="60kB")
    os.killpg(process.pid, signal.SIGINT)  # like a terminal, also to the workers
    os.killpg(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert not (out / "index.json").exists()
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(UsageError, match=r"quality was 95, is 90"):
        packed(source, out, 64, shard_size="60kB", quality=90)
    packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)


def test_a_full_disk_is_reported_and_packing_continues_later(tmp_path, many):
    source, whole = many
    out = tmp_path / "out"

    def limit():  # a limit of the file size stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = start_pack(source, out, 0, preexec_fn=limit)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "RunError" in errors
    assert "no room to write" in errors
    assert not (out / "index.json").exists()
    assert not list(out.rglob("*.tmp"))
    packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)


def test_a_failing_source_stops_packing_instead_of_losing_pictures(tmp_path, monkeypatch):
    source = folder_of(tmp_path / "in", ["a.png", "b.png"])
    real = open

    def failing(file, *args, **kwargs):
        if str(file).endswith("b.png"):
            raise OSError(5, "Input/output error")
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(RunError, match=r"b.png cannot be read: .*Input/output error"):
        packed(source, tmp_path / "out")
    monkeypatch.undo()
    assert packed(source, tmp_path / "out").count == 2


def test_a_lost_shard_is_packed_again(tmp_path, many, monkeypatch):
    source, whole = many
    out = tmp_path / "out"
    made = shard_writer.Group.commit

    def commit(self, *args):
        if (out / ".pack" / "00004.json").exists():
            raise KeyboardInterrupt
        return made(self, *args)

    monkeypatch.setattr(shard_writer.Group, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        packed(source, out, 64, shard_size="60kB")
    monkeypatch.undo()
    tar = out / "r0008" / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    packed(source, out, 64, shard_size="60kB")
    assert files_of(out) == files_of(whole)


@pytest.mark.distributed
def test_workers_do_not_change_a_byte(tmp_path, many):
    source, whole = many
    report = packed(source, tmp_path / "out", 64, workers=2, shard_size="60kB")
    assert files_of(tmp_path / "out") == files_of(whole)
    assert report.unreadable == (
        ("0/030.png", "is not a picture of a supported format"),
        ("1/119.png", "is not a picture of a supported format"),
    )
