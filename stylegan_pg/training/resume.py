"""Whether a checkpoint can be continued, also with another configuration, and which differences are reported."""

from __future__ import annotations

import platform
import sys
from functools import partial
from typing import Any

import torch

from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.config import Config, FixedConfig
from stylegan_pg.config.plain import flat, stored_keys, to_plain
from stylegan_pg.config.schedule import Phase
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import check_arguments
from stylegan_pg.ops.recipes import has_bf16_instructions
from stylegan_pg.systems.base import System
from stylegan_pg.systems.state import REMEDY, GANState, read_state
from stylegan_pg.training.running import RunningState, stored_states
from stylegan_pg.untrusted import finite_number, printable, whole_number
from stylegan_pg.version import __version__

# Keys whose change makes another run: other networks or moments, or other phases at the same nimg.
FIXED = ("seed", "resolution", "system.name", "model.", "growth.", "data.conditional", "data.condition", "train.batch")
FIXED += ("train.batch_at", "train.dtype", "optim.name")
# Keys that begin like FIXED ones and may change: the networks are the same, the steps or the rounding differ.
PRECISION = ("model.low_precision", "model.low_precision_at", "model.low_precision_resolutions")
CHANGEABLE = (*PRECISION, "model.w_avg_beta")
# Keys whose change has no effect on what is computed.
FREE = (
    "run",
    "data.url",
    "data.mixture",
    "data.unpaired",
    "data.workers",
    "data.cache_",
    "data.prefetch_shards",
    "data.patience_sec",
)
FREE += ("data.max_bad_share", "output.", "checkpoint.", "metrics.", "train.total_kimg", "train.threads")
FREE += (
    "train.join_sec",
    "train.timeout_sec",
    "train.check_ranks_every",
    "train.max_skipped",
    "train.loss_scale",
    "init",
    "ema.profiles",  # of whose averages TrainState.load says which begin anew
    "ema.every_kimg",
)


# The dataset's name is there for data.unpaired only.
_BAD_SAMPLES = ([int, int, str, str, str], [int, int, str, str, str, str])
MOST_THREADS, FINITE = 1024, sys.float_info.max


def check_state(state: dict[str, Any], named: str, system: System | None = None) -> None:
    """Check that a checkpoint's header has the form and the ranges that continuing relies on, and that its state of the
    system is one of `system`.

    Raises:
        UsageError: in one message that begins with `named`, for the first value that is missing or wrong.
    """
    remedy = REMEDY

    def part(key: str, kind: type) -> Any:
        if not isinstance(found := state.get(key), kind):
            raise UsageError(f"{named} has no {key}, or it is no {kind.__name__}: {remedy}")
        return found

    whole_number(state.get("nimg"), 0, 1 << 53, f"{named}: nimg", remedy)
    whole_number(state.get("phase"), 0, 1 << 20, f"{named}: phase", remedy)
    part("dataset", str)
    for key in ("training", "system") if "training" in state or "system" in state else ():
        part(key, dict)
    if "training" not in state:  # as earlier versions wrote it
        for name, value in part("running_means", dict).items():
            finite_number(value, -FINITE, FINITE, f"{named}: {printable(name, 60)}", remedy)
    of_training, of_system = stored_states(state)
    read_state(RunningState, of_training, str(named))
    (system.check_state if system else partial(read_state, GANState))(of_system, str(named))
    averages = part("averages", dict) if "averages" in state else {}
    for name, since in averages.items():
        whole_number(since, 0, state["nimg"], f"{named}: the start of {printable(name, 60)}", remedy)
    for name, pair in part("means", dict).items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageError(f"{named}: the mean of {printable(name, 60)} is no sum and count: {remedy}")
        finite_number(pair[0], -FINITE, FINITE, f"{named}: the sum of {printable(name, 60)}", remedy)
        whole_number(pair[1], 0, 1 << 62, f"{named}: the count of {printable(name, 60)}", remedy)
    for bad in part("bad_samples", list):
        is_entry = isinstance(bad, list) and list(map(type, bad)) in _BAD_SAMPLES
        if not is_entry and not isinstance(bad, str):  # a text is the form of an earlier version
            raise UsageError(f"{named}: an entry of bad_samples is no damaged sample: {remedy}")
    environment = part("environment", dict)
    whole_number(environment.get("threads"), 1, MOST_THREADS, f"{named}: threads", remedy)
    if not all(isinstance(value, str | int | None) for value in environment.values()):
        raise UsageError(f"{named}: its environment holds other things than texts and numbers: {remedy}")
    config = part("config", dict)
    model, train, loss = (config.get(key) for key in ("model", "train", "loss"))
    terms = loss.get("terms", []) if isinstance(loss, dict) else None
    if not (isinstance(terms, list) and all(isinstance(term, dict) for term in terms)):
        raise UsageError(f"{named}: loss.terms of its configuration is no list of tables: {remedy}")
    if not isinstance(model, dict) or not isinstance(train, dict):
        raise UsageError(f"{named}: model or train of its configuration is no table: {remedy}")
    if not isinstance(train.get("channels_last"), bool | None):  # which is taken over, as is the next
        raise UsageError(f"{named}: train.channels_last of its configuration is no true, false or null: {remedy}")
    taken = {key: model[key] for key in ("low_precision_at", "low_precision") if model.get(key) not in (None, "auto")}
    if taken:
        try:
            check_arguments(taken)
        except ValueError as error:
            raise UsageError(f"{named}: model.{error}: {remedy}") from None


def running_state(state: dict[str, Any], config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the fields of RunningState, those of the system's state) of a checkpoint, without those that start afresh:
    another value was configured for their start, they are fixed now, or they were found for another precision."""
    before, now = stored_keys(state["config"]), flat(to_plain(config))
    starts = ("augment.p", "train.loss_scale", "model.low_precision")
    changed = {key for key in starts if before.get(key) != now.get(key)}
    training, system = map(dict, stored_states(state))
    if changed & {"train.loss_scale", "model.low_precision"}:
        training.pop("loss_scale", None)
    if "augment.p" in changed or isinstance(config.augment, FixedConfig):
        system.pop("augment_p", None)
    return training, system


def environment(device: torch.device, kernels: str) -> dict[str, Any]:
    """What bit-exact continuation depends on besides the checkpoint's state; `kernels`: as native.agree gave it."""
    return {
        "threads": torch.get_num_threads(),
        "world": dist.world(),
        "device": device.type,
        "kernels": kernels,
        "bf16": device.type != "cpu" or has_bf16_instructions(),  # False: computed in float32 and rounded
        "torch": torch.__version__,
        "python": platform.python_version(),
        "stylegan_pg": __version__,
    }


def compare(
    state: dict[str, Any],
    config: Config,
    index: DatasetIndex,
    plan: list[Phase],
    here: dict[str, Any],
    where: str = "",
) -> list[str]:
    """Return warnings for the log about what differs between the checkpoint's run and this one.

    Args:
        state: of the checkpoint, checked by check_state.
        here: what `environment` gives for this process.
        where: the folder in which the checkpoint lies, if it is not config.run.

    Raises:
        UsageError: if the difference makes it another run: other networks, other phases, other data.
    """
    where = where or config.run
    before, now = stored_keys(state["config"]), flat(to_plain(config))
    changed = {key: (before[key], now[key]) for key in before.keys() & now.keys()}  # the others follow from other modes
    changed = {printable(key, 60): (printable(a, 80), b) for key, (a, b) in sorted(changed.items()) if a != b}
    fatal = [f"{k} was {a}, is {b}" for k, (a, b) in changed.items() if k.startswith(FIXED) and k not in CHANGEABLE]
    if fatal:
        pair = changed.get("train.total_kimg")
        if pair and any(text.startswith(("growth.stable_kimg_at", "growth.fade_kimg_at")) for text in fatal):
            fatal.append(f"train.total_kimg, which growth.schedule=auto makes phases from, was {pair[0]}, is {pair[1]}")
        raise UsageError(
            f"the checkpoints in {where} are of another run: {'; '.join(fatal)}. Take the old values to continue "
            "it, or another run=FOLDER to start a new one"
        )
    if state["dataset"] != index.identity:
        raise UsageError(
            f"the checkpoints in {where} were trained on other data than {index.path}: give data.url of the same "
            "dataset (or data.mixture of the same, in the same proportions) to continue, or "
            "another run=FOLDER to start a new one"
        )
    nimg, number = state["nimg"], state["phase"]
    if number >= len(plan) or not plan[number].start < nimg <= plan[number].end:
        raise UsageError(
            f"train.total_kimg={config.train.total_kimg} ends before the checkpoint at {kimg(nimg)} kimg in "
            f"{where}: raise it, or take another run=FOLDER"
        )
    notes = [f"{k} was {a}, is now {b}" for k, (a, b) in changed.items() if not k.startswith(FREE)]
    if config.init and config.init != before["init"]:
        began = f"init={printable(before['init'], 80)}" if before["init"] else "no init="
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
            was = printable(then, 80)
            notes.append(f"{printable(name, 60)} was {was}, is now {here.get(name)}: results may differ by rounding")
    return notes
