"""Reading byte ranges from URLs: http(s), s3, the output of a command, and plain files.

    http://, https://   http.py: proxies from the environment, names and passwords as urls.py says, ranges where the
                        server knows them
    s3://BUCKET/KEY     boto3 (pip install 'stylegan-pg[s3]'); credentials and AWS_ENDPOINT_URL from the environment
    pipe:COMMAND        the output of a command. It is split into words as a shell does, but no shell runs it: for
                        pipelines, redirections and variables write pipe:bash -c '...'
    file://, a path     the file system

Only `read_url` retries; other callers use retry.Patience.
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

from stylegan_pg.data.storage import http
from stylegan_pg.data.storage.byte_stream import CHUNK, Body, Stream
from stylegan_pg.data.storage.retry import GRACE, Fault, Lasting, Passing, Patience
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import open_regular, printable
from stylegan_pg.urls import shown, without_secrets

TIMEOUT = 30.0  # seconds without a byte, or without complete headers, after which a connection counts as lost
SCHEMES = ("http", "https", "s3")
_LASTING_STATUS = (400, 401, 403, 404, 405, 410, 416)
_PIPELINE = {"|", ">", "<", ">>", "&&", "||", ";", "&", "2>&1"}


class Stat(NamedTuple):
    """Size in bytes (None if unknown), and a tag that changes with the content: ETag or modification time, or ""."""

    size: int | None
    tag: str


def is_remote(url: str) -> bool:
    """Whether a URL is read from a server or a command, and not from the file system."""
    return url.startswith("pipe:") or url.split("://", 1)[0] in SCHEMES


@contextlib.contextmanager
def open_url(url: str, start: int = 0, end: int | None = None, patience: float = TIMEOUT) -> Iterator[Stream]:
    """Open the bytes [start, end) of a URL as a stream whose read(n) returns b"" only at the end.

    Args:
        url: see the module's description.
        start, end: byte range; an end of None means the end of the file.
        patience: seconds of silence, clamped to [10, 30], after which a server counts as lost.

    Raises, also from read:
        Passing, Lasting: see retry.py. OSError: for plain files. UsageError: for an unknown kind of URL.
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
    else:
        opened = _open_file(url, start, end)
    with opened as stream:
        yield stream


def stat_url(url: str, patience: float = TIMEOUT) -> Stat:
    """Size and tag of a URL, without reading its content. Arguments and errors are those of open_url."""
    if url.startswith("pipe:"):
        return Stat(None, "")
    if url.startswith(("http://", "https://")):
        return Stat(*http.stat_http(url, min(TIMEOUT, max(patience, GRACE))))
    if url.startswith("s3://"):
        with _s3_faults(url):
            head = _s3().head_object(**_bucket_key(url))
            return Stat(_s3_length(head), str(head.get("ETag", "")))
    status = os.stat(file_path(url))
    return Stat(status.st_size, str(status.st_mtime_ns))


def read_url(url: str, start: int = 0, end: int | None = None, patience: float = 0.0, most: int | None = None) -> bytes:
    """Read the bytes [start, end), retrying for `patience` seconds without progress (see Patience).

    Raises:
        As open_url; UsageError also if there are more than `most` bytes.
    """
    data, waiting = bytearray(), Patience(patience)
    while True:
        try:
            with open_url(url, start + len(data), end, patience) as stream:
                while chunk := stream.read1(CHUNK):
                    data += chunk
                    if most is not None and len(data) > most:
                        raise UsageError(f"{shown(url)} is larger than {most} bytes: it is not what it should be")
                    waiting.arrived(len(chunk), shown(url))
            return bytes(data)
        except Passing as fault:
            waiting.wait(fault)


# -------------------------------------------------------------------------------------------------------------- s3


def _bucket_key(url: str) -> dict[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise UsageError(f"{shown(url)} is no s3://BUCKET/KEY")
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
    try:
        return boto3.Session().client("s3", config=how)
    except ValueError as error:  # for example, the endpoint is not a URL
        raise UsageError(f"boto3 cannot be used ({printable(error)}): see to $AWS_ENDPOINT_URL and ~/.aws") from None


def _s3_length(answer: dict[str, Any]) -> int | None:
    """The content length in an S3 answer, or None."""
    length = answer.get("ContentLength")
    if length is not None and not 0 <= length <= http.LARGEST:
        raise http.Refused(f"its Content-Length is {length}")
    return length


def _s3_status(error: Exception) -> int:
    answer = getattr(error, "response", None)
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) if isinstance(answer, dict) else 0


@contextlib.contextmanager
def _s3_faults(url: str) -> Iterator[None]:
    try:
        with http.refusals(url):
            yield
    except (Fault, UsageError):
        raise
    except Exception as error:  # botocore's have no common base with urllib3's, which come through in a body
        kind, status = type(error), _s3_status(error)
        if not isinstance(error, OSError) and not kind.__module__.startswith(("botocore", "urllib3", "boto3")):
            # what botocore fails over when it takes an answer apart, such as ValueError
            raise Passing(f"{shown(url)}: the server's answer makes no sense: {printable(error)}") from None
        lasting = status in _LASTING_STATUS or re.search("Credential|Region|Param|Profile|InvalidE", kind.__name__)
        raise (Lasting if lasting else Passing)(f"{shown(url)}: {printable(error)}") from None


@contextlib.contextmanager
def _open_s3(url: str, start: int, end: int | None) -> Iterator[Stream]:
    span = http.range_header(start, end)
    with _s3_faults(url):
        try:
            answer = _s3().get_object(**_bucket_key(url), **({"Range": span} if span else {}))
        except Exception as error:  # others are handled by _s3_faults
            if _s3_status(error) != 416:  # nothing from `start` on
                raise
            answer = None
    if answer is None:
        yield Body(io.BytesIO(), url, 0)
        return
    with contextlib.closing(answer["Body"]) as body:
        with http.refusals(url):
            length, part = _s3_length(answer), str(answer.get("ContentRange", ""))
            if span:
                length = http.length_of_part(part, start, end, length)
            elif part:
                raise http.Refused("it sent a part of the file where all of it was asked for")
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
        raise Lasting(f"{shown(url)}: there is no command {printable(words[0])}")
    return words


@contextlib.contextmanager
def _open_pipe(url: str, start: int, end: int | None) -> Iterator[Stream]:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(_words(url), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said)
        assert process.stdout is not None
        try:
            yield _Printed(process.stdout, url, start, end, process, said)
        finally:
            process.kill()  # in case that it was not read to its end
            process.stdout.close()
            process.wait()


class _Printed(Body):
    """The output of a command; at its end, an exit status other than 0 is a fault."""

    def __init__(
        self, raw: IO[bytes], url: str, start: int, end: int | None, process: subprocess.Popen, said: IO[bytes]
    ):
        super().__init__(raw, url, None if end is None else max(end - start, 0), start)
        self.process, self.said = process, said

    def _read(self, n: int, take: Callable[[int], bytes]) -> bytes:
        data = super()._read(n, take)
        if not data and self.left != 0 and (status := self.process.wait()):
            self.said.seek(0)
            words = self.said.read().decode(errors="replace").split("\n")
            reason = next((line for line in reversed(words) if line.strip()), "it said nothing")
            reason = printable(without_secrets(f"pipe:{reason}").removeprefix("pipe:"), 200)
            raise Passing(f"{shown(self.url)}: the command failed with exit status {status}: {reason}")
        return data


def file_path(url: str) -> str:
    """The path of a file:// URL or of a path. Raises UsageError for another kind of URL."""
    if "://" in url and not url.startswith("file://"):
        scheme = printable(url.split("://")[0])
        raise UsageError(f"{shown(url)}: no way to read {scheme}://; known are paths, http(s)://, s3://, pipe:")
    return url.removeprefix("file://")


@contextlib.contextmanager
def _open_file(url: str, start: int, end: int | None) -> Iterator[Stream]:
    with open_regular(file_path(url)) as file:
        file.seek(start)
        yield Body(file, url, None if end is None else max(end - start, 0))
