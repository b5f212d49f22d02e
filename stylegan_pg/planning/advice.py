"""Notes about a configuration before training: keys without effect, and settings that are probably not intended.

None of them is an error. Each note names the key, its effect, and what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stylegan_pg.config import ADAConfig, Config, ConvolutionalConfig, StyleConfig, curves, renamed
from stylegan_pg.config.keys import SHORT
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.renamed import RENAMED
from stylegan_pg.config.schedule import Phase, deal, images_meet, phases
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import without_secrets

# Plain keys, and the tables by resolution that take precedence over each of them, in order of precedence.
TABLES = {
    "optim.g_lr": ("optim.g_lr_at", "optim.lr_at"),
    "optim.d_lr": ("optim.d_lr_at", "optim.lr_at"),
    "optim.beta2": ("optim.beta2_at",),
    "loss.r1_gamma": ("loss.r1_gamma_at",),
    "loss.pl_weight": ("loss.pl_weight_at",),
    "loss.blur_sigma": ("loss.blur_sigma_at",),
    "augment.p": ("augment.p_at",),
    "ema.kimg": ("ema.kimg_at",),
    "train.batch": ("train.batch_at",),
    "train.micro_batch": ("train.micro_batch_at",),
    "growth.stable_kimg": ("growth.stable_kimg_at",),
    "growth.fade_kimg": ("growth.fade_kimg_at",),
    "growth.optimizer": ("growth.optimizer_at",),
}
MADE_BY_AUTO = ("train.batch", "train.micro_batch")  # growth.schedule=auto does not read these plain keys
CLASSES_SHOWN = 5

# Keys that have no effect with certain values of others: (keys, condition, reason).
SWITCHES: list[tuple[str, Callable[[Config], bool], str]] = [
    ("loss.r1_every", lambda c: not r1_is_on(c), "R1 is off (loss.r1_gamma=0)"),
    (
        "loss.pl_every",
        lambda c: not c.loss.path_length().is_used,
        "path length regularisation is off (loss.pl_weight=0)",
    ),
    ("loss.pl_decay loss.pl_batch_shrink", lambda c: not _has(c, "path_length"), "there is no path_length term"),
    ("loss.style_mixing", lambda c: not isinstance(c.model, StyleConfig), "the networks have no styles to mix"),
    ("train.zero_stage", lambda c: c.train.engine != "deepspeed", "it is for train.engine=deepspeed"),
    ("train.bucket_mib", lambda c: c.train.engine != "accelerate", "it is for train.engine=accelerate"),
    (
        "model.low_precision_resolutions",
        lambda c: c.model.low_precision == "fp32" or c.model.low_precision_at is not None,
        "model.low_precision=fp32, or model.low_precision_at says which resolutions",
    ),
    (
        "model.low_precision",
        lambda c: (
            c.model.low_precision in ("bf16", "fp16")
            and not (c.model.low_precision_at or c.model.low_precision_resolutions)
        ),
        "it is for no resolution: give model.low_precision_resolutions too",
    ),
    ("model.mbstd_group", lambda c: not images_meet(c), "no images meet (model.mbstd_channels=0)"),
    ("growth.devices", lambda c: c.growth.schedule != "auto", "it is for growth.schedule=auto"),
    ("ema.every_kimg", lambda c: not c.ema.profiles, "no averages are kept (ema.profiles=[])"),
    ("output.grid output.grid_psi", lambda c: not c.output.grid_kimg, "no grids are drawn (output.grid_kimg=0)"),
    (
        "metrics.names metrics.images metrics.weights metrics.extractor metrics.precision metrics.best",
        lambda c: not (c.metrics.every_kimg or c.metrics.at_snapshots),
        "nothing is measured: give metrics.every_kimg or metrics.at_snapshots=true too",
    ),
]


def _has(config: Config, term: str) -> bool:
    return term in [t.name for t in config.loss.all_terms()]


def r1_is_on(config: Config) -> bool:
    """Whether loss.r1_gamma, or a table of it, asks for R1."""
    return config.loss.r1().is_used


def value(config: Config, key: str) -> Any:
    """The value of a key such as "optim.g_lr"."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part)
    return node


def decider(config: Config, plain: str, resolution: int) -> str:
    """The key whose value holds at a resolution: the plain key, or a table that has an entry for the resolution."""
    return next((table for table in TABLES[plain] if resolution in entries(config, table)), plain)


def entries(config: Config, table: str) -> Mapping[int, Any]:
    """The entries of a table, none if the configuration's classes do not have it."""
    section, _, name = table.partition(".")
    return getattr(getattr(config, section), name, {})


def decides(config: Config, plain: str, resolution: int, nimg: float) -> str:
    """The key whose value holds after nimg images: one of the tables by kimg or resolution, or the plain key."""
    reached = any(nimg >= kimg * 1000 for kimg in entries(config, f"{plain}_from"))
    return f"{plain}_from" if reached else decider(config, plain, resolution)


def multiplied(config: Config, plain: str, factor: float, resolution: int, nimg: float) -> str:
    """The override that multiplies a number as it is after nimg images by a factor; of curves, all their values."""
    key = decides(config, plain, resolution, nimg)
    if key == plain:
        text = curves.as_text(curves.scaled(value(config, plain), factor))
        return f"{key}={text}" if not text.startswith(("{", "[")) else f"'{key}={text}'"
    table = entries(config, key)
    if not key.endswith("_from"):
        return f"{key}.{resolution}={table[resolution] * factor:.6g}"
    reached = max(kimg for kimg in table if nimg >= kimg * 1000)
    new = dict(table) | {reached: table[reached] * factor}
    return f"'{key}={{{', '.join(f'{kimg:g}: {number:.6g}' for kimg, number in new.items())}}}'"


def deciders(config: Config, plan: Sequence[Phase], plain: str) -> dict[int, str]:
    """For each resolution at which a run reads a plain key or its tables: the key whose value holds there."""
    looked_at = {p.resolution for p in plan if _matters(p, plain)}
    if plain == "growth.stable_kimg" and config.train.total_kimg is not None:
        looked_at.discard(config.resolution)  # the last phase lasts until train.total_kimg
    found = {}
    for r in sorted(looked_at):
        found[r] = decider(config, plain, r)
        since = min(entries(config, f"{plain}_from"), default=None)
        if since is not None and all(p.start >= since * 1000 for p in plan if p.resolution == r):
            found[r] = f"{plain}_from"
    return found


def _matters(phase: Phase, plain: str) -> bool:
    """Whether a phase depends on a key; growth.optimizer matters only after another phase."""
    if plain == "growth.optimizer":
        return phase.index > 0
    return {"growth.stable_kimg": not phase.fade, "growth.fade_kimg": phase.fade}.get(plain, True)


def without_effect(path: str | Path | None, overrides: Sequence[str]) -> list[str]:
    """A line for each `key=value` of a command line that has no effect, or only in a part of the run.

    Raises:
        UsageError: as load_config does.
    """
    written, config = load_config(path, overrides, fill_in=False), load_config(path, overrides)
    notes = []
    items = [(_whole_key(key), key, given) for key, given in (item.split("=", 1) for item in overrides)]
    last = {name: place for place, (name, _, _) in enumerate(items)}
    for place, (key, short, given) in enumerate(items):
        idle = [why for keys, is_idle, why in SWITCHES if key in keys.split() and is_idle(written)]
        if last[key] != place:
            reason = f"changes nothing: {key} is given once more after it"
        else:
            reason = f"changes nothing: {idle[0]}" if idle else _overruled(key, given, written, config)
        if reason:
            notes.append(f"{printable(f'{short}={without_secrets(given)}')} {reason}")
        notes += _of_terms(config) if key == "loss.terms" else []
    return notes


def _whole_key(key: str) -> str:
    """The full present name of a key of the command line: data stands for data.url, an old name for the new one."""
    key = key.strip()
    if found := renamed.find(key):
        return ".".join(filter(None, [RENAMED[found[0]].new, found[1]]))
    return f"{key}.{SHORT[key]}" if key in SHORT else key


def _of_terms(config: Config) -> list[str]:
    """Lines as those of without_effect, for weights in loss.terms that tables of the same term override."""
    notes, resolutions = [], {p.resolution for p in phases(config)}
    for term in config.loss.terms:
        everywhere = min(term.weight_from, default=1) <= 0
        if everywhere or resolutions <= term.weight_at.keys():
            table = "weight_from" if everywhere else "weight_at"
            keys = ["weight"] if term.weight != type(term)().weight else []
            keys += ["weight_at"] if everywhere and term.weight_at else []
            notes += [f"loss.terms: {key} of {term.name} changes nothing: its {table} goes before it" for key in keys]
    return notes


def _overruled(key: str, given: str, written: Config, config: Config) -> str:
    """Why a plain key, a table or one entry of it has no effect, or only at some resolutions; "" if it has effect.

    `written` and `config` are the configuration before and after an automatic schedule was filled in.
    """
    name, at, entry = key.partition("_at")
    own = next((plain for plain in TABLES if key.startswith(f"{plain}.")), name + at)  # a number of a curve
    served = [plain for plain, tables in TABLES.items() if own == plain or own in tables]
    if not served:
        return ""
    plan, filled_in = phases(config), written.growth.schedule == "auto" and own in MADE_BY_AUTO
    found = [deciders(config if filled_in else written, plan, plain) for plain in served]
    wanted = list(found[0]) if own in TABLES else [int(entry[1:])] if entry else sorted(value(written, own))
    lost = [r for r in wanted if own not in [by.get(r) for by in found]]
    others = {r: by[r] for by in found for r in lost if r in by}
    if others:
        r, other = list(others.items())[-1]
        instead = f"{other}.{r}={given}" if own in TABLES and other.endswith("_at") else f"another {other}"
        origin = ", which growth.schedule=auto fills in" if filled_in and r not in value(written, other) else ""
        reason = f"{other} goes before it{origin}; give {instead}"
    else:
        last = " (the last phase lasts until train.total_kimg)" if own.startswith("growth.stable_kimg") else ""
        reason = f"no phase of this run asks for it; its resolutions are {_listed({p.resolution for p in plan})}{last}"
    if lost or (own in TABLES and not wanted):
        return f"changes nothing{f' at {_listed(lost)}' if len(lost) < len(wanted) else ''}: {reason}"
    return ""


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def of_configuration(config: Config) -> list[str]:
    """Notes about settings that are possible, but probably not intended."""
    model, objective = config.model, config.loss.objective
    found = _of_curves(config)
    if isinstance(config.augment, ADAConfig) and objective in ("wgan", "lsgan", "relativistic"):
        found.append(
            f"augment.mode=ada follows the signs of D's scores, which say little under loss.objective={objective}: "
            "watch augment_p in stats.jsonl, or take augment.mode=fixed"
        )
    if model.mbstd_channels and model.mbstd_group > 1 and isinstance(model, ConvolutionalConfig):
        alone = {p.resolution: p.batch for p in phases(config) if p.mbstd_group == 1}
        if alone:
            batches = ", ".join(f"{batch} at {r}x{r}" for r, batch in alone.items())
            found.append(
                f"minibatch stddev does nothing: no group of 2 to model.mbstd_group={model.mbstd_group} images divides "
                f"the batch of {batches}; give an even train.batch, or model.mbstd_channels=0 to leave it out"
            )
    return found


def _of_curves(config: Config) -> list[str]:
    """Notes about curves that the run ends before."""
    end, found = phases(config)[-1].end, []
    values = [(key, value(config, key)) for key in TABLES if key != "augment.p"]
    values += [("augment.p", getattr(config.augment, "p", 0.0))]
    values += [(f"loss.terms: the weight of {term.name}", term.weight) for term in config.loss.terms]
    for key, given in values:
        own = curves.curves_of(given)
        if own and own[-1].end > end:
            found.append(
                f"{key}: its curve ends at {own[-1].end / 1000:.10g} kimg, the run at {end / 1000:.10g}, where it has "
                f"come to {curves.at(given, end):.6g}"
            )
    return found


def of_data(config: Config, index: DatasetIndex) -> list[str]:
    """A note if the dataset has classes that the configuration does not use."""
    names = index.label_names
    if config.data.conditional or len(names) < 2:
        return []
    shown = ", ".join(printable(name, 40) for name in names[:CLASSES_SHOWN])
    more = f" and {len(names) - CLASSES_SHOWN} more" if len(names) > CLASSES_SHOWN else ""
    return [
        f"the data has {len(names)} classes ({shown}{more}) that training does not use: give data.conditional=true to "
        "train on them"
    ]


def of_ranks(plan: Sequence[Phase], world: int) -> list[str]:
    """Notes about phases in which some ranks have no images, because there are fewer minibatch-stddev groups than
    ranks."""
    idle: dict[int, list[str]] = {}
    for p in plan:
        busy = sum(bool(share) for share in deal(p.batch, p.mbstd_group, world))
        if busy < world:
            idle.setdefault(busy, []).append(f"{p} (batch {p.batch} in groups of {p.mbstd_group})")
    return [
        f"only {busy} of the {world} ranks have images to train on in {', '.join(names)}: give a larger train.batch or "
        "train.batch_at, a smaller model.mbstd_group, or fewer processes"
        for busy, names in idle.items()
    ]
