"""Pictures that crash the process that decodes them, or need too much memory, are named once. They do not count as bad
pictures where the fault may be temporary."""

import io
import os
import re
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packing import encoded, folder_of, noise
from PIL import Image
from test_picture_limits import png, zeros

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.loader import batches

CRASHING = """
import os, signal
from PIL import Image
real = Image.open
def open(file, *rest, **options):
    data = file.getvalue()
    if b"ends-by-" in data:
        os.kill(os.getpid(), int(data.split(b"ends-by-")[1][:2]))
    return real(file, *rest, **options)
Image.open = open
"""


def ends_by(signal: int) -> bytes:
    return png(8, 8, (b"tEXt", b"x\0ends-by-%02d" % signal), pixels=zeros(200))


def pack_command(
    source: Path, out: Path, workers: int, memory: int = 0, path: str = ""
) -> subprocess.CompletedProcess[str]:
    def limit():
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    command = [sys.executable, "-m", "stylegan_pg", "pack", str(source), str(out), "--resolution", "64"]
    environment = os.environ | ({"PYTHONPATH": path} if path else {})
    command += ["--workers", str(workers)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment)


@pytest.mark.distributed
@pytest.mark.slow
def test_pictures_that_crash_a_worker_are_named(tmp_path):
    """After a crash, the picture counts as unreadable. A kill may be temporary: it stops the packing, which can be
    continued."""
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(CRASHING)
    path = os.pathsep.join([str(tmp_path / "patch"), *sys.path])
    source = folder_of(tmp_path / "in", [f"{i:03d}.png" for i in range(45)], size=8)
    (source / "010.png").write_bytes(ends_by(11))
    (source / "040.png").write_bytes(ends_by(6))
    result = pack_command(source, tmp_path / "out", 2, path=path)
    assert result.returncode == 0, result.stderr
    report = (tmp_path / "out" / "report.json").read_text()
    assert "Traceback" not in result.stderr
    assert re.findall(r'"(\d+.png)",\s*"ended the process that decoded it, twice \((\w+)\)', report) == [
        ("010.png", "SIGSEGV"),
        ("040.png", "SIGABRT"),
    ]
    assert load_index(str(tmp_path / "out")).count == 43

    (source / "040.png").write_bytes(ends_by(9))
    killed = pack_command(source, tmp_path / "killed", 2, path=path)
    assert killed.returncode == 1
    assert "040.png: the process that decoded it died, perhaps for want of memory" in killed.stderr
    assert "Traceback" not in killed.stderr


@pytest.mark.slow
def test_a_picture_that_needs_too_much_memory_is_named_once(tmp_path):
    source = folder_of(tmp_path / "in", ["a.png"], size=64)
    (source / "b.png").write_bytes(png(9000, 9000, pixels=zeros((9000 * 3 + 1) * 9000)))
    code = (
        "import webdataset.writer as _; print(next(x for x in open('/proc/self/status') if 'VmPeak' in x).split()[1])"
    )
    libraries = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    result = pack_command(source, tmp_path / "out", 0, memory=(int(libraries) << 10) + (350 << 20))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "b.png: there is not enough memory for this picture" in result.stderr
    assert "Traceback" not in result.stderr
    assert pack_command(source, tmp_path / "out", 0).returncode == 0


def test_training_names_the_sample_that_crashes_a_worker(tmp_path, monkeypatch):
    """With tars of other programs that are read by processes, the message names the sample."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(8):
            data = ends_by(11) if i == 5 else encoded(noise(i, 8))
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = load_index(str(tmp_path / "a.tar"))
    monkeypatch.setattr(Image, "open", Image.open)  # so that monkeypatch restores it
    exec(CRASHING, {})
    found = list(batches(index.table(8), index.order(0), start=0, end=64, batch=8, share=range(8), workers=2))
    shard = "/".join((tmp_path / "a.tar").parts[-2:])
    died = f"a loader worker crashed (SIGSEGV) while it decoded sample 5 in {shard}"
    assert found[-1].fault == died


def test_too_little_memory_for_libraries_is_one_message(tmp_path):
    result = pack_command(folder_of(tmp_path / "in", ["a.png"], size=64), tmp_path / "out", 0, memory=450 << 20)
    assert result.returncode == 1
    assert "webdataset, which writes the shards, cannot be loaded" in result.stderr
    assert "Traceback" not in result.stderr
