"""The limit of the shard cache: eviction, full disks, prefetching, and processes that are killed meanwhile."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from caching import (
    CONTENTS,
    COUNT,
    READER,
    SIZE,
    close_cached_files,
    empty_cache,
    read,
    reader,
    serve_shards,
    shard,
    shards_in,
    wait_for,
)

from stylegan_pg.data.storage import remote, shard_cache, shard_reader
from stylegan_pg.data.storage.shard_cache import CacheSettings


@pytest.fixture
def server(tmp_path):
    with serve_shards(tmp_path) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    with empty_cache(tmp_path / "store") as folder:
        yield folder


def test_two_processes_share_a_limited_cache(server, folder):
    limit = 9 * SIZE  # each process uses up to four at a time
    shards = [shard(server, i) for i in range(COUNT)]
    readers = [reader(folder, shards, i, 60, limit) for i in range(2)]
    most = 0
    while any(process.poll() is None for process in readers):
        sizes = {}  # by shard, because a .part may get its final name while the folder is listed
        for path in [p for p in folder.iterdir() if p.suffix != ".json"] if folder.exists() else []:
            try:
                sizes[path.name.split("-")[0]] = path.stat().st_size
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes.values()))
    for process in readers:
        assert process.communicate()[0] == "read\n"
    assert 4 * SIZE < most <= limit
    assert len(server.requests()) > COUNT  # some were evicted and fetched again


def test_least_recently_used_shard_is_evicted_first(server, folder):
    shard_cache.configure(CacheSettings(str(folder), 3 * SIZE, 20.0))
    shards = [shard(server, i) for i in range(4)]
    for i in (0, 1, 2, 0):
        close_cached_files()
        read(shards[i])
    close_cached_files()
    read(shards[3])
    assert {s.name for s in (shards[0], shards[2], shards[3])} == {path.name for path in shards_in(folder)}


def test_shards_in_use_are_not_evicted(server, folder, capfd):
    shards = [shard(server, i) for i in range(3)]
    shard_cache.configure(CacheSettings(str(folder), 2 * SIZE, 20.0))
    other = reader(folder, shards[:1], 0, 1, 2 * SIZE, stay=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "read\n"
    assert read(shards[1]) == CONTENTS[1]
    assert read(shards[2]) == CONTENTS[2]  # replaces the shard of this process
    assert {path.name for path in shards_in(folder)} == {shards[0].name, shards[2].name}
    shard_cache.configure(CacheSettings(str(folder), SIZE, 20.0))
    assert read(shards[1], 5, 10) == CONTENTS[1][5:15]
    assert "leaves no space for" in capfd.readouterr().err
    assert server.requests("1.tar")[-1]["range"] == "bytes=5-14"
    assert {path.name for path in shards_in(folder)} == {shards[0].name}
    other.kill()
    other.communicate()
    shard_cache.configure(CacheSettings(str(folder), 0, 20.0))
    assert read(shards[0], 5, 10) == CONTENTS[0][5:15]  # 0: no caching


def test_other_files_in_the_cache_folder_are_untouched(server, folder):
    """The folder was chosen by the user and contains other files and folders."""
    folder.mkdir()
    theirs = [folder / name for name in ("thesis.tex", "x.part", "x.5.part", "x.json", "old.tmp", "0123-x.tar")]
    for file in theirs:
        file.write_bytes(b"mine")
        os.utime(file, (0, 0))
    (folder / "pictures").mkdir()
    os.close(shard_cache.fetch(shard(server, 0)))
    shard_cache.configure(CacheSettings(str(folder), 1, 20.0))
    with pytest.raises(shard_cache.CacheFull):
        os.close(shard_cache.fetch(shard(server, 1)))
    assert not shards_in(folder, "-0.tar")  # the cached shard was evicted
    assert shard_cache.evict(folder, everything=True) is False
    assert all(file.read_bytes() == b"mine" for file in theirs)


def test_a_full_disk(server, tmp_path, folder, capfd):
    """First a file system with room for two and a half shards, and then one without any room."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE * 5 // 2 // 4096 * 4096}", "none", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        shard_cache.configure(CacheSettings(str(small / "store"), 1 << 30, 20.0))
        shards = [shard(server, i) for i in range(4)]
        for i in (0, 1, 2, 3, 0):
            close_cached_files()
            assert read(shards[i]) == CONTENTS[i]
        assert 1 <= len(shards_in(small / "store")) <= 2
        (small / "others").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_bsize))
        close_cached_files()
        for path in shards_in(small / "store"):
            path.unlink()
        (small / "more").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_bsize))
        assert read(shards[1], 50, 100) == CONTENTS[1][50:150]
        assert "has no space for" in capfd.readouterr().err
        (small / "others").unlink()
        close_cached_files()
        assert read(shards[1]) == CONTENTS[1]
        assert [path.name for path in shards_in(small / "store")] == [shards[1].name]
    finally:
        close_cached_files()
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_file_size_limit(server, folder):
    """RLIMIT_FSIZE, which behaves like a quota."""
    script = READER.replace(
        "import hashlib", "import resource, hashlib; resource.setrlimit(%d, (20000, 20000))\nimport hashlib"
    )
    script %= (resource.RLIMIT_FSIZE,)
    one = shard(server, 0)
    import json

    how = {"folder": str(folder), "limit": 1 << 30, "shards": [(one.url, one.size, one.sha256)], "seed": 0, "turns": 2}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(how)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "read\n", done.stderr
    assert "has no space for" in done.stderr
    assert not shards_in(folder)
    assert not shards_in(folder, ".part")


def test_prefetching(server, folder):
    """Shards are fetched in the order of use, a few at a time. A shard that is requested meanwhile is not fetched
    twice, and no shard that will be used is evicted."""
    server.misbehave(rate=200_000)
    shard_cache.configure(CacheSettings(str(folder), 6 * SIZE, 20.0))
    shards = [shard(server, i) for i in range(COUNT)]
    old = [read(shards[i]) for i in (10, 11)]
    close_cached_files()
    prefetcher = shard_reader.Prefetcher(2)
    try:
        prefetcher.request(shards[:5])
        assert read(shards[4]) == CONTENTS[4]
        wait_for(lambda: len(shards_in(folder)) == 6 and all((folder / s.name).exists() for s in shards[:5]))
        assert len(old) == 2
        order = [request["path"] for request in server.requests()][2:]
        assert sorted(order) == [f"/{i}.tar" for i in range(5)]
        assert set(order[:3]) >= {"/0.tar", "/1.tar"}
        prefetcher.request(shards[:8])  # more than the limit
        time.sleep(1.5)
        assert all((folder / s.name).exists() for s in shards[:5])
        server.kill()
        prefetcher.request(shards[5:9])
        time.sleep(0.5)
        server.start()
        wait_for(lambda: all((folder / s.name).exists() for s in shards[5:9]))
    finally:
        prefetcher.close()
    assert not any(thread.is_alive() for thread in prefetcher.threads)
    assert all((folder / s.name).read_bytes() == CONTENTS[5 + i] for i, s in enumerate(shards[5:9]))


def test_random_kills(server, folder):
    """Whatever process is killed, and at any time, all data that is read is correct, and all remaining files are
    complete."""
    server.misbehave(rate=400_000)
    shards, dice = [shard(server, i) for i in range(6)], random.Random(1)
    running = [reader(folder, shards, i, 40, 4 * SIZE) for i in range(2)]
    for k in range(8):
        time.sleep(0.1 + 0.4 * dice.random())
        victim = running[k % 2]
        victim.send_signal(signal.SIGKILL)
        assert "Error" not in victim.communicate()[0]
        running[k % 2] = reader(folder, shards, 10 + k, 40, 4 * SIZE)
    for process in running:
        output = process.communicate(timeout=60)[0]
        assert output.endswith("read\n")
        # If the other process uses or fetches all shards that fit.
        assert all("leaves no space" in line for line in output.splitlines()[:-1]), output
    known = {s.name: CONTENTS[i] for i, s in enumerate(shards)}
    assert all(path.read_bytes() == known[path.name] for path in shards_in(folder))
    assert remote.stat_url(shards[0].url).size == SIZE
