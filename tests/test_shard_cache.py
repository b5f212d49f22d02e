"""The shard cache contains only complete shards and observes its limit, even if processes are killed or files are
damaged."""

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import serving

from stylegan_pg.data.storage import remote, shard_cache, shard_reader
from stylegan_pg.data.storage.retry import TransientFault
from stylegan_pg.data.storage.shard_cache import Settings, Shard
from stylegan_pg.errors import UsageError

COUNT, SIZE = 12, 40_000
SLOW = {"rate": 40_000}  # one second per shard


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    return [random.Random(i).randbytes(SIZE) for i in range(COUNT)]


@pytest.fixture
def server(contents, tmp_path):
    (tmp_path / "root").mkdir()
    for i, data in enumerate(contents):
        (tmp_path / "root" / f"{i}.tar").write_bytes(data)
    with serving.http(tmp_path / "root", tmp_path / "books") as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    """Use a separate folder for the shard cache in this test."""
    before, path = shard_cache.settings(), tmp_path / "store"
    shard_cache.configure(Settings(str(path), 1 << 30, 20.0))
    close_cached_files()
    yield path
    close_cached_files()
    shard_cache.configure(before)


def close_cached_files() -> None:
    """Close all files of the cache that this process has open, so that it behaves like a new process."""
    shard_reader._cached_file.cache_clear()
    shard_reader._uncached_until.clear()
    shard_reader._intact.clear()
    shard_reader._warn_once.cache_clear()


def shard(server, contents, i: int, *, checked: bool = True) -> Shard:
    return Shard(f"{server.url}/{i}.tar", SIZE, hashlib.sha256(contents[i]).hexdigest() if checked else None)


def read(one: Shard, offset: int = 0, length: int = SIZE) -> bytes:
    return shard_reader.read(one.url, offset, length, size=one.size, sha256=one.sha256)


def shards_in(folder: Path, suffix: str = ".tar") -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(suffix)]


# Run in separate processes: reads shards, randomly or in order, and reports whether they were correct.
READER = textwrap.dedent("""
    import hashlib, json, random, sys
    from stylegan_pg.data.storage import shard_reader as cache, shard_cache as store
    how = json.loads(sys.argv[1])
    store.configure(store.Settings(how["folder"], how["limit"], how.get("patience", 20)))
    dice = random.Random(how["seed"])
    for turn in range(how["turns"]):
        url, size, sha256 = how["shards"][dice.randrange(len(how["shards"]))]
        data = cache.read(url, 0, size, size=size, sha256=sha256)
        assert hashlib.sha256(data).hexdigest() == sha256, url
    print("read", flush=True)
    sys.stdin.read() if how.get("stay") else None
""")


def reader(folder: Path, shards: list[Shard], seed: int, turns: int, limit: int = 1 << 30, **how) -> subprocess.Popen:
    import json

    plain = [(s.url, s.size, s.sha256) for s in shards]
    given = {"folder": str(folder), "limit": limit, "shards": plain, "seed": seed, "turns": turns, **how}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", READER, json.dumps(given)], **pipes)


def test_second_read_comes_from_the_cache(server, contents, folder):
    for checked in (True, False):
        one = shard(server, contents, 0, checked=checked)
        assert read(one) == contents[0]
        close_cached_files()
        assert read(one, 100, 50) == contents[0][100:150]
        assert read(one, SIZE - 10, 50) == contents[0][-10:]
    assert len(server.requests("0.tar")) == 2  # two entries, because their checks differ
    assert Path(shard_reader.local_path(one.url, SIZE)).read_bytes() == contents[0]
    assert shard_reader.local_path("file:///a/b") == shard_reader.local_path("/a/b") == "/a/b"
    assert not shards_in(folder, ".part")


def test_concurrent_processes_fetch_a_shard_once(server, contents, folder):
    server.misbehave(**SLOW)
    one = shard(server, contents, 0)
    readers = [reader(folder, [one], i, 3) for i in range(3)]
    for process in readers:
        assert process.communicate(timeout=60)[0] == "read\n"
    assert len(server.requests()) == 1


def test_another_process_continues_after_a_killed_fetch(server, contents, folder):
    """Another process, which was waiting, continues from the partial file."""
    server.misbehave(**SLOW)
    one = shard(server, contents, 0)
    first = reader(folder, [one], 0, 1)
    end = time.time() + 30
    while not (folder.exists() and any(p.stat().st_size >= SIZE // 4 for p in shards_in(folder, ".part"))):
        assert time.time() < end
        time.sleep(0.01)
    second = reader(folder, [one], 1, 1)
    time.sleep(0.2)
    first.kill()
    first.wait()
    assert second.communicate(timeout=60)[0] == "read\n"
    spans = [request["range"] for request in server.requests()]
    assert len(spans) == 2
    start = max(int(span.removeprefix("bytes=")[:-1]) for span in spans if span)
    assert start >= SIZE // 4


def test_interrupted_fetch_is_resumed(server, contents, folder):
    one = shard(server, contents, 0)
    server.misbehave(truncate=15_000)
    assert read(one) == contents[0]
    assert [r["range"] for r in server.requests()] == [None, "bytes=15000-", "bytes=30000-"]
    server.kill()
    threading.Timer(1.0, server.start).start()
    assert read(shard(server, contents, 1)) == contents[1]
    server.misbehave(status=500, times=3)
    assert read(shard(server, contents, 2)) == contents[2]
    server.misbehave(status=404, times=3)
    assert read(shard(server, contents, 3)) == contents[3]
    server.misbehave(truncate=10_000, no_ranges=True, times=2)
    assert read(shard(server, contents, 4)) == contents[4]


def test_retries_end_after_the_retry_time(server, contents, folder):
    server.kill()
    with shard_cache.patience(0.5), pytest.raises(TransientFault, match="refused"):
        read(shard(server, contents, 0))
    server.start()
    server.misbehave(truncate=10_000, no_ranges=True)  # always the same first bytes
    with shard_cache.patience(1.0), pytest.raises(TransientFault, match="too early"):
        read(shard(server, contents, 0))
    server.misbehave()
    assert read(shard(server, contents, 0)) == contents[0]


def test_a_waiting_process_reports_the_fault_of_the_fetching_process(server, contents, folder):
    server.kill()
    one = shard(server, contents, 0)
    other = reader(folder, [one], 0, 1, patience=60)
    end = time.time() + 30
    while not (folder.exists() and shards_in(folder, ".json")):
        assert time.time() < end
        time.sleep(0.01)
    with shard_cache.patience(0.5), pytest.raises(TransientFault, match="refused"):
        read(one)
    other.kill()
    other.communicate()


def test_wrong_sizes_and_checksums(server, contents, folder):
    """Shards of other sizes and garbled transfers are not stored. A shard that is garbled in the same way each time is
    reported as the source's fault."""
    url = f"{server.url}/0.tar"
    with shard_cache.patience(0.5), pytest.raises(OSError, match="40000 bytes where 39999 were expected"):
        shard_reader.read(url, 0, 10, size=SIZE - 1)
    with shard_cache.patience(0.5), pytest.raises(OSError, match="40000 bytes where 40001 were expected"):
        shard_reader.read(url, 0, 10, size=SIZE + 1)
    server.misbehave(swap="an error page")
    with shard_cache.patience(0.5), pytest.raises(OSError, match="13 bytes where 40000 were expected"):
        read(shard(server, contents, 0))
    server.misbehave(garble=True, times=1)
    assert read(shard(server, contents, 1)) == contents[1]
    server.misbehave(garble=True)
    data = read(shard(server, contents, 2))
    assert [a ^ b for a, b in zip(data, contents[2], strict=True) if a != b] == [1]
    assert len(server.requests("2.tar")) == shard_cache.EQUAL_COPIES


@pytest.mark.parametrize("checked", [True, False])
def test_corrupted_cached_shard_is_fetched_again(server, contents, folder, checked):
    one = shard(server, contents, 0, checked=checked)
    read(one)
    (path,) = shards_in(folder)
    data = bytearray(contents[0])
    data[7] ^= 1
    path.write_bytes(data)
    close_cached_files()
    assert read(one) == data
    shard_reader.report_damage(one.url, size=one.size, sha256=one.sha256)  # as after a wrong checksum of a sample
    assert read(one) == contents[0]
    assert len(server.requests()) == 2
    for _ in range(3):  # after this, it is known that the server has these bytes
        shard_reader.report_damage(one.url, size=one.size, sha256=one.sha256)
        assert read(one) == contents[0]
    assert len(server.requests()) == 2


def test_corrupted_transfer_without_checksum_is_fetched_once_more(server, contents, folder):
    one = shard(server, contents, 0, checked=False)
    server.misbehave(garble=True, times=1)
    assert read(one) != contents[0]
    shard_reader.report_damage(one.url, size=one.size)
    assert read(one) == contents[0]


def test_two_processes_share_a_limited_cache(server, contents, folder):
    limit = 9 * SIZE  # each process uses up to four at a time
    shards = [shard(server, contents, i) for i in range(COUNT)]
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


def test_least_recently_used_shard_is_evicted_first(server, contents, folder):
    shard_cache.configure(Settings(str(folder), 3 * SIZE, 20.0))
    shards = [shard(server, contents, i) for i in range(4)]
    for i in (0, 1, 2, 0):
        close_cached_files()
        read(shards[i])
    close_cached_files()
    read(shards[3])
    assert {s.name for s in (shards[0], shards[2], shards[3])} == {path.name for path in shards_in(folder)}


def test_shards_in_use_are_not_evicted(server, contents, folder, capfd):
    shards = [shard(server, contents, i) for i in range(3)]
    shard_cache.configure(Settings(str(folder), 2 * SIZE, 20.0))
    other = reader(folder, shards[:1], 0, 1, 2 * SIZE, stay=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "read\n"
    assert read(shards[1]) == contents[1]
    assert read(shards[2]) == contents[2]  # replaces the shard of this process
    assert {path.name for path in shards_in(folder)} == {shards[0].name, shards[2].name}
    shard_cache.configure(Settings(str(folder), SIZE, 20.0))
    assert read(shards[1], 5, 10) == contents[1][5:15]
    assert "leaves no space for" in capfd.readouterr().err
    assert server.requests("1.tar")[-1]["range"] == "bytes=5-14"
    assert {path.name for path in shards_in(folder)} == {shards[0].name}
    other.kill()
    other.communicate()
    shard_cache.configure(Settings(str(folder), 0, 20.0))
    assert read(shards[0], 5, 10) == contents[0][5:15]  # 0: no caching


def test_other_files_in_the_cache_folder_are_untouched(server, contents, folder):
    """The folder was chosen by the user and contains other files and folders."""
    folder.mkdir()
    theirs = [folder / name for name in ("thesis.tex", "x.part", "x.5.part", "x.json", "old.tmp", "0123-x.tar")]
    for file in theirs:
        file.write_bytes(b"mine")
        os.utime(file, (0, 0))
    (folder / "pictures").mkdir()
    os.close(shard_cache.fetch(shard(server, contents, 0)))
    shard_cache.configure(Settings(str(folder), 1, 20.0))
    with pytest.raises(shard_cache.CacheFull):
        os.close(shard_cache.fetch(shard(server, contents, 1)))
    assert not shards_in(folder, "-0.tar")  # the cached shard was evicted
    assert shard_cache.evict(folder, everything=True) is False
    assert all(file.read_bytes() == b"mine" for file in theirs)


def test_a_full_disk(server, contents, tmp_path, folder, capfd):
    """First a file system with room for two and a half shards, and then one without any room."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE * 5 // 2 // 4096 * 4096}", "none", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        shard_cache.configure(Settings(str(small / "store"), 1 << 30, 20.0))
        shards = [shard(server, contents, i) for i in range(4)]
        for i in (0, 1, 2, 3, 0):
            close_cached_files()
            assert read(shards[i]) == contents[i]
        assert 1 <= len(shards_in(small / "store")) <= 2
        (small / "others").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_bsize))
        close_cached_files()
        for path in shards_in(small / "store"):
            path.unlink()
        (small / "more").write_bytes(bytes(os.statvfs(small).f_bavail * os.statvfs(small).f_bsize))
        assert read(shards[1], 50, 100) == contents[1][50:150]
        assert "has no space for" in capfd.readouterr().err
        (small / "others").unlink()
        close_cached_files()
        assert read(shards[1]) == contents[1]
        assert [path.name for path in shards_in(small / "store")] == [shards[1].name]
    finally:
        close_cached_files()
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_file_size_limit(server, contents, folder):
    """RLIMIT_FSIZE, which behaves like a quota."""
    script = READER.replace(
        "import hashlib", "import resource, hashlib; resource.setrlimit(%d, (20000, 20000))\nimport hashlib"
    )
    script %= (resource.RLIMIT_FSIZE,)
    one = shard(server, contents, 0)
    import json

    how = {"folder": str(folder), "limit": 1 << 30, "shards": [(one.url, one.size, one.sha256)], "seed": 0, "turns": 2}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(how)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "read\n", done.stderr
    assert "has no space for" in done.stderr
    assert not shards_in(folder)
    assert not shards_in(folder, ".part")


def test_prefetching(server, contents, folder):
    """Shards are fetched in the order of use, a few at a time. A shard that is requested meanwhile is not fetched
    twice, and no shard that will be used is evicted."""
    server.misbehave(rate=200_000)
    shard_cache.configure(Settings(str(folder), 6 * SIZE, 20.0))
    shards = [shard(server, contents, i) for i in range(COUNT)]
    old = [read(shards[i]) for i in (10, 11)]
    close_cached_files()
    prefetcher = shard_reader.Prefetcher(2)
    try:
        prefetcher.request(shards[:5])
        assert read(shards[4]) == contents[4]
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
    assert all((folder / s.name).read_bytes() == contents[5 + i] for i, s in enumerate(shards[5:9]))


def wait_for(condition, seconds: float = 30) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def test_output_of_commands_is_cached(contents, folder, tmp_path):
    (tmp_path / "x.tar").write_bytes(contents[0])
    log = tmp_path / "log"
    url = f"""pipe:bash -c 'echo ran >> {log}; cat "{tmp_path}/x.tar"'"""
    for _ in range(3):
        assert shard_reader.read(url, 10, 20) == contents[0][10:30]
        close_cached_files()
    assert log.read_text() == "ran\n"
    with shard_cache.patience(0.3), pytest.raises(TransientFault, match="exit status"):
        shard_reader.read(f"pipe:bash -c 'cat {tmp_path}/x.tar; false'", 0, 10)


def test_unusable_cache_folder(tmp_path, folder):
    (tmp_path / "file").write_text("")
    shard_cache.configure(Settings(str(tmp_path / "file" / "x")))
    with pytest.raises(UsageError, match=r"data\.cache_dir=.* cannot be used"):
        shard_reader.read("http://127.0.0.1:1/x", 0, 1)


def test_random_kills(server, contents, folder):
    """Whatever process is killed, and at any time, all data that is read is correct, and all remaining files are
    complete."""
    server.misbehave(rate=400_000)
    shards, dice = [shard(server, contents, i) for i in range(6)], random.Random(1)
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
    known = {s.name: contents[i] for i, s in enumerate(shards)}
    assert all(path.read_bytes() == known[path.name] for path in shards_in(folder))
    assert remote.stat_url(shards[0].url).size == SIZE
