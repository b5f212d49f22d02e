"""From a YAML file and `key=value` overrides to a checked configuration, and back to YAML.

OmegaConf works at this boundary only; everything behind it sees the plain immutable objects of config.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stylegan_pg.config import Config, TermConfig
from stylegan_pg.errors import UsageError
from stylegan_pg.schedule import automatic
from stylegan_pg.urls import publishable

CHOICES = {
    "model.name": ("stylegan2", "stylegan", "progan", "mlp"),
    "model.g_architecture": ("skip", "resnet", "orig"),
    "model.d_architecture": ("skip", "resnet", "orig"),
    "model.low_precision": ("fp32", "bf16", "fp16", "auto"),
    "growth.schedule": ("tables", "auto"),
    "growth.optimizer": ("reset", "carry"),
    "loss.objective": ("logistic", "saturating", "wgan", "lsgan", "hinge", "relativistic"),
    "augment.mode": ("none", "ada", "fixed", "diffaugment"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.dtype": ("float32", "float64"),
    "train.engine": ("accelerate", "deepspeed"),
}
TERMS = ("r1", "r2", "gradient_penalty", "drift", "dragan", "path_length")  # losses.py says what they are
POSITIVE = [
    "model.z_dim",
    "model.w_dim",
    "model.mapping_layers",
    "model.channel_base",
    "model.channel_max",
    "model.mbstd_group",
    "data.window",
    "growth.devices",
    "optim.g_lr",
    "optim.d_lr",
    "optim.eps",
    "optim.d_steps",
    "optim.g_steps",
    "loss.r1_every",
    "loss.pl_every",
    "loss.pl_batch_shrink",
    "augment.interval",
    "augment.kimg",
    "ema.kimg",
    "train.batch",
    "train.join_sec",
    "train.timeout_sec",
    "train.check_ranks_every",
    "train.bucket_mib",
    "output.tick_kimg",
    "checkpoint.every_kimg",
    "checkpoint.keep",
    "checkpoint.max_failures",
    "metrics.images",
]
NOT_NEGATIVE = [
    "seed",
    "train.freeze_d",
    "train.max_skipped",
    "data.workers",
    "data.cache_gib",
    "data.prefetch_shards",
    "data.patience_sec",
    "model.mbstd_channels",
    "model.low_precision_resolutions",
    "growth.stable_kimg",
    "growth.fade_kimg",
    "loss.d_clip",
    "loss.r1_gamma",
    "loss.pl_weight",
    "train.micro_batch",
    "train.threads",
    "output.grid_kimg",
    "output.snapshot_kimg",
    "metrics.every_kimg",
]
UNIT = [
    "data.max_bad_share",
    "model.w_avg_beta",
    "optim.beta1",
    "optim.beta2",
    "loss.pl_decay",
    "loss.style_mixing",
    "augment.p",
]
AUGMENT_LETTERS = "bgcfno"  # of augment.pipeline
AUGMENT_POLICIES = ("color", "translation", "cutout")  # of augment.policy


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def configs_folder() -> Path:
    """Where the shipped YAML files are: beside the package in a wheel, one level up in a checkout.

    Raises:
        UsageError: when neither exists (a broken installation).
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise UsageError("the shipped configurations are missing from this installation: install stylegan-pg again")


def find_config(name: str) -> Path:
    """A YAML file by path, or a shipped one by name ('ffhq1024').

    Raises:
        UsageError: naming the shipped ones, when there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = configs_folder() / (Path(name).name.removesuffix(".yaml") + ".yaml")
    if shipped.is_file() and Path(name).parent in (Path("."), Path("configs")):
        return shipped
    known = ", ".join(sorted(p.stem for p in configs_folder().glob("*.yaml")))
    raise UsageError(f"no configuration {name!r}: give the path of a YAML file, or one of the shipped ones: {known}")


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in get_type_hints(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += _known_keys(hint, prefix + name + ".")  # type: ignore[arg-type]  # dataclass types only
    return keys


def _explain(error: OmegaConfBaseException, source: str) -> UsageError:
    key = str(getattr(error, "full_key", "") or "")
    known = _known_keys(Config)
    if "missing mandatory value" in str(error):
        return UsageError(f"{source}: {key} is not set: give it there, or as {key}=... on the command line")
    reason = str(error).splitlines()[0]
    if "not in 'TermConfig'" in reason:  # an entry of loss.terms
        leaf = key.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(leaf, _known_keys(TermConfig), 1, 0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return UsageError(f"{source}: loss.terms: unknown key {leaf!r}{hint}")
    if key and "not in" in reason and key not in known:
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        near = difflib.get_close_matches(key, known, 1, 0.6)
        near = near or [by_leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.6)]
        return UsageError(f"{source}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if "incompatible with (int)" in reason and "_at." in key:
        reason += "; in a table a space follows the colon: {8: 0.5, 16: 1}"  # else YAML takes 8:0.5 for a time of day
    return UsageError(f"{source}: {key + ': ' if key else ''}{reason}")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration from a YAML file and `key=value` overrides, checked, an automatic schedule filled in.

    Raises:
        UsageError: no such file, no YAML, an unknown key (naming the nearest known one), a value of a wrong type or
            out of range, or values that contradict each other.
    """
    source = "configuration" if path is None else str(path)
    try:
        merged = OmegaConf.structured(Config)
        if path is not None:
            file = OmegaConf.load(find_config(str(path)))
            if not OmegaConf.is_dict(file):
                raise UsageError(f"{source}: not a mapping of keys to values")
            for key in (item.split("=", 1)[0] for item in overrides):
                if key.endswith(("_at", "_from")) and OmegaConf.is_dict(OmegaConf.select(file, key)):
                    OmegaConf.update(file, key, {}, merge=False)  # a table given as a whole replaces the file's
            merged = OmegaConf.merge(merged, file)
        for item in overrides:
            source = item
            if "=" not in item:
                raise UsageError(f"{item!r} is not of the form key=value")
            merged = OmegaConf.merge(merged, _override(item))
        source = "configuration" if path is None else str(path)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error, source) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: {error}") from None
    except Exception as error:  # PyYAML has no common base here that OmegaConf exposes
        if type(error).__module__.startswith("yaml"):
            raise UsageError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
        raise
    assert isinstance(config, Config)
    check(config)
    if config.growth.schedule == "auto":
        config = automatic(config)
        check(config)
    return config


def _override(item: str) -> Any:
    """One `a.b=c`; the last part of the key may be a resolution."""
    key, value = item.split("=", 1)
    parsed = OmegaConf.from_dotlist([f"v={value}"])
    parsed = OmegaConf.to_container(parsed)["v"]  # type: ignore[index, call-overload]  # a mapping, as just made
    for part in reversed(key.split(".")):
        parsed = {int(part) if part.isdigit() else part: parsed}
    return OmegaConf.create(parsed)


def check(config: Config) -> None:
    """Ranges and contradictions.

    Raises:
        UsageError: naming the key, its value and what it may be.
    """

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    def demand(condition: bool, key: str, wanted: str) -> None:
        if not condition:
            raise UsageError(f"{key}={value(key)} is not possible: it must be {wanted}")

    demand(is_power_of_two(config.resolution) and config.resolution >= 4, "resolution", "a power of two, 4 or more")
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
    demand(config.train.threads <= 1024, "train.threads", "at most 1024")
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
            value = getattr(term, key)
            raise UsageError(f"loss.terms: {term.name}: {key}={value} is not possible: it must be {wanted}")

    demand(term.name in TERMS, "name", " or ".join(TERMS))
    demand(term.every >= 1, "every", "1 or more")
    demand(0 <= term.weight < math.inf, "weight", "0 or more and finite")
    demand(0 < term.target < math.inf, "target", "above 0 and finite")
    fits = all(is_power_of_two(r) and r >= 4 and 0 <= v < math.inf for r, v in term.weight_at.items())
    demand(fits, "weight_at", "a table from resolutions (powers of two, 4 or more) to numbers of 0 or more")
    fits = all(k >= 0 and 0 <= v < math.inf for k, v in term.weight_from.items())
    demand(fits, "weight_from", "a table from kimg (0 or more) to numbers of 0 or more")


def to_yaml(config: Config) -> str:
    """The whole resolved configuration as YAML, which load_config reads back to an equal one; but without the secrets
    that its URLs may have."""
    return OmegaConf.to_yaml(OmegaConf.structured(publishable(config)))
