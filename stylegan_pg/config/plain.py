"""Configurations as plain tables and as YAML, without secrets, and stored ones as tables with the present keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from stylegan_pg.config import Config, TermConfig
from stylegan_pg.config.families import SECTIONS, class_of, fields_of
from stylegan_pg.config.renamed import translated
from stylegan_pg.urls import without_secrets


def publishable(config: Config) -> Config:
    """The configuration as it may stand in files that people pass on: its URLs without secrets."""
    data = config.data
    mixture: dict[str, float] = {}
    for url, weight in data.mixture.items():  # some may differ in their secrets alone
        mixture[without_secrets(url)] = mixture.get(without_secrets(url), 0) + weight
    unpaired = {name: without_secrets(url) for name, url in data.unpaired.items()}
    data = dataclasses.replace(data, url=without_secrets(data.url), mixture=mixture, unpaired=unpaired)
    return dataclasses.replace(config, data=data)


def to_yaml(config: Config) -> str:
    """The whole resolved configuration as YAML, which load_config reads back to an equal one except for the secrets
    that its URLs may have."""
    plain = dataclasses.asdict(publishable(config))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def to_plain(config: Config | TermConfig) -> dict[str, Any]:
    """The configuration as nested dictionaries that JSON can hold (keys as strings), without secrets in its URLs."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(publishable(config) if isinstance(config, Config) else config))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; tables by resolution or kimg stay together."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not key.endswith(("_at", "_from")):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def stored_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from a checkpoint or snapshot, of this version or an earlier one, as {key: value}.

    Renamed keys have their present names. Keys that were added since have their defaults. Keys that the networks,
    the augmentation or the terms do not have, which earlier versions stored as well, are left out.
    """
    tree = translated(stored)
    kinds = {
        name: class_of(base, tree[name] if isinstance(tree.get(name), dict) else {}) for name, base in SECTIONS.items()
    }
    defaults = to_plain(Config(**{name: cls() for name, cls in kinds.items()}))
    found = flat(defaults)
    for key, value in flat(tree).items():
        section, _, name = key.partition(".")
        if section not in kinds or name in fields_of(kinds[section]):
            found[key] = value
    found["loss.terms"] = [_stored_term(term) for term in found["loss.terms"]]
    return found


def _stored_term(term: Mapping[str, Any]) -> dict[str, Any]:
    cls = class_of(TermConfig, term)
    return to_plain(cls()) | {key: value for key, value in term.items() if key in fields_of(cls)}
