"""Captions of the pictures in SOURCE: .txt or .json files beside them, or a JSON or CSV file that the user names."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from stylegan_pg.data.datasets.class_numbers import LABEL_BYTES
from stylegan_pg.data.datasets.fields import MAX_TEXT
from stylegan_pg.data.datasets.json_members import caption_in, json_content
from stylegan_pg.data.pack.labels import content_of, csv_rows, looked_up, picture_finder, read_table
from stylegan_pg.data.pack.source_files import File
from stylegan_pg.data.pack.sources import Listing
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import parse_json, printable

TEXT = ".txt"
_MEND = "mend it, or give --captions none"
_FORM = 'give {"path": "text", ...} or {"path": ["text", ...], ...}'


class Captions(NamedTuple):
    """The captions of a listing's pictures, in their order: a text, or the file that holds it; None: there is none.

    `said` says where they come from; it is empty if no captions were asked for.
    """

    of: list[File | str | None]
    said: str


def captions_of(listing: Listing, captions: str | os.PathLike[str]) -> Captions:
    """The captions that the option `captions` asks for (see `pack`).

    Raises:
        UsageError: there are no captions, they fit no picture, or have an unknown form.
    """
    if captions == "none":
        return Captions([None] * len(listing.pictures), "")
    if captions == "auto":
        return _beside(listing)
    path = Path(captions)
    origin = printable(path)
    data = read_table(path, "captions", "give auto, none, or a JSON or CSV file")
    if path.suffix.lower() == ".csv":
        rows = csv_rows(origin, data, picture_finder(listing.pictures, origin), "path,text").rows
        wrong = next((row for row in rows if len(row) != 2), None)
        if wrong is not None:
            raise UsageError(
                f"{origin} has lines that are not path,text, the first: {printable(','.join(wrong))}; put texts with "
                "commas in quotation marks"
            )
        given: dict[str, Any] = {}
        for place, text in rows:  # several lines for one picture are several texts
            given.setdefault(place, []).append(text)
    else:
        given = parse_json(data, origin, _FORM)
        if not isinstance(given, dict):
            raise UsageError(f"{origin} does not hold captions in a known form: {_FORM}")
    texts = looked_up({path: _text(value, origin, path) for path, value in given.items()}, listing.pictures, origin)
    return Captions(texts, origin)


def _beside(listing: Listing) -> Captions:
    """The .txt files beside the pictures; without any, the captions in their .json files."""
    files = [listing.beside(picture, TEXT) for picture in listing.pictures]
    if any(files):
        return Captions(list(files), f"{TEXT} files beside the pictures")
    texts = [_in_json(file) if (file := listing.beside(picture, ".json")) else "" for picture in listing.pictures]
    if any(texts):
        return Captions([text or None for text in texts], ".json files beside the pictures")
    raise UsageError(
        f"captions = auto: SOURCE has no {TEXT} files beside its pictures, and no .json files with a caption; "
        "give none, or a file"
    )


def _in_json(file: File) -> str:
    named = f"{printable(file.path)} in SOURCE"
    data = content_of(file, LABEL_BYTES, _MEND)
    return _text(caption_in(json_content(data, named, _MEND)), named, file.path)


def _text(value: Any, origin: str, path: str) -> str:
    """One text, or several, each on a line of its own."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in texts):
        raise UsageError(f"{origin} gives {printable(path)} {printable(repr(value), 60)}, which is no text: {_FORM}")
    whole = "\n".join(unicodedata.normalize("NFC", one.strip()) for one in texts)
    try:
        size = len(whole.encode())
    except UnicodeEncodeError:
        raise UsageError(f"{origin} gives {printable(path)} a text that is no Unicode: {_FORM}") from None
    if size > MAX_TEXT:
        raise UsageError(f"{origin} gives {printable(path)} a text of {size} bytes, more than {MAX_TEXT}: shorten it")
    return whole
