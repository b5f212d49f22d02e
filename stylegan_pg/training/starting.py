"""What rank 0 settles and logs when a run starts or continues."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from stylegan_pg.checkpoint import history, latest
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.config import Config
from stylegan_pg.config.schedule import Phase
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.periodic import Periodic
from stylegan_pg.planning.advice import of_configuration, of_data
from stylegan_pg.training import autotune
from stylegan_pg.training.resume import check_state, compare, environment
from stylegan_pg.training.train_state import TrainState

log = logging.getLogger(__name__)


def settle_config(
    config: Config, found: latest.Found, state: TrainState, plan: list[Phase], kernels: str, must_resume: bool
) -> Config:
    """Compare the configuration with the one of the checkpoint that was found, set the number of threads, and fill in
    what the configuration leaves to measurement. To be called by rank 0.

    Raises:
        UsageError: there is no checkpoint where one must be, it is damaged, or it is of another run.
    """
    if not found.path:
        return _settle_new(config, state, must_resume)
    check_state(found.state, found.path, state.system)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    config, chosen = autotune.resolve(config, state.device, found.state["config"])
    for line in compare(found.state, config, state.index, plan, environment(state.device, kernels), found.where):
        log.warning(line)
    if not config.train.freeze_d:  # the checkpoint says which weights the run really began with
        config = dataclasses.replace(config, init=found.state["config"].get("init", ""))
    _log_choice(chosen)
    return config


def _settle_new(config: Config, state: TrainState, must_resume: bool) -> Config:
    """The same for a run without a checkpoint."""
    for line in history.check(Path(config.run)):
        log.info(line)
    if must_resume:
        raise UsageError(
            f"{Path(config.run) / 'checkpoints'} holds no checkpoint to continue from: leave --resume away to start"
        )
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    config, chosen = autotune.resolve(config, state.device, None)
    _log_choice(chosen)
    return config


def _log_choice(chosen: str) -> None:
    if chosen:
        log.info(f"measured: {chosen}")


def log_start(config: Config, found: latest.Found, state: TrainState, metrics: Periodic) -> None:
    """Log notes on the configuration and the data of a new run, metrics that cannot be measured, and the checkpoint
    that the run continues from."""
    for remark in [] if found.path else [*of_configuration(config), *of_data(config, state.index)]:
        log.info(f"note: {remark}")
    for remark in metrics.remarks(state.device) if dist.is_main() else []:
        log.warning(remark)
    if found.path:
        whose = f" in {found.where}, sent to all ranks," if found.holder else ""
        log.info(f"continuing from {found.path}{whose} at {kimg(state.nimg)} kimg")
