"""The shard cache contains only complete shards, even if processes are killed, transfers fail or files are damaged."""

import threading
import time
from pathlib import Path

import pytest
from caching import CONTENTS, SIZE, close_cached_files, empty_cache, read, reader, serve_shards, shard, shards_in

from stylegan_pg.data.storage import shard_cache, shard_reader
from stylegan_pg.data.storage.retry import TransientFault
from stylegan_pg.data.storage.shard_cache import CacheSettings
from stylegan_pg.errors import UsageError

SLOW = {"rate": 40_000}  # one second per shard


@pytest.fixture
def server(tmp_path):
    with serve_shards(tmp_path) as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    with empty_cache(tmp_path / "store") as folder:
        yield folder


def test_second_read_comes_from_the_cache(server, folder):
    for checked in (True, False):
        one = shard(server, 0, checked=checked)
        assert read(one) == CONTENTS[0]
        close_cached_files()
        assert read(one, 100, 50) == CONTENTS[0][100:150]
        assert read(one, SIZE - 10, 50) == CONTENTS[0][-10:]
    assert len(server.requests("0.tar")) == 2  # two entries, because their checks differ
    assert Path(shard_reader.local_path(one.url, SIZE)).read_bytes() == CONTENTS[0]
    assert shard_reader.local_path("file:///a/b") == shard_reader.local_path("/a/b") == "/a/b"
    assert not shards_in(folder, ".part")


def test_concurrent_processes_fetch_a_shard_once(server, folder):
    server.misbehave(**SLOW)
    one = shard(server, 0)
    readers = [reader(folder, [one], i, 3) for i in range(3)]
    for process in readers:
        assert process.communicate(timeout=60)[0] == "read\n"
    assert len(server.requests()) == 1


def test_another_process_continues_after_a_killed_fetch(server, folder):
    """Another process, which was waiting, continues from the partial file."""
    server.misbehave(**SLOW)
    one = shard(server, 0)
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


def test_interrupted_fetch_is_resumed(server, folder):
    one = shard(server, 0)
    server.misbehave(truncate=15_000)
    assert read(one) == CONTENTS[0]
    assert [r["range"] for r in server.requests()] == [None, "bytes=15000-", "bytes=30000-"]
    server.kill()
    threading.Timer(1.0, server.start).start()
    assert read(shard(server, 1)) == CONTENTS[1]
    server.misbehave(status=500, times=3)
    assert read(shard(server, 2)) == CONTENTS[2]
    server.misbehave(status=404, times=3)
    assert read(shard(server, 3)) == CONTENTS[3]
    server.misbehave(truncate=10_000, no_ranges=True, times=2)
    assert read(shard(server, 4)) == CONTENTS[4]


def test_retries_end_after_the_retry_time(server, folder):
    server.kill()
    with shard_cache.patience(0.5), pytest.raises(TransientFault, match="refused"):
        read(shard(server, 0))
    server.start()
    server.misbehave(truncate=10_000, no_ranges=True)  # always the same first bytes
    with shard_cache.patience(1.0), pytest.raises(TransientFault, match="too early"):
        read(shard(server, 0))
    server.misbehave()
    assert read(shard(server, 0)) == CONTENTS[0]


def test_a_waiting_process_reports_the_fault_of_the_fetching_process(server, folder):
    server.kill()
    one = shard(server, 0)
    other = reader(folder, [one], 0, 1, patience=60)
    end = time.time() + 30
    while not (folder.exists() and shards_in(folder, ".json")):
        assert time.time() < end
        time.sleep(0.01)
    with shard_cache.patience(0.5), pytest.raises(TransientFault, match="refused"):
        read(one)
    other.kill()
    other.communicate()


def test_wrong_sizes_and_checksums(server, folder):
    """Shards of other sizes and garbled transfers are not stored. A shard that is garbled in the same way each time is
    reported as the source's fault."""
    url = f"{server.url}/0.tar"
    with shard_cache.patience(0.5), pytest.raises(OSError, match="40000 bytes, 39999 were expected"):
        shard_reader.read(url, 0, 10, size=SIZE - 1)
    with shard_cache.patience(0.5), pytest.raises(OSError, match="40000 bytes, 40001 were expected"):
        shard_reader.read(url, 0, 10, size=SIZE + 1)
    server.misbehave(swap="an error page")
    with shard_cache.patience(0.5), pytest.raises(OSError, match="13 bytes, 40000 were expected"):
        read(shard(server, 0))
    server.misbehave(garble=True, times=1)
    assert read(shard(server, 1)) == CONTENTS[1]
    server.misbehave(garble=True)
    data = read(shard(server, 2))
    assert [a ^ b for a, b in zip(data, CONTENTS[2], strict=True) if a != b] == [1]
    assert len(server.requests("2.tar")) == shard_cache.EQUAL_COPIES


@pytest.mark.parametrize("checked", [True, False])
def test_corrupted_cached_shard_is_fetched_again(server, folder, checked):
    one = shard(server, 0, checked=checked)
    read(one)
    (path,) = shards_in(folder)
    data = bytearray(CONTENTS[0])
    data[7] ^= 1
    path.write_bytes(data)
    close_cached_files()
    assert read(one) == data
    shard_reader.report_damage(one.url, size=one.size, sha256=one.sha256)  # as after a wrong checksum of a sample
    assert read(one) == CONTENTS[0]
    assert len(server.requests()) == 2
    for _ in range(3):  # after this, it is known that the server has these bytes
        shard_reader.report_damage(one.url, size=one.size, sha256=one.sha256)
        assert read(one) == CONTENTS[0]
    assert len(server.requests()) == 2


def test_corrupted_transfer_without_checksum_is_fetched_once_more(server, folder):
    one = shard(server, 0, checked=False)
    server.misbehave(garble=True, times=1)
    assert read(one) != CONTENTS[0]
    shard_reader.report_damage(one.url, size=one.size)
    assert read(one) == CONTENTS[0]


def test_output_of_commands_is_cached(folder, tmp_path):
    (tmp_path / "x.tar").write_bytes(CONTENTS[0])
    log = tmp_path / "log"
    url = f"""pipe:bash -c 'echo ran >> {log}; cat "{tmp_path}/x.tar"'"""
    for _ in range(3):
        assert shard_reader.read(url, 10, 20) == CONTENTS[0][10:30]
        close_cached_files()
    assert log.read_text() == "ran\n"
    with shard_cache.patience(0.3), pytest.raises(TransientFault, match="exit status"):
        shard_reader.read(f"pipe:bash -c 'cat {tmp_path}/x.tar; false'", 0, 10)


def test_unusable_cache_folder(tmp_path, folder):
    (tmp_path / "file").write_text("")
    shard_cache.configure(CacheSettings(str(tmp_path / "file" / "x")))
    with pytest.raises(UsageError, match=r"data\.cache_dir=.* cannot be used"):
        shard_reader.read("http://127.0.0.1:1/x", 0, 1)
