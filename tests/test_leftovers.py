"""Files that killed processes leave in a run's folder, and a run whose folder disappears."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
from conftest import ROOT

from stylegan_pg import files
from stylegan_pg.monitoring import status

pytestmark = pytest.mark.distributed

WRITER = """
import sys, time
from pathlib import Path
from stylegan_pg import files
with files.atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
    file.write(b", and half")
"""


def writer(path: Path) -> subprocess.Popen[str]:
    """Start a process that is writing a file until it receives a line."""
    command = [sys.executable, "-c", WRITER, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob(".*.tmp"))


def test_leftovers_are_distinguished_from_files_being_written(tmp_path):
    killed, living = writer(tmp_path / "a"), writer(tmp_path / "b")
    killed.kill()
    killed.wait()
    (tmp_path / ".c.tmp").write_text("as earlier versions named them")
    (tmp_path / ".best.safetensors.tmp").symlink_to("nowhere")
    (tmp_path / "d.tmp").write_text("somebody's")
    assert len(hidden(tmp_path)) == 4
    files.remove_leftovers(tmp_path)
    (left,) = hidden(tmp_path)
    assert left.startswith(".b.")
    assert (tmp_path / "d.tmp").exists()
    living.communicate("go on\n")
    assert (tmp_path / "b").read_text() == "half, and half"
    assert not hidden(tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("before")

    def write() -> None:
        with files.atomic_write(tmp_path / "a") as file:
            file.write(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def wait_for_lines(run: Path, lines: int, process: subprocess.Popen) -> None:
    end = time.time() + 180
    while harness.lines_of(run) < lines:
        assert time.time() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_renaming_the_folder_of_a_run(tiny_data, tmp_path):
    """At the start, leftovers are removed, except files that another process is writing. Later the folder is renamed:
    the run ends without creating another folder, and can be resumed in the renamed one."""
    run, other = tmp_path / "run", tmp_path / "other"
    for name in ("", "checkpoints", "snapshots", "samples"):
        (run / name).mkdir(exist_ok=True)
        (run / name / f".{name or 'config.yaml'}.1234.tmp").write_text("left by a kill")
    living = writer(run / "snapshots" / "living")
    args = harness.arguments(run, tiny_data, growth__stable_kimg_at="{16: 99}")
    process = harness.start(args)
    try:
        wait_for_lines(run, 3, process)
        left = [name for folder in (run, *run.iterdir()) if folder.is_dir() for name in hidden(folder)]
        assert [name[:8] for name in left if "1234" in name or "living" in name] == [".living."]
        run.rename(other)
        output = harness.finish(process, 2, timeout=60)
    finally:
        living.kill()
        living.communicate()
        process.kill()
    assert f"the run's folder {run} was moved away or deleted during training (it is {other} now)" in output
    assert output.count("error: ") == 1
    assert "Traceback" not in output
    assert not run.exists()
    assert status.collect(other)["state"] == "failed"
    process = harness.start([*args, f"run={other}", "train.total_kimg=0.064"])
    assert "continuing from" in harness.finish(process, 0) or "done" in (other / "log.txt").read_text()


@pytest.mark.slow
def test_deleting_or_replacing_the_folder_of_two_ranks(tiny_data, tmp_path):
    """Both ranks end, although their console is closed, and a folder that replaced the run's folder is not changed."""
    run = tmp_path / "run"
    args = harness.arguments(run, tiny_data, growth__stable_kimg_at="{16: 99}")
    process = harness.start(args, ranks=2, fresh=True)
    try:
        assert process.stdout
        assert process.stdout.readline()
        process.stdout.close()
        wait_for_lines(run, 12, process)
        assert (run / "log.txt").read_text().count("the console is gone (standard error: Broken pipe)") == 1
        shutil.move(run, tmp_path / "other")
        run.mkdir()
        assert process.wait(timeout=90) == 1  # torchrun's exit code
    finally:
        process.kill()
    assert os.listdir(run) == []
    assert "error: the run's folder" in (tmp_path / "other" / "log.txt").read_text().splitlines()[-1]
