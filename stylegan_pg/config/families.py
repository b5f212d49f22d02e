"""Sections that have one of several classes: `system`, `model`, `augment`, and each entry of `loss.terms`.

One key of such a section names the class (`model.name`, `augment.mode`). Files and overrides are read with the keys of
all classes; afterwards the keys that the chosen class does not have are left out or refused.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from stylegan_pg.config import (
    AUGMENTATIONS,
    MODELS,
    SYSTEMS,
    TERMS,
    AugmentConfig,
    Config,
    ModelConfig,
    StyleGAN2Config,
    SystemConfig,
    TermConfig,
)
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

log = logging.getLogger(__name__)


class Family(NamedTuple):
    """The classes that a section may have, by the value of the key that chooses one; and what a value that is missing
    stands for."""

    selector: str
    classes: Mapping[str, type]
    default: str


FAMILIES: dict[type, Family] = {
    SystemConfig: Family("name", SYSTEMS, SystemConfig.name),
    ModelConfig: Family("name", MODELS, StyleGAN2Config.name),
    AugmentConfig: Family("mode", AUGMENTATIONS, AugmentConfig.mode),
    TermConfig: Family("name", TERMS, ""),
}
SECTIONS: dict[str, type] = {"system": SystemConfig, "model": ModelConfig, "augment": AugmentConfig}  # of Config
ADDED = {"system"}  # sections that files of earlier versions lack


def base_of(cls: type) -> type | None:
    """The common class of the family that `cls` belongs to, None if it belongs to none."""
    return next((base for base in FAMILIES if issubclass(cls, base)), None)


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The types of a configuration class's keys, by name; of a common class, of the keys of the whole family."""
    found = dict(get_type_hints(cls))
    for variant in FAMILIES[cls].classes.values() if cls in FAMILIES else ():
        found |= {name: hint for name, hint in get_type_hints(variant).items() if name not in found}
    return found


def unwrap(hint: Any) -> tuple[Any, bool]:
    """(the type itself, whether null is possible, too)."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None)), True
    return hint, False


def class_of(base: type, table: Mapping[str, Any]) -> type:
    """The class that a section's keys choose; the common one if they name none that exists."""
    family = FAMILIES[base]
    chosen = table.get(family.selector, family.default)
    return family.classes.get(chosen, base) if isinstance(chosen, str) else base


def fields_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The dataclass fields of a configuration class, by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def owners(base: type, key: str) -> list[str]:
    """The names of the classes of a family that have a key."""
    return [name for name, cls in FAMILIES[base].classes.items() if key in fields_of(cls)]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value of a dataclass field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def is_default(base: type, key: str, value: Any) -> bool:
    """Whether a value is the default that a key has in a class of the family."""
    return any(
        value == default_of(fields_of(cls)[key]) for cls in FAMILIES[base].classes.values() if key in fields_of(cls)
    )


@functools.cache
def announce(named: str, keys: tuple[str, ...], chosen: str) -> None:
    """Log, once in a process, that keys of other classes are left out."""
    verb, it = ("are", "them") if len(keys) > 1 else ("is", "it")
    log.info("note: %s: %s %s left out, because %s does not read %s", named, ", ".join(keys), verb, chosen, it)


class Resolved(NamedTuple):
    """A configuration as tables, whose sections have the keys of their classes only; and these classes."""

    tree: dict[str, Any]
    classes: dict[str, type]  # of SECTIONS
    terms: list[TermConfig]  # which are not in the tree


class Source(NamedTuple):
    """Where a configuration comes from."""

    file: Mapping[str, Any]  # what the file holds, without overrides
    given: Collection[tuple[str, str]]  # (section, key) of the overrides
    named: str  # in messages
    quiet: bool = False  # keys that are left out are not worth a line

    @property
    def is_whole(self) -> bool:
        """Whether the file has all sections, as a program writes it. Those of earlier versions have the keys of all
        classes."""
        sections = {name for name, hint in types_of(Config).items() if dataclasses.is_dataclass(hint)}
        return sections - ADDED <= self.file.keys()


def resolve(tree: Mapping[str, Any], source: Source) -> Resolved:
    """Choose the classes of a configuration's sections, and leave out the keys of other classes that may be left out.

    These are keys with their default value; all keys of a file that was written as a whole; and those that fit the
    class which the file chooses, if an override chooses another one.

    Raises:
        UsageError: for a key that the chosen class does not have, naming those that have it; or for a class that does
            not exist.
    """
    tree, classes = dict(tree), {}
    for section, base in SECTIONS.items():
        classes[section] = _chosen(base, section, tree.get(section, {}))
        if section in tree:
            tree[section] = _own_keys(tree[section], classes[section], section, source)
    loss = dict(tree.get("loss", {}))
    terms = [_term(term, source) for term in loss.pop("terms", [])]
    return Resolved(tree | {"loss": loss}, classes, terms)


def _chosen(base: type, section: str, table: Mapping[str, Any]) -> type:
    selector, classes, default = FAMILIES[base]
    chosen = table.get(selector, default)
    if chosen not in classes:
        wanted = " or ".join(classes)
        raise UsageError(f"{section}.{selector}={printable(chosen)} is not possible: it must be {wanted}")
    return classes[chosen]


def _own_keys(table: Mapping[str, Any], cls: type, section: str, source: Source) -> dict[str, Any]:
    base, selector = SECTIONS[section], FAMILIES[SECTIONS[section]].selector
    chosen = f"{section}.{selector}={getattr(cls, selector)}"
    before = fields_of(class_of(base, source.file.get(section, {})))
    foreign = [key for key in table if key not in fields_of(cls)]
    for key in foreign:
        of_file = (section, key) not in source.given and (key in before or source.is_whole)
        if not of_file and not is_default(base, key, table[key]):
            raise UsageError(
                f"{section}.{key} is no key of {chosen}; it belongs to {', '.join(owners(base, key))}"
                + (f" (in {source.named})" if (section, key) not in source.given else "")
            )
    if foreign and not source.quiet:
        announce(source.named, tuple(f"{section}.{key}" for key in foreign), chosen)
    return {key: value for key, value in table.items() if key not in foreign}


def _term(table: Mapping[str, Any], source: Source) -> TermConfig:
    """A term with its own keys; one whose name does not exist keeps what all terms have, for the message about it."""
    cls = class_of(TermConfig, table)
    foreign = [key for key in table if key not in fields_of(cls)]
    for key in foreign if cls is not TermConfig else ():
        if not source.is_whole and not is_default(TermConfig, key, table[key]):
            name, others = table["name"], ", ".join(owners(TermConfig, key))
            raise UsageError(f"loss.terms: {key} is no key of the term {name}; it belongs to {others}")
    if foreign and cls is not TermConfig and not source.quiet:
        announce(source.named, tuple(f"{key} in loss.terms" for key in foreign), f"the term {table['name']}")
    return cls(**{key: value for key, value in table.items() if key not in foreign})
