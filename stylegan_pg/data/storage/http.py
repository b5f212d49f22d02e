"""Reading byte ranges over http and https from servers that may be slow, faulty or hostile.

urllib handles proxies, certificates and redirects. This module adds what it lacks: a time limit for all headers of an
answer, not only for the next byte; a check of Content-Range against the range that was requested; redirects to http and
https only, without sending credentials to another server.
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
from stylegan_pg.data.storage.retry import Fault, Lasting, Passing
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import AUTH, authorization, same_server, shown, split_user

_LASTING_STATUS = (400, 401, 403, 404, 405, 410, 416)
LARGEST = 1 << 60  # bytes of a file; a larger number cannot be right


class Refused(Exception):  # noqa: N818 - what happened to an answer
    """A server's answer is invalid; the message says why."""


@contextlib.contextmanager
def open_http(url: str, start: int, end: int | None, timeout: float) -> Iterator[Stream]:
    """Open the bytes [start, end) of a URL; `timeout` in seconds holds for the headers and for each read after them.

    Raises, also from read:
        Passing, Lasting, UsageError.
    """
    span = range_header(start, end)
    response: Any = None
    length, skip = None, 0
    with faults(url):
        try:
            response = _open(url, timeout, span=span)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not span:  # nothing from `start` on
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
                    raise Refused("it sent a part of the file where all of it was asked for")
                length = length_of_part(response.headers.get("Content-Range", ""), start, end, length)
            elif span:  # the server knows no ranges
                skip, length = start, None if length is None else max(length - start, 0)
                if end is not None:
                    length = end - start if length is None else min(length, end - start)
        yield Body(response, url, length, skip, exact=True, faults=faults)


def stat_http(url: str, timeout: float) -> tuple[int | None, str]:
    """The size of a file (None if the server does not say), and its ETag or modification time. Raises as open_http."""
    with faults(url):
        try:
            with _open(url, timeout, "HEAD") as response:
                headers = response.headers
                size = _number(headers, "Content-Length")
        except urllib.error.HTTPError as error:
            if error.code not in (400, 403, 405, 501):  # signed URLs and small servers know GET only
                raise
            error.close()
            with _open(url, timeout, span="bytes=0-0") as response:
                headers = response.headers
                part = response.status == 206
                size = _range(headers.get("Content-Range", ""))[2] if part else _number(headers, "Content-Length")
        return size, headers.get("ETag") or headers.get("Last-Modified") or ""


@contextlib.contextmanager
def refusals(url: str) -> Iterator[None]:
    """Turn Refused into Passing."""
    try:
        yield
    except Refused as error:
        raise Passing(f"{shown(url)}: the server's answer makes no sense: {printable(error)}") from None


@contextlib.contextmanager
def faults(url: str) -> Iterator[None]:
    """Turn errors of a connection into Passing, Lasting or UsageError, with the URL in the message, without secrets."""
    named = shown(url)
    try:
        with refusals(url):
            yield
    except (Fault, UsageError):
        raise
    except urllib.error.HTTPError as error:
        error.close()
        kind = Lasting if error.code in _LASTING_STATUS else Passing
        remedy = ""
        if error.code in (401, 403):
            remedy = f" (a name and a password for it are taken from ~/.netrc or ${AUTH}=HOST=USER:PASSWORD)"
        raise kind(f"{named}: the server answered {error.code} {printable(error.reason)}{remedy}") from None
    except urllib.error.URLError as error:
        raise Passing(f"{named}: {printable(error.reason)}") from None
    except http.client.InvalidURL as error:
        raise UsageError(f"{named} is no URL: {printable(error)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Passing(f"{named}: {printable(error) or type(error).__name__}") from None
    except ValueError as error:
        raise UsageError(f"{named} is no URL: {printable(error)}") from None


# ---------------------------------------------------------------------------------------------------- what it says


def _number(headers: Message, name: str) -> int | None:
    """A header's value as a number of bytes, None if it is missing."""
    told = {value.strip() for line in headers.get_all(name, []) for value in line.split(",")}
    if not told:
        return None
    text = told.pop()
    if told or not re.fullmatch(r"\d{1,19}", text, re.ASCII) or int(text) > LARGEST:
        raise Refused(f"its {name} is {', '.join(headers.get_all(name, []))}")
    return int(text)


def range_header(start: int, end: int | None) -> str:
    """The Range header of [start, end); "" for a whole file."""
    return f"bytes={start}-{'' if end is None else max(end - 1, start)}" if start or end is not None else ""


def length_of_part(told: str, start: int, end: int | None, announced: int | None) -> int:
    """The length of the answer to a request for [start, end), after checking it.

    Args:
        told: the Content-Range header.
        start, end: the range that was requested.
        announced: the Content-Length header, if any.

    Raises:
        Refused: the answer is another range than the requested one.
    """
    first, last, size = _range(told)
    wanted = None if end is None else max(end - 1, start)
    if size is not None:
        wanted = size - 1 if wanted is None else min(wanted, size - 1)
    if first != start or last < first or last != (last if wanted is None else wanted) or last > LARGEST:
        raise Refused(
            f"bytes {start} to {'the end' if wanted is None else wanted} were asked for, its Content-Range is {told}"
        )
    if announced not in (None, last - first + 1):
        raise Refused(f"its Content-Length is {announced}, but its Content-Range has {last - first + 1} bytes")
    return last - first + 1


def _range(told: str) -> tuple[int, int, int | None]:
    """Parse a Content-Range header -> (first byte, last byte, size of the whole file or None)."""
    match = re.fullmatch(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*", told, re.ASCII | re.IGNORECASE)
    if not match:
        raise Refused(f"it is a part of the file, and its Content-Range is {told or 'missing'}")
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])


# ---------------------------------------------------------------------------------------------------------- talking


def _open(url: str, timeout: float, method: str = "GET", span: str = "") -> Any:
    return _opener().open(_request(url, method, span), timeout=timeout)


def _request(url: str, method: str = "GET", span: str = "") -> urllib.request.Request:
    headers = {"User-Agent": "stylegan-pg", "Accept-Encoding": "identity"} | ({"Range": span} if span else {})
    if secret := authorization(url):
        headers["Authorization"] = secret
    bare = split_user(url)[0]  # urllib takes credentials in a URL for a part of the host name
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
            raise Refused(f"it redirects to {place}, which is no URL: {printable(error, 80)}") from None

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
            raise Refused(f"it redirects to {shown(newurl)}, which is no http:// or https:// URL")
        if super().redirect_request(req, fp, code, msg, headers, newurl) is None:
            return None
        request = _request(newurl, req.get_method(), req.get_header("Range") or "")
        if not request.has_header("Authorization") and same_server(req.full_url, newurl):
            secret = req.get_header("Authorization")
            if secret:
                request.add_header("Authorization", secret)
        return request


class _InTime(http.client.HTTPConnection):
    """A connection whose handshake and headers must be complete within `timeout` seconds. Otherwise a server that sends
    single bytes, or "100 Continue" for ever, would never time out."""

    timeout: float
    _late = False
    _watch: threading.Timer | None = None

    def _dial(self, *args: Any, **kwargs: Any) -> socket.socket:
        sock = socket.create_connection(*args, **kwargs)
        # A duplicate descriptor, because TLS wraps the socket later, and the timer must shut down the one beneath.
        self._beneath = socket.socket(fileno=os.dup(sock.fileno()))
        self._watch = threading.Timer(self.timeout, self._cut)
        self._watch.daemon = True
        self._watch.start()
        return sock

    def _cut(self) -> None:
        self._late = True
        with contextlib.suppress(OSError):
            self._beneath.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        self._create_connection = self._dial
        with self._in_time():
            super().connect()

    def getresponse(self) -> http.client.HTTPResponse:
        try:
            with self._in_time():
                return super().getresponse()
        finally:
            self._watch_no_more()

    def close(self) -> None:
        self._watch_no_more()
        super().close()

    def _watch_no_more(self) -> None:
        if self._watch:
            self._watch.cancel()
            self._beneath.close()
            self._watch = None

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        late = TimeoutError(f"the server's answer did not begin within {self.timeout:g} seconds")
        try:
            yield
        except (OSError, http.client.HTTPException):
            if self._late:
                raise late from None
            raise
        if self._late:  # the connection was cut, and the headers received so far were taken for all of them
            raise late


class _InTimeTLS(_InTime, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_InTime, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_InTimeTLS, req, context=self._context)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    """urllib's default opener without file:, ftp: and data:, to which no redirect or dataset URL may lead."""
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
