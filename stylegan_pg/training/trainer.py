"""The training loop of a run: it starts or continues, makes steps until the end, and writes outputs when they are due.

nimg, the number of real images shown to D, is the clock. The phase and the times of logging, grids, metrics, snapshots
and checkpoints follow from it. The checkpoint comes last at each of these times, so that everything that a kill
interrupts is done again when the run continues.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import averages, latest
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.checkpoint.run_folder import RunFolder
from stylegan_pg.config import Config
from stylegan_pg.config.plain import flat, to_plain
from stylegan_pg.config.schedule import Phase, crossed, learning_rate, phases, shortfall
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.loader.loader import Batch
from stylegan_pg.data.loader.workers import give_up_waiting
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.distributed import stopping
from stylegan_pg.errors import DONE, TO_BE_CONTINUED, RunError, UsageError
from stylegan_pg.metrics.periodic import Periodic
from stylegan_pg.monitoring import trackers
from stylegan_pg.monitoring.loggers import Means, RunLogger
from stylegan_pg.monitoring.logs import LogFile
from stylegan_pg.monitoring.status_writer import StatusWriter
from stylegan_pg.monitoring.step_clock import Shortage, StepClock
from stylegan_pg.ops import native
from stylegan_pg.planning.advice import of_ranks
from stylegan_pg.systems.base import System
from stylegan_pg.training import starting, transfer
from stylegan_pg.training.batches import TrainingBatches
from stylegan_pg.training.checkpointing import Checkpoints
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine, Outcome
from stylegan_pg.training.nonfinite import SkippedSteps
from stylegan_pg.training.outputs import Outputs
from stylegan_pg.training.replay import graphs_of
from stylegan_pg.training.resume import environment, running_state
from stylegan_pg.training.train_state import SIDES, TrainState

log = logging.getLogger(__name__)


class Trainer:
    """One run of a configuration on one dataset."""

    def __init__(self, config: Config, index: DatasetIndex, parallel: Devices, system: System | None = None):
        """
        Raises:
            UsageError: the configuration and the dataset do not fit together.
        """
        self.config, self.index = config, index
        trackers.check(config.output.trackers)
        self.state = TrainState(config, index, parallel, system)
        self.engine = Engine(self.state, graphs_of(config.train.graphs, self.state.device))
        self.plan = phases(config)
        self.end = self.plan[-1].end
        for r in sorted({p.resolution for p in self.plan}):
            index.table(r)  # raises now, not days later, if a resolution is missing or damaged
        self.run = Path(config.run)
        self.folder = RunFolder(self.run)
        self.checkpoints = Checkpoints(self.run / "checkpoints", config.checkpoint)
        self.data = TrainingBatches(config, index, parallel, self.plan)
        self.data.check(self.state.fields)
        self.means = Means()
        self.lost = ""  # why rank 0 cannot write into the run's folder any more
        self.stopping = False  # the ranks have agreed to stop after this step
        self.init: transfer.Weights | None = None  # weights from config.init that a new run starts with
        self.other_model = ""  # how the model of the run they come from differs
        self.init_p: float | None = None  # the probability of augmentation that it had reached
        self.skipped = SkippedSteps(self.checkpoints.folder, config.train.max_skipped)
        self.reporter: RunLogger | None = None  # rank 0 has one
        self.clock, self.shortage = StepClock(str(parallel.device), self.engine.idle), Shortage()
        self.metrics = Periodic(config, index)
        if self.metrics.enabled and self.state.system.inputs():
            raise UsageError(
                "metrics.every_kimg, metrics.at_snapshots: metrics are of images that a generator makes of latents, "
                "and this one changes pictures: set metrics.every_kimg=0 and metrics.at_snapshots=false"
            )
        self.log_file, self.status = LogFile(), StatusWriter()

    def train(
        self,
        *,
        must_resume: bool = False,
        restart: bool = False,
        warnings: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ) -> int:
        """Start, or continue from the newest good checkpoint, until the end or a request to stop.

        Args:
            must_resume: fail unless there is a checkpoint to continue from.
            restart: move what the run's folder holds aside and begin anew.
            warnings, remarks: are logged when the folder is known to be this run's.

        Returns:
            An exit code: errors.DONE or errors.TO_BE_CONTINUED.

        Raises:
            UsageError: unreadable checkpoints or ones of another run; RunError: the run cannot go on.
        """
        self.restore(must_resume, restart)
        for warning in warnings:
            log.warning(warning)
        for remark in filter(None, [shortfall(self.config), *of_ranks(self.plan, dist.world()), *remarks]):
            log.info(f"note: {remark}")
        p = self.state
        with contextlib.closing(self.data.batches(p.nimg, p.fields)) as stream:
            ahead = self.data.first(stream, stopping.asked)
            while ahead and not self.stopping:
                phase, batch = ahead
                if p.phase != phase:
                    self.enter(phase)
                # Whether the next step will have data is known before this one: if not on all ranks, all stop with it.
                ahead = next(stream, None)
                self.step(batch, no_more=bool(ahead and ahead[1].fault))
            for reason in self.data.why_no_more(ahead[1], stopping.asked()) if ahead else []:
                waited = f"data.patience_sec={self.config.data.patience_sec:g}"
                log.info(f"stopped, as there is no more data ({waited}): {reason}")
        if p.nimg >= self.end:
            self.outputs.final_snapshot()
        return DONE if p.nimg >= self.end else TO_BE_CONTINUED

    def step(self, batch: Batch, *, no_more: bool) -> None:
        """Train on one batch and do what is due after it; with `no_more`, the run stops with this step.

        Raises:
            RunError: too many steps were left out, or too many checkpoints could not be written.
        """
        p, before = self.state, self.state.nimg
        done = self.engine.step(batch, stop=lambda: no_more or self.must_stop())
        self.stopping = done.stopping
        if self.stopping:
            self.check_folder()
            if stopping.reason():
                log.info(f"{stopping.reason()}; stopping with a checkpoint")
        for name, (total, count) in done.stats.items():
            self.means.add(name, total, count)
        self.data.use(batch)
        self.skipped.record(p, done, before, self.checkpoints.writer.wait)
        self.maintain(before, done)
        if self.checkpoints.failing:
            raise RunError(
                f"{self.checkpoints.failures} checkpoints in a row could not be written; the last good one is "
                "kept: make room, and run the same command again"
            )

    def close(self) -> None:
        """Close the logs. On all ranks, also after a fault."""
        if self.reporter:
            self.reporter.close()
        self.log_file.close()
        self.status.close()

    def enter(self, phase: Phase) -> None:
        """Begin a phase, before its first step."""
        p = self.state
        fresh = p.enter(phase, self.init)
        lr = " / ".join(f"{learning_rate(self.config, side, phase.resolution, p.nimg):g}" for side in SIDES)
        log.info(f"{kimg(p.nimg)} kimg: {phase}, batch {phase.batch}, lr {lr}")
        if self.init:
            later = phase.resolution < self.config.resolution
            transfer.log_account({"G": p.G, "D": p.D}, fresh, self.init, self.config.init, self.other_model, later)
            if self.init_p is not None and p.system.start_augmenting(self.init_p):
                log.info(f"ADA's probability of augmentation starts from {self.init_p:g}, as it was there")
            self.init = None
        if p.nimg == 0:
            self.outputs.grids()

    # -------------------------------------------------------------------------------------- start and continue

    def restore(self, must_resume: bool, restart: bool) -> None:
        """Load the newest good checkpoint if there is one, take over what it decided, and open the logs. A collective
        call.

        Raises:
            UsageError, RunError: as `train`.
        """
        self.kernels = native.agree(self.state.device.type)
        seen = latest.claim(self.folder, to_plain(self.config), restart)
        self.skipped.owners = seen.owners
        found = latest.find(self.run, seen)
        for problem in found.problems:
            log.warning(f"passed over a bad checkpoint: {problem}")
        with dist.main_decides() as box:
            if dist.is_main():
                given = (self.config, found, self.state, self.plan, self.kernels)
                box[:] = [starting.settle_config(*given, must_resume), torch.get_num_threads()]
        config, threads = box
        self.config = config
        torch.set_num_threads(threads)  # those of rank 0, because other counts give other bits
        self.state.use(config)
        if config.init and not found.path:
            with dist.together():
                self.init, self.other_model, self.init_p = transfer.read(config.init, config.model)
        if found.path:
            self.take_over(found.tensors, found.state)
        with dist.main_decides():
            if dist.is_main():
                self.open_logs()
        self.outputs = Outputs(self.config, self.index, self.state, self.metrics, self.reporter)
        self.outputs.lost = self.folder.lost
        starting.log_start(self.config, found, self.state, self.metrics)
        stopping.begin(give_up_waiting, self.checkpoints.writer.is_writing)

    def open_logs(self) -> None:
        try:
            self.reporter = RunLogger(
                self.run,
                self.state.nimg,
                self.end,
                means=self.means,
                trackers=self.config.output.trackers,
                config=flat(to_plain(self.config)),
                lost=self.folder.lost,
            )
            self.status.open(self.run, self.state.nimg, self.end, self.folder.lost)
            self.log_file.open(self.run, self.folder.lost)
            self.folder.keep(self.config)
            averages.cut_back(self.run / averages.FOLDER, self.state.nimg)
        except OSError as error:
            raise UsageError(f"run={self.run} cannot be written: {error}") from None

    def take_over(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint, and its thread count."""
        torch.set_num_threads(state["environment"]["threads"])
        p = self.state
        p.nimg = state["nimg"]
        p.load_running(*running_state(state, self.config))
        p.enter(self.plan[state["phase"]])
        p.load(tensors, state.get("averages"))
        self.means = Means(state["means"])
        self.data.load(state["bad_samples"])

    def must_stop(self) -> bool:
        """Whether this rank has to stop after the present step: it was asked to, or its folder is lost."""
        self.lost = self.folder.lost() if dist.is_main() else ""
        return bool(self.lost) or stopping.asked()

    def check_folder(self) -> None:
        """Check that the run's folder is still this run's, before the outputs of a last step are written. A collective
        call.

        Raises:
            UsageError: on all ranks, if the run's folder is not this run's any more.
        """
        with dist.main_decides():
            if dist.is_main() and self.lost:
                place = self.folder.place()
                if self.reporter and place:
                    self.reporter.run, self.reporter.lost = place, str
                    self.log_file.open(place)  # where the fault is logged
                    self.status.move(place)
                else:
                    self.close()
                    self.reporter = None
                raise UsageError(self.lost)

    # --------------------------------------------------------------------------------------------- maintenance

    def maintain(self, before: int, done: Outcome) -> None:
        """Do everything that is due after the step that began at nimg `before`."""
        p = self.state
        after, last = p.nimg, p.nimg >= self.end
        self.clock.pause(len(p.micro_batches.share))
        if self.reporter:
            self.log_file.check_console()
            self.reporter.progress(after, f"{p.phase} alpha {p.phase.alpha(before):.2f}" if p.phase else "")
        if (after - before) and p.current.step(after) % self.config.train.check_ranks_every == 0:
            p.check_ranks(f"the parameters at nimg {after}")
        tick, ranks = crossed(self.config.output.tick_kimg, before, after) or last, []
        if tick:
            self.checkpoints.take_outcome()
            ranks = dist.gather_on_main(self.clock.take()) or []
        due = crossed(self.config.checkpoint.every_kimg, before, after) or (self.checkpoints.failures and tick)
        due = due or self.stopping or last
        if tick or due:
            self.gather_bad()
        if tick:
            self.outputs.tick(before, self.data.kinds())
            if self.reporter:
                self.status.update(ranks=ranks, img_per_sec=self.reporter.img_per_sec, **self.progress(before))
                self.shortage.look(ranks)
        self.outputs.due(before, last=last)
        # A state that may have diverged must not replace a good one. A single step left out is no reason to lose work.
        if due and (not done.faults or (self.skipped.is_first and (self.stopping or last))):
            self.checkpoint()
        elif self.stopping or last:
            log.warning("no checkpoint of this state, as its last steps were left out; the one before stays")
            self.checkpoints.take_outcome(wait=True, final=True)
        self.clock.go()

    def progress(self, before: int) -> dict[str, Any]:
        """Fields of the status file after the step that began at nimg `before`."""
        p = self.state
        return {
            "nimg": p.nimg,
            "phase": str(p.phase or ""),
            "alpha": p.current.alpha(before) if p.phase else None,
            "checkpoint": self.checkpoints.newest,
        }

    def checkpoint(self) -> None:
        """Start to write a checkpoint, which a thread of rank 0 does. At the end of a run, wait for it. A collective
        call."""
        p = self.state
        self.checkpoints.take_outcome(
            wait=True
        )  # the one before: on a disk that is slower than the interval, training waits
        tensors = p.tensors()
        if dist.is_main() and not self.folder.lost():
            state = {
                "nimg": p.nimg,
                "phase": p.current.index,
                "running_means": p.statistics(),  # read by earlier versions only
                "training": p.running.plain(),
                "system": p.system.state(),
                "averages": {average.name: average.since for average in p.averages},
                "means": self.means.sums,
                "bad_samples": self.data.state(),
                "environment": environment(self.state.device, self.kernels),
                "config": to_plain(self.config),
                "dataset": self.index.identity,
            }
            self.checkpoints.start(p.nimg, tensors, state)
        if p.nimg >= self.end or self.stopping:
            self.checkpoints.take_outcome(wait=True, final=True)

    def gather_bad(self) -> None:
        """Log the corrupt samples that any rank has met and that were not logged before. A collective call.

        Raises:
            RunError: on all ranks, if there are too many of them.
        """
        for bad in self.data.gather():
            log.warning(f"replaced a corrupt picture by the next one: {bad}")
            if self.reporter:
                source = self.index.source_of(bad.ordinal)
                self.reporter.data_fault(self.state.nimg, **bad._asdict(), source=source)
        self.data.check_share(self.state.current.resolution)
