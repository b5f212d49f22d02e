"""From a YAML file and `key=value` overrides to a checked configuration.

OmegaConf is used at this boundary only; everything behind it sees the plain immutable dataclasses.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from stylegan_pg.config import Config, TermConfig, curves
from stylegan_pg.config.checks import check
from stylegan_pg.config.families import Resolved, Source, resolve, types_of
from stylegan_pg.config.nodes import home
from stylegan_pg.config.overrides import read_file, read_override
from stylegan_pg.config.schedule import automatic
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

RESOLVED = "config.yaml"  # of a run's folder
SYSTEMS = "systems"  # the subfolder of small configurations, one for each system


def configs_folder() -> Path:
    """The folder of the shipped YAML files: inside the package in a wheel, beside it in a checkout.

    Raises:
        UsageError: if neither exists (a broken installation).
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UsageError("the shipped configurations are missing from this installation: install stylegan-pg again")


def find_config(name: str) -> Path:
    """The file of a configuration: a YAML file by its path, a shipped one by its name ('ffhq1024' or 'systems/gan'), or
    that of a run by the run's folder.

    A folder with the name of a shipped configuration is used only if a slash is given: `./demo`, `demo/`.

    Raises:
        UsageError: if there is no such file; the message names the shipped ones.
    """
    path = Path(home(name))
    try:
        if path.is_file():
            return path
        folder = Path(*path.parent.parts[path.parts[:1] == ("configs",) :])  # a path within the folder of shipped ones
        shipped = configs_folder() / folder / (path.name.removesuffix(".yaml") + ".yaml")
        bare = not name.startswith("./") and not name.endswith("/")
        if bare and folder in (Path("."), Path(SYSTEMS)) and shipped.is_file():
            return shipped
        if (path / RESOLVED).is_file():
            return path / RESOLVED
        is_folder = path.is_dir()
    except (OSError, ValueError):  # no file can have this name
        is_folder = False
    reason = f" (this folder has no {RESOLVED}, so it is not the folder of a run)" if is_folder else ""
    if "=" in name and not is_folder:
        reason = " (the configuration comes before the keys)"
    raise UsageError(
        f"no configuration {printable(repr(name))}{reason}: give the path of a YAML file, a run's folder, or one of "
        f"the shipped ones: {', '.join(name for name in shipped_configs() if not name.startswith(SYSTEMS))}, "
        f"{SYSTEMS}/NAME (`stylegan-pg configs` lists them)"
    )


def shipped_configs() -> dict[str, str]:
    """{name: first sentence of the comment at the head of the file} of the shipped configurations."""
    found = [path for pattern in ("*.yaml", f"{SYSTEMS}/*.yaml") for path in sorted(configs_folder().glob(pattern))]
    return {str(path.relative_to(configs_folder()).with_suffix("")): _first_sentence(path) for path in found}


def _first_sentence(path: Path) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    return re.split(r"(?<=[.:])\s", " ".join(line.lstrip("# ") for line in lines))[0].rstrip(".:")


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, fill_in: bool = True) -> Config:
    """The configuration from a YAML file and `key=value` overrides, checked.

    An automatic schedule is written into the tables, unless `fill_in` is false.

    If a run's folder is given, the configuration is the run's own, and `run` is that folder, wherever it was when the
    configuration was written.

    Raises:
        UsageError: no such file, no YAML, an unknown key (naming the nearest known one, or the networks that have
            it), a value of a wrong type or out of range, or values that contradict each other.
    """
    file = find_config(str(path)) if path is not None else None
    named = printable(path) if file else "configuration"
    written = read_file(file, named) if file else {}
    in_run = file is not None and file == Path(home(str(path))) / RESOLVED
    if file is not None and in_run:
        written["run"] = str(file.parent)
    tree, given = copy.deepcopy(written), set()
    for item in overrides:
        for parts, value in read_override(item):
            try:
                _put(tree, parts, value)
            except UsageError as error:
                raise UsageError(f"{printable(item, 120)}: {error}") from None
            given |= {(parts[0], key) for key in (value if len(parts) == 1 and isinstance(value, dict) else parts[1:2])}
    config = _built(resolve(_completed(tree), Source(written, given, named, quiet=in_run)), named)
    check(config)
    if fill_in and config.growth.schedule == "auto":
        config = automatic(config)
        check(config)
    return config


def _built(resolved: Resolved, named: str) -> Config:
    """The configuration of resolved sections, not checked yet."""
    start = Config(**{section: cls() for section, cls in resolved.classes.items()})
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(start), _literal(resolved.tree)))
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UsageError(f"{named}: {key} is not set: give it there, or as {key}=... on the command line") from None
    assert isinstance(config, Config)
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, terms=resolved.terms))


def _completed(tree: dict[str, Any]) -> dict[str, Any]:
    """A tree whose curves have what they leave out.

    Raises:
        UsageError: naming a number of a curve that is missing or not possible.
    """
    hints, whole = types_of(Config), dict(tree)
    for section, table in tree.items():
        if dataclasses.is_dataclass(hints.get(section)):
            scheduled = types_of(hints[section])
            whole[section] = {
                key: curves.completed(value, f"{section}.{key}") if scheduled.get(key) is Any else value
                for key, value in table.items()
            }
    if isinstance(terms := tree.get("loss", {}).get("terms"), list):
        whole["loss"]["terms"] = [_term_completed(term) for term in terms]
    return whole


def _term_completed(term: dict[str, Any]) -> dict[str, Any]:
    named = f"loss.terms: {printable(term.get('name'), 80)}"
    return {
        key: curves.completed(value, f"{named}: {key}") if types_of(TermConfig).get(key) is Any else value
        for key, value in term.items()
    }


def _put(tree: dict[Any, Any], parts: Sequence[Any], value: Any) -> None:
    """Set one value. Sections are merged; a list, or a table of values, replaces the previous one."""
    *sections, last = parts
    if isinstance(last, curves.Part):
        key = ".".join(sections)
        last, sections = sections[-1], sections[:-1]
        part = parts[-1]
        before = functools.reduce(lambda inner, section: inner.get(section, {}), sections, tree).get(last)
        value = curves.changed(before, part, value, key)
    for section in sections:
        tree = tree.setdefault(section, {})
    if isinstance(value, dict) and dataclasses.is_dataclass(types_of(Config).get(last)):
        for name, inner in value.items():
            _put(tree.setdefault(last, {}), [name], inner)
    else:
        tree[last] = value


def _literal(value: Any) -> Any:
    """A copy in which `${...}` is escaped in all texts, so that OmegaConf does not replace it by keys or variables."""
    if isinstance(value, dict):
        return {_literal(k): _literal(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_literal(v) for v in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
