"""Helpers for the tests of the shard cache: shards, and processes that read them."""

import contextlib
import hashlib
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import serving

from stylegan_pg.data.storage import shard_cache, shard_reader
from stylegan_pg.data.storage.shard_cache import CacheSettings, RemoteShard

COUNT = 12
SIZE = 40_000
CONTENTS = [random.Random(i).randbytes(SIZE) for i in range(COUNT)]


@contextlib.contextmanager
def serve_shards(folder: Path) -> Iterator[serving.Server]:
    """Start a server of the shards of CONTENTS."""
    (folder / "root").mkdir()
    for i, data in enumerate(CONTENTS):
        (folder / "root" / f"{i}.tar").write_bytes(data)
    with serving.http(folder / "root", folder / "books") as server:
        yield server


@contextlib.contextmanager
def empty_cache(path: Path) -> Iterator[Path]:
    """Use a separate folder for the shard cache within the block."""
    before = shard_cache.settings()
    shard_cache.configure(CacheSettings(str(path), 1 << 30, 20.0))
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


def shard(server, i: int, *, checked: bool = True) -> RemoteShard:
    return RemoteShard(f"{server.url}/{i}.tar", SIZE, hashlib.sha256(CONTENTS[i]).hexdigest() if checked else None)


def read(one: RemoteShard, offset: int = 0, length: int = SIZE) -> bytes:
    return shard_reader.read(one.url, offset, length, size=one.size, sha256=one.sha256)


def shards_in(folder: Path, suffix: str = ".tar") -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(suffix)]


# Run in separate processes: reads shards, randomly or in order, and reports whether they were correct.
READER = textwrap.dedent("""
    import hashlib, json, random, sys
    from stylegan_pg.data.storage import shard_cache, shard_reader as cache, shard_cache as store
    how = json.loads(sys.argv[1])
    store.configure(store.CacheSettings(how["folder"], how["limit"], how.get("patience", 20)))
    dice = random.Random(how["seed"])
    for turn in range(how["turns"]):
        url, size, sha256 = how["shards"][dice.randrange(len(how["shards"]))]
        data = cache.read(url, 0, size, size=size, sha256=sha256)
        assert hashlib.sha256(data).hexdigest() == sha256, url
    print("read", flush=True)
    sys.stdin.read() if how.get("stay") else None
""")


def reader(
    folder: Path, shards: list[RemoteShard], seed: int, turns: int, limit: int = 1 << 30, **how
) -> subprocess.Popen:
    import json

    plain = [(s.url, s.size, s.sha256) for s in shards]
    given = {"folder": str(folder), "limit": limit, "shards": plain, "seed": seed, "turns": turns, **how}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", READER, json.dumps(given)], **pipes)


def wait_for(condition, seconds: float = 30) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.02)
