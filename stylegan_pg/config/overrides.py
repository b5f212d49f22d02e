"""YAML text and `key=value` overrides as plain tables, parsed by the types that schema.py declares.

What YAML would make of a value does not count, but what its key is for: for a text, `00012`, `on` and `null` are texts.
Files may come from somebody else, so sizes and depths are limited, and nothing in them is looked up or run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from stylegan_pg.config import Config, TermConfig, renamed
from stylegan_pg.config.families import FAMILIES, types_of, unwrap
from stylegan_pg.config.keys import SHORT, did_you_mean, values_at
from stylegan_pg.config.renamed import RENAMED
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import without_secrets

MOST_BYTES = 1 << 17
MOST_VALUES = 10_000  # with what aliases repeat
DEEPEST = 16
MOST_INTEGER = 1 << 63
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NULLS = ("", "~", "null", "none")
TAG = "tag:yaml.org,2002:"
PLAIN = ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map")


def home(text: str) -> str:
    """A path, or several joined by "::", whose leading `~` stands for the home folder, as in a shell."""
    parts = text.split("::")
    return "::".join(os.path.expanduser(part) if part == "~" or part.startswith("~/") else part for part in parts)


def read_file(path: Path, named: str) -> dict[str, Any]:
    """The sections of a YAML file: nested tables whose values have the types of their keys.

    Raises:
        UsageError: beginning with `named`: an unreadable or oversized file, no YAML, an unknown key or one that is
            there twice, a value of another type, or values without end through aliases.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{named}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"{named}: more than {MOST_BYTES} bytes, which is no configuration")
    node = _compose(data, named)
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{named}: not a mapping of keys to values")
    reader = _Reader(named, lines=True)
    tree = reader.value(node, Config, "")
    for old, parts, value in reader.moved:
        *sections, name = parts
        place = functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, tree)
        if name in place:
            raise UsageError(f"{named}: {old} is now {'.'.join(parts)}, and both are given: leave {old} out")
        place[name] = value
    return tree


def read_override(item: str) -> list[tuple[list[Any], Any]]:
    """[(the parts of the key, the value)] of one `a.b=value`, the last part perhaps a resolution or a URL. There are
    several if the value is a table for a section that holds renamed keys.

    Raises:
        UsageError: no such form or key, or a value of another type.
    """
    key, equals, text = item.partition("=")
    named = printable(f"{key}{equals}{without_secrets(text)}", 120)
    if not equals:
        raise UsageError(f"{printable(repr(item))} is not of the form key=value")
    reader, parts, hint = _Reader(named), [], Config
    names = key.strip().split(".")
    if found := renamed.find(key.strip()):
        old, rest = found
        renamed.announce(old)
        if RENAMED[old].type is not None and not rest:
            value = reader.value(_node(text.strip(), RENAMED[old].type, named), RENAMED[old].type, old)
            return [(list(RENAMED[old].new.split(".")), RENAMED[old].value(value))]
        names = [*RENAMED[old].new.split("."), *filter(None, [rest])]
    while names and dataclasses.is_dataclass(hint):
        name = names.pop(0)
        parts.append(name)
        hint = types_of(hint).get(name)  # type: ignore[arg-type]  # a dataclass, as just seen
    if names and get_origin(hint) is dict:
        of, hint = get_args(hint)
        parts.append(reader.scalar(_text(".".join(names)), of, key))
    elif names or hint is None:
        raise reader.fault(f"unknown key {printable(repr(key))}{did_you_mean(key)}")
    value = reader.value(_node(text.strip(), hint, named), hint, key.strip())
    return [(parts, value), *((new, moved) for _, new, moved in reader.moved)]


def _node(text: str, hint: Any, named: str) -> yaml.Node:
    """The value of an override: a text as it stands, if not in quotes; else YAML where there are brackets."""
    kind = unwrap(hint)[0]
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    is_flow = text[:1] in ("{", "[") and (get_origin(kind) is not None or dataclasses.is_dataclass(kind))
    if is_flow or quoted:
        try:
            node = _compose(text, named)
        except UsageError:
            if is_flow:
                raise
        else:
            if node is not None and (is_flow or isinstance(node, yaml.ScalarNode)):
                return node
    return _text(text)


def _is_null(node: yaml.Node) -> bool:
    """Nothing is given: an empty override, or null in a file."""
    return isinstance(node, yaml.ScalarNode) and (node.tag == TAG + "null" or (not node.value and not node.style))


def _split(pair: tuple[yaml.Node, yaml.Node]) -> tuple[yaml.Node, yaml.Node]:
    """An entry `8:16`, where YAML wants a space behind the colon and takes all of it for a key, as what was meant;
    there may be colons in the key itself, a URL."""
    name, child = pair
    if isinstance(name, yaml.ScalarNode) and not name.style and ":" in name.value and _is_null(child):
        left, _, right = name.value.rpartition(":")
        return _text(left.strip(), name), _text(right.strip(), name)
    return pair


def _text(text: str, at: yaml.Node | None = None) -> yaml.ScalarNode:
    return yaml.ScalarNode(TAG + "str", text, at and at.start_mark)


def _compose(data: bytes | str, named: str) -> yaml.Node | None:
    try:
        return yaml.compose(data, yaml.SafeLoader)
    except RecursionError:
        raise UsageError(f"{named}: nested deeper than {DEEPEST} levels") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{named}: not valid YAML: {printable(' '.join(str(error).split()))}") from None


class _Reader:
    """Turns YAML's nodes into values, and counts them."""

    def __init__(self, named: str, *, lines: bool = False):
        self.named, self.lines, self.left = named, lines, MOST_VALUES
        self.moved: list[tuple[str, list[str], Any]] = []  # of renamed keys: old name, parts of the new one, new value

    def fault(self, reason: str, node: yaml.Node | None = None) -> UsageError:
        at = f" (line {node.start_mark.line + 1})" if self.lines and node is not None and node.start_mark else ""
        return UsageError(f"{self.named}: {reason}{at}")

    def unfit(self, node: yaml.Node, key: str, wanted: str) -> UsageError:
        if isinstance(node, yaml.ScalarNode):
            given = printable(repr(without_secrets(node.value)), 80)
        else:
            given = "a list" if isinstance(node, yaml.SequenceNode) else "a table"
        return self.fault(f"{key or 'a key'}: {given} is not possible: it must be {wanted}", node)

    def count(self, node: yaml.Node, depth: int) -> None:
        """Aliases can make few bytes into values without end."""
        self.left -= 1
        if self.left < 0:
            raise self.fault(f"more than {MOST_VALUES} values, which is no configuration", node)
        if depth > DEEPEST:
            raise self.fault(f"nested deeper than {DEEPEST} levels", node)

    def value(self, node: yaml.Node, hint: Any, key: str, depth: int = 0) -> Any:
        """A node as a value of a type: of a dataclass, a table with the keys that are given."""
        self.count(node, depth)
        if node.tag.removeprefix(TAG) not in PLAIN:
            raise self.fault(f"{key or 'the whole'}: the tag {printable(node.tag, 80)} means nothing here", node)
        hint, optional = unwrap(hint)
        scalar = isinstance(node, yaml.ScalarNode)
        if optional and scalar and not node.style and node.value.lower() in NULLS:
            return None
        if dataclasses.is_dataclass(hint):
            return self.section(node, hint, key, depth)
        if get_origin(hint) is list:
            return self.sequence(node, get_args(hint)[0], key, depth)
        if get_origin(hint) is dict:
            of, to = get_args(hint)
            return self.table(node, of, to, key, depth)
        return self.scalar(node, hint, key)

    def section(self, node: yaml.Node, cls: Any, key: str, depth: int) -> dict[str, Any]:
        hints = types_of(cls)
        if not isinstance(node, yaml.MappingNode):
            if node.tag == TAG + "null":  # all that was in it is commented out
                return {}
            if key in SHORT:
                name = SHORT[key]
                return {name: self.value(node, hints[name], f"{key}.{name}", depth + 1)}
            if isinstance(node, yaml.ScalarNode) and cls is TermConfig and node.value in FAMILIES[cls].classes:
                return {"name": node.value}
            if "[" in key:
                raise self.unfit(node, key, "a table such as {name: r2, weight: 1}")
            raise self.fault(f"{key} is a section: give a key in it, such as {key}.{next(iter(hints))}=VALUE", node)
        found: dict[str, Any] = {}
        for name_node, child in map(_split, self.pairs(node, depth)):
            name = self.scalar(name_node, str, key)
            if name not in hints:
                if (f"{key}.{name}" if key else name) in RENAMED:
                    self.move(f"{key}.{name}" if key else name, child, depth)
                    continue
                if "[" in key:  # an entry of a list
                    raise self.fault(f"{key}: unknown key {printable(repr(name))}{did_you_mean(name, cls)}", name_node)
                full = f"{key}.{name}" if key else name
                raise self.fault(f"unknown key {printable(repr(full))}{did_you_mean(full)}", name_node)
            found[name] = self.value(child, hints[name], f"{key}.{name}" if key else name, depth + 1)
        if "[" in key and "name" not in found:
            raise self.fault(f"{key}.name is not set: give each entry its name", node)
        return found

    def move(self, old: str, node: yaml.Node, depth: int) -> None:
        """Read the value of a renamed key for the key that has taken its place."""
        new, kind, change = RENAMED[old]
        parts = new.split(".")
        hint = functools.reduce(lambda cls, part: types_of(cls)[part], parts, Config) if kind is None else kind
        renamed.announce(old)
        self.moved.append((old, parts, change(self.value(node, hint, old, depth + 1))))

    def sequence(self, node: yaml.Node, of: Any, key: str, depth: int) -> list[Any]:
        """A list; one value, or several with commas between them, stand for a list of them."""
        entries: Sequence[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            entries = node.value
        elif isinstance(node, yaml.ScalarNode) and not _is_null(node):
            texts = [node.value] if _is_path(key) or node.style in ("'", '"') else node.value.split(",")
            entries = [_text(text.strip()) for text in texts if text or node.style]
        elif not _is_null(node):
            raise self.unfit(node, key, "a list, such as [a, b]")
        return [self.value(entry, of, f"{key}[{i}]", depth + 1) for i, entry in enumerate(entries)]

    def table(self, node: yaml.Node, of: Any, to: Any, key: str, depth: int) -> dict[Any, Any]:
        """A table; `8:16` alone, or several with commas between them, stand for one."""
        pairs: list[tuple[yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            pairs = self.pairs(node, depth)
        elif isinstance(node, yaml.ScalarNode) and ":" in node.value and not _is_path(key):
            pairs = [(_text(text.strip()), _text("")) for text in node.value.split(",")]
        elif not _is_null(node):
            raise self.unfit(
                node, key, "a table, such as {8: 16, 16: 8}" if of is int else "a table {URL: WEIGHT, ...}"
            )
        found = {}
        for name, child in map(_split, pairs):
            place = self.scalar(name, of, key)
            if place in found:
                raise self.fault(f"{key}: {printable(place)} is there twice", name)
            found[place] = self.value(child, to, f"{key}.{printable(place)}", depth + 1)
        return found

    def pairs(self, node: yaml.MappingNode, depth: int) -> list[tuple[yaml.Node, yaml.Node]]:
        """The entries of a mapping; behind its own, those that `<<` takes from others and that it does not have."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for name, child in node.value:
            self.count(name, depth)
            if name.tag == TAG + "merge":
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            if not isinstance(name, yaml.ScalarNode):
                raise self.fault("a list or a table cannot be a key", name)
            if name.value in own:
                raise self.fault(f"{printable(repr(name.value))} is there twice", name)
            own[name.value] = name, child
        for other in merged:
            self.count(other, depth)
            if not isinstance(other, yaml.MappingNode):
                raise self.fault("<< takes tables alone", other)
            for name, child in self.pairs(other, depth + 1):
                own.setdefault(name.value, (name, child))
        return list(own.values())

    def scalar(self, node: yaml.Node, hint: Any, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            kinds = {int: "a whole number", float: "a number", bool: "true or false"}
            raise self.unfit(node, key, kinds.get(hint, "a text"))
        text = node.value
        if hint is str:
            if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text):
                raise self.unfit(node, key, "a text without control characters")
            return home(text) if _is_path(key) else text
        text = text.strip().lower()
        if hint is bool:
            if text not in BOOLEANS:
                raise self.unfit(node, key, "true or false")
            return BOOLEANS[text]
        number = _number(text)
        if hint is int:
            if number is None or not math.isfinite(number) or number != int(number):
                raise self.unfit(node, key, "a whole number")
            if abs(number) >= MOST_INTEGER:
                raise self.unfit(node, key, f"a whole number below {MOST_INTEGER}")
            return int(number)
        if number is None or not math.isfinite(number):
            raise self.unfit(node, key, "a finite number" if number is not None else "a number")
        return float(number)


def _is_path(key: str) -> bool:
    """Whether the value of a key, or an entry of it, is the path of a file or folder."""
    whole = key.split("[")[0]
    return values_at(whole).is_path or values_at(".".join(whole.split(".")[:2])).is_path


def _number(text: str) -> int | float | None:
    """Decimal digits as they are read by people: 010 is ten, whatever YAML says."""
    if text in (".inf", "+.inf", "-.inf", ".nan"):
        return float(text.replace(".", ""))
    try:
        if re.fullmatch(r"[+-]?[0-9_]{1,40}", text):
            return int(text)
        if re.fullmatch(r"0x[0-9a-f]{1,16}", text):
            return int(text, 16)
        return float(text) if text.isascii() and len(text) < 400 else None
    except ValueError:
        return None
