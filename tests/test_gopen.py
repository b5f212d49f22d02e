"""URLs that webdataset reads with other programs, which are small scripts here: gs://, ais:// and the like."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from packing import encoded, folder_of, noise, packed, tar_of

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.storage import gopen, remote, shard_cache
from stylegan_pg.data.storage.retry import PermanentFault, TransientFault
from stylegan_pg.errors import RunError, UsageError

# Prints the file of the bucket that the URL names, and notes its arguments, one on a line.
PROGRAM = """#!/bin/sh
printf '%s\\n' "$@" >> {notes}
for word; do case "$word" in *://*) url="$word";; esac; done
case "$url" in *fails*) head -c 1000 {bucket}/"${{url##*/}}"; exit 3;; esac
cat {bucket}/"${{url#*://bucket/}}"
"""


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder in which the programs find what is called SCHEME://bucket/NAME."""
    folder, programs = tmp_path / "bucket", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for name in ("gsutil", "ais", "curl"):
        (programs / name).write_text(PROGRAM.format(bucket=folder, notes=tmp_path / f"{name}.txt"))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("USE_AIS_FOR", raising=False)
    before = shard_cache.settings()
    shard_cache.configure(shard_cache.CacheSettings(str(tmp_path / "shards"), patience=0.0))
    yield folder
    shard_cache.configure(before)


@pytest.mark.parametrize(("scheme", "program"), [("gs", "gsutil"), ("ais", "ais"), ("sftp", "curl"), ("scp", "curl")])
def test_tars_are_read_through_the_cache(bucket, tmp_path, scheme, program):
    for k in range(2):
        tar_of(bucket / f"{k}.tar", {f"{k}{i}.png": encoded(noise(i)) for i in range(3)})
    url = f"{scheme}://bucket/{{0..1}}.tar"
    index = load_index(url)
    table = index.table(16)
    assert (index.count, index.source_of(4)) == (6, "11")
    for i in range(6):
        assert table.read(i) == encoded(noise(i % 3))
    words = (tmp_path / f"{program}.txt").read_text().split()
    read = sorted(word for word in words if "://" in word)
    assert read == [f"{scheme}://bucket/{k}.tar" for k in range(2)]  # each of them once


def test_packed_datasets_are_read(bucket, tmp_path):
    packed(folder_of(tmp_path / "in", ["a/0.png", "b/1.png"]), bucket / "data")
    index = load_index("gs://bucket/data")
    assert (index.count, index.label_names, index.sources()) == (2, ("a", "b"), ["a/0.png", "b/1.png"])
    assert index.table(8).read(1) == load_index(str(bucket / "data")).table(8).read(1)
    with pytest.raises(RunError, match=r"gs://bucket/none/index\.json: the program .* failed with exit status 1"):
        with_little_patience("gs://bucket/none")


def with_little_patience(url: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stylegan_pg.data.datasets.shard_index.START_PATIENCE", 0.1)
        load_index(url)


def test_ranges(bucket):
    data = bytes(range(256)) * 1000
    (bucket / "x").write_bytes(data)
    assert remote.read_url("gs://bucket/x") == data
    assert remote.read_url("gs://bucket/x", 70_000, 70_010) == data[70_000:70_010]
    assert remote.read_url("gs://bucket/x", 255_999, 300_000) == data[-1:]
    assert remote.stat_url("gs://bucket/x") == (None, "")


def test_a_program_that_fails_is_a_transient_fault_and_no_shorter_file(bucket):
    (bucket / "fails").write_bytes(b"x" * 100_000)
    for end in (None, 5000):
        with pytest.raises(TransientFault, match="exit status 3"):
            remote.read_url("gs://bucket/fails", 0, end)


def test_a_program_that_is_missing(bucket, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PermanentFault, match=r"gs://bucket/x: the command gsutil does not exist"):
        remote.read_url("gs://bucket/x")


@pytest.mark.parametrize(
    "sign", [";", "$(touch x)", "`x`", "|x", "&", "'", '"', " x", "\n", "*", "?x", "{a", "\\", "\x00"]
)
def test_signs_of_a_shell_never_reach_a_program(bucket, tmp_path, monkeypatch, sign):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"may only contain letters, digits"):
        remote.read_url(f"gs://bucket/a{sign}b")
    assert not (tmp_path / "gsutil.txt").exists()
    assert not (tmp_path / "x").exists()


def test_rewriting_by_the_environment_starts_no_shell(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("GOPEN_REWRITE", f"gs://=pipe:touch {tmp_path}/made;")
    (bucket / "x").write_bytes(b"content")
    assert remote.read_url("gs://bucket/x") == b"content"
    assert not (tmp_path / "made").exists()


def test_what_is_known(monkeypatch):
    monkeypatch.delenv("USE_AIS_FOR", raising=False)
    assert all(map(remote.is_remote, ("gs://b/x", "ais://b/x", "http://x", "s3://b/x", "pipe:x")))
    assert not any(
        map(gopen.is_known, ("/x", "file:///x", "http://x", "https://x", "s3://b/x", "pipe:x", "gs:x", "hdfs://x"))
    )
    with pytest.raises(UsageError, match=r"hdfs:// is not supported"):
        remote.read_url("hdfs://x/y")
    monkeypatch.setenv("USE_AIS_FOR", "hdfs:s3:pipe:file")
    assert gopen.is_known("hdfs://x/y")
    assert not any(map(gopen.is_known, ("s3://b/x", "pipe://x", "file:///x")))
