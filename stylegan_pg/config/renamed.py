"""Keys of earlier versions, and the keys that hold their values now.

YAML files, overrides and the configurations stored in checkpoints may use the old keys. Whoever renames a key adds one
entry to RENAMED; nothing else has to know about it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


class Renamed(NamedTuple):
    """The present key of a renamed one. `type` is the type of the old value, None if it is that of the new key;
    `value` turns an old value into a new one."""

    new: str
    type: Any = None
    value: Callable[[Any], Any] = lambda old: old


RENAMED: dict[str, Renamed] = {
    "output.tensorboard": Renamed("output.trackers", bool, lambda on: ["tensorboard"] if on else []),
}


def find(key: str) -> tuple[str, str] | None:
    """(the renamed key, the rest behind it) of a key that is renamed or an entry of a renamed table, otherwise None.
    The rest of `train.old_at.8` is "8"."""
    for old in RENAMED:
        if key == old or key.startswith(old + "."):
            return old, key[len(old) + 1 :]
    return None


@functools.cache
def announce(old: str) -> None:
    """Log, once in a process, that a key has another name now."""
    log.info("note: key %s is now %s", old, RENAMED[old].new)


def translated(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that a checkpoint or snapshot holds, as nested dictionaries, with present keys instead of renamed
    ones. A present key that is there already keeps its value."""
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in stored.items()}
    for old, renamed in RENAMED.items():
        section, _, name = old.rpartition(".")
        place = tree.get(section) if section else tree
        if isinstance(place, dict) and name in place:
            value = renamed.value(place.pop(name))
            section, _, name = renamed.new.rpartition(".")
            place = tree.setdefault(section, {}) if section else tree
            if isinstance(place, dict):
                place.setdefault(name, value)
    return tree
