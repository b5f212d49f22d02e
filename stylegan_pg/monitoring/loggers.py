"""The records of a run: the progress bar, stats.jsonl, metrics.jsonl, data-faults.jsonl, sample grids, trackers.

Only rank 0 has a RunLogger. A fault in writing any of these (a full disk) costs one warning, never the training.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from stylegan_pg import files
from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.images import save_image, tile
from stylegan_pg.monitoring.trackers import Trackers
from stylegan_pg.untrusted import json_lines

log = logging.getLogger(__name__)


def cut_back(path: Path, nimg: int) -> None:
    """Remove the lines of a .jsonl file that are beyond nimg, and an incomplete last line, atomically."""
    if not path.exists():
        return
    lines = [line + "\n" for line, row in json_lines(path) if row["nimg"] <= nimg]
    with files.atomic_write(path) as file:
        file.write("".join(lines).encode())


class Means:
    """Running means of named quantities since the last tick, in float64. Checkpoints store them, so that the logs of a
    continued run equal those of an uninterrupted one."""

    def __init__(self, sums: dict[str, list[float]] | None = None):
        self.sums = sums or {}

    def add(self, name: str, total: float, count: int) -> None:
        entry = self.sums.setdefault(name, [0.0, 0])
        entry[0] += total
        entry[1] += count

    def take(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in sorted(self.sums.items()) if count}
        self.sums = {}
        return means


class RunLogger:
    """Opens the run folder's logs, and removes what is beyond `nimg`, where the run starts or continues."""

    def __init__(
        self,
        run: Path,
        nimg: int,
        end: int,
        *,
        means: Means,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        lost: Callable[[], str] = str,
    ):
        """
        Args:
            run: the run's folder.
            nimg: where the run starts or continues.
            end: nimg at which it is complete.
            means: what the next tick reports.
            trackers: names as in output.trackers.
            config: {key: value} of the configuration for them, without secrets.
            lost: gives the reason why the folder is not the run's any more, "" while it is.
        """
        self.run, self.end, self.lost = run, end, lost
        self.complained: set[str] = set()
        run.mkdir(parents=True, exist_ok=True)
        for name in ("stats.jsonl", "metrics.jsonl", "data-faults.jsonl"):
            self._guard(cut_back, run / name, nimg)
        self.trackers = Trackers(trackers, run, nimg, config or {})
        self.bar = tqdm(
            total=end, initial=nimg, unit="img", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self.started = self.tick_time = time.monotonic()  # monotonic: the system's clock may be changed
        self.tick_nimg = nimg
        self.means = means
        self.latest = ""  # losses and memory at the last tick
        self.img_per_sec = 0.0  # between the last two ticks

    def _guard(self, function, *args, **kwargs) -> None:
        if self.lost():
            return
        try:
            function(*args, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            text = f"{getattr(function, '__name__', 'output')}: {error}"
            if text not in self.complained:
                self.complained.add(text)
                log.warning(f"could not write a log or picture ({text}); training goes on")

    def _append(self, name: str, line: str) -> None:
        with open(self.run / name, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def progress(self, nimg: int, postfix: str) -> None:
        self.bar.set_postfix_str(f"{postfix}  {self.latest}", refresh=False)
        self.bar.update(nimg - self.bar.n)

    def tick(self, nimg: int, facts: dict[str, Any], device: torch.device) -> None:
        """Log a line of statistics: the means since the last tick, `facts`, speed and memory."""
        now = time.monotonic()
        rate = (nimg - self.tick_nimg) / max(now - self.tick_time, 1e-9)
        self.tick_time, self.tick_nimg, self.img_per_sec = now, nimg, round(rate, 3)
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            memory = psutil.Process().memory_info().rss / 2**20
        stats = {
            "nimg": nimg,
            **facts,
            **self.means.take(),
            "img_per_sec": self.img_per_sec,
            "eta_sec": round((self.end - nimg) / rate) if rate else None,
            "elapsed_sec": round(now - self.started, 3),
            "memory_mib": round(memory, 1),
        }
        self._guard(self._append, "stats.jsonl", json.dumps(stats))
        numbers = {k: v for k, v in stats.items() if isinstance(v, (int, float)) and k != "nimg"}
        self.trackers.scalars(numbers, nimg)
        self.latest = (
            "  ".join(f"{k} {stats[k]:.3f}" for k in ("loss_g", "loss_d") if k in stats) + f"  {memory:.0f} MiB"
        )
        if self.bar.disable:
            losses = " ".join(f"{k} {stats[k]:.3f}" for k in ("loss_g", "loss_d") if k in stats)
            log.info(
                f"{kimg(nimg)}/{kimg(self.end)} kimg  {facts['phase']} alpha {facts['alpha']:.2f}  {losses}  "
                f"{rate:.1f} img/s  ETA {_clock(stats['eta_sec'])}  {memory:.0f} MiB"
            )

    def not_training(self, seconds: float) -> None:
        """Exclude a pause from the next tick's images per second."""
        self.tick_time += seconds

    def metrics(self, nimg: int, values: dict[str, float], **facts: Any) -> None:
        """Log a line of metrics.jsonl, draw metrics.png, and send the values to the trackers."""
        self._guard(self._append, "metrics.jsonl", json.dumps({"nimg": nimg, **facts, **values}))
        self._guard(_draw_curves, self.run)
        log.info(f"{kimg(nimg)} kimg  " + "  ".join(f"{k} {v:.3f}" for k, v in values.items()))
        self.trackers.scalars({f"metrics/{name}": value for name, value in values.items()}, nimg)

    def data_fault(self, nimg: int, **facts: Any) -> None:
        """Log a line of data-faults.jsonl."""
        self._guard(self._append, "data-faults.jsonl", json.dumps({"nimg": nimg, **facts}))

    def link_best(self, snapshot: Path) -> None:
        """Make best.safetensors in the snapshot's folder a link to this snapshot, and delete the previous best one."""
        self._guard(_link, snapshot, snapshot.with_name("best.safetensors"))
        for other in snapshot.parent.glob("best-*.safetensors"):
            if other != snapshot:
                self._guard(other.unlink)

    def grid(self, name: str, nimg: int, images: torch.Tensor, columns: int) -> None:
        """Write uint8 images [N, C, H, W] as one grid, samples/NAME.png (grey, RGB or RGBA for C = 1, 3 or 4), and send
        it to the trackers."""
        picture = tile(images, columns)
        self._guard(_save_grid, picture, self.run / "samples" / f"{name}.png")
        self.trackers.image(name.rsplit("-", 1)[0], picture, nimg)

    def texts(self, name: str, lines: Sequence[str]) -> None:
        """Write texts, one a line, to samples/NAME.txt."""
        self._guard(_save_texts, lines, self.run / "samples" / f"{name}.txt")

    def close(self) -> None:
        self.bar.close()
        self.trackers.close()


def _draw_curves(run: Path) -> None:
    from stylegan_pg.monitoring.figures import draw_curves  # it imports matplotlib, which is slow

    draw_curves(run / "metrics.jsonl", run / "metrics.png")


def _save_grid(picture: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)  # without parents: the run's folder may have been moved away
    save_image(picture, path)


def _save_texts(lines: Sequence[str], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with files.atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _link(target: Path, path: Path) -> None:
    """Make a symbolic link within a folder, or a copy if the file system has no links."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except OSError:
        shutil.copyfile(target, temporary)
    os.replace(temporary, path)


def _clock(seconds: int | None) -> str:
    if seconds is None:
        return "?"
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
