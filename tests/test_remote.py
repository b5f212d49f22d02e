"""Reading byte ranges from real servers and commands, and the classification of faults."""

import os
import sys
import time
from base64 import b64encode

import pytest
import serving

from stylegan_pg.data.storage import remote, retry
from stylegan_pg.data.storage.remote import open_url, read_url, stat_url
from stylegan_pg.data.storage.retry import Fault, PermanentFault, Retries, TransientFault
from stylegan_pg.errors import UsageError
from stylegan_pg.urls import authorization, shown

DATA = bytes(range(256)) * 1000
SPANS = [(0, None), (0, 10), (5, None), (5, 300), (255_990, None), (255_990, 300_000), (256_000, None), (7, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "x.tar").write_bytes(DATA)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with serving.http(folder, tmp_path_factory.mktemp("books")) as server:
        yield server


@pytest.fixture(autouse=True)
def _well_behaved(server):
    yield
    server.misbehave()


@pytest.fixture(scope="module")
def bucket(folder):
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    with pytest.MonkeyPatch.context() as patch, serving.s3() as (endpoint, _):
        for name, value in {"ACCESS_KEY_ID": "us", "SECRET_ACCESS_KEY": "secret", "ENDPOINT_URL": endpoint}.items():
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        remote._s3_client.cache_clear()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        client.upload_file(str(folder / "x.tar"), "bucket", "data/x.tar")
        yield "s3://bucket/data/x.tar"
        remote._s3_client.cache_clear()


def whole(url: str, start: int = 0, end: int | None = None, step: int = 1000) -> bytes:
    with open_url(url, start, end) as stream:
        return b"".join(iter(lambda: stream.read(step), b""))


@pytest.mark.parametrize("span", SPANS)
def test_byte_ranges(server, bucket, folder, span):
    expected = DATA[slice(*span)]
    printing = f"pipe:cat '{folder}/x.tar'"
    for url in (f"{server.url}/x.tar", bucket, printing, str(folder / "x.tar"), f"file://{folder}/x.tar"):
        assert whole(url, *span) == expected, url
        assert read_url(url, *span) == expected
    server.misbehave(no_ranges=True)
    assert whole(f"{server.url}/x.tar", *span) == expected


def test_stat_url(server, bucket, folder):
    for url in (f"{server.url}/x.tar", bucket, str(folder / "x.tar")):
        size, tag = stat_url(url)
        assert size == len(DATA)
        assert tag
        assert stat_url(url) == (size, tag)
    assert stat_url("pipe:cat x") == (None, "")
    before = stat_url(f"{server.url}/x.tar")
    os.utime(folder / "x.tar", (1, 1))
    assert stat_url(f"{server.url}/x.tar") != before


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_server_errors_are_transient(server, status):
    url = f"{server.url}/x.tar"
    server.misbehave(status=status)
    with pytest.raises(TransientFault, match=f"{url}: the server answered {status}"):
        whole(url)
    with pytest.raises(TransientFault):
        stat_url(url)
    server.misbehave(status=status, times=2)
    assert read_url(url, patience=20) == DATA


@pytest.mark.parametrize("status", [404, 403, 401, 410])
def test_missing_or_forbidden_files_are_permanent_faults(server, status):
    server.misbehave(status=status)
    with pytest.raises(PermanentFault, match=f"answered {status}"):
        whole(f"{server.url}/x.tar")


def test_truncated_bodies_are_resumed(server):
    url = f"{server.url}/x.tar"
    server.misbehave(truncate=100_000)
    with pytest.raises(TransientFault, match="ended 156000 bytes too early"):
        whole(url)
    before = len(server.requests())
    assert read_url(url, patience=20) == DATA
    assert [r["range"] for r in server.requests()[before:]] == [None, "bytes=100000-", "bytes=200000-"]


def test_unreachable_server(server):
    url = f"{server.url}/x.tar"
    server.kill()
    started = time.monotonic()
    with pytest.raises(TransientFault, match="refused"):
        read_url(url, patience=1)
    assert 1 <= time.monotonic() - started < 10
    server.start()
    assert read_url(url) == DATA
    with pytest.raises(TransientFault):
        whole("http://no-such-host.invalid/x")


def test_silent_server(server, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)
    server.misbehave(rate=1)  # a byte every 50 ms
    with open_url(f"{server.url}/x.tar") as stream:
        assert stream.read(3) == DATA[:3]
    with serving.socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TransientFault, match=r"did not begin within 0\.5 seconds"):
            whole(f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar")


def test_errors_of_the_caller_are_not_transient(server, bucket):
    for url in (f"{server.url}/x.tar", bucket):
        with pytest.raises(OSError, match="mine") as error, open_url(url):
            raise OSError("mine")
        assert not isinstance(error.value, Fault)


def test_s3_faults(bucket, monkeypatch):
    with pytest.raises(PermanentFault, match=r"s3://bucket/nothing: .*(404|NoSuchKey)"):
        whole("s3://bucket/nothing")
    with pytest.raises(PermanentFault, match="404"):
        stat_url("s3://bucket/nothing")
    with pytest.raises(PermanentFault, match="NoSuchBucket"):
        whole("s3://elsewhere/x.tar")
    with pytest.raises(UsageError, match="BUCKET/KEY"):
        whole("s3://bucket")
    remote._s3_client.cache_clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{serving.free_port()}")
    with pytest.raises(TransientFault, match=r"s3://bucket/data/x\.tar: .*connect"):
        whole(bucket)
    remote._s3_client.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(PermanentFault, match="credentials"):
        whole(bucket)
    remote._s3_client.cache_clear()
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UsageError, match=r"pip install 'stylegan-pg\[s3\]'"):
        whole(bucket)
    remote._s3_client.cache_clear()


def test_commands(folder, tmp_path):
    with pytest.raises(TransientFault, match=r"exit status 1: cat: .*No such file"):
        whole(f"pipe:cat {tmp_path}/nothing")
    with pytest.raises(TransientFault, match="exit status 3: it printed no message"):
        whole(f"""pipe:bash -c 'head -c 1000 "{folder}/x.tar"; exit 3'""")
    with pytest.raises(PermanentFault, match="the command no-such-command does not exist"):
        whole("pipe:no-such-command x")
    with pytest.raises(UsageError, match="without a shell"):
        whole("pipe:cat x | head")
    assert whole(f"""pipe:bash -c 'cat "{folder}/x.tar" | head -c 9'""") == DATA[:9]
    marker = tmp_path / "made"
    whole(f"pipe:echo $(touch {marker})")
    assert not marker.exists()  # it was not interpreted by a shell
    with open_url("pipe:cat /dev/zero") as stream:  # never ends by itself
        assert stream.read(5) == bytes(5)
    assert whole("pipe:cat /dev/zero", 100, 110) == bytes(10)


def test_messages_contain_no_secrets():
    assert shown("https://me:secret@host/x.tar?Signature=abc") == "https://host/x.tar"
    assert shown("pipe:cat a?b") == "pipe:cat a?b"
    with pytest.raises(UsageError, match="ftp:// is not supported"):
        whole("ftp://host/x")


def test_credentials(server):
    """Credentials in the URL are sent in a header and do not appear in messages."""
    url = server.url.replace("//", "//me%20too:secret@") + "/x.tar"
    assert whole(url) == DATA
    assert authorization(url) == f"Basic {b64encode(b'me too:secret').decode()}"
    server.misbehave(status=403)
    with pytest.raises(PermanentFault) as error:
        whole(url)
    assert "secret" not in str(error.value)
    with pytest.raises(UsageError, match="is not a valid URL"):
        whole(f"{server.url}/a file.tar")


def test_give_up_ends_waits(monkeypatch):
    now, naps = [0.0], []
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])

    def nap(seconds):
        naps.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(retry.time, "sleep", nap)
    waiting, fault = Retries(100), TransientFault("away")

    def wait_on() -> None:
        for _ in range(1000):
            waiting.wait(fault)

    with pytest.raises(TransientFault, match="away"):
        wait_on()
    assert now[0] == pytest.approx(100, abs=0.3)
    waiting.progress()
    waiting.wait(fault)
    assert now[0] < 101
    monkeypatch.setattr(Retries, "giving_up", True)
    with pytest.raises(TransientFault):
        waiting.wait(fault)
