"""The keys of the configuration by name: which there are, and what `stylegan-pg config` prints about them."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import sys
import tokenize
from typing import Any, get_args, get_origin

from omegaconf import MISSING

from stylegan_pg.config import Config, TermConfig, curves
from stylegan_pg.config.families import FAMILIES, default_of, fields_of, owners, types_of, unwrap
from stylegan_pg.config.fields import Values, values_of
from stylegan_pg.config.renamed import RENAMED
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

# The key of a section that is set if a single value is given for the section: data=FOLDER, model=progan.
SHORT = {"data": "url", "model": "name", "loss": "objective", "augment": "mode", "metrics": "names"}


def known(cls: type = Config, prefix: str = "") -> list[str]:
    """The names of all keys and sections; a section comes before its keys."""
    keys = []
    for name, hint in types_of(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += known(hint, prefix + name + ".")  # type: ignore[arg-type]  # dataclass types only
    return keys


def field_of(cls: type, name: str) -> dataclasses.Field[Any]:
    """The field of a key in a class; of a key of a family, in the first class that has it."""
    if name in fields_of(cls):
        return fields_of(cls)[name]
    return fields_of(FAMILIES[cls].classes[owners(cls, name)[0]])[name]


def values_at(key: str) -> Values:
    """What a key of the configuration may hold; nothing is demanded of what is no key."""
    cls: Any = Config
    *sections, name = key.split(".")
    for section in sections:
        cls = types_of(cls).get(section) if dataclasses.is_dataclass(cls) else None
    known_there = isinstance(cls, type) and dataclasses.is_dataclass(cls) and name in types_of(cls)
    return values_of(field_of(cls, name)) if known_there else Values()


def nearest(key: str, cls: type = Config) -> str | None:
    """The key that is most like a misspelt one, compared as a whole or by its last part; None if none is like it."""
    if cls is Config and key in RENAMED:
        return RENAMED[key].new
    keys = known(cls)
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in keys}
    near = difflib.get_close_matches(key, keys, 1, 0.6)
    near = near or [by_leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.6)]
    return near[0] if near else None


def did_you_mean(key: str, cls: type = Config) -> str:
    """The end of a message about an unknown key: the key that was probably meant, if there is one."""
    near = nearest(key, cls)
    return f"; did you mean {near!r}?" if near else ""


# --- what `stylegan-pg config` prints ---------------------------------------------------------------------------------


@functools.cache
def _comments(module: str) -> dict[tuple[str, str], str]:
    """The comment behind each field of a module's classes, by the names of its class and of the field."""
    text = inspect.getsource(sys.modules[module])
    behind = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        (cls.name, field.target.id): behind.get(field.end_lineno or 0, "")
        for cls in ast.parse(text).body
        if isinstance(cls, ast.ClassDef)
        for field in cls.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _comment(cls: type, name: str) -> str:
    """The comment behind a field in the class, or in the nearest base class that declares it with a comment."""
    found = (_comments(c.__module__).get((c.__name__, name), "") for c in cls.__mro__[:-1])
    return next(filter(None, found), "")


def _comment_of_family(base: type, name: str) -> str:
    """The comment on a key of a family. If it differs between the classes, or some lack the key, their names follow."""
    by_comment: dict[str, list[str]] = {}
    for owner in owners(base, name):
        by_comment.setdefault(_comment(FAMILIES[base].classes[owner], name), []).append(owner)
    if sum(map(len, by_comment.values())) == len(FAMILIES[base].classes) and len(by_comment) == 1:
        return next(iter(by_comment))
    return "; ".join(f"{comment} ({', '.join(names)})" for comment, names in by_comment.items())


def _kind(hint: Any, values: Values) -> str:
    """The kind of a value, in words."""
    hint, optional = unwrap(hint)
    words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if hint is Any:
        text = words[float]
    elif get_origin(hint) is list:
        (of,) = get_args(hint)
        text = "list of terms" if dataclasses.is_dataclass(of) else f"list of {words[of]}s".replace("texts", "names")
    elif get_origin(hint) is dict:
        text = f"table {{{values.by}: {words[get_args(hint)[1]]}, ...}}"
    else:
        text = words[hint]
    if values.choices:
        text = ("some of " if values.several else "one of ") + ", ".join(map(str, values.choices))
    return text + values.words + (", or a curve" if hint is Any else "") + (", or null" if optional else "")


def _shown(value: Any) -> str:
    """A default value in the form of an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "..." if value == MISSING else f"{value:g}" if isinstance(value, float) else str(value)


def describe(key: str = "") -> list[str]:
    """One line for each key with its default, kind and comment. `key` may be empty (all keys), a section, a key, or the
    last part of keys.

    Raises:
        UsageError: if there is no such key; the message names the nearest one.
    """
    keys = known()
    chosen = [k for k in keys if not key or k == key or k.startswith(key + ".")]
    chosen = chosen or [k for k in keys if k.rsplit(".", 1)[-1] == key]
    if not chosen:
        raise UsageError(f"there is no key {printable(repr(key))}{did_you_mean(key)} (`stylegan-pg config` lists all)")
    lines = [line for k in chosen for line in _lines(Config, k, k)]
    if chosen == ["loss.terms"]:
        lines += [line for name in types_of(TermConfig) for line in _lines(TermConfig, name, f"  {name}")]
        lines.append(f"  possible names: {', '.join(FAMILIES[TermConfig].classes)}")
    if len(chosen) == 1 and values_at(chosen[0]).curve is not None:
        lines.append(f"  a curve: {chosen[0]}={curves.EXAMPLE}; or a list of curves, one after another")
        lines.append(
            f"  shape: {' or '.join(curves.SHAPES)} (the default is {curves.SHAPES[0]}); start: kimg at which "
        )
        lines[-1] += "it begins (where the one before ends, the first one at 0)"
    return lines


def _lines(cls: Any, key: str, label: str) -> list[str]:
    *sections, name = key.split(".")
    for section in sections:
        cls = types_of(cls)[section]
    hint = types_of(cls)[name]
    if dataclasses.is_dataclass(hint):
        return []
    field = field_of(cls, name)
    values, default = values_of(field), default_of(field)
    comment = _comment_of_family(cls, name) if cls in FAMILIES else _comment(cls, name)
    if cls in FAMILIES and name == FAMILIES[cls].selector:
        values, default = Values(choices=tuple(FAMILIES[cls].classes)), FAMILIES[cls].default or MISSING
        comment = _comment(cls, name)
    return [f"{label + '=' + _shown(default):<41}  {_kind(hint, values)}" + (f"; {comment}" if comment else "")]
