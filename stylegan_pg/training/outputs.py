"""The outputs of a run while it trains: lines of statistics, grids of images, metrics and snapshots."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylegan_pg.checkpoint import averages, names
from stylegan_pg.checkpoint.snapshot import write_snapshot
from stylegan_pg.config import Config
from stylegan_pg.config.plain import to_plain
from stylegan_pg.config.schedule import crossed, learning_rate
from stylegan_pg.data.conditions import names_of
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.images.decode import MODES
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import PeersLost, RunError, UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import finite, grid_inputs, grid_ordinals, images_of
from stylegan_pg.inference.texts import makes_texts, texts_of
from stylegan_pg.metrics.periodic import Periodic
from stylegan_pg.metrics.watch import SAMPLES, Watch
from stylegan_pg.monitoring.loggers import RunLogger
from stylegan_pg.training.inputs import inputs_at
from stylegan_pg.training.train_state import TrainState
from stylegan_pg.version import __version__

log = logging.getLogger(__name__)


class Outputs:
    """The outputs of one run. All ranks measure the metrics; only rank 0, which has the reporter, writes."""

    def __init__(
        self, config: Config, index: DatasetIndex, state: TrainState, metrics: Periodic, reporter: RunLogger | None
    ):
        self.config, self.index, self.state, self.metrics, self.reporter = config, index, state, metrics, reporter
        self.run, self.watch = Path(config.run), Watch(config, index)
        self.lost: Callable[[], str] = str  # gives the reason why the folder is not the run's any more

    def due(self, before: int, *, last: bool) -> None:
        """Measure, draw and write what is due after the step that began at nimg `before`; `last` ends the run, whose
        final_snapshot comes later."""
        after, out = self.state.nimg, self.config.output
        snapshot = crossed(out.snapshot_kimg, before, after) or last
        every = self.config.metrics.every_kimg
        if crossed(every, before, after) or (last and every) or (snapshot and self.config.metrics.at_snapshots):
            self.measure()
        if dist.is_main():
            if crossed(out.grid_kimg, before, after) or (last and out.grid_kimg):
                self.grids()
            if crossed(self.config.metrics.watch_kimg, before, after):
                self.look_for_collapse()
            if snapshot and not last:
                self.snapshot(self.snapshot_path())
            if crossed(self.config.ema.every_kimg, before, after) or after == self.state.current.end or last:
                self.store_averages()

    def tick(self, before: int, bad_samples: Mapping[str, int]) -> None:
        """Write a line of statistics since the last one; `bad_samples` counts damaged samples by kind."""
        if not self.reporter:
            return
        p = self.state
        facts = {
            "phase": str(p.phase),
            "resolution": p.current.resolution,
            "alpha": p.current.alpha(before),
            "lr_g": learning_rate(self.config, "G", p.current.resolution, before),
            "lr_d": learning_rate(self.config, "D", p.current.resolution, before),
            "batch": p.current.batch,
            **{name: v for name, v in p.statistics().items() if (name, v) != ("loss_scale", 1)},
        }
        if bad_samples:
            facts["bad_samples"] = sum(bad_samples.values())
            facts |= {f"bad_{kind}": count for kind, count in sorted(bad_samples.items())}
        self.reporter.tick(p.nimg, facts, p.device)

    def grids(self) -> None:
        """Write a grid of G_ema's images of fixed latents, with a row for each class if there are labels; and once per
        resolution a grid of real images."""
        if not self.reporter or self.index.channels not in MODES:  # points in the plane are not drawn
            return
        p, (columns, rows) = self.state, self.config.output.grid
        by_class = p.conditions is not None and p.conditions.are_classes
        classes = np.unique(p.table.label).tolist() if by_class else []
        chosen = grid_ordinals(p.table.label, columns, rows, classes)
        z, c = grid_inputs(p.G_ema, columns, rows, classes)
        if p.conditions is not None and not by_class:
            c = p.conditions.at(chosen)  # of the real images at the same positions
        at = self.moment(self.run / "samples", ".txt" if makes_texts(p.G_ema) else ".png", self.config.output.grid_kimg)
        how = {"alpha": p.alpha, "psi": self.config.output.grid_psi}
        try:
            if makes_texts(p.G_ema):
                self.reporter.texts(f"fakes-{at}", texts_of(p.G_ema, z, c))
                return
            if p.system.inputs():
                images = self._changed(chosen, z, c)
            else:
                images = torch.cat(list(images_of(p.G_ema, z, c, batch=max(1, min(16, len(z))), **how)))
        except (OSError, RunError) as error:
            log.warning(f"no grid at {names.kimg(p.nimg)} kimg: {error}")
            return
        self.reporter.grid(f"fakes-{at}", p.nimg, images, columns)
        name = f"reals-r{p.current.resolution:04d}"
        if not (self.run / "samples" / f"{name}.png").exists():
            try:
                self.reporter.grid(name, p.nimg, read_batch(p.table, chosen), columns)
            except (OSError, RunError) as error:
                log.warning(f"no grid of real images ({error}); training goes on")

    @torch.no_grad()
    def _changed(self, ordinals: list[int], z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """The images with these ordinals, as a generator that changes images returns them, uint8 [n, C, H, W]."""
        p = self.state
        z, c = z.to(p.device, p.dtype), None if c is None else c.to(p.device, p.dtype)
        return to_uint8(finite(p.system.images(p.G_ema, z, c, inputs_at(ordinals, p)))).cpu()

    def measure(self) -> None:
        """Measure the metrics of G_ema. If that fails, a warning is logged and training goes on. A collective call."""
        p, started = self.state, time.monotonic()
        moment = f"the metrics at {names.kimg(p.nimg)} kimg"
        try:
            values = self.metrics.measure(p.G_ema, p.current.resolution, p.device, p.alpha)
        except PeersLost:
            raise
        except Exception as error:  # also whatever a user's extractor raises, and out of memory
            log.warning(f"{moment} are missing: {error or type(error).__name__}; training goes on")
            return
        for reason in self.metrics.missing:
            log.warning(f"{moment} are incomplete: {reason}; training goes on")
        if self.reporter and values:
            seconds, how = round(time.monotonic() - started, 1), self.config.metrics
            facts = {"resolution": p.current.resolution, "images": how.images, "seconds": seconds}
            self.reporter.metrics(p.nimg, values, **facts)
            self.reporter.not_training(time.monotonic() - started)
            folder, suffix = self.run / "snapshots", ".safetensors"
            at = self.moment(
                folder, suffix, how.every_kimg, self.config.output.snapshot_kimg if how.at_snapshots else 0
            )
            path = folder / f"best-{at}{suffix}"
            try:
                best = self.metrics.is_best(self.run / "metrics.jsonl", values)
            except OSError as error:
                log.warning(f"{moment} are logged, but cannot be compared with others ({error}); training goes on")
                return
            if best and self.snapshot(path):
                self.reporter.link_best(path)

    def look_for_collapse(self) -> None:
        """Compare samples with each other and with real pictures, log what that gives, and warn of a collapse and of
        memorised pictures. Generators that change pictures are left alone."""
        p, started = self.state, time.monotonic()
        if not self.reporter or not self.watch.possible(p.G_ema) or p.system.inputs():
            return
        moment = f"{names.kimg(p.nimg)} kimg"
        try:
            signs = self.watch.look(p.G_ema, p.current.resolution, p.alpha, p.conditions)
        except Exception as error:  # also out of memory
            reason = error or type(error).__name__
            log.warning(f"no look for collapse and memorisation at {moment}: {reason}; training goes on")
            return
        values = {f"watch_{name}": round(value, 6) for name, value in signs._asdict().items()}
        seconds = round(time.monotonic() - started, 1)
        self.reporter.metrics(p.nimg, values, resolution=p.current.resolution, images=SAMPLES, seconds=seconds)
        self.reporter.not_training(time.monotonic() - started)
        if warning := signs.warning():
            log.warning(f"{moment}: signs of {warning}; metrics.watch_kimg=0 stops looking")

    def moment(self, folder: Path, suffix: str, *every_kimg: float) -> str:
        """nimg as the part of a file's name in a folder whose files are due at these intervals."""
        p, whole = self.state, all(float(every).is_integer() for every in every_kimg)
        return names.moment_name(p.nimg, p.current.batch, whole, (path.name for path in folder.glob(f"*{suffix}")))

    def snapshot_path(self) -> Path:
        folder = self.run / "snapshots"
        return folder / f"{self.moment(folder, '.safetensors', self.config.output.snapshot_kimg)}.safetensors"

    def store_averages(self) -> None:
        """Store the averages of ema.profiles. What fails is logged."""
        if not self.state.averages or self.lost():
            return
        try:
            for path, write in self._to_store():
                write(path)
        except OSError as error:
            log.warning(
                f"the averages at {names.kimg(self.state.nimg)} kimg could not be stored ({error}); training goes on"
            )

    def _to_store(self) -> Iterator[tuple[Path, Callable[[Path], None]]]:
        """The path of each average at this nimg, and what writes it. One that begins here covers nothing yet."""
        p, folder = self.state, self.run / averages.FOLDER
        moment = self.moment(folder, ".safetensors", self.config.ema.every_kimg)
        for average in p.averages:
            if average.since >= p.nimg:
                continue
            buffers = [name for name, _ in p.G.named_buffers() if name in average.tensors]
            entry = averages.entry(average.width, p.current.start, average.since, p.current.batch, buffers)
            write = partial(self._write, tensors=average.tensors, ema=entry)
            yield folder / averages.file_name(average.width, moment), write

    def final_snapshot(self) -> None:
        """Write the snapshot and the averages at the end of a run, unless they exist.

        Raises:
            RunError: on all ranks, if it cannot be written; UsageError: if the folder is not this run's any more.
        """
        with dist.main_decides():
            if dist.is_main() and (lost := self.lost()):
                raise UsageError(lost)
            for path, write in [(self.snapshot_path(), self._write), *self._to_store()] if dist.is_main() else []:
                if not path.is_file():
                    self._write_last(path, write)

    def _write_last(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write(path)
        except OSError as error:
            raise RunError(
                f"training is complete, but its last snapshot {path} could not be written ({error}): free "
                "space, or correct what is wrong there, and run the same command again, which writes it"
            ) from None

    def snapshot(self, path: Path) -> bool:
        """Write a snapshot and return whether that worked; a failure is logged."""
        if self.lost():
            return False
        try:
            self._write(path)
            return True
        except OSError as error:
            log.warning(f"the snapshot {path} could not be written ({error}); training goes on")
            return False

    def _conditions(self) -> dict[str, Any]:
        """The entries of a snapshot's description about conditions: the field, names, and examples of vectors."""
        p = self.state
        if p.conditions is None:
            return {"label_names": []}
        names = {"label_names": names_of(self.index, p.condition)}
        if p.conditions.are_classes:
            return names
        return {**names, "condition": p.condition, "conditions": p.conditions.examples()}

    def _write(
        self, path: Path, tensors: Mapping[str, torch.Tensor] | None = None, ema: Mapping[str, Any] | None = None
    ) -> None:
        """Write a snapshot of G_ema, or of other tensors of a generator's state, of which `ema` says what they are."""
        p = self.state
        description = {
            **p.system.snapshot_description(),
            "alpha": p.alpha,
            "nimg": p.nimg,
            **self._conditions(),
            "dataset": self.index.identity,
            "config": to_plain(self.config),
            "stylegan_pg": __version__,
            **({"ema": dict(ema)} if ema else {}),
        }
        write_snapshot(path, p.G_ema.state_dict() if tensors is None else tensors, description)
        log.info(f"{names.kimg(p.nimg)} kimg: {'average' if ema else 'snapshot'} {path}")
