"""Foreign tars on servers and from commands: how their headers are read at the start."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving
from test_foreign import jpeg, pictures, write

from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets import foreign, foreign_tars
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.storage import shard_cache
from stylegan_pg.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch) -> Iterator[Path]:
    """A separate cache folder for each test, and settings that are reset afterwards."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(folder))
    before = shard_cache.settings()
    yield folder
    shard_cache.configure(before)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "tars").mkdir()
    for i in range(3):
        write(tmp_path / "tars" / f"{i}.tar", {f"{i}-{name}": data for name, data in pictures().items()})
    with serving.http(tmp_path / "tars", tmp_path / "books") as server:
        yield server


def shards_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tar"))


def dataset(url: str, **data):
    settings = [f"data.{key}={value}" for key, value in data.items()]
    return load_dataset(load_config("demo", ["resolution=16", f"data.url='{url}'", *settings]))


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}])
def test_transient_faults_are_retried(server, fault):
    """The faults occur in some of the HEAD and GET requests."""
    server.misbehave(times=2, **fault)
    assert load_index(f"{server.url}/{{0..2}}.tar").count == 12


def test_waiting_for_an_unreachable_server_is_short(server, monkeypatch):
    monkeypatch.setattr(foreign, "START_PATIENCE", 0.5)
    server.misbehave(status=503)
    with pytest.raises(RunError, match=r"answered 503 .*try again when the server is up"):
        load_index(f"{server.url}/{{0..2}}.tar")


def test_headers_are_read_through_the_configured_cache(server, home, tmp_path):
    assert dataset(f"{server.url}/{{0..2}}.tar", cache_dir=tmp_path / "scratch").count == 12
    assert len(shards_in(tmp_path / "scratch")) == 3
    assert not shards_in(home)


@pytest.mark.parametrize("url", ["{server}/{{0..2}}.tar", "pipe:cat {folder}/1.tar"])
def test_without_a_cache_nothing_is_stored(url, server, home, tmp_path, monkeypatch):
    """Lack of cache space is not an error."""
    monkeypatch.setattr(foreign_tars, "PIECE", 1000)
    index = dataset(url.format(server=server.url, folder=server.root), cache_gib=0, cache_dir=tmp_path / "scratch")
    assert index.count in (4, 12)
    assert not shards_in(home)
    assert not shards_in(tmp_path / "scratch")
    assert index.table(16).read(0) == jpeg(0)


def test_a_truncated_copy_is_downloaded_again(server, tmp_path):
    """The command succeeded although its output was truncated, and its length was unknown."""
    whole = server.root / "1.tar"
    half = tmp_path / "half"
    half.write_bytes(whole.read_bytes()[:3000])
    script = tmp_path / "print"
    script.write_text(f"if [ -e {half} ]; then cat {half}; rm {half}; else cat {whole}; fi")
    assert load_index(f"pipe:bash {script}").count == 4
    broken = tmp_path / "broken.tar"
    broken.write_bytes(whole.read_bytes()[:3000])
    with pytest.raises(UsageError, match="truncated"):
        load_index(f"pipe:cat {broken}")
    with tarfile.open(whole) as tar:
        assert len(tar.getmembers()) == 4  # the sources are unchanged
