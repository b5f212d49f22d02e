"""A run: start or continue, step after step until the end, and at kimg boundaries look after everything else.

nimg, the number of real images shown to D, is the clock: which phase it is, what is logged, drawn, measured and
written follows from it. The checkpoint comes last at each boundary, so whatever a kill cuts off is done again.
"""

from __future__ import annotations

import contextlib
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from stylegan_pg import __version__, checkpoint, dist
from stylegan_pg.config import Config, to_yaml
from stylegan_pg.data.index import DatasetIndex
from stylegan_pg.data.stream import batches
from stylegan_pg.errors import DONE, TO_BE_CONTINUED, RunError, UsageError
from stylegan_pg.generate import images_of, labels_to_c, latents
from stylegan_pg.metrics.evaluate import SlicedWasserstein, check_names
from stylegan_pg.parallel import Parallel
from stylegan_pg.players import Players
from stylegan_pg.report import Means, Reporter
from stylegan_pg.resume import compare, to_plain
from stylegan_pg.schedule import crossed, phase_at, phases
from stylegan_pg.snapshot import save_snapshot


class Trainer:
    """One run of a configuration on one dataset."""

    def __init__(self, config: Config, index: DatasetIndex, parallel: Parallel):
        """
        Raises:
            UsageError: where configuration and dataset do not fit together.
        """
        self.config, self.index = config, index
        check_names(config.metrics.names)
        self.players = Players(config, index, parallel)
        self.plan = phases(config)
        self.end = self.plan[-1].end
        for r in sorted({p.resolution for p in self.plan}):
            index.table(r)  # says now, not days later, if a resolution is missing or damaged
        self.run = Path(config.run)
        self.folder = self.run / "checkpoints"
        self.means = Means()
        self.bad: dict[str, None] = {}  # corrupt samples met so far, in order
        self.asked = False  # a signal came to this rank
        self.stopping = False  # the ranks have agreed to stop after this step
        self.failing = False  # too many checkpoints could not be written
        self.write_failures = 0
        self.reporter: Reporter | None = None  # rank 0 has one
        self.distances: dict[int, SlicedWasserstein] = {}

    def train(self, *, must_resume: bool = False) -> int:
        """Start, or continue from the newest good checkpoint, until the end or a request to stop.

        Returns an exit code: errors.DONE or errors.TO_BE_CONTINUED.

        Raises:
            UsageError: unreadable checkpoints or ones of another run; RunError: the run cannot go on.
        """
        self.restore(must_resume)
        p = self.players
        while p.nimg < self.end and not self.stopping:
            phase = phase_at(self.plan, p.nimg)
            if p.phase != phase:
                p.enter(phase)
                self.say(f"{p.nimg / 1000:.1f} kimg: {phase}, batch {phase.batch}, lr {phase.g_lr:g} / {phase.d_lr:g}")
                if p.nimg == 0:
                    self.grids()
            data = batches(
                p.table,
                seed=self.config.seed,
                start=p.nimg,
                end=phase.end,
                batch=phase.batch,
                share=p.share,
                classes=p.classes,
                mirror=self.config.data.mirror,
                workers=self.config.data.workers,
            )
            with contextlib.closing(data):
                for batch in data:
                    before = p.nimg
                    stats, self.stopping = p.step(batch, stop=self.asked)
                    for name, (total, count) in stats.items():
                        self.means.add(name, total, count)
                    self.note_bad(batch.bad)
                    self.maintain(before)
                    if self.stopping or self.failing:
                        break
            if self.failing:
                raise RunError(
                    f"{self.config.checkpoint.max_failures} checkpoints in a row could not be written; the last good "
                    "one is kept: make room, and run the same command again"
                )
        if self.reporter:
            self.reporter.close()
        return DONE if p.nimg >= self.end else TO_BE_CONTINUED

    # -------------------------------------------------------------------------------------- start and continue

    def restore(self, must_resume: bool) -> None:
        """Load the newest good checkpoint if there is one, open the logs, and take over what it decided."""
        with dist.main_decides() as box:
            if dist.is_main():
                path, _, state, problems = checkpoint.newest_good(self.folder)
                if path is None and must_resume:
                    raise UsageError(
                        f"{self.folder} holds no checkpoint to continue from: leave --resume away to start"
                    )
                notes = compare(state, self.config, self.index, self.plan) if path else []
                box[:] = [str(path) if path else None, problems, notes]
        path, problems, notes = box
        if path:
            tensors, state = checkpoint.read(Path(path))
            self.take_over(tensors, state)
        elif self.config.train.threads:
            torch.set_num_threads(self.config.train.threads)
        if dist.is_main():
            self.reporter = Reporter(
                self.run, self.players.nimg, self.end, tensorboard=self.config.output.tensorboard, means=self.means
            )
            (self.run / "config.yaml").write_text(to_yaml(self.config), "utf-8")
        for problem in problems:
            self.say(f"warning: passed over a bad checkpoint: {problem}")
        for note in notes:
            self.say(f"warning: {note}")
        if path:
            self.say(f"continuing from {path} at {self.players.nimg / 1000:.1f} kimg")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.request_stop)

    def take_over(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Continue where a checkpoint was written, with its thread count: other counts give other bits."""
        torch.set_num_threads(state["environment"]["threads"])
        p = self.players
        p.nimg = state["nimg"]
        p.enter(self.plan[state["phase"]])
        p.load(tensors)
        p.state = dict(state["running_means"])
        self.means = Means(state["means"])
        self.bad = dict.fromkeys(state["bad_samples"])

    def request_stop(self, *_: Any) -> None:
        self.asked = True  # nothing more: a signal may come at any moment, also within a write

    def environment(self) -> dict[str, Any]:
        """What bit-exact continuation depends on besides the checkpoint itself."""
        return {
            "threads": torch.get_num_threads(),
            "world": dist.world(),
            "device": self.players.device.type,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "stylegan_pg": __version__,
        }

    # --------------------------------------------------------------------------------------------- maintenance

    def maintain(self, before: int) -> None:
        """Everything that is due after the step that began at nimg `before`."""
        p, out = self.players, self.config.output
        after, last = p.nimg, p.nimg >= self.end
        if self.reporter:
            self.reporter.progress(after, f"{p.phase} alpha {p.phase.alpha(before):.2f}" if p.phase else "")
        if (after - before) and p.current.step(after) % self.config.train.check_ranks_every == 0:
            dist.check_same([*p.G.parameters(), *p.D.parameters()], f"the parameters at nimg {after}")
        tick = crossed(out.tick_kimg, before, after) or last
        if dist.is_main():
            if tick:
                self.tick(before)
            if crossed(self.config.metrics.every_kimg, before, after) or (last and self.config.metrics.every_kimg):
                self.measure()
            if crossed(out.grid_kimg, before, after) or (last and out.grid_kimg):
                self.grids()
            if crossed(out.snapshot_kimg, before, after) or last:
                self.snapshot()
        due = crossed(self.config.checkpoint.every_kimg, before, after) or (self.write_failures and tick)
        if due or self.stopping or last:
            self.checkpoint()

    def tick(self, before: int) -> None:
        assert self.reporter
        p = self.players
        facts = {
            "phase": str(p.phase),
            "resolution": p.current.resolution,
            "alpha": p.current.alpha(before),
            "lr_g": p.current.g_lr,
            "lr_d": p.current.d_lr,
            "batch": p.current.batch,
            **p.state,
        }
        if self.bad:
            facts["bad_samples"] = len(self.bad)
        self.reporter.tick(p.nimg, facts, p.device)

    def grids(self) -> None:
        """Fixed latents through G_ema, and once per resolution the real images beside them."""
        if not self.reporter:
            return
        p, (columns, rows) = self.players, self.config.output.grid
        count = columns * rows
        z, c = latents(range(count), self.config.model.z_dim), labels_to_c(p.G_ema, None, count)
        how = {"alpha": p.alpha, "psi": self.config.output.grid_psi}
        images = torch.cat(list(images_of(p.G_ema, z, c, batch=max(1, min(16, count)), **how)))
        self.reporter.grid(f"fakes-{p.nimg // 1000:06d}", p.nimg, images, columns)
        name = f"reals-r{p.current.resolution:04d}"
        if not (self.run / "samples" / f"{name}.png").exists():
            from stylegan_pg.data.stream import read_batch

            chosen = [i * len(p.table) // count for i in range(count)]
            self.reporter.grid(name, p.nimg, read_batch(p.table, chosen), columns)

    def measure(self) -> None:
        p, resolution = self.players, self.players.current.resolution
        assert self.reporter
        if resolution not in self.distances:  # of one resolution at a time, the descriptors are large
            self.distances = {resolution: SlicedWasserstein(p.table, self.config.metrics.images)}
        started = time.time()
        values = self.distances[resolution](p.G_ema, alpha=p.alpha)
        self.reporter.metrics(p.nimg, values, resolution=resolution, images=self.distances[resolution].images)
        self.reporter.not_training(time.time() - started)

    def snapshot(self) -> None:
        p = self.players
        description = {
            "network": self.config.model.name,
            "kwargs": p.G_kwargs,
            "alpha": p.alpha,
            "nimg": p.nimg,
            "label_names": list(self.index.label_names) if p.classes else [],
            "dataset": self.index.identity,
            "config": to_plain(self.config),
            "stylegan_pg": __version__,
        }
        path = self.run / "snapshots" / f"{p.nimg // 1000:06d}kimg.safetensors"
        try:
            save_snapshot(path, p.G_ema, description)
            self.say(f"{p.nimg / 1000:.1f} kimg: snapshot {path}")
        except OSError as error:
            self.say(f"warning: the snapshot {path} could not be written ({error}); training goes on")

    def checkpoint(self) -> None:
        """Written by rank 0; a failure is told and counted, and tried again at the next tick."""
        p = self.players
        fault: OSError | None = None
        if dist.is_main():
            state = {
                "nimg": p.nimg,
                "phase": p.current.index,
                "running_means": p.state,
                "means": self.means.sums,
                "bad_samples": list(self.bad),
                "environment": self.environment(),
                "config": to_plain(self.config),
                "dataset": self.index.identity,
            }
            path = checkpoint.path_for(self.folder, p.nimg)
            try:
                checkpoint.write(path, p.tensors(), state)
                checkpoint.rotate(self.folder, self.config.checkpoint.keep)
            except OSError as error:
                fault = error
        if dist.broadcast_object(None if fault is None else str(fault)) is None:
            self.write_failures = 0
            return
        self.write_failures += 1
        newest = next(iter(checkpoint.found(self.folder)), None)
        self.say(
            f"warning: the checkpoint at {p.nimg / 1000:.1f} kimg could not be written ({fault}); the last good one is "
            f"{newest or 'none yet'} (failure {self.write_failures} of {self.config.checkpoint.max_failures})"
        )
        done = p.nimg >= self.end or self.stopping
        if self.write_failures >= self.config.checkpoint.max_failures or done:
            self.failing = True

    def note_bad(self, bad: list[str]) -> None:
        for sample in bad:
            if sample not in self.bad:
                self.bad[sample] = None
                self.say(f"warning: replaced a corrupt picture by the next one: {sample}")

    def say(self, message: str) -> None:
        if self.reporter:
            self.reporter.say(message)


def run(config: Config, index: DatasetIndex, *, must_resume: bool = False) -> int:
    """Train to the end, or until asked to stop; returns the exit code.

    Raises:
        UsageError, RunError: as Trainer does.
    """
    parallel = Parallel(config)
    failed = True
    try:
        trainer = Trainer(config, index, parallel)
        code = trainer.train(must_resume=must_resume)
        failed = False
        if dist.is_main():
            done = "done" if code == DONE else "stopped; to continue, run the same command again"
            print(f"{done}: {config.run} at {trainer.players.nimg / 1000:.1f} kimg", file=sys.stderr)
        return code
    finally:
        dist.shutdown(failed=failed)


__all__ = ["TO_BE_CONTINUED", "Trainer", "run"]
