"""Safe handling of untrusted text, JSON and numbers from files, servers and archives.

Text is escaped before it is printed, JSON is parsed within limits of size and depth, and a number is checked against
its range before anything is built or allocated with it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from stylegan_pg.errors import UsageError

MAX_JSON_BYTES = 1 << 28
MAX_JSON_DEPTH = 64
_MAX_JSON_MEMORY = 3 << 29
MAX_LINE_BYTES = 1 << 20
_MAX_PRINTED = 300


def printable(text: object, longest: int = _MAX_PRINTED) -> str:
    """Return a text that is safe to print on a terminal.

    Control, formatting and undecodable characters are escaped (\\x1b, \\u202e), so that a file name can neither move
    the cursor nor hide a part of a message. A text longer than `longest` characters is shortened in its middle.
    """
    whole = str(text)
    shown = whole if len(whole) <= 2 * longest else whole[:longest] + whole[-longest:]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in shown)
    if len(plain) <= longest:
        return plain
    half = (longest - 5) // 2
    return f"{plain[:half]} ... {plain[-half:]}"


def readable(error: BaseException) -> str:
    """Return an error's message, safe to print on a terminal. Each line is escaped and shortened, and there are at most
    100 lines."""
    return "\n".join(printable(line, 4000) for line in str(error).splitlines()[:100])


def parse_json(
    data: bytes | str,
    named: str,
    remedy: str,
    *,
    max_bytes: int = MAX_JSON_BYTES,
    max_depth: int = MAX_JSON_DEPTH,
    finite: bool = True,
) -> Any:
    """Parse a JSON text of at most `max_bytes` bytes whose lists and objects are nested at most `max_depth` levels
    deep.

    An object with a duplicate key is refused, because parsers differ in which value they use. NaN, Infinity and numbers
    that overflow to infinity are refused unless `finite` is False.

    Args:
        data: The JSON text.
        named: The name of the text, with which error messages begin.
        remedy: What the user can do, with which error messages end.

    Raises:
        UsageError: if the text is refused.
    """
    if len(data) > max_bytes:
        raise UsageError(f"{named} has {len(data)} bytes of JSON, more than {max_bytes}: {remedy}")
    if _memory(data) > _MAX_JSON_MEMORY:
        raise UsageError(f"{named} has too many values in its {len(data)} bytes of JSON: {remedy}")
    try:
        only: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
        content = json.loads(data, object_pairs_hook=_without_duplicates, **only)
    except RecursionError:
        raise UsageError(f"{named} is nested deeper than {max_depth} levels: {remedy}") from None
    except ValueError as error:  # this includes text that is not UTF-8, and numbers with too many digits for Python
        why = str(error).partition("; use sys.")[0]  # the rest of the message is advice to programmers
        raise UsageError(f"{named} is not JSON ({printable(why)}): {remedy}") from None
    if _depth_exceeds(content, max_depth):
        raise UsageError(f"{named} is nested deeper than {max_depth} levels: {remedy}")
    return content


def _memory(data: bytes | str) -> int:
    """Return an upper bound of the memory in bytes of the parsed content of a JSON text."""
    count = data.count if isinstance(data, str) else lambda sign: data.count(sign.encode())
    return 240 * count("{") + 80 * count("[") + 120 * count(",")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} occurs twice")
    return content


def _depth_exceeds(content: Any, max_depth: int) -> bool:
    level = [content]
    for _ in range(max_depth + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def whole_number(value: Any, low: int, high: int, named: str, remedy: str) -> int:
    """Return `value` if it is an integer (not a bool) within [low, high].

    Raises:
        UsageError: otherwise. The message begins with `named` and ends with `remedy`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{named} is {printable(repr(value), 80)}, not a whole number from {low} to {high}: {remedy}")
    return value


def is_number(value: Any, low: float = -1e100, high: float = 1e100) -> bool:
    """Return whether `value` is an int or float (neither a bool nor NaN) within [low, high]."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def finite_number(value: Any, low: float, high: float, named: str, remedy: str) -> float:
    """Return `value` if it is a number (not a bool) within [low, high].

    Raises:
        UsageError: otherwise. The message begins with `named` and ends with `remedy`.
    """
    if not is_number(value, low, high):
        raise UsageError(f"{named} is {printable(repr(value), 80)}, not a number from {low:g} to {high:g}: {remedy}")
    return value


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading. Named pipes, which could block, devices and folders are errors.

    Raises:
        OSError: if the file does not exist, is not regular, or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(code, "this is not a regular file", os.fspath(path))
    return open(fd, "rb")


def read_json(path: Path, remedy: str, *, max_bytes: int = 1 << 24) -> Any:
    """Read and parse a JSON file of at most `max_bytes` bytes; see parse_json.

    Raises:
        OSError: as open_regular; UsageError: as parse_json.
    """
    with open_regular(path) as file:
        return parse_json(file.read(max_bytes + 1), str(path), remedy, max_bytes=max_bytes)


def text_lines(path: Path, *, last: int | None = None) -> Iterator[str]:
    """Iterate over the lines of a log file, without line ends; lines longer than MAX_LINE_BYTES are skipped.

    Args:
        path: The file. If it does not exist, there are no lines. Bytes that are not UTF-8 are replaced.
        last: The number of bytes at the end of the file that are read; None for the whole file.

    Raises:
        OSError: as open_regular.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    with file:
        if last is not None and os.fstat(file.fileno()).st_size > last:
            file.seek(-last, os.SEEK_END)
            file.readline(MAX_LINE_BYTES)  # skips an incomplete line whose beginning was not read
        whole = True
        while line := file.readline(MAX_LINE_BYTES):
            begins, whole = whole, line.endswith(b"\n")
            if begins and (whole or len(line) < MAX_LINE_BYTES):
                yield line.decode("utf-8", "replace").rstrip("\r\n")


def json_lines(path: Path, *, last: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over a .jsonl log. Yield each line that contains an object with an integer `nimg`, as text and parsed.

    Other lines, such as those truncated by a kill or a full disk, are skipped.

    Raises:
        OSError: as open_regular.
    """
    for line in text_lines(path, last=last):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        nimg = row.get("nimg") if isinstance(row, dict) else None
        if isinstance(nimg, int) and not isinstance(nimg, bool) and 0 <= nimg < 1 << 63:
            yield line, row
