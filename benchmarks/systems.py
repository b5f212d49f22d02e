"""Every system of the package on a small problem that shows whether its idea works: `python benchmarks/systems.py`.

Each row trains a system a few times and measures what its paper promises. `ratio` is the least of the ratios of what
was achieved to what is asked (the inverse where less is better), each the median over the seeds; a row passes with 1 or
more. With --off the idea of each system is switched off, which should fail. `--only NAME...` chooses rows. Samples of
all rows are drawn in one picture (runs/systems/sheet.png).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows.catalogue import ROWS
from rows.trial import ROOT, Measured, Row

OUT = ROOT / "runs" / "systems"


def trial(name: str, seed: int, off: bool) -> tuple[Measured, float]:
    """One trial of a row, and its minutes."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        measured = ROWS[name].measure(seed, Path(folder), off)
    return measured, (time.perf_counter() - began) / 60


def result_of(row: Row, trials: list[tuple[Measured, float]], off: bool) -> dict[str, Any]:
    """The line of a row."""
    values = {c.name: [float(m.values[c.name]) for m, _ in trials] for c in row.checks}
    medians = {name: statistics.median(each) for name, each in values.items()}
    ratio = min(check.ratio(medians[check.name]) for check in row.checks)
    rounded = {name: [round(value, 4) for value in each] for name, each in values.items()}
    further = {key: [m.further[key] for m, _ in trials] for key in trials[0][0].further}
    asked = {check.name: check.asked for check in row.checks}
    case = f"{row.name}, off" if off else row.name
    minutes = round(sum(minutes for _, minutes in trials), 2)
    return {"case": case, "ratio": round(ratio, 3), "asked": asked, **rounded, **further, "minutes": minutes}


def draw(pictures: dict[str, np.ndarray], path: Path) -> None:
    """Draw a labelled strip for each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [picture.shape[0] / picture.shape[1] * 10 + 0.4 for picture in pictures.values()]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(pictures), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for (name, picture), ax in zip(pictures.items(), axes, strict=True):
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(name, loc="left", fontsize=10)
        ax.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def strip(picture: np.ndarray, width: int = 1024) -> np.ndarray:
    """A picture scaled down or padded with white to a common width."""
    if picture.shape[1] >= width:
        return picture[:, :width]
    return np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0)), constant_values=255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*ROWS], choices=[*ROWS], metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--off", action="store_true", help="switch off the idea of each system")
    parser.add_argument("--seeds", type=int, default=None, help="trials of each row, in place of its own number")
    parser.add_argument("--processes", type=int, default=2, help="trials at a time, of one thread each")
    args = parser.parse_args()
    names = [name for name in args.only if ROWS[name].off or not args.off]
    results, pictures = [], {}
    print(f"{'case':<28} {'ratio':>6} {'minutes':>8}  values (asked)", flush=True)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        tasks = {
            name: [pool.submit(trial, name, seed, args.off) for seed in range(args.seeds or ROWS[name].seeds)]
            for name in names
        }
        for name, submitted in tasks.items():
            row, trials = ROWS[name], [task.result() for task in submitted]
            result = result_of(row, trials, args.off)
            shown = ", ".join(
                f"{c.name} {statistics.median(result[c.name]):.3f} ({'at most ' if c.at_most else ''}{c.asked:g})"
                for c in row.checks
            )
            print(f"{result['case']:<28} {result['ratio']:6.2f} {result['minutes']:8.1f}  {shown}", flush=True)
            results.append(result)
            if (picture := trials[0][0].picture) is not None:
                pictures[result["case"]] = strip(picture)
    if pictures:
        draw(pictures, OUT / ("sheet-off.png" if args.off else "sheet.png"))
        print(f"samples: {OUT / ('sheet-off.png' if args.off else 'sheet.png')}")
    for result in results:
        print(json.dumps(result))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
