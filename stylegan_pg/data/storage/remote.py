"""Reading byte ranges from URLs: http(s), s3, the output of a command, and plain files.

    http://, https://   read by http.py, with proxies from the environment, credentials as described in urls.py, and
                        range requests if the server supports them
    s3://BUCKET/KEY     read by boto3 (pip install 'stylegan-pg[s3]'), with credentials and AWS_ENDPOINT_URL from the
                        environment
    pipe:COMMAND        the output of a command. The text is split into words as in a shell, but no shell runs it. For
                        pipelines, redirections and variables, write pipe:bash -c '...'
    gs://, ais://, ...  what webdataset reads with other programs, see gopen.py
    file://, a path     the file system

`read_url` retries after transient faults. The other functions do not; their callers use retry.Retries.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from stylegan_pg.data.storage import gopen, http
from stylegan_pg.data.storage.byte_stream import CHUNK, Body, Stream
from stylegan_pg.data.storage.retry import GRACE, Fault, PermanentFault, Retries, TransientFault
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import open_regular, printable
from stylegan_pg.urls import shown, without_secrets

TIMEOUT = 30.0  # seconds without a byte, or without complete headers, after which a connection is considered lost
SCHEMES = ("http", "https", "s3")
_PERMANENT_STATUS = (400, 401, 403, 404, 405, 410, 416)
_PIPELINE = {"|", ">", "<", ">>", "&&", "||", ";", "&", "2>&1"}


class Stat(NamedTuple):
    """The size in bytes (None if unknown), and a tag that changes with the content (ETag, modification time, or "")."""

    size: int | None
    tag: str


def is_remote(url: str) -> bool:
    """Return whether a URL is read from a server or a command, and not from the file system."""
    return url.split("://", 1)[0] in SCHEMES or is_printed(url)


def is_printed(url: str) -> bool:
    """Return whether a program prints what a URL names, so that reading a part of it costs as much as all before it."""
    return url.startswith("pipe:") or gopen.is_known(url)


@contextlib.contextmanager
def open_url(url: str, start: int = 0, end: int | None = None, patience: float = TIMEOUT) -> Iterator[Stream]:
    """Open the bytes [start, end) of a URL as a stream. Its read(n) returns b"" only at the end.

    Args:
        url: A URL of one of the kinds in the module's description.
        start, end: The byte range. An end of None means the end of the file.
        patience: Seconds without data after which the connection to a server is considered lost, clamped to [10, 30].

    Raises (also when the stream is read):
        TransientFault, PermanentFault: see retry.py.
        OSError: for plain files.
        UsageError: for an unknown kind of URL.
    """
    if end is not None and end <= start:
        yield Body(io.BytesIO(), url, 0)
        return
    if url.startswith("pipe:"):
        opened = _open_pipe(url, start, end)
    elif url.startswith(("http://", "https://")):
        opened = http.open_http(url, start, end, min(TIMEOUT, max(patience, GRACE)))
    elif url.startswith("s3://"):
        opened = _open_s3(url, start, end)
    elif gopen.is_known(url):
        opened = gopen.open_gopen(url, start, end)
    else:
        opened = _open_file(url, start, end)
    with opened as stream:
        yield stream


def stat_url(url: str, patience: float = TIMEOUT) -> Stat:
    """Return size and tag of a URL without reading its content. Arguments and errors are those of open_url."""
    if is_printed(url):
        return Stat(None, "")
    if url.startswith(("http://", "https://")):
        return Stat(*http.stat_http(url, min(TIMEOUT, max(patience, GRACE))))
    if url.startswith("s3://"):
        with _s3_faults(url):
            head = _s3().head_object(**_bucket_key(url))
            return Stat(_s3_length(head), str(head.get("ETag", "")))
    status = os.stat(file_path(url))
    return Stat(status.st_size, str(status.st_mtime_ns))


def read_url(
    url: str, start: int = 0, end: int | None = None, patience: float = 0.0, max_bytes: int | None = None
) -> bytes:
    """Read the bytes [start, end), and retry after transient faults until there was no progress for `patience` seconds.

    Raises:
        As open_url; also UsageError if there are more than `max_bytes` bytes.
    """
    data, retries = bytearray(), Retries(patience)
    while True:
        try:
            with open_url(url, start + len(data), end, patience) as stream:
                while chunk := stream.read1(CHUNK):
                    data += chunk
                    if max_bytes is not None and len(data) > max_bytes:
                        raise UsageError(f"{shown(url)} is larger than {max_bytes} bytes: check that the URL is right")
                    retries.arrived(len(chunk), shown(url))
            return bytes(data)
        except TransientFault as fault:
            retries.wait(fault)


# -------------------------------------------------------------------------------------------------------------- s3


def _bucket_key(url: str) -> dict[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise UsageError(f"{shown(url)} does not have the form s3://BUCKET/KEY")
    return {"Bucket": bucket, "Key": key}


def _s3() -> Any:
    return _s3_client(os.getpid())  # each process has its own connections


@functools.lru_cache(maxsize=1)
def _s3_client(_: int) -> Any:
    try:
        import boto3  # an optional dependency
        from botocore.config import Config
    except ImportError:
        raise UsageError("s3:// needs boto3: pip install 'stylegan-pg[s3]'") from None
    how = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"max_attempts": 1}, max_pool_connections=32)
    try:
        return boto3.Session().client("s3", config=how)
    except ValueError as error:  # for example, the endpoint is not a URL
        raise UsageError(f"boto3 cannot be used ({printable(error)}): check $AWS_ENDPOINT_URL and ~/.aws") from None


def _s3_length(answer: dict[str, Any]) -> int | None:
    """Return the content length in a response of S3, or None."""
    length = answer.get("ContentLength")
    if length is not None and not 0 <= length <= http.MAX_FILE_BYTES:
        raise http.InvalidAnswer(f"its Content-Length is {length}")
    return length


def _s3_status(error: Exception) -> int:
    answer = getattr(error, "response", None)
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(answer, dict) else 0


@contextlib.contextmanager
def _s3_faults(url: str) -> Iterator[None]:
    try:
        with http.invalid_answers(url):
            yield
    except (Fault, UsageError):
        raise
    except Exception as error:  # exceptions of botocore and of urllib3, which occur in a body, have no common base
        kind, status = type(error), _s3_status(error)
        if not isinstance(error, OSError) and not kind.__module__.startswith(("botocore", "urllib3", "boto3")):
            # botocore fails in this way, for example with ValueError, if it cannot parse a response
            raise TransientFault(f"{shown(url)}: the server's response is invalid: {printable(error)}") from None
        lasting = status in _PERMANENT_STATUS or re.search("Credential|Region|Param|Profile|InvalidE", kind.__name__)
        raise (PermanentFault if lasting else TransientFault)(f"{shown(url)}: {printable(error)}") from None


@contextlib.contextmanager
def _open_s3(url: str, start: int, end: int | None) -> Iterator[Stream]:
    span = http.range_header(start, end)
    with _s3_faults(url):
        try:
            answer = _s3().get_object(**_bucket_key(url), **({"Range": span} if span else {}))
        except Exception as error:  # others are handled by _s3_faults
            if _s3_status(error) != 416:  # 416: the file ends before `start`
                raise
            answer = None
    if answer is None:
        yield Body(io.BytesIO(), url, 0)
        return
    with contextlib.closing(answer["Body"]) as body:
        with http.invalid_answers(url):
            length, part = _s3_length(answer), str(answer.get("ContentRange", ""))
            if span:
                length = http.length_of_part(part, start, end, length)
            elif part:
                raise http.InvalidAnswer("it sent a part of the file although the whole file was requested")
        yield Body(body, url, length, exact=True, faults=_s3_faults)


# ---------------------------------------------------------------------------------------------- commands and files


def _words(url: str) -> list[str]:
    try:
        words = shlex.split(url.removeprefix("pipe:"))
    except ValueError as error:
        raise UsageError(f"{shown(url)}: {error}") from None
    if not words or _PIPELINE.intersection(words):
        raise UsageError(f"{shown(url)}: commands run without a shell; write pipe:bash -c '...' for pipelines")
    if not shutil.which(words[0]):
        raise PermanentFault(f"{shown(url)}: the command {printable(words[0])} does not exist")
    return words


@contextlib.contextmanager
def _open_pipe(url: str, start: int, end: int | None) -> Iterator[Stream]:
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(_words(url), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        try:
            yield _CommandOutput(process.stdout, url, start, end, process, stderr)
        finally:
            process.kill()  # it still runs if its output was not read to the end
            process.stdout.close()
            process.wait()


class _CommandOutput(Body):
    """The output of a command. At its end, an exit status other than 0 is a TransientFault."""

    def __init__(
        self, raw: IO[bytes], url: str, start: int, end: int | None, process: subprocess.Popen, stderr: IO[bytes]
    ):
        super().__init__(raw, url, None if end is None else max(end - start, 0), start)
        self.process, self.stderr = process, stderr

    def _read(self, n: int, take: Callable[[int], bytes]) -> bytes:
        data = super()._read(n, take)
        if not data and self.left != 0 and (status := self.process.wait()):
            self.stderr.seek(0)
            words = self.stderr.read().decode(errors="replace").split("\n")
            reason = next((line for line in reversed(words) if line.strip()), "it printed no message")
            reason = printable(without_secrets(f"pipe:{reason}").removeprefix("pipe:"), 200)
            raise TransientFault(f"{shown(self.url)}: the command failed with exit status {status}: {reason}")
        return data


def file_path(url: str) -> str:
    """Return the path of a file:// URL, or a path unchanged. Raises UsageError for another kind of URL."""
    if "://" in url and not url.startswith("file://"):
        scheme = printable(url.split("://")[0])
        raise UsageError(f"{shown(url)}: {scheme}:// is not supported; use a path, http(s)://, s3://, pipe: or gs://")
    return url.removeprefix("file://")


@contextlib.contextmanager
def _open_file(url: str, start: int, end: int | None) -> Iterator[Stream]:
    with open_regular(file_path(url)) as file:
        file.seek(start)
        yield Body(file, url, None if end is None else max(end - start, 0))
