"""Steps that were left out because a loss or gradient was not finite. They are logged and counted; too many of them end
the run.

The step that spoils the weights can be finite itself, and a checkpoint may then hold the spoilt weights. Therefore
checkpoints that were followed by nothing but faults are renamed before the run ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path

from stylegan_pg.checkpoint import checkpoint
from stylegan_pg.config import Config, LossConfig
from stylegan_pg.config.schedule import Phase, learning_rate, term_weight
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError
from stylegan_pg.losses import TERMS
from stylegan_pg.planning.advice import decides, multiplied, r1_is_on
from stylegan_pg.training.engine import Outcome
from stylegan_pg.training.train_state import TrainState

log = logging.getLogger(__name__)

FORGIVEN = 0.01  # steps by which each good step lowers the count of steps left out


class SkippedSteps:
    """Counts the steps that a run leaves out.

    Args:
        folder: of the run's checkpoints.
        most: steps that may be left out; each good step lowers the count by FORGIVEN.
    """

    def __init__(self, folder: Path, most: int):
        self.folder, self.most = folder, most
        self.owners = [0]  # ranks with a folder of their own, whose checkpoints the next start may find
        self.streak = 0  # number of consecutive faulty steps up to now
        self.since = 0  # nimg of the state that they began with

    @property
    def is_first(self) -> bool:
        """Whether the last step was left out and the one before was not."""
        return self.streak == 1

    def record(self, state: TrainState, done: Outcome, nimg: int, wait_for_write: Callable[[], object]) -> None:
        """Count the step that began at nimg and had this outcome. A collective call.

        Args:
            wait_for_write: waits until the checkpoint that is being written is complete.

        Raises:
            RunError: too many steps were left out; the message names remedies.
        """
        for note in done.notes:
            log.warning(note)
        skipped = state.running.skipped_lately
        if not done.faults:
            state.running.skipped_lately = max(skipped - FORGIVEN, 0.0)
            self.streak = 0
            return
        self.streak += 1
        if self.is_first:
            self.since = nimg if done.began_bad else state.nimg
        state.running.skipped_lately = skipped = skipped + 1
        state.running.skipped += 1
        reason = f"the step at nimg {nimg} ({state.phase}) was left out: {'; '.join(done.faults)}"
        log.warning(f"{reason} ({math.ceil(skipped)} of at most {self.most})")
        if skipped <= self.most:
            return
        wait_for_write()
        with dist.together():
            mine = put_aside(self.folder, self.since) if dist.rank() in self.owners else None
        good = max((path for path in dist.gather_objects(mine) if path), key=lambda path: int(path.stem), default=None)
        advice = "; or ".join(remedies(state.config, state.current, nimg))
        if good:
            how = f"The last good checkpoint is {good} (later ones are now called NAME.bad): run the same command"
        else:
            how = "No good checkpoint is left (NAME.bad are none): run the same command with --restart, which begins"
        raise RunError(
            f"training has diverged: more than train.max_skipped={self.most} steps were left out; {reason}. {how} "
            f"again with one or more of these: {advice}"
        )


def remedies(config: Config, phase: Phase, nimg: int) -> list[str]:
    """Changes that may help a run that diverged in this phase, in the form of overrides."""
    resolution, found = phase.resolution, []
    rates = [_half_rate(config, side, resolution, nimg) for side in ("G", "D")]
    own = [t.name for t in config.loss.terms if TERMS[t.name].on == "D" and not TERMS[t.name].of_scores]
    if own and not r1_is_on(config):
        found.append(f"a larger weight of {' or '.join(own)} in loss.terms")
    else:
        found.append(_more_r1(config, resolution, nimg))
    found.append(" ".join(rates))
    low = config.model
    if low.low_precision != "fp32" and (low.low_precision_at or low.low_precision_resolutions):
        found.append("model.low_precision=fp32" + (" model.low_precision_at=null" if low.low_precision_at else ""))
    return found


def _more_r1(config: Config, resolution: int, nimg: int) -> str:
    """An override that doubles loss.r1_gamma, or the key that decides about it here."""
    loss, plain = config.loss, "loss.r1_gamma"
    if term_weight(loss.r1(), resolution, nimg):
        return multiplied(config, plain, 2, resolution, nimg)
    key, default = decides(config, plain, resolution, nimg), LossConfig().r1_gamma
    if key == plain:
        return f"{key}={default:g}"
    if key != f"{plain}_from":
        return f"{key}.{resolution}={default:g}"
    reached = max(kimg for kimg in loss.r1_gamma_from if nimg >= kimg * 1000)
    table = ", ".join(f"{k:g}: {v:g}" for k, v in (loss.r1_gamma_from | {reached: default}).items())
    return f"'{key}={{{table}}}'"


def _half_rate(config: Config, side: str, resolution: int, nimg: int) -> str:
    """An override that halves a learning rate."""
    key = f"optim.{side.lower()}_lr"
    if decides(config, key, resolution, nimg) == "optim.lr_at":  # which both sides share
        return f"{key}_at.{resolution}={learning_rate(config, side, resolution, nimg) / 2:.6g}"
    return multiplied(config, key, 0.5, resolution, nimg)


def put_aside(folder: Path, since: int) -> Path | None:
    """Rename the checkpoints from nimg `since` on to NAME.bad; returns the newest one before, if there is any.

    Raises:
        RunError: where that is not possible.
    """
    for path in checkpoint.found(folder):
        if int(path.stem) < since:
            return path
        try:
            path.rename(path.with_name(path.name + ".bad"))
        except OSError as error:
            raise RunError(
                f"training has diverged, and {path}, which holds such a state, cannot be renamed ({error}): delete it"
            ) from None
    return None
