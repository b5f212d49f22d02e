"""YAML nodes as values of the types that the configuration's classes declare.

A value is read as the type of its key, and not as the type that YAML would choose: for a key whose value is text,
`00012`, `on` and `null` are texts. Files may come from other people, so sizes and depths are limited, and no variable,
file or code that they name is used.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, get_args, get_origin

import yaml

from stylegan_pg.config import Config, TermConfig, curves, renamed
from stylegan_pg.config.families import FAMILIES, types_of, unwrap
from stylegan_pg.config.keys import SHORT, did_you_mean, values_at
from stylegan_pg.config.renamed import RENAMED
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import without_secrets

MOST_VALUES = 10_000  # including those that aliases repeat
DEEPEST = 16
MOST_INTEGER = 1 << 63
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NULLS = ("", "~", "null", "none")
TAG = "tag:yaml.org,2002:"
PLAIN = ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "seq", "map")


def home(text: str) -> str:
    """A path, or several joined by "::", with the home folder in place of a leading `~`, as in a shell."""
    parts = text.split("::")
    return "::".join(os.path.expanduser(part) if part == "~" or part.startswith("~/") else part for part in parts)


def is_null(node: yaml.Node) -> bool:
    """Whether no value is given: an empty override, or null in a file."""
    return isinstance(node, yaml.ScalarNode) and (node.tag == TAG + "null" or (not node.value and not node.style))


def _split(pair: tuple[yaml.Node, yaml.Node]) -> tuple[yaml.Node, yaml.Node]:
    """An entry `8:16` of a table as its key and value. YAML requires a space behind the colon and would read all of it
    as a key. The key may contain colons itself if it is a URL."""
    name, child = pair
    if isinstance(name, yaml.ScalarNode) and not name.style and ":" in name.value and is_null(child):
        left, _, right = name.value.rpartition(":")
        return text_node(left.strip(), name), text_node(right.strip(), name)
    return pair


def text_node(text: str, at: yaml.Node | None = None) -> yaml.ScalarNode:
    """A node of plain text, at the position of another one."""
    return yaml.ScalarNode(TAG + "str", text, at and at.start_mark)


def compose(data: bytes | str, named: str) -> yaml.Node | None:
    """Parse YAML to nodes, without interpreting their values.

    Raises:
        UsageError: beginning with `named`: it is no YAML, or nested too deeply.
    """
    try:
        return yaml.compose(data, yaml.SafeLoader)
    except RecursionError:
        raise UsageError(f"{named}: nested deeper than {DEEPEST} levels") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{named}: not valid YAML: {printable(' '.join(str(error).split()))}") from None


class Reader:
    """Converts YAML's nodes to values of the keys' types, with limits on their number and depth."""

    def __init__(self, named: str, *, lines: bool = False):
        self.named, self.lines, self.left = named, lines, MOST_VALUES
        self.moved: list[tuple[str, list[str], Any]] = []  # of renamed keys: old name, parts of the new one, new value

    def fault(self, reason: str, node: yaml.Node | None = None) -> UsageError:
        """An error with the name of the source and, in a file, the line of the node."""
        at = f" (line {node.start_mark.line + 1})" if self.lines and node is not None and node.start_mark else ""
        return UsageError(f"{self.named}: {reason}{at}")

    def unfit(self, node: yaml.Node, key: str, wanted: str) -> UsageError:
        """The error of a value of a wrong type."""
        if isinstance(node, yaml.ScalarNode):
            given = printable(repr(without_secrets(node.value)), 80)
        else:
            given = "a list" if isinstance(node, yaml.SequenceNode) else "a table"
        return self.fault(f"{key or 'a key'}: {given} is not possible: it must be {wanted}", node)

    def count(self, node: yaml.Node, depth: int) -> None:
        """Count a value. Aliases can expand a few bytes into an unlimited number of values."""
        self.left -= 1
        if self.left < 0:
            raise self.fault(f"more than {MOST_VALUES} values, which is no configuration", node)
        if depth > DEEPEST:
            raise self.fault(f"nested deeper than {DEEPEST} levels", node)

    def value(self, node: yaml.Node, hint: Any, key: str, depth: int = 0) -> Any:
        """A node as a value of a type. A dataclass becomes a table with the keys that are given."""
        self.count(node, depth)
        if node.tag.removeprefix(TAG) not in PLAIN:
            raise self.fault(f"{key or 'the whole'}: the tag {printable(node.tag, 80)} is not supported", node)
        hint, optional = unwrap(hint)
        scalar = isinstance(node, yaml.ScalarNode)
        if optional and scalar and not node.style and node.value.lower() in NULLS:
            return None
        if dataclasses.is_dataclass(hint):
            return self.section(node, hint, key, depth)
        if hint is Any:
            return self.scheduled(node, key, depth)
        if get_origin(hint) is list:
            return self.sequence(node, get_args(hint)[0], key, depth)
        if get_origin(hint) is dict:
            of, to = get_args(hint)
            return self.table(node, of, to, key, depth)
        return self.scalar(node, hint, key)

    def section(self, node: yaml.Node, cls: Any, key: str, depth: int) -> dict[str, Any]:
        """A section, or an entry of a list of tables, as a table with the keys that are given."""
        if not isinstance(node, yaml.MappingNode):
            return self.short_section(node, cls, key, depth)
        hints = types_of(cls)
        found: dict[str, Any] = {}
        for name_node, child in map(_split, self.pairs(node, depth)):
            name = self.scalar(name_node, str, key)
            full = f"{key}.{name}" if key else name
            if name in hints:
                found[name] = self.value(child, hints[name], full, depth + 1)
            elif full in RENAMED:
                self.move(full, child, depth)
            elif "[" in key:  # an entry of a list
                raise self.fault(f"{key}: unknown key {printable(repr(name))}{did_you_mean(name, cls)}", name_node)
            else:
                raise self.fault(f"unknown key {printable(repr(full))}{did_you_mean(full)}", name_node)
        if "[" in key and "name" not in found:
            raise self.fault(f"{key}.name is not set: give each entry its name", node)
        return found

    def short_section(self, node: yaml.Node, cls: Any, key: str, depth: int) -> dict[str, Any]:
        """A section for which a single value is given, or nothing."""
        hints = types_of(cls)
        if node.tag == TAG + "null":  # all its keys are commented out
            return {}
        if key in SHORT:
            name = SHORT[key]
            return {name: self.value(node, hints[name], f"{key}.{name}", depth + 1)}
        if isinstance(node, yaml.ScalarNode) and cls is TermConfig and node.value in FAMILIES[cls].classes:
            return {"name": node.value}
        if "[" in key:
            raise self.unfit(node, key, "a table such as {name: r2, weight: 1}")
        raise self.fault(f"{key} is a section: give a key in it, such as {key}.{next(iter(hints))}=VALUE", node)

    def move(self, old: str, node: yaml.Node, depth: int) -> None:
        """Read the value of a renamed key for the key that has taken its place."""
        new, kind, change = RENAMED[old]
        parts = new.split(".")
        hint = functools.reduce(lambda cls, part: types_of(cls)[part], parts, Config) if kind is None else kind
        renamed.announce(old)
        self.moved.append((old, parts, change(self.value(node, hint, old, depth + 1))))

    def sequence(self, node: yaml.Node, of: Any, key: str, depth: int) -> list[Any]:
        """A list. A single value, or several with commas between them, are accepted as a list."""
        entries: Sequence[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            entries = node.value
        elif isinstance(node, yaml.ScalarNode) and not is_null(node):
            texts = [node.value] if _is_path(key) or node.style in ("'", '"') else node.value.split(",")
            entries = [text_node(text.strip()) for text in texts if text or node.style]
        elif not is_null(node):
            raise self.unfit(node, key, "a list, such as [a, b]")
        return [self.value(entry, of, f"{key}[{i}]", depth + 1) for i, entry in enumerate(entries)]

    def table(self, node: yaml.Node, of: Any, to: Any, key: str, depth: int) -> dict[Any, Any]:
        """A table. A single `8:16`, or several with commas between them, are accepted as a table."""
        pairs: list[tuple[yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            pairs = self.pairs(node, depth)
        elif isinstance(node, yaml.ScalarNode) and ":" in node.value and not _is_path(key):
            pairs = [(text_node(text.strip()), text_node("")) for text in node.value.split(",")]
        elif not is_null(node):
            of_names = f"a table {{{values_at(key).by}: {'NUMBER' if to is float else 'TEXT'}, ...}}"
            raise self.unfit(node, key, "a table, such as {8: 16, 16: 8}" if of is int else of_names)
        found = {}
        for name, child in map(_split, pairs):
            place = self.scalar(name, of, key)
            if place in found:
                raise self.fault(f"{key}: {printable(place)} is there twice", name)
            found[place] = self.value(child, to, f"{key}.{printable(place)}", depth + 1)
        return found

    def scheduled(self, node: yaml.Node, key: str, depth: int) -> Any:
        """A number, or curves: a list of tables with the keys that are given. A single table is a list of one."""
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, float, key)
        if not isinstance(node, yaml.SequenceNode):
            return [self.curve(node, key, depth + 1)]
        count = len(node.value)
        return [self.curve(one, curves.place(key, i, count), depth + 1) for i, one in enumerate(node.value)]

    def curve(self, node: yaml.Node, named: str, depth: int) -> dict[str, Any]:
        """One curve, whose numbers are not checked yet."""
        if not isinstance(node, yaml.MappingNode):
            raise self.unfit(node, named, f"a curve, such as {curves.EXAMPLE}")
        self.count(node, depth)
        found: dict[str, Any] = {}
        for name_node, child in map(_split, self.pairs(node, depth)):
            name = self.scalar(name_node, str, named)
            if name not in curves.KEYS:
                raise self.fault(curves.unknown(named, name), name_node)
            self.count(child, depth)
            found[name] = self.of_curve(child, name, f"{named}.{name}")
        return found

    def of_curve(self, node: yaml.Node, name: str, key: str) -> Any:
        """A number of a curve, or its shape."""
        return self.scalar(node, float if name in curves.NUMBERS else str, key)

    def pairs(self, node: yaml.MappingNode, depth: int) -> list[tuple[yaml.Node, yaml.Node]]:
        """The entries of a mapping: its own, followed by those of mappings that `<<` merges, without its own keys."""
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
                raise self.fault("<< must be followed by tables", other)
            for name, child in self.pairs(other, depth + 1):
                own.setdefault(name.value, (name, child))
        return list(own.values())

    def scalar(self, node: yaml.Node, hint: Any, key: str) -> Any:
        """A text, a boolean or a number, as the type of the key requires."""
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
        return self.number(node, text, hint, key)

    def number(self, node: yaml.Node, text: str, hint: Any, key: str) -> int | float:
        """A finite number, whole if the type is int."""
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
    """A number as people read it: 010 is ten, and not eight as in YAML. None if the text is no number."""
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
