"""The keys of the configuration: the kind of value that each takes, its range, and its comment in schema.py."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import tokenize
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from stylegan_pg.config import Config, TermConfig
from stylegan_pg.config import schema as source
from stylegan_pg.config.renamed import RENAMED
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

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
    "metrics.precision": ("fp32", "bf16"),
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
# Far above what anybody means, and below what ends in no memory or in no time.
MOST = {
    "resolution": 1 << 14,
    "data.workers": 1024,
    "data.prefetch_shards": 1 << 20,
    "model.z_dim": 1 << 16,
    "model.w_dim": 1 << 16,
    "model.mapping_layers": 256,
    "model.channel_base": 1 << 24,
    "model.channel_max": 1 << 16,
    "model.mbstd_group": 1 << 20,
    "model.mbstd_channels": 1 << 16,
    "growth.devices": 1 << 20,
    "optim.d_steps": 1 << 20,
    "optim.g_steps": 1 << 20,
    "train.batch": 1 << 20,
    "train.micro_batch": 1 << 20,
    "train.threads": 1024,
    "train.total_kimg": 1e9,
    "train.join_sec": 1e8,
    "train.timeout_sec": 1e8,
    "train.bucket_mib": 1 << 20,
    "train.loss_scale": 2.0**100,
    "metrics.images": 1 << 30,
}
# One value given for a section means this key of it: data=FOLDER, model=progan.
SHORT = {"data": "url", "model": "name", "loss": "objective", "augment": "mode", "metrics": "names"}
# A leading ~ of these is the home folder.
PATHS = ("run", "init", "data.url", "data.mixture", "data.unpaired", "data.cache_dir", "metrics.weights")


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass of schema.py, by field name."""
    return get_type_hints(cls)


def unwrap(hint: Any) -> tuple[Any, bool]:
    """(the type itself, whether null is possible too)."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None)), True
    return hint, False


def known(cls: type = Config, prefix: str = "") -> list[str]:
    """All keys, sections among them, each before what is in it."""
    keys = []
    for name, hint in types_of(cls).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            keys += known(hint, prefix + name + ".")  # type: ignore[arg-type]  # dataclass types only
    return keys


def nearest(key: str, cls: type = Config) -> str | None:
    """What somebody may have meant who wrote `key`: by the whole of it, or by its last part."""
    if cls is Config and key in RENAMED:
        return RENAMED[key].new
    keys = known(cls)
    by_leaf = {k.rsplit(".", 1)[-1]: k for k in keys}
    near = difflib.get_close_matches(key, keys, 1, 0.6)
    near = near or [by_leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, 1, 0.6)]
    return near[0] if near else None


def did_you_mean(key: str, cls: type = Config) -> str:
    """The end of a message about a key that does not exist."""
    near = nearest(key, cls)
    return f"; did you mean {near!r}?" if near else ""


# --- what `stylegan-pg config` prints ---------------------------------------------------------------------------------


@functools.cache
def _comments() -> dict[tuple[str, str], str]:
    """The comment behind each field in schema.py, by the names of its class and of the field."""
    text = inspect.getsource(source)
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


def _kind(key: str, hint: Any) -> str:
    """What a value is, in words."""
    hint, optional = unwrap(hint)
    words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if get_origin(hint) is list:
        (of,) = get_args(hint)
        text = "list of terms" if dataclasses.is_dataclass(of) else f"list of {words[of]}s".replace("texts", "names")
    elif get_origin(hint) is dict:
        by = (
            "kimg" if key.endswith("_from") else {"data.mixture": "URL", "data.unpaired": "name"}.get(key, "resolution")
        )
        by = "name" if key == "data.derived" else by
        text = f"table {{{by}: {words[get_args(hint)[1]]}, ...}}"
    else:
        text = words[hint]
    if key in CHOICES:
        text = "one of " + ", ".join(CHOICES[key])
    elif key in POSITIVE:
        text += " above 0"
    elif key in NOT_NEGATIVE:
        text += ", 0 or more"
    elif key in UNIT:
        text += " between 0 and 1"
    return text + (", or null" if optional else "")


def _shown(value: Any) -> str:
    """A default, as an override would give it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return "..." if value == MISSING else f"{value:g}" if isinstance(value, float) else str(value)


def describe(key: str = "") -> list[str]:
    """One line for each key with its default, kind and comment: of all keys, of a section, of one key, or of all
    keys that end in one name.

    Raises:
        UsageError: naming the nearest key, if there is no such one.
    """
    keys = known()
    chosen = [k for k in keys if not key or k == key or k.startswith(key + ".")]
    chosen = chosen or [k for k in keys if k.rsplit(".", 1)[-1] == key]
    if not chosen:
        raise UsageError(f"there is no key {printable(repr(key))}{did_you_mean(key)} (`stylegan-pg config` lists all)")
    lines = [line for k in chosen for line in _lines(Config, k, k)]
    if chosen == ["loss.terms"]:
        lines += [line for name in types_of(TermConfig) for line in _lines(TermConfig, name, f"  {name}")]
        lines.append(f"  possible names: {', '.join(TERMS)}")
    return lines


def _lines(cls: Any, key: str, label: str) -> list[str]:
    *sections, name = key.split(".")
    for section in sections:
        cls = types_of(cls)[section]
    hint = types_of(cls)[name]
    if dataclasses.is_dataclass(hint):
        return []
    field = next(f for f in dataclasses.fields(cls) if f.name == name)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    comment = _comments().get((cls.__name__, name), "")
    return [f"{label + '=' + _shown(default):<42} {_kind(key, hint)}" + (f"; {comment}" if comment else "")]
