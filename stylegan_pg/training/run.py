"""Starting a run: the process group, the checks that all ranks belong together, training, and the exit code."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from stylegan_pg import files
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.config import Config
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.data.storage.shard_reader import OPEN_CACHED_FILES, OPEN_FILES
from stylegan_pg.distributed import consistency, launcher, stopping
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import DONE, TO_BE_CONTINUED, RunError, UsageError
from stylegan_pg.monitoring import logs
from stylegan_pg.systems.base import System
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.trainer import Trainer

log = logging.getLogger(__name__)


def run(
    config: Config,
    index: DatasetIndex,
    *,
    must_resume: bool = False,
    restart: bool = False,
    remarks: Sequence[str] = (),
    system: System | None = None,
) -> int:
    """Train to the end, or until the run is asked to stop.

    Args:
        must_resume: fail unless there is a checkpoint to continue from.
        restart: move what the run's folder holds aside and begin anew.
        remarks: notes for the log.
        system: what to train in place of the system that the configuration names.

    Returns:
        The exit code: errors.DONE or errors.TO_BE_CONTINUED.

    Raises:
        UsageError, RunError: as Trainer does.
    """
    # For libraries, connections to the other ranks, workers, and open shards.
    files.allow_open_files(64 + 4 * launcher.place().world + 4 * config.data.workers + OPEN_FILES + OPEN_CACHED_FILES)
    with logs.to_console():
        parallel = Devices(config)
        failed, trainer = True, None
        try:
            warnings = consistency.check(config, index.identity)
            trainer = Trainer(config, index, parallel, system)
            code = _train(trainer, must_resume=must_resume, restart=restart, warnings=warnings, remarks=remarks)
            failed = False
            return code
        finally:
            if trainer:
                trainer.checkpoints.finish()
                trainer.close()
            dist.shutdown(failed=failed)
            stopping.end()


def _train(trainer: Trainer, **how: Any) -> int:
    """Call `trainer.train(**how)`, and log how the run ended."""
    try:
        code = trainer.train(**how)
        if code == TO_BE_CONTINUED and any(dist.gather_objects(launcher.asked_to_stop())):
            launcher.ask_to_stop()
    except Exception as error:
        trainer.checkpoints.finish()
        expected = isinstance(error, (RunError, UsageError))
        log.error(f"{'' if expected else type(error).__name__ + ': '}{error}", extra=logs.FILE_ONLY)  # shown elsewhere
        trainer.status.update(state="failed", checkpoint=trainer.checkpoints.newest)
        raise
    trainer.checkpoints.finish()
    state = "done" if code == DONE else "stopped"
    trainer.status.update(state=state, nimg=trainer.state.nimg, checkpoint=trainer.checkpoints.newest)
    done = "done" if code == DONE else "stopped; to continue, run the same command again"
    log.info(f"{done}: {trainer.config.run} at {kimg(trainer.state.nimg)} kimg")
    return code


def train(config: Config, *, system: System | None = None, resume: bool = False, restart: bool = False) -> int:
    """Train as `stylegan-pg train` does, from Python; several ranks each call it, as launchers start them.

    Args:
        config: as load_config returns it.
        system: what to train in place of the system that the configuration names, such as `GAN(config, pair)`.
        resume: fail unless there is a checkpoint to continue from.
        restart: move what the run's folder holds aside and begin anew.

    Returns:
        The exit code: 0 done, 75 stopped on request and to be continued by the same call.

    Raises:
        UsageError, RunError: as `run` does.
    """
    return run(config, load_dataset(config), must_resume=resume, restart=restart, system=system)
