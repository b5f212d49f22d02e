"""From a YAML file and `key=value` overrides to a checked configuration, and back to YAML.

OmegaConf is used at this boundary only; everything behind it sees the plain immutable objects of schema.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from stylegan_pg.config import Config, TermConfig
from stylegan_pg.config.keys import (
    AUGMENT_LETTERS,
    AUGMENT_POLICIES,
    CHOICES,
    MOST,
    NOT_NEGATIVE,
    POSITIVE,
    TERMS,
    UNIT,
    types_of,
)
from stylegan_pg.config.overrides import home, read_file, read_override
from stylegan_pg.config.schedule import automatic
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import without_secrets

RESOLVED = "config.yaml"  # of a run's folder


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def configs_folder() -> Path:
    """Where the shipped YAML files are: beside the package in a wheel, one level up in a checkout.

    Raises:
        UsageError: when neither exists (a broken installation).
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UsageError("the shipped configurations are missing from this installation: install stylegan-pg again")


def find_config(name: str) -> Path:
    """A YAML file by path, a shipped one by name ('ffhq1024'), or a run's own by the run's folder.

    A folder that bears the name of a shipped configuration is meant where a slash says so: `./demo`, `demo/`.

    Raises:
        UsageError: naming the shipped ones, when there is no such file.
    """
    path = Path(home(name))
    try:
        if path.is_file():
            return path
        shipped = configs_folder() / (path.name.removesuffix(".yaml") + ".yaml")
        bare = path.parent == Path(".") and not name.startswith("./") and not name.endswith("/")
        if (bare or path.parent == Path("configs")) and shipped.is_file():
            return shipped
        if (path / RESOLVED).is_file():
            return path / RESOLVED
        is_folder = path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        is_folder = False
    reason = f" (this folder holds no {RESOLVED}, so it is no run's)" if is_folder else ""
    if "=" in name and not is_folder:
        reason = " (a configuration comes first, then keys)"
    raise UsageError(
        f"no configuration {printable(repr(name))}{reason}: give the path of a YAML file, a run's folder, or one of "
        f"the shipped ones: {', '.join(shipped_configs())}"
    )


def shipped_configs() -> dict[str, str]:
    """{name: the first sentence of the comment at the file's head}."""
    return {path.stem: _first_sentence(path) for path in sorted(configs_folder().glob("*.yaml"))}


def _first_sentence(path: Path) -> str:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    return re.split(r"(?<=[.:])\s", " ".join(line.lstrip("# ") for line in lines))[0].rstrip(".:")


def load_config(path: str | Path | None, overrides: Sequence[str] = (), *, fill_in: bool = True) -> Config:
    """The configuration from a YAML file and `key=value` overrides, checked, an automatic schedule filled in (unless
    not to `fill_in`: as it was written).

    Given a run's folder, it is the run's own, and `run` is that folder, wherever it was when it was written.

    Raises:
        UsageError: no such file, no YAML, an unknown key (naming the nearest known one), a value of a wrong type or
            out of range, or values that contradict each other.
    """
    tree: dict[str, Any] = {}
    named = "configuration"
    if path is not None:
        file = find_config(str(path))
        named = printable(path)
        tree = read_file(file, named)
        if file == Path(home(str(path))) / RESOLVED:  # a run's folder, wherever it lies by now
            tree["run"] = str(file.parent)
    for item in overrides:
        for parts, value in read_override(item):
            _put(tree, parts, value)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), _literal(tree)))
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UsageError(f"{named}: {key} is not set: give it there, or as {key}=... on the command line") from None
    assert isinstance(config, Config)
    check(config)
    if fill_in and config.growth.schedule == "auto":
        config = automatic(config)
        check(config)
    return config


def _put(tree: dict[Any, Any], parts: Sequence[Any], value: Any) -> None:
    """Set one value. Sections are united; a list, or a table of values, replaces the one that was there."""
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
    last = parts[-1]
    if isinstance(value, dict) and dataclasses.is_dataclass(types_of(Config).get(last)):
        for name, inner in value.items():
            _put(tree.setdefault(last, {}), [name], inner)
    else:
        tree[last] = value


def _literal(value: Any) -> Any:
    """The same with every text escaped, in which OmegaConf would look for other keys and variables: `${...}`."""
    if isinstance(value, dict):
        return {_literal(k): _literal(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_literal(v) for v in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def check(config: Config) -> None:
    """Ranges and contradictions.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """

    def value(key: str, node: Any = config) -> Any:
        for part in key.split("."):
            node = getattr(node, part)
        return node

    def demand(condition: bool, key: str, wanted: str) -> None:
        if not condition:
            raise UsageError(f"{key}={printable(value(key, publishable(config)))} is not possible: it must be {wanted}")

    demand(is_power_of_two(config.resolution) and config.resolution >= 4, "resolution", "a power of two, 4 or more")
    demand(bool(config.run), "run", "the folder of the run")
    if not config.data.url and not config.data.mixture:
        raise UsageError("data.url is not set: give it in the configuration, or as data.url=... on the command line")
    demand(not config.data.url or not config.data.mixture, "data.mixture", "empty where data.url is given")
    fits = all(0 < weight < math.inf for weight in config.data.mixture.values())
    demand(fits, "data.mixture", "a table from URLs to weights above 0")
    for key, choices in CHOICES.items():
        demand(value(key) in choices, key, " or ".join(choices))
    for key in POSITIVE:
        demand(0 < value(key) < math.inf, key, "above 0 and finite")
    for key in NOT_NEGATIVE:
        demand(0 <= value(key) < math.inf, key, "0 or more and finite")
    for key in UNIT:
        demand(0 <= value(key) <= 1, key, "between 0 and 1")
    for key, most in MOST.items():
        demand(value(key) is None or value(key) <= most, key, f"at most {most:.12g}")
    for key in ("optim.beta1", "optim.beta2"):
        demand(value(key) < 1, key, "below 1")
    demand(config.model.channel_base >= config.resolution, "model.channel_base", f"at least {config.resolution}")
    start = config.growth.start
    if start is not None:
        possible = is_power_of_two(start) and 4 <= start <= config.resolution
        demand(possible, "growth.start", f"a power of two from 4 to {config.resolution}, or null")
    if config.growth.schedule == "auto":
        demand(config.train.total_kimg is not None, "train.total_kimg", "given for growth.schedule=auto")
    if start is None:
        demand(config.train.total_kimg is not None, "train.total_kimg", "given where nothing grows")
    if config.train.total_kimg is not None:
        demand(0 < config.train.total_kimg < math.inf, "train.total_kimg", "above 0 and finite")
    for key in ("model.conv_clamp", "ema.rampup"):
        demand(value(key) is None or 0 < value(key) < math.inf, key, "above 0 and finite, or null")
    scale = config.train.loss_scale
    fits = scale is None or (scale >= 1 and math.log2(scale).is_integer())
    demand(fits, "train.loss_scale", "a power of two from 1 on, or null")
    demand(config.data.patience_sec <= 3600, "data.patience_sec", "at most 3600: other ranks wait for no more than 2 h")
    base = config.model.base
    demand(len(base) == 2 and min(base) > 0, "model.base", "[rows, columns] at resolution 4, both above 0")
    width = min(config.model.channel_base // 4, config.model.channel_max)
    low = config.model.low_precision_at or []
    demand(
        all(is_power_of_two(r) and r >= 8 for r in low), "model.low_precision_at", "powers of two from 8 on, or null"
    )
    demand(
        not low or config.model.low_precision != "fp32", "model.low_precision", "bf16, fp16 or auto where _at is given"
    )
    mbstd = config.model.mbstd_channels
    demand(not mbstd or width % mbstd == 0, "model.mbstd_channels", f"a divisor of {width}, the channels at 4x4, or 0")
    taps = config.model.resample_filter
    demand(len(taps) >= 2 and sum(taps) != 0, "model.resample_filter", "at least two taps with a sum other than 0")
    for key, names, known in (
        ("augment.pipeline", list(config.augment.pipeline), AUGMENT_LETTERS),
        ("augment.policy", config.augment.policy.split(","), AUGMENT_POLICIES),
    ):
        once = len(names) == len(set(names)) > 0
        demand(once and set(names) <= set(known), key, f"some of {', '.join(known)}, each once")
    mode, smallest = config.augment.mode, min(config.model.base) * (start or config.resolution) // 4
    demand(mode != "fixed" or config.augment.p > 0, "augment.p", "above 0 with augment.mode=fixed")
    fits = mode == "none" or (smallest >= 2 and config.model.name != "mlp")
    demand(fits, "augment.mode", "none for pictures with a side of one pixel")
    grows = start not in (None, config.resolution)
    possible = not config.train.freeze_d or (config.init and not grows and config.model.name != "mlp")
    demand(bool(possible), "train.freeze_d", "0 but for networks that do not grow, with init=CHECKPOINT")
    demand(-1 <= config.augment.target <= 1, "augment.target", "between -1 and 1")
    demand(len(config.output.grid) == 2 and min(config.output.grid) > 0, "output.grid", "[columns, rows]")
    tables = "growth.stable_kimg_at growth.fade_kimg_at loss.r1_gamma_at train.batch_at train.micro_batch_at"
    for key in [*tables.split(), "optim.lr_at", "optim.g_lr_at", "optim.d_lr_at"]:
        fits = all(is_power_of_two(r) and r >= 4 and 0 <= v < math.inf for r, v in value(key).items())
        demand(fits, key, "a table from resolutions (powers of two, 4 or more) to numbers of 0 or more")
    demand(all(v > 0 for v in config.train.batch_at.values()), "train.batch_at", "above 0")
    optimizer = config.growth.optimizer_at
    fits = all(is_power_of_two(r) and r >= 4 and v in CHOICES["growth.optimizer"] for r, v in optimizer.items())
    demand(fits, "growth.optimizer_at", "a table from resolutions (powers of two, 4 or more) to reset or carry")
    fits = all(k >= 0 and 0 <= v < math.inf for k, v in config.loss.r1_gamma_from.items())
    demand(fits, "loss.r1_gamma_from", "a table from kimg (0 or more) to numbers of 0 or more")
    demand(config.model.name != "mlp" or start is None, "growth.start", "null: points do not grow")
    _check_engine(config)
    for term in config.loss.terms:
        _check_term(term)
    names = [term.name for term in config.loss.all_terms()]
    for name in names:
        if names.count(name) > 1:
            own = {"r1": " (loss.r1_gamma=0 takes R1 away)", "path_length": " (loss.pl_weight=0 takes it away)"}
            raise UsageError(f"loss.terms: {name} is there twice: leave one of them away{own.get(name, '')}")


def _check_engine(config: Config) -> None:
    train = config.train
    if train.zero_stage == 3:
        raise UsageError(
            "train.zero_stage=3 is not possible: ZeRO-3 takes weights apart as soon as a layer has run, and the terms "
            "that differentiate twice (R1, path length) need them again; take train.zero_stage=2"
        )
    if train.zero_stage not in (0, 1, 2):
        raise UsageError(f"train.zero_stage={train.zero_stage} is not possible: it must be 0, 1 or 2")
    if train.zero_offload and not train.zero_stage:
        raise UsageError("train.zero_offload=true needs train.zero_stage=1 or 2: stage 0 has no shards to move")
    if train.engine == "deepspeed" and train.dtype != "float32":
        raise UsageError(f"train.dtype={train.dtype} needs train.engine=accelerate: DeepSpeed's shards are float32")


def _check_term(term: TermConfig) -> None:
    def demand(condition: bool, key: str, wanted: str) -> None:
        if not condition:
            name, value = printable(term.name, 80), printable(getattr(term, key))
            raise UsageError(f"loss.terms: {name}: {key}={value} is not possible: it must be {wanted}")

    demand(term.name in TERMS, "name", " or ".join(TERMS))
    demand(term.every >= 1, "every", "1 or more")
    demand(0 <= term.weight < math.inf, "weight", "0 or more and finite")
    demand(0 < term.target < math.inf, "target", "above 0 and finite")
    fits = all(is_power_of_two(r) and r >= 4 and 0 <= v < math.inf for r, v in term.weight_at.items())
    demand(fits, "weight_at", "a table from resolutions (powers of two, 4 or more) to numbers of 0 or more")
    fits = all(k >= 0 and 0 <= v < math.inf for k, v in term.weight_from.items())
    demand(fits, "weight_from", "a table from kimg (0 or more) to numbers of 0 or more")


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
    """The whole resolved configuration as YAML, which load_config reads back to an equal one; but without the secrets
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


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; values by resolution or kimg stay together."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not key.endswith(("_at", "_from")):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
