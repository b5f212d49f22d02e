"""Text, JSON and numbers that come from files, servers and archives which somebody else may have written.

Nothing in here trusts its input: text is shown without its control characters, JSON is parsed within limits of size and
depth, and a number is held against its range before anything is built or allocated with it.
"""

from __future__ import annotations

import json
from typing import Any

from stylegan_pg.errors import UsageError

MOST_JSON_BYTES = 1 << 28
DEEPEST_JSON = 64
_MOST_JSON_MEMORY = 3 << 29
_LONGEST_PRINTED = 300


def printable(text: object, longest: int = _LONGEST_PRINTED) -> str:
    """Text as a terminal may see it: control, formatting and undecodable characters are escaped (\\x1b, \\u202e), so
    that a file name can neither move the cursor nor hide what a message says; what is longer than `longest`
    characters is cut in its middle."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))
    if len(plain) <= longest:
        return plain
    half = (longest - 5) // 2
    return f"{plain[:half]} ... {plain[-half:]}"


def readable(error: BaseException) -> str:
    """An error's message for a terminal: printable line by line, and of bounded length, whatever names, texts and
    numbers have found their way into it."""
    return "\n".join(printable(line, 4000) for line in str(error).splitlines()[:100])


def parse_json(
    data: bytes | str,
    named: str,
    remedy: str,
    *,
    most: int = MOST_JSON_BYTES,
    deepest: int = DEEPEST_JSON,
    finite: bool = True,
) -> Any:
    """The content of a JSON text of at most `most` bytes whose lists and objects are nested at most `deepest` deep.

    Unless `finite` is False, NaN and Infinity, which are no JSON, are refused as well.

    Raises:
        UsageError: for anything else, in one message that begins with `named` and ends with `remedy`.
    """
    if len(data) > most:
        raise UsageError(f"{named} has {len(data)} bytes of JSON, more than {most}: {remedy}")
    if _memory(data) > _MOST_JSON_MEMORY:
        raise UsageError(f"{named} has too many values in its {len(data)} bytes of JSON: {remedy}")
    try:
        content = json.loads(data, parse_constant=_refuse if finite else None)
    except RecursionError:
        raise UsageError(f"{named} is nested deeper than {deepest} levels: {remedy}") from None
    except ValueError as error:  # also of text that is not UTF-8, and of numbers of more digits than Python takes
        raise UsageError(f"{named} is not JSON ({printable(error)}): {remedy}") from None
    if _depth_exceeds(content, deepest):
        raise UsageError(f"{named} is nested deeper than {deepest} levels: {remedy}")
    return content


def _memory(data: bytes | str) -> int:
    """About how many bytes the content of a JSON text takes in memory, at most."""
    count = data.count if isinstance(data, str) else lambda sign: data.count(sign.encode())
    return 240 * count("{") + 80 * count("[") + 120 * count(",")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _depth_exceeds(content: Any, deepest: int) -> bool:
    level = [content]
    for _ in range(deepest + 1):
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
    """`value`, if it is an integer (no bool) within [low, high].

    Raises:
        UsageError: if it is not; the message begins with `named` and ends with `remedy`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{named} is {printable(repr(value), 80)}, not a whole number from {low} to {high}: {remedy}")
    return value
