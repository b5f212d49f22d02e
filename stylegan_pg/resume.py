"""Whether a checkpoint can be continued, with another configuration too, and what to say about the differences."""

from __future__ import annotations

import dataclasses
from typing import Any

from stylegan_pg.config import Config, TermConfig
from stylegan_pg.data.index import DatasetIndex
from stylegan_pg.errors import UsageError
from stylegan_pg.schedule import Phase
from stylegan_pg.urls import publishable

# Another value here makes another network, or moves the phases that nimg is counted in.
FIXED = ("seed", "resolution", "model.", "growth.", "data.conditional", "train.batch", "train.batch_at", "train.dtype")
# Though they begin like these: another value goes on with the same networks, in other steps or other rounding.
PRECISION = ("model.low_precision", "model.low_precision_at", "model.low_precision_resolutions")
CHANGEABLE = (*PRECISION, "model.w_avg_beta")
# Another value here changes nothing about what is computed.
FREE = ("run", "data.url", "data.mixture", "data.workers", "data.cache_", "data.prefetch_shards", "data.patience_sec")
FREE += ("data.max_bad_share", "output.", "checkpoint.", "metrics.", "train.total_kimg", "train.threads")
FREE += (
    "train.join_sec",
    "train.timeout_sec",
    "train.check_ranks_every",
    "train.max_skipped",
    "train.loss_scale",
    "init",
)


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


def running_numbers(state: dict[str, Any], config: Config) -> dict[str, float]:
    """The checkpoint's running means and the like, without those that start afresh: another value was configured for
    their start, they are fixed now, or they were found for another precision."""
    before, now = flat(to_plain(Config())) | flat(state["config"]), flat(to_plain(config))
    afresh = {"augment_p"} if config.augment.mode == "fixed" else set()
    for key, name in (
        ("augment.p", "augment_p"),
        ("train.loss_scale", "loss_scale"),
        ("model.low_precision", "loss_scale"),
    ):
        if before[key] != now[key]:
            afresh.add(name)
    return {name: value for name, value in state["running_means"].items() if name not in afresh}


def compare(
    state: dict[str, Any], config: Config, index: DatasetIndex, plan: list[Phase], here: dict[str, Any]
) -> list[str]:
    """What differs between the checkpoint's run and this one, for the log; `here` is Trainer.environment().

    Raises:
        UsageError: if the difference makes it another run: other networks, other phases, other data.
    """
    before, now = flat(to_plain(Config())) | flat(state["config"]), flat(to_plain(config))  # keys may be new
    term = to_plain(TermConfig())
    before["loss.terms"] = [term | t for t in before["loss.terms"]]
    changed = {key: (before.get(key), now.get(key)) for key in before.keys() | now.keys()}
    changed = {key: pair for key, pair in sorted(changed.items()) if pair[0] != pair[1]}
    fatal = [f"{k} was {a}, is {b}" for k, (a, b) in changed.items() if k.startswith(FIXED) and k not in CHANGEABLE]
    if fatal:
        pair = changed.get("train.total_kimg")
        if pair and any(text.startswith(("growth.stable_kimg_at", "growth.fade_kimg_at")) for text in fatal):
            fatal.append(f"train.total_kimg, which growth.schedule=auto makes phases from, was {pair[0]}, is {pair[1]}")
        raise UsageError(
            f"the checkpoints in {config.run} are of another run: {'; '.join(fatal)}. Take the old values to continue "
            "it, or another run=FOLDER to start a new one"
        )
    if state["dataset"] != index.identity:
        raise UsageError(
            f"the checkpoints in {config.run} were trained on other data than {index.path}: give data.url of the same "
            "dataset (or data.mixture of the same, in the same proportions) to continue, or "
            "another run=FOLDER to start a new one"
        )
    nimg, number = state["nimg"], state["phase"]
    if number >= len(plan) or not plan[number].start < nimg <= plan[number].end:
        raise UsageError(
            f"train.total_kimg={config.train.total_kimg} ends before the checkpoint at {nimg / 1000:.1f} kimg in "
            f"{config.run}: raise it, or take another run=FOLDER"
        )
    notes = [f"{k} was {a}, is now {b}" for k, (a, b) in changed.items() if not k.startswith(FREE)]
    if config.init and config.init != before["init"]:
        began = f"init={before['init']}" if before["init"] else "no init="
        notes.append(
            f"init={config.init} changes nothing: the run was begun with {began} and goes on from its checkpoint; take "
            "another run=FOLDER to start from the file"
        )
    formats = {before["model.low_precision"], now["model.low_precision"]}
    if formats != {"fp32"} and any(key in PRECISION for key in changed):
        notes.append("the precision changes here: from now on the bits are not those of a run that kept it")
    for name, then in state["environment"].items():
        if name == "world" and then != here[name]:
            notes.append(f"continuing on {here[name]} ranks what ran on {then}: the same batches, other rounding")
        elif name == "threads" and then != here[name]:
            notes.append(
                f"using {then} CPU threads, as the run did before, not {here[name]}: other counts round otherwise"
            )
        elif name == "bf16" and (config.model.low_precision == "fp32" or config.model.low_precision_at == []):
            pass  # nothing is computed in it
        elif then != here.get(name):
            notes.append(f"{name} was {then}, is now {here.get(name)}: results may differ by rounding")
    return notes
