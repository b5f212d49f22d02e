"""Slow, faulty and malicious servers: each case ends with one message, within limits of time and memory."""

import base64
import contextlib
import re
import shutil
import socket
import threading
import time

import pytest

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.storage import remote, retry, shard_cache
from stylegan_pg.data.storage.remote import read_url, stat_url
from stylegan_pg.data.storage.retry import PermanentFault, TransientFault
from stylegan_pg.errors import UsageError

DATA = bytes(range(256)) * 40


class Scripted:
    """A server that responds to each request with the result of `answer(request text, connection)`, unless that
    function sends its own data."""

    def __init__(self, answer):
        self.answer, self.seen, self.open = answer, [], True
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while self.open:
            with contextlib.suppress(OSError):
                connection, _ = self.socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            self.seen.append(request.decode())
            if answer := self.answer(request.decode(), connection):
                connection.sendall(answer)

    def close(self):
        self.open = False
        self.socket.close()


@pytest.fixture
def serve():
    """Return a function that starts a server from its `answer` function."""
    servers = []

    def start(answer):
        servers.append(Scripted(answer if callable(answer) else lambda *_: answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    monkeypatch.setattr(retry, "GRACE", 1.0)
    monkeypatch.setattr(remote, "GRACE", 1.0)


def answered(body=b"", status="200 OK", **headers):
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def part_of(request, data):
    match = re.search(r"Range: bytes=(\d+)-(\d*)", request)
    assert match
    return int(match[1]), min(int(match[2]), len(data) - 1) if match[2] else len(data) - 1


# ------------------------------------------------------------------------------------------------- slow and endless


def drip(*parts, pause=0.05):
    def answer(_, connection):
        connection.sendall(parts[0])
        while True:
            connection.sendall(parts[1])
            time.sleep(pause)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.0),
        drip(b"HTTP/1.1 200 OK\r\n", b"X", pause=0.2),
        lambda _, connection: connection.recv(1),  # waits until the client disconnects
    ],
    ids=["100-continue", "headers drip", "silence"],
)
def test_header_timeout(serve, answer):
    server, started = serve(answer), time.monotonic()
    with pytest.raises(TransientFault, match=r"did not begin within 1 seconds|timed out"):
        read_url(f"{server.url}/x.tar", patience=2)
    assert time.monotonic() - started < 8
    with pytest.raises(TransientFault):
        stat_url(f"{server.url}/x.tar")


def test_very_slow_bodies_do_not_count_as_progress(serve, tmp_path):
    server, started = serve(drip(answered(Content_Length=1 << 20), b"x")), time.monotonic()
    with pytest.raises(TransientFault, match="fewer than 1024 bytes arrive per second"):
        read_url(f"{server.url}/x.tar", patience=2)
    shard_cache.configure(shard_cache.CacheSettings(str(tmp_path), 1 << 30, 2))
    with pytest.raises(TransientFault, match="fewer than 1024 bytes arrive per second"):
        shard_cache.fetch(shard_cache.RemoteShard(f"{server.url}/x.tar", 1 << 20))
    assert time.monotonic() - started < 20


def test_slow_but_steady_server(serve):
    """4 KiB per second for longer than the retry time counts as progress."""

    def answer(_, connection):
        connection.sendall(answered(Content_Length=len(DATA)))
        for i in range(0, len(DATA), 1024):
            connection.sendall(DATA[i : i + 1024])
            time.sleep(0.25)

    assert read_url(f"{serve(answer).url}/x.tar", patience=0.5) == DATA


@pytest.mark.parametrize("length", [{}, {"Content_Length": 1 << 50}], ids=["unannounced", "announced"])
def test_an_endless_index_is_rejected(serve, length, monkeypatch):
    sent = [0]

    def answer(_, connection):
        connection.sendall(answered(**length))
        while True:
            connection.sendall(b" " * (1 << 20))
            sent[0] += 1

    monkeypatch.setattr("stylegan_pg.data.datasets.shard_index.MAX_JSON_BYTES", 4 << 20)
    server = serve(answer)
    with pytest.raises(UsageError, match=rf"{server.url}/index\.json is larger than {4 << 20} bytes"):
        load_index(server.url)
    assert sent[0] < 64


# ------------------------------------------------------------------------------------------------------ nonsense


@pytest.mark.parametrize("length", ["abc", "-5", "1e3", "9" * 30, "5, 6", "²"])
def test_invalid_content_length(serve, length):
    server = serve(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nhello".encode("latin-1"))
    for ask in (read_url, stat_url):
        with pytest.raises(TransientFault, match=r"x\.tar: the server's response is invalid: its Content-Length is"):
            ask(f"{server.url}/x.tar")


@pytest.mark.parametrize(
    "told",
    [
        None,
        "bytes 0-99/10240",
        "bytes 101-199/10240",
        "bytes 100-9/10240",
        "bytes 100-500/10240",
        "bytes 100-150/10240",
        "items 100-199/10240",
        "bytes */10240",
        "bytes 100-199/-1",
        f"bytes 100-{'9' * 25}/*",
    ],
)
def test_wrong_content_range_is_rejected(serve, told):
    headers = {"Content_Range": told} if told else {}
    server = serve(answered(DATA[:100], "206 Partial Content", Content_Length=100, **headers))
    with pytest.raises(TransientFault, match=r"the server's response is invalid: .*Content-Range"):
        read_url(f"{server.url}/x.tar", 100, 200)


def test_correct_content_range(serve):
    def answer(request, _):
        first, last = part_of(request, DATA)
        return answered(
            DATA[first : last + 1], "206 Partial Content", Content_Range=f"bytes {first}-{last}/{len(DATA)}"
        )

    url = f"{serve(answer).url}/x.tar"
    for start, end in ((1, None), (100, 200), (len(DATA) - 5, len(DATA) + 100)):
        assert read_url(url, start, end) == DATA[start:end]


def test_excess_bytes_are_not_read(serve):
    server = serve(answered(DATA, "206 Partial Content", Content_Range=f"bytes 100-199/{len(DATA)}"))
    assert len(read_url(f"{server.url}/x.tar", 100, 200)) == 100
    server = serve(answered(DATA, "206 Partial Content", Content_Range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}"))
    with pytest.raises(TransientFault, match="a part of the file although the whole file was requested"):
        read_url(f"{server.url}/x.tar")


def test_invalid_answer_is_escaped_in_messages(serve):
    server = serve(b"HTTP/1.1 404 \x1b[2Jgone\r\nContent-Length: 0\r\n\r\n")
    with pytest.raises(PermanentFault) as error:
        read_url(f"{server.url}/x.tar")
    assert "\x1b" not in str(error.value)
    server = serve(b"\x00\xff nothing like HTTP\r\n\r\n")
    with pytest.raises(TransientFault):
        read_url(f"{server.url}/x.tar")


# --------------------------------------------------------------------------------------------- redirects, passwords


def with_user(url, user="me:secret"):
    return url.replace("//", f"//{user}@")


def test_redirects_send_credentials_to_the_same_server_only(serve):
    data = serve(answered(DATA, Content_Length=len(DATA)))
    away = serve(answered(b"", "302 Found", Location=f"{data.url}/y.tar", Content_Length=0))
    assert read_url(with_user(f"{away.url}/x.tar")) == DATA
    assert "Authorization" in away.seen[0]
    assert "Authorization" not in data.seen[0]

    def answer(request, _):
        if "/x.tar" in request:
            return answered(b"", "301 Moved", Location="/y.tar", Content_Length=0)
        return answered(DATA, Content_Length=len(DATA))

    here = serve(answer)
    assert read_url(with_user(f"{here.url}/x.tar")) == DATA
    assert all(f"Basic {base64.b64encode(b'me:secret').decode()}" in request for request in here.seen)


def test_redirects_preserve_method_and_range(serve):
    def answer(request, _):
        if "/x.tar" in request:
            return answered(b"", "307 Temporary Redirect", Location="/y.tar", Content_Length=0)
        assert request.startswith("HEAD") or "Range" in request
        first, last = part_of(request, DATA) if "Range" in request else (0, len(DATA) - 1)
        if request.startswith("HEAD"):
            return answered(Content_Length=len(DATA))
        return answered(
            DATA[first : last + 1], "206 Partial Content", Content_Range=f"bytes {first}-{last}/{len(DATA)}"
        )

    url = f"{serve(answer).url}/x.tar"
    assert read_url(url, 10, 20) == DATA[10:20]
    assert stat_url(url).size == len(DATA)


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,hello", "pipe:touch%20{}"])
def test_redirects_to_other_schemes_are_rejected(serve, to, tmp_path):
    marker = tmp_path / "made"
    server = serve(answered(b"", "302 Found", Location=to.format(marker), Content_Length=0))
    with pytest.raises(TransientFault):
        read_url(f"{server.url}/x.tar")
    assert not marker.exists()


def test_redirect_loops_end(serve):
    server = serve(answered(b"", "302 Found", Location="/x.tar", Content_Length=0))
    with pytest.raises(TransientFault, match=r"x\.tar"):
        read_url(f"{server.url}/x.tar")
    assert len(server.seen) < 20


def test_credentials_from_environment_and_netrc(serve, tmp_path, monkeypatch):
    server = serve(answered(DATA, Content_Length=len(DATA)))
    host = server.url.removeprefix("http://")

    def sent():
        read_url(f"{server.url}/x.tar")
        match = re.search(r"Authorization: Basic (\S+)", server.seen[-1])
        return base64.b64decode(match[1]).decode() if match else None

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert sent() is None
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password of-netrc\n")
    (tmp_path / "netrc").chmod(0o600)
    assert sent() == "me:of-netrc"
    monkeypatch.setenv("STYLEGAN_PG_HTTP_AUTH", f"elsewhere=no:no {host}=you:p=w:1")
    assert sent() == "you:p=w:1"
    monkeypatch.setenv("STYLEGAN_PG_HTTP_AUTH", "secretive")
    with pytest.raises(UsageError, match="HOST=USER:PASSWORD") as error:
        sent()
    assert "secretive" not in str(error.value)
    monkeypatch.delenv("STYLEGAN_PG_HTTP_AUTH")
    for words in ("passwort hidden", "password two hidden", "password two 'hid\"den", "password two hidden's"):
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me {words}\n")
        with pytest.raises(UsageError, match=r"cannot be read \(line") as error:
            sent()
        assert "hid" not in str(error.value)


@pytest.mark.parametrize("url", ["http:///x", "http://h:99999/x", "http://h:0/x", "https://", "http://[::1/x"])
def test_invalid_urls_are_not_retried(url):
    with pytest.raises(UsageError, match="is not a valid URL"):
        read_url(url, patience=60)


@pytest.mark.parametrize("place", ["http://h:99999/x", "http://[::1/x", "http://h:x/", "http://..../x"])
def test_redirects_to_invalid_urls_are_transient(serve, place):
    server = serve(answered(b"", "302 Found", Location=place, Content_Length=0))
    with pytest.raises(TransientFault, match="response is invalid"):
        read_url(f"{server.url}/x.tar")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content_Length": "abc"},
        {"Content_Length": -5},
        {"Content_Length": 10**26},
        {"Content_Length": 4, "Last_Modified": "nonsense"},
        {"Content_Length": 4, "Content_Range": "bytes 5-8/20"},
    ],
)
def test_invalid_s3_answers(serve, monkeypatch, headers):
    pytest.importorskip("boto3", reason="boto3 is not installed")
    as_s3(monkeypatch, serve(answered(b"abcd", **headers)).url)
    with pytest.raises(TransientFault, match=r"s3://b/x\.tar: .*response is invalid"):
        read_url("s3://b/x.tar")


def test_s3_without_length_or_valid_endpoint(serve, monkeypatch):
    pytest.importorskip("boto3", reason="boto3 is not installed")
    as_s3(monkeypatch, serve(answered(b"abcd")).url)
    assert stat_url("s3://b/x.tar").size is None
    assert read_url("s3://b/x.tar") == b"abcd"
    as_s3(monkeypatch, serve(answered(b"", "301 Moved", Location="http://127.0.0.1:1/", Content_Length=0)).url)
    with pytest.raises(TransientFault, match="s3://b/x"):
        read_url("s3://b/x.tar")
    as_s3(monkeypatch, "no endpoint")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL"):
        read_url("s3://b/x.tar")


def as_s3(monkeypatch, endpoint):
    for name, value in {"ACCESS_KEY_ID": "us", "SECRET_ACCESS_KEY": "x", "ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    remote._s3_client.cache_clear()


def test_unauthorized_message_explains_credentials(serve):
    server = serve(answered(b"", "401 Unauthorized", Content_Length=0))
    with pytest.raises(PermanentFault, match=r"401 Unauthorized .*netrc.*STYLEGAN_PG_HTTP_AUTH") as error:
        read_url(with_user(f"{server.url}/x.tar?token=hidden"))
    assert "secret" not in str(error.value).replace("secrets", "")
    assert "hidden" not in str(error.value)


def test_endless_tar_uses_half_of_the_free_disk_at_most(serve, monkeypatch, tmp_path):
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 16 << 20))

    def endless(request, connection):
        connection.sendall(answered())
        while not request.startswith("HEAD"):
            connection.sendall(bytes(1 << 20))

    shard_cache.configure(shard_cache.CacheSettings(str(tmp_path), 0, 1))
    try:
        for url in (f"{serve(endless).url}/x.tar", "pipe:cat /dev/zero"):
            with pytest.raises(UsageError, match="has more than 8 MiB"):
                load_index(url)
    finally:
        shard_cache.configure(shard_cache.CacheSettings())
