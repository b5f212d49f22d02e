"""Configuration files and `key=value` overrides as plain tables, whose values have the types of their keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from stylegan_pg.config import Config, curves, renamed
from stylegan_pg.config.families import types_of, unwrap
from stylegan_pg.config.keys import did_you_mean
from stylegan_pg.config.nodes import Reader, compose, text_node
from stylegan_pg.config.renamed import RENAMED
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import without_secrets

MOST_BYTES = 1 << 17


def read_file(path: Path, named: str) -> dict[str, Any]:
    """The sections of a YAML file: nested tables whose values have the types of their keys.

    Raises:
        UsageError: beginning with `named`: the file cannot be read, is too large or no YAML; it has an unknown or
            duplicate key, a value of a wrong type, or too many values through aliases.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{named}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"{named}: more than {MOST_BYTES} bytes, which is no configuration")
    node = compose(data, named)
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{named}: not a mapping of keys to values")
    reader = Reader(named, lines=True)
    tree = reader.value(node, Config, "")
    for old, parts, value in reader.moved:
        _add(tree, old, parts, value, named)
    return tree


def _add(tree: dict[str, Any], old: str, parts: Sequence[str], value: Any, named: str) -> None:
    """Add the value of a renamed key to the tree of a file, under the present key."""
    *sections, name = parts
    place = functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, tree)
    if name in place:
        raise UsageError(f"{named}: {old} is now {'.'.join(parts)}, and both are given: leave {old} out")
    place[name] = value


def read_override(item: str) -> list[tuple[list[Any], Any]]:
    """[(the parts of the key, the value)] of one `a.b=value`. The last part may be a resolution, a URL, or a
    curves.Part. There are several pairs if the value is a table for a section and contains renamed keys.

    Raises:
        UsageError: the form is wrong, the key is unknown, or the value is of a wrong type.
    """
    key, equals, text = (part.strip() for part in item.partition("="))
    named = printable(f"{item.partition('=')[0]}{equals}{without_secrets(text)}", 120)
    if not equals:
        raise UsageError(f"{printable(repr(item))} is not of the form key=value")
    reader, names = Reader(named), key.split(".")
    if found := renamed.find(key):
        old, rest = found
        new = RENAMED[old].new.split(".")
        if RENAMED[old].type is not None and not rest:
            reader.move(old, _node(text, RENAMED[old].type, named), 0)
            return [(parts, value) for _, parts, value in reader.moved]
        renamed.announce(old)
        names = [*new, *filter(None, [rest])]
    parts, hint = _place(names, key, reader)
    if isinstance(parts[-1], curves.Part):
        return [(parts, reader.of_curve(_node(text, hint, named), parts[-1].name, key))]
    value = reader.value(_node(text, hint, named), hint, key)
    return [(parts, value), *((new, moved) for _, new, moved in reader.moved)]


def _place(names: Sequence[str], key: str, reader: Reader) -> tuple[list[Any], Any]:
    """(the parts of a key, the type of its value), for a key, a section, an entry of a table, or a number of a curve,
    whose last part is a curves.Part."""
    hint: Any = Config
    parts, rest = [], list(names)
    while rest and dataclasses.is_dataclass(hint):
        parts.append(rest.pop(0))
        hint = types_of(hint).get(parts[-1])  # type: ignore[arg-type]  # a dataclass, as just seen
    if rest and get_origin(hint) is dict:
        of, hint = get_args(hint)
        parts.append(reader.scalar(text_node(".".join(rest)), of, key))
    elif rest and hint is Any:
        try:
            parts.append(curves.part_of(rest, ".".join(parts)))
        except UsageError as error:
            raise reader.fault(str(error)) from None
        hint = str
    elif rest or hint is None:
        raise reader.fault(f"unknown key {printable(repr(key))}{did_you_mean(key)}")
    return parts, hint


def _node(text: str, hint: Any, named: str) -> yaml.Node:
    """The value of an override as a YAML node: parsed if it is in quotes or begins with a bracket, otherwise text."""
    kind = unwrap(hint)[0]
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    holds_more = get_origin(kind) is not None or dataclasses.is_dataclass(kind) or kind is Any
    is_flow = text[:1] in ("{", "[") and holds_more
    if is_flow or quoted:
        try:
            node = compose(text, named)
        except UsageError:
            if is_flow:
                raise
        else:
            if node is not None and (is_flow or isinstance(node, yaml.ScalarNode)):
                return node
    return text_node(text)
