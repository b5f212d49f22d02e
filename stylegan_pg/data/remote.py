"""Bytes behind URLs: http(s), s3, the output of a command, and plain files.

    http://, https://   urllib: proxies from the environment, USER:PASSWORD@HOST, ranges where the server knows them
    s3://BUCKET/KEY     boto3 (pip install 'stylegan-pg[s3]'); credentials and AWS_ENDPOINT_URL from the environment
    pipe:COMMAND        what a command prints. It is split as a shell would, but there is no shell: for pipelines,
                        redirections and variables write pipe:bash -c '...'
    file://, a path     the file system

Nothing here waits or tries again but `read_url` and who uses `Patience`.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import io
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

from stylegan_pg.data.patience import Fault, Lasting, Passing, Patience
from stylegan_pg.errors import UsageError

TIMEOUT = 30.0  # seconds without a byte, after which a connection counts as lost
CHUNK, PIECE = 1 << 20, 1 << 16
SCHEMES = ("http", "https", "s3")
_LASTING_STATUS = (400, 401, 403, 404, 405, 410, 416)
_PIPELINE = {"|", ">", "<", ">>", "&&", "||", ";", "&", "2>&1"}


class Stat(NamedTuple):
    """size in bytes, None where it cannot be known; tag: ETag or time of change, "" where there is none."""

    size: int | None
    tag: str


class Stream(Protocol):
    def read(self, n: int, /) -> bytes: ...

    def read1(self, n: int, /) -> bytes: ...  # as read, but what there is at once


def is_remote(url: str) -> bool:
    """Whether this is read through this module rather than opened as a file."""
    return url.startswith("pipe:") or url.split("://", 1)[0] in SCHEMES


def shown(url: str) -> str:
    """A URL for messages: without passwords and signatures."""
    return url if url.startswith("pipe:") else re.sub(r"//[^/@]*@", "//", url.split("?", 1)[0])


@contextlib.contextmanager
def open_url(url: str, start: int = 0, end: int | None = None) -> Iterator[Stream]:
    """The bytes [start, end) of a URL, as something with read(n), which gives b"" only at the end.

    Raises, also from read: Passing, Lasting; other OSErrors for files; UsageError for a kind of URL that nobody knows.
    """
    if end is not None and end <= start:
        yield _Plain(io.BytesIO(), url, 0)
        return
    if url.startswith("pipe:"):
        opened = _open_pipe(url, start, end)
    elif url.startswith(("http://", "https://")):
        opened = _open_http(url, start, end)
    elif url.startswith("s3://"):
        opened = _open_s3(url, start, end)
    else:
        opened = _open_file(url, start, end)
    with opened as stream:
        yield stream


def stat_url(url: str) -> Stat:
    """What is known of a URL without reading it. Raises as open_url."""
    if url.startswith("pipe:"):
        return Stat(None, "")
    if url.startswith(("http://", "https://")):
        return _stat_http(url)
    if url.startswith("s3://"):
        with _s3_faults(url):
            head = _s3().head_object(**_bucket_key(url))
        return Stat(int(head["ContentLength"]), str(head.get("ETag", "")))
    status = os.stat(file_path(url))
    return Stat(status.st_size, str(status.st_mtime_ns))


def read_url(url: str, start: int = 0, end: int | None = None, patience: float = 0.0) -> bytes:
    """All of [start, end), tried again for `patience` seconds without any progress. Raises as open_url."""
    data, waiting = bytearray(), Patience(patience)
    while True:
        try:
            with open_url(url, start + len(data), end) as stream:
                while chunk := stream.read1(CHUNK):
                    data += chunk
                    waiting.progress()
            return bytes(data)
        except Passing as fault:
            waiting.wait(fault)


# ------------------------------------------------------------------------------------------------------------ http


class _Body:
    """A response's body, of which `length` bytes (None: all) are to come after `skip` that nobody wants.

    Its own reading alone is watched for faults: what goes wrong with the bytes in the caller's hands is the caller's.
    """

    def __init__(self, raw: Any, url: str, length: int | None, skip: int = 0, exact: bool = True):
        self.raw, self.url, self.left, self.skip, self.exact = raw, url, length, skip, exact

    def read(self, n: int) -> bytes:
        with self._faults():
            return self._read(n, self.raw.read)

    def read1(self, n: int) -> bytes:
        some = getattr(self.raw, "read1", None)
        with self._faults():
            return self._read(n, some) if some else self._read(min(n, PIECE), self.raw.read)

    def _faults(self) -> contextlib.AbstractContextManager[None]:
        return _s3_faults(self.url) if self.url.startswith("s3://") else _http_faults(self.url)

    def _read(self, n: int, take: Callable[[int], bytes]) -> bytes:
        if self.left == 0:
            return b""
        while self.skip:
            got = self.raw.read(min(self.skip, CHUNK))
            if not got:
                return b""  # shorter than `start`
            self.skip -= len(got)
        data = take(n if self.left is None else min(n, self.left))
        if self.left is not None:
            if not data and self.left and self.exact:
                raise Passing(f"{shown(self.url)}: the connection ended {self.left} bytes too early")
            self.left -= len(data)
        return data


@contextlib.contextmanager
def _http_faults(url: str) -> Iterator[None]:
    try:
        yield
    except Fault:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        kind = Lasting if error.code in _LASTING_STATUS else Passing
        raise kind(f"{shown(url)}: the server answered {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise Passing(f"{shown(url)}: {error.reason}") from None
    except http.client.InvalidURL as error:
        raise UsageError(f"{shown(url)} is no URL: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Passing(f"{shown(url)}: {error or type(error).__name__}") from None
    except ValueError as error:
        raise UsageError(f"{shown(url)} is no URL: {error}") from None


def _request(url: str, method: str = "GET", span: str = "") -> urllib.request.Request:
    headers = {"User-Agent": "stylegan-pg", "Accept-Encoding": "identity"} | ({"Range": span} if span else {})
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if at:  # urllib takes a name and a password for a part of the host's name
        headers["Authorization"] = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
        url = urlunsplit(parts._replace(netloc=host))
    return urllib.request.Request(url, method=method, headers=headers)


@contextlib.contextmanager
def _open_http(url: str, start: int, end: int | None) -> Iterator[Stream]:
    span = _span(start, end)
    response: Any = None
    with _http_faults(url):
        try:
            response = urllib.request.urlopen(_request(url, span=span), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # nothing from `start` on
                raise
            error.close()
    if response is None:
        yield _Body(io.BytesIO(), url, 0)
        return
    announced = response.headers.get("Content-Length")
    length = int(announced) if announced else None
    skip = 0
    if span and response.status != 206:  # the server knows no ranges
        skip, length = start, None if length is None else max(length - start, 0)
        if end is not None:
            length = end - start if length is None else min(length, end - start)
    with contextlib.closing(response):
        yield _Body(response, url, length, skip)


def _span(start: int, end: int | None) -> str:
    """The Range header of [start, end)."""
    return f"bytes={start}-{'' if end is None else max(end - 1, start)}" if start or end is not None else ""


def _stat_http(url: str) -> Stat:
    with _http_faults(url):
        try:
            with urllib.request.urlopen(_request(url, "HEAD"), timeout=TIMEOUT) as response:
                headers, size = response.headers, response.headers.get("Content-Length")
        except urllib.error.HTTPError as error:
            if error.code not in (400, 403, 405, 501):  # signed URLs and small servers know GET only
                raise
            error.close()
            with urllib.request.urlopen(_request(url, span="bytes=0-0"), timeout=TIMEOUT) as response:
                headers, whole = response.headers, response.status != 206
                size = (headers.get("Content-Length" if whole else "Content-Range") or "").rpartition("/")[2]
        text = str(size or "")
        return Stat(int(text) if text.isdigit() else None, headers.get("ETag") or headers.get("Last-Modified") or "")


# -------------------------------------------------------------------------------------------------------------- s3


def _bucket_key(url: str) -> dict[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise UsageError(f"{url} is no s3://BUCKET/KEY")
    return {"Bucket": bucket, "Key": key}


def _s3() -> Any:
    return _s3_client(os.getpid())  # a connection of its own for each process


@functools.lru_cache(maxsize=1)
def _s3_client(_: int) -> Any:
    try:
        import boto3  # an extra
        from botocore.config import Config
    except ImportError:
        raise UsageError("s3:// needs boto3: pip install 'stylegan-pg[s3]'") from None
    how = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"max_attempts": 1}, max_pool_connections=32)
    return boto3.Session().client("s3", config=how)


def _s3_status(error: Exception) -> int:
    answer = getattr(error, "response", None)
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(answer, dict) else 0


@contextlib.contextmanager
def _s3_faults(url: str) -> Iterator[None]:
    try:
        yield
    except Fault:
        raise
    except Exception as error:  # botocore's have no common base with urllib3's, which come through in a body
        kind, status = type(error), _s3_status(error)
        if not isinstance(error, OSError) and not kind.__module__.startswith(("botocore", "urllib3", "boto3")):
            raise
        lasting = status in _LASTING_STATUS or re.search("Credential|Region|Param|Profile|InvalidE", kind.__name__)
        raise (Lasting if lasting else Passing)(f"{url}: {error}") from None


@contextlib.contextmanager
def _open_s3(url: str, start: int, end: int | None) -> Iterator[Stream]:
    span = _span(start, end)
    with _s3_faults(url):
        try:
            answer = _s3().get_object(**_bucket_key(url), **({"Range": span} if span else {}))
        except Exception as error:  # see _s3_faults, which all others go to
            if _s3_status(error) != 416:  # nothing from `start` on
                raise
            answer = None
    if answer is None:
        yield _Body(io.BytesIO(), url, 0)
        return
    with contextlib.closing(answer["Body"]) as body:
        yield _Body(body, url, int(answer["ContentLength"]))


# ---------------------------------------------------------------------------------------------- commands and files


def _words(url: str) -> list[str]:
    try:
        words = shlex.split(url.removeprefix("pipe:"))
    except ValueError as error:
        raise UsageError(f"{url}: {error}") from None
    if not words or _PIPELINE.intersection(words):
        raise UsageError(f"{url}: commands run without a shell; write pipe:bash -c '...' for pipelines")
    if not shutil.which(words[0]):
        raise Lasting(f"{url}: there is no command {words[0]}")
    return words


@contextlib.contextmanager
def _open_pipe(url: str, start: int, end: int | None) -> Iterator[Stream]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(_words(url), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
        assert process.stdout is not None
        try:
            yield _Printed(process.stdout, url, start, end, process, said)
        finally:
            process.kill()  # where it was not read to its end; by its process id, and before it is waited for
            process.stdout.close()
            process.wait()


class _Plain(_Body):
    """A file or a pipe, whose faults are plain OSErrors."""

    def _faults(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _Printed(_Plain):
    """A command's output; its exit status says at the end whether that was all."""

    def __init__(
        self, raw: IO[bytes], url: str, start: int, end: int | None, process: subprocess.Popen, said: IO[bytes]
    ):
        super().__init__(raw, url, None if end is None else max(end - start, 0), start, exact=False)
        self.process, self.said = process, said

    def _read(self, n: int, take: Callable[[int], bytes]) -> bytes:
        data = super()._read(n, take)
        if not data and self.left != 0 and (status := self.process.wait()):
            self.said.seek(0)
            words = self.said.read().decode(errors="replace").split("\n")
            reason = next((line for line in reversed(words) if line.strip()), "it said nothing")
            raise Passing(f"{self.url}: the command failed with exit status {status}: {reason[:200]}")
        return data


def file_path(url: str) -> str:
    """The path of a file:// URL or a path. Raises UsageError for another kind of URL."""
    if "://" in url and not url.startswith("file://"):
        raise UsageError(f"{url}: no way to read {urlsplit(url).scheme}://; known are paths, http(s)://, s3://, pipe:")
    return url.removeprefix("file://")


@contextlib.contextmanager
def _open_file(url: str, start: int, end: int | None) -> Iterator[Stream]:
    with open(file_path(url), "rb") as file:
        file.seek(start)
        yield _Plain(file, url, None if end is None else max(end - start, 0), exact=False)
