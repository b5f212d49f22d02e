"""A run: start or continue, step after step until the end, and at kimg boundaries look after everything else.

nimg, the number of real images shown to D, is the clock: which phase it is, what is logged, drawn, measured and
written follows from it. The checkpoint comes last at each boundary, so whatever a kill cuts off is done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import history, latest
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.checkpoint.run_folder import RunFolder
from stylegan_pg.config import Config
from stylegan_pg.config.plain import to_plain
from stylegan_pg.config.schedule import Phase, crossed, phases, shortfall
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.loader.workers import give_up_waiting
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.distributed import stopping
from stylegan_pg.errors import DONE, TO_BE_CONTINUED, RunError, UsageError
from stylegan_pg.metrics.periodic import Periodic
from stylegan_pg.monitoring import status
from stylegan_pg.monitoring.loggers import Means, RunLogger
from stylegan_pg.ops import native
from stylegan_pg.ops.recipes import has_bf16_instructions
from stylegan_pg.planning.advice import of_configuration, of_data, of_ranks
from stylegan_pg.systems.base import System
from stylegan_pg.training import autotune, transfer
from stylegan_pg.training.batches import TrainingBatches
from stylegan_pg.training.checkpointing import Checkpoints
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine, Outcome
from stylegan_pg.training.nonfinite import Divergence
from stylegan_pg.training.outputs import Outputs
from stylegan_pg.training.resume import check_state, compare, running_state
from stylegan_pg.training.train_state import TrainState
from stylegan_pg.version import __version__


class Trainer:
    """One run of a configuration on one dataset."""

    def __init__(self, config: Config, index: DatasetIndex, parallel: Devices, system: System | None = None):
        """
        Raises:
            UsageError: where configuration and dataset do not fit together.
        """
        self.config, self.index = config, index
        self.state = TrainState(config, index, parallel, system)
        self.engine = Engine(self.state)
        self.plan = phases(config)
        self.end = self.plan[-1].end
        for r in sorted({p.resolution for p in self.plan}):
            index.table(r)  # says now, not days later, if a resolution is missing or damaged
        self.run = Path(config.run)
        self.folder = RunFolder(self.run)
        self.checkpoints = Checkpoints(self.run / "checkpoints", config.checkpoint, self.note, self.say)
        self.feed = TrainingBatches(config, index, parallel, self.plan)
        self.feed.check(self.state.fields)
        self.means = Means()
        self.lost = ""  # why rank 0 cannot write into the run's folder any more
        self.stopping = False  # the ranks have agreed to stop after this step
        self.init: transfer.Weights | None = None  # what a new run starts with, if not with noise
        self.other_model = ""  # what was otherwise in the run that it comes from
        self.divergence = Divergence(self.checkpoints.folder, config.train.max_skipped)
        self.reporter: RunLogger | None = None  # rank 0 has one
        self.pace = status.Pace(str(parallel.device))
        self.metrics = Periodic(config, index)  # which refuses what it does not know
        if self.metrics.enabled and self.state.system.inputs():
            raise UsageError(
                "metrics.every_kimg, metrics.at_snapshots: metrics are of images that a generator makes of latents, "
                "and this one changes pictures: set metrics.every_kimg=0 and metrics.at_snapshots=false"
            )

    def train(
        self,
        *,
        must_resume: bool = False,
        restart: bool = False,
        warnings: Sequence[str] = (),
        remarks: Sequence[str] = (),
    ) -> int:
        """Start, or continue from the newest good checkpoint, until the end or a request to stop; `warnings` and
        `remarks` are told once there is a log.

        Returns an exit code: errors.DONE or errors.TO_BE_CONTINUED.

        Raises:
            UsageError: unreadable checkpoints or ones of another run; RunError: the run cannot go on.
        """
        self.restore(must_resume, restart)
        for warning in warnings:
            self.say(f"warning: {warning}")
        for remark in filter(None, [shortfall(self.config), *of_ranks(self.plan, dist.world()), *remarks]):
            self.say(f"note: {remark}")
        p = self.state
        with contextlib.closing(self.feed.batches(p.nimg, p.fields)) as stream:
            ahead = self.feed.first(stream, stopping.asked)
            while ahead and not self.stopping:
                phase, batch = ahead
                if p.phase != phase:
                    self.enter(phase)
                # Whether the next step will have data is known before this one: if not on all ranks, all stop with it.
                ahead = next(stream, None)
                before = p.nimg
                no_more = bool(ahead and ahead[1].fault)
                done = self.engine.step(batch, stop=lambda no_more=no_more: no_more or self.must_stop())
                self.stopping = done.stopping
                if self.stopping:
                    self.look_after_folder()
                    if stopping.reason():
                        self.say(f"{stopping.reason()}; stopping with a checkpoint")
                for name, (total, count) in done.stats.items():
                    self.means.add(name, total, count)
                self.feed.use(batch)
                self.divergence.look(p, done, before, self.say, self.checkpoints.writer.wait)
                self.maintain(before, done)
                if self.checkpoints.failing:
                    raise RunError(
                        f"{self.checkpoints.failures} checkpoints in a row could not be written; the last good one is "
                        "kept: make room, and run the same command again"
                    )
            for reason in self.feed.why_no_more(ahead[1], stopping.asked()) if ahead else []:
                waited = f"data.patience_sec={self.config.data.patience_sec:g}"
                self.say(f"stopped, as there is no more data ({waited}): {reason}")
        if p.nimg >= self.end:
            self.outputs.final_snapshot()
        if self.reporter:
            self.reporter.close()
        return DONE if p.nimg >= self.end else TO_BE_CONTINUED

    def enter(self, phase: Phase) -> None:
        """Go over to a phase, before its first step."""
        p = self.state
        fresh = p.enter(phase, self.init)
        self.say(f"{kimg(p.nimg)} kimg: {phase}, batch {phase.batch}, lr {phase.g_lr:g} / {phase.d_lr:g}")
        if self.init:
            init, nets = self.config.init, {"G": p.G, "D": p.D}
            amounts = transfer.account(nets, fresh, self.init, init, self.other_model)
            for line in [f"started from {init}; new: {', '.join(fresh) or 'nothing'}", *amounts]:
                self.say(line)
            if unused := transfer.unused(p.G, self.init["G"]):
                later = "; what grows later is drawn anew" if phase.resolution < self.config.resolution else ""
                self.say(f"not used of it: {', '.join(unused)}{later}")
            self.init = None
        if p.nimg == 0:
            self.outputs.grids()

    # -------------------------------------------------------------------------------------- start and continue

    def restore(self, must_resume: bool, restart: bool) -> None:
        """Load the newest good checkpoint if there is one, open the logs, and take over what it decided."""
        self.kernels = native.agree(self.state.device.type)
        seen, told = latest.claim(self.folder, to_plain(self.config), restart)
        self.divergence.owners = seen.owners
        found = latest.find(self.run, seen)
        path = found.path
        with dist.main_decides() as box:
            if dist.is_main():
                told += [] if path else history.check(self.run)
                if not path and must_resume:
                    raise UsageError(
                        f"{self.checkpoints.folder} holds no checkpoint to continue from: leave --resume away to start"
                    )
                if path:
                    check_state(found.state, path, self.state.system)
                if self.config.train.threads:
                    torch.set_num_threads(self.config.train.threads)
                kept = found.state["config"] if path else None
                self.config, chosen = autotune.settle(self.config, self.state.device, kept)
                if path:
                    here = self.environment()
                    notes = compare(found.state, self.config, self.index, self.plan, here, found.where)
                    told += [f"warning: {note}" for note in notes]
                    if not self.config.train.freeze_d:  # what is kept says where the run really began
                        self.config = dataclasses.replace(self.config, init=found.state["config"].get("init", ""))
                told += [f"measured: {chosen}"] if chosen else []
                box[:] = [torch.get_num_threads(), self.config]
        threads, config = box
        torch.set_num_threads(threads)  # rank 0's: other counts give other bits
        self.config = config  # as rank 0 has settled it
        self.state.use(config)
        if config.init and not path:
            with dist.together():
                self.init, self.other_model = transfer.read(config.init, config.model)
        if path:
            self.take_over(found.tensors, found.state)
        with dist.main_decides():
            if dist.is_main():
                self.open_logs()
        self.outputs = Outputs(self.config, self.index, self.state, self.metrics, self.reporter)
        self.outputs.lost = self.folder.lost
        for line in [*(f"warning: passed over a bad checkpoint: {problem}" for problem in found.problems), *told]:
            self.say(line)
        for remark in [] if path else [*of_configuration(config), *of_data(config, self.index)]:
            self.say(f"note: {remark}")
        for remark in self.metrics.remarks(self.state.device) if self.reporter else []:
            self.say(f"warning: {remark}")
        if path:
            whose = f" in {found.where}, sent to all ranks," if found.holder else ""
            self.say(f"continuing from {path}{whose} at {kimg(self.state.nimg)} kimg")
        stopping.begin(give_up_waiting, self.checkpoints.writer.is_writing)

    def open_logs(self) -> None:
        try:
            self.reporter = RunLogger(
                self.run,
                self.state.nimg,
                self.end,
                tensorboard=self.config.output.tensorboard,
                means=self.means,
                lost=self.folder.lost,
            )
            self.folder.keep(self.config)
        except OSError as error:
            raise UsageError(f"run={self.run} cannot be written: {error}") from None

    def take_over(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Continue where a checkpoint was written, with its thread count."""
        torch.set_num_threads(state["environment"]["threads"])
        p = self.state
        p.nimg = state["nimg"]
        p.load_running(*running_state(state, self.config))
        p.enter(self.plan[state["phase"]])
        p.load(tensors)
        self.means = Means(state["means"])
        self.feed.load(state["bad_samples"])

    def must_stop(self) -> bool:
        """Whether this rank cannot go on after a step, or was asked not to."""
        self.lost = self.folder.lost() if dist.is_main() else ""
        return bool(self.lost) or stopping.asked()

    def look_after_folder(self) -> None:
        """A collective call, before anything is written of a last step.

        Raises:
            UsageError: on all ranks, if the run's folder is not this run's any more.
        """
        with dist.main_decides():
            if dist.is_main() and self.lost:
                place = self.folder.place()
                if self.reporter and place:
                    self.reporter.run, self.reporter.lost = place, str  # its last words
                else:
                    self.reporter = None
                raise UsageError(self.lost)

    def environment(self) -> dict[str, Any]:
        """What bit-exact continuation depends on besides the checkpoint itself."""
        return {
            "threads": torch.get_num_threads(),
            "world": dist.world(),
            "device": self.state.device.type,
            "kernels": self.kernels,
            "bf16": self.state.device.type != "cpu" or has_bf16_instructions(),  # else float32 that is rounded
            "torch": torch.__version__,
            "python": platform.python_version(),
            "stylegan_pg": __version__,
        }

    # --------------------------------------------------------------------------------------------- maintenance

    def maintain(self, before: int, done: Outcome) -> None:
        """Everything that is due after the step that began at nimg `before`."""
        p = self.state
        after, last = p.nimg, p.nimg >= self.end
        self.pace.pause(len(p.micro_batches.share))
        if self.reporter:
            self.reporter.progress(after, f"{p.phase} alpha {p.phase.alpha(before):.2f}" if p.phase else "")
        if (after - before) and p.current.step(after) % self.config.train.check_ranks_every == 0:
            p.check_ranks(f"the parameters at nimg {after}")
        tick = crossed(self.config.output.tick_kimg, before, after) or last
        if tick:
            self.checkpoints.settle()
            paces = dist.gather_on_main(self.pace.take())
            if self.reporter and paces:
                self.reporter.ranks(after, paces)
        due = crossed(self.config.checkpoint.every_kimg, before, after) or (self.checkpoints.failures and tick)
        due = due or self.stopping or last
        if tick or due:
            self.gather_bad()
        if tick:
            self.outputs.tick(before, self.feed.kinds())
        self.outputs.due(before, last=last)
        # A state that may have diverged takes no good one's place; but one step left out is no reason to lose work.
        if due and (not done.faults or (self.divergence.is_new and (self.stopping or last))):
            self.checkpoint()
        elif self.stopping or last:
            self.say("warning: no checkpoint of this state, as its last steps were left out; the one before stays")
            self.checkpoints.settle(wait=True, final=True)
        self.pace.go()

    def checkpoint(self) -> None:
        """Written by a thread of rank 0; the run ends with nothing unwritten."""
        p = self.state
        self.checkpoints.settle(wait=True)  # the one before; a disk that is slower than the interval holds training up
        tensors = p.tensors()
        if dist.is_main() and not self.folder.lost():
            state = {
                "nimg": p.nimg,
                "phase": p.current.index,
                "running_means": p.statistics(),  # read by earlier versions only
                "training": p.running.plain(),
                "system": p.system.state(),
                "means": self.means.sums,
                "bad_samples": self.feed.state(),
                "environment": self.environment(),
                "config": to_plain(self.config),
                "dataset": self.index.identity,
            }
            self.checkpoints.start(p.nimg, tensors, state)
        if p.nimg >= self.end or self.stopping:
            self.checkpoints.settle(wait=True, final=True)

    def gather_bad(self) -> None:
        """The corrupt samples that all ranks have met, told once each.

        Raises:
            RunError: on all ranks, if there are too many of them.
        """
        for bad in self.feed.gather():
            self.say(f"warning: replaced a corrupt picture by the next one: {bad}")
            if self.reporter:
                source = self.index.source_of(bad.ordinal)
                self.reporter.data_fault(self.state.nimg, **bad._asdict(), source=source)
        self.feed.check_share(self.state.current.resolution)

    def note(self, message: str) -> None:
        """A line in the log alone."""
        if self.reporter:
            self.reporter.note(message)

    def say(self, message: str) -> None:
        if self.reporter:
            self.reporter.say(message)
