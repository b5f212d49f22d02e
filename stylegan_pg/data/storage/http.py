"""Reading byte ranges over http and https from servers that may be slow, faulty or hostile.

urllib handles proxies, certificates and redirects. This module adds what urllib lacks: a time limit for all headers of
a response, not only for the next byte; a check of Content-Range against the requested range; and restriction of
redirects to http and https, without sending credentials to another server.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import os
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from stylegan_pg.data.storage.byte_stream import Body, Stream
from stylegan_pg.data.storage.retry import Fault, PermanentFault, TransientFault
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import AUTH, authorization, same_server, shown, split_user

_PERMANENT_STATUS = (400, 401, 403, 404, 405, 410, 416)
MAX_FILE_BYTES = 1 << 60  # a server that states a larger size is wrong


class InvalidAnswer(Exception):  # noqa: N818 - it names what is wrong
    """A server's response is invalid. The message states the reason."""


@contextlib.contextmanager
def open_http(url: str, start: int, end: int | None, timeout: float) -> Iterator[Stream]:
    """Open the bytes [start, end) of a URL. `timeout`, in seconds, applies to all headers and to each read.

    Raises (also when the stream is read):
        TransientFault, PermanentFault, UsageError.
    """
    span = range_header(start, end)
    response: Any = None
    length, skip = None, 0
    with faults(url):
        try:
            response = _open(url, timeout, span=span)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not span:  # 416: the file ends before `start`
                raise
            error.close()
    if response is None:
        yield Body(io.BytesIO(), url, 0)
        return
    with contextlib.closing(response):
        with faults(url):
            length = _number(response.headers, "Content-Length")
            if response.status == 206:
                if not span:
                    raise InvalidAnswer("it sent a part of the file although the whole file was requested")
                length = length_of_part(response.headers.get("Content-Range", ""), start, end, length)
            elif span:  # the server does not support ranges
                skip, length = start, None if length is None else max(length - start, 0)
                if end is not None:
                    length = end - start if length is None else min(length, end - start)
        yield Body(response, url, length, skip, exact=True, faults=faults)


def stat_http(url: str, timeout: float) -> tuple[int | None, str]:
    """Return the size of a file (None if the server does not state it), and its ETag or modification time.

    Raises:
        As open_http.
    """
    with faults(url):
        try:
            with _open(url, timeout, "HEAD") as response:
                headers = response.headers
                size = _number(headers, "Content-Length")
        except urllib.error.HTTPError as error:
            if error.code not in (400, 403, 405, 501):  # signed URLs and simple servers support GET only
                raise
            error.close()
            with _open(url, timeout, span="bytes=0-0") as response:
                headers = response.headers
                part = response.status == 206
                size = _range(headers.get("Content-Range", ""))[2] if part else _number(headers, "Content-Length")
        return size, headers.get("ETag") or headers.get("Last-Modified") or ""


@contextlib.contextmanager
def invalid_answers(url: str) -> Iterator[None]:
    """Convert InvalidAnswer to TransientFault."""
    try:
        yield
    except InvalidAnswer as error:
        raise TransientFault(f"{shown(url)}: the server's response is invalid: {printable(error)}") from None


@contextlib.contextmanager
def faults(url: str) -> Iterator[None]:
    """Convert errors of a connection to TransientFault, PermanentFault or UsageError. The message contains the URL
    without secrets."""
    named = shown(url)
    try:
        with invalid_answers(url):
            yield
    except (Fault, UsageError):
        raise
    except urllib.error.HTTPError as error:
        error.close()
        kind = PermanentFault if error.code in _PERMANENT_STATUS else TransientFault
        remedy = ""
        if error.code in (401, 403):
            remedy = f" (put a user name and a password into ~/.netrc or ${AUTH}=HOST=USER:PASSWORD)"
        raise kind(f"{named}: the server answered {error.code} {printable(error.reason)}{remedy}") from None
    except urllib.error.URLError as error:
        raise TransientFault(f"{named}: {printable(error.reason)}") from None
    except http.client.InvalidURL as error:
        raise UsageError(f"{named} is not a valid URL: {printable(error)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise TransientFault(f"{named}: {printable(error) or type(error).__name__}") from None
    except ValueError as error:
        raise UsageError(f"{named} is not a valid URL: {printable(error)}") from None


# ---------------------------------------------------------------------------------------------------------- headers


def _number(headers: Message, name: str) -> int | None:
    """Return the value of a header as a number of bytes, or None if the header is missing."""
    values = {value.strip() for line in headers.get_all(name, []) for value in line.split(",")}
    if not values:
        return None
    text = values.pop()
    if values or not re.fullmatch(r"\d{1,19}", text, re.ASCII) or int(text) > MAX_FILE_BYTES:
        raise InvalidAnswer(f"its {name} is {', '.join(headers.get_all(name, []))}")
    return int(text)


def range_header(start: int, end: int | None) -> str:
    """Return the Range header for [start, end); "" for a whole file."""
    return f"bytes={start}-{'' if end is None else max(end - 1, start)}" if start or end is not None else ""


def length_of_part(header: str, start: int, end: int | None, announced: int | None) -> int:
    """Check the headers of the response to a request for [start, end), and return the length of the response's body.

    Args:
        header: The Content-Range header.
        start, end: The requested range.
        announced: The Content-Length header; None if it is missing.

    Raises:
        InvalidAnswer: if the response contains another range than the requested one.
    """
    first, last, size = _range(header)
    wanted = None if end is None else max(end - 1, start)
    if size is not None:
        wanted = size - 1 if wanted is None else min(wanted, size - 1)
    if first != start or last < first or last != (last if wanted is None else wanted) or last > MAX_FILE_BYTES:
        raise InvalidAnswer(
            f"bytes {start} to {'the end' if wanted is None else wanted} were requested, its Content-Range is {header}"
        )
    if announced not in (None, last - first + 1):
        raise InvalidAnswer(f"its Content-Length is {announced}, but its Content-Range has {last - first + 1} bytes")
    return last - first + 1


def _range(header: str) -> tuple[int, int, int | None]:
    """Parse a Content-Range header. Return (first byte, last byte, size of the whole file or None)."""
    match = re.fullmatch(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*", header, re.ASCII | re.IGNORECASE)
    if not match:
        raise InvalidAnswer(f"it sent a part of the file, and its Content-Range is {header or 'missing'}")
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])


# --------------------------------------------------------------------------------------------------------- requests


def _open(url: str, timeout: float, method: str = "GET", span: str = "") -> Any:
    return _opener().open(_request(url, method, span), timeout=timeout)


def _request(url: str, method: str = "GET", span: str = "") -> urllib.request.Request:
    headers = {"User-Agent": "stylegan-pg", "Accept-Encoding": "identity"} | ({"Range": span} if span else {})
    if secret := authorization(url):
        headers["Authorization"] = secret
    bare = split_user(url)[0]  # urllib would treat credentials in a URL as a part of the host name
    if not urlsplit(bare).hostname or urlsplit(bare).port == 0:  # other invalid ports raise ValueError
        raise ValueError("it names no host, or port 0")
    return urllib.request.Request(bare, method=method, headers=headers)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except (ValueError, http.client.InvalidURL) as error:
            place = shown(headers.get("Location") or "")
            raise InvalidAnswer(f"it redirects to {place}, which is not a valid URL: {printable(error, 80)}") from None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.lower().startswith(("http://", "https://")):
            raise InvalidAnswer(f"it redirects to {shown(newurl)}, which is not an http:// or https:// URL")
        if super().redirect_request(req, fp, code, msg, headers, newurl) is None:
            return None
        request = _request(newurl, req.get_method(), req.get_header("Range") or "")
        if not request.has_header("Authorization") and same_server(req.full_url, newurl):
            secret = req.get_header("Authorization")
            if secret:
                request.add_header("Authorization", secret)
        return request


class _DeadlineConnection(http.client.HTTPConnection):
    """A connection whose handshake and headers must be complete within `timeout` seconds. With the timeouts of sockets
    only, a server that sends single bytes, or "100 Continue" forever, would never time out."""

    timeout: float
    _expired = False
    _timer: threading.Timer | None = None

    def _create_socket(self, *args: Any, **kwargs: Any) -> socket.socket:
        sock = socket.create_connection(*args, **kwargs)
        # The timer uses a duplicate descriptor, because TLS wraps the socket later, and the timer must shut down the
        # underlying socket.
        self._raw_socket = socket.socket(fileno=os.dup(sock.fileno()))
        self._timer = threading.Timer(self.timeout, self._cut)
        self._timer.daemon = True
        self._timer.start()
        return sock

    def _cut(self) -> None:
        self._expired = True
        with contextlib.suppress(OSError):
            self._raw_socket.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        self._create_connection = self._create_socket
        with self._deadline():
            super().connect()

    def getresponse(self) -> http.client.HTTPResponse:
        try:
            with self._deadline():
                return super().getresponse()
        finally:
            self._stop_timer()

    def close(self) -> None:
        self._stop_timer()
        super().close()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._raw_socket.close()
            self._timer = None

    @contextlib.contextmanager
    def _deadline(self) -> Iterator[None]:
        late = TimeoutError(f"the server's answer did not begin within {self.timeout:g} seconds")
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            if self._expired or isinstance(error, TimeoutError):  # the socket has the same time limit
                raise late from None
            raise
        if self._expired:  # the connection was closed, and the headers received so far were mistaken for all headers
            raise late


class _DeadlineTLSConnection(_DeadlineConnection, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_DeadlineConnection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_DeadlineTLSConnection, req, context=self._context)  # type: ignore[attr-defined]  # not in stubs


@functools.lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    """Return urllib's default opener without file:, ftp: and data:, so that no redirect or dataset URL can use them."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _Http(),
        _Https(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
