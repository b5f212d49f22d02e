"""KEY.json beside a picture: its label and its caption, where other programs write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stylegan_pg.untrusted import parse_json

CAPTION_KEYS = ("caption", "captions", "text", "texts", "prompt")  # the first that holds a text is taken


def json_content(data: bytes, named: str, remedy: str) -> Mapping[str, Any]:
    """The entries of a JSON file; none if it holds no object. Raises UsageError for invalid JSON."""
    content = parse_json(data, named, remedy, finite=False)
    return content if isinstance(content, dict) else {}


def caption_in(content: Mapping[str, Any]) -> str:
    """The caption among the entries of a JSON file, "" if there is none. Each of several captions is a line."""
    for key in CAPTION_KEYS:
        value = content.get(key)
        given = value if isinstance(value, list) else [value]
        texts = [one.strip() for one in given if isinstance(one, str)]
        if len(texts) == len(given) and (text := "\n".join(texts).strip()):
            return text if _is_unicode(text) else ""
    return ""


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
