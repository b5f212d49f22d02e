"""Reading URLs whose schemes only webdataset's gopen supports: gs://, ais://, hf://, sftp:// and others.

webdataset starts gsutil, ais or curl for them, with the URL as an argument and without a shell. Older versions of
webdataset run a shell command. Therefore URLs with characters that a shell might interpret (those that `_PLAIN` does
not allow) are rejected. This module calls the function that gopen would choose, and not gopen itself, because gopen
first applies $GOPEN_REWRITE, which may turn any URL into a command (`pipe:`) for a shell.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from stylegan_pg.data.storage.byte_stream import Body, Stream
from stylegan_pg.data.storage.retry import PermanentFault, TransientFault
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import shown

SCHEMES = ("gs", "ais", "hf", "sftp", "ftps", "scp", "htgs")
_PLAIN = re.compile(r"[a-z0-9]+://[A-Za-z0-9._~:/@%+=,-]+")
_BUFFER = 1 << 16  # bytes


@functools.lru_cache(maxsize=4)
def _schemes(used_for: str) -> frozenset[str]:
    added = (name for name in used_for.split(":") if re.fullmatch("[a-z][a-z0-9]*", name))
    return frozenset(SCHEMES) | frozenset(added) - {"file", "pipe", "http", "https", "s3"}


def is_known(url: str) -> bool:
    """Return whether the scheme of a URL is supported by gopen, but not by this program itself. $USE_AIS_FOR can name
    further schemes, such as hdfs, for which webdataset starts `ais`."""
    scheme, separator, _ = url.partition("://")
    return bool(separator) and scheme in _schemes(os.environ.get("USE_AIS_FOR", ""))


@contextlib.contextmanager
def open_gopen(url: str, start: int, end: int | None) -> Iterator[Stream]:
    """Open the bytes [start, end) of a URL for which `is_known` is true. All of its bytes up to `end` are read.

    Raises (also when the stream is read):
        TransientFault: The program failed.
        PermanentFault: The program does not exist.
        UsageError: The URL contains characters that a shell would interpret, or a package is missing.
    """
    if not _PLAIN.fullmatch(url):
        raise UsageError(
            f"{shown(url)}: such URLs may only contain letters, digits and the characters . _ ~ : / @ % + = , -; "
            "rename the file, or write pipe:COMMAND with the command that prints it"
        )
    pipe = _started(url)
    try:
        yield _Output(pipe, url, start, end)
    finally:
        pipe.ignore_errors = True
        pipe.proc.kill()  # it is still running if its output was not read to the end
        pipe.close()


def _started(url: str) -> Any:
    """Start the program for a URL and return webdataset's stream of its output."""
    from webdataset.gopen import gopen_schemes  # imported late: it imports torch, which most commands do not need

    handler = gopen_schemes.get(url.partition("://")[0])
    if handler is None:
        raise UsageError(f"{shown(url)}: this version of webdataset does not read such URLs: update it")
    try:
        return handler(url, "rb", _BUFFER)
    except FileNotFoundError as error:
        raise PermanentFault(f"{shown(url)}: the command {printable(error.filename)} does not exist") from None
    except ImportError as error:
        raise UsageError(
            f"{shown(url)}: {printable(error)}; install the package that webdataset needs for it"
        ) from None
    except Exception as error:  # for example exceptions of huggingface_hub, which first queries a server
        raise TransientFault(f"{shown(url)}: {printable(error)}") from None


class _Output(Body):
    """The output of a program. An exit status other than 0 is a TransientFault, at the latest at the end."""

    def __init__(self, pipe: Any, url: str, start: int, end: int | None):
        super().__init__(pipe, url, None if end is None else max(end - start, 0), start)

    def _read(self, n: int, take: Callable[[int], bytes]) -> bytes:
        try:
            data = super()._read(n, take)
            if not data and self.left != 0:
                self.raw.wait_for_child()
            return data
        except OSError:
            status = self.raw.proc.poll()
            raise TransientFault(
                f"{shown(self.url)}: the program that reads it failed with exit status {status}; its own "
                "message is above"
            ) from None
