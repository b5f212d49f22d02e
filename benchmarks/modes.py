"""Which objectives cover all modes of eight Gaussians on a ring and of twenty-five on a grid? `python
benchmarks/modes.py` trains pairs of small MLPs with the trainer of the large networks (under five minutes on two
cores).

A case is `POINTS OBJECTIVE TERMS`. Two numbers count, as in the row `gan` of systems.py: how many modes have a
hundredth of 2500 samples within three standard deviations each, and the share of all samples that are so near to any
mode (after Srivastava et al. 2017, section 4.1, where one sample is enough for a mode). `ratio` is the smaller one of
(modes found / modes) and (share near / 0.5), and a case passes with 1. Uniform noise is there as a control, which must
not pass. A figure shows the samples of every case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.data.datasets.points import MIXTURES, load_points
from stylegan_pg.metrics.coverage import mode_coverage
from stylegan_pg.rng import generator
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.trainer import Trainer

SAMPLES = 2500
LEAST_SHARE = 0.01  # of the samples that a mode must get to count
LEAST_NEAR = 0.5  # share of the samples that must be near a mode
COMMON = """model.name=mlp model.base=[1,1] resolution=4 model.z_dim=16 model.channel_max=128 model.mapping_layers=3
    model.mbstd_channels=0 loss.style_mixing=0 loss.pl_weight=0 loss.r1_gamma=0 loss.r1_every=1 optim.g_lr=0.001
    optim.d_lr=0.001 ema.kimg=20 train.batch=128 train.device=cpu train.threads=1 train.channels_last=false
    data.workers=0 output.grid_kimg=0 output.snapshot_kimg=0 output.trackers=[] output.tick_kimg=100
    checkpoint.every_kimg=100000"""
WGAN_GP = ("loss.objective=wgan", "loss.terms=[{name: gradient_penalty, weight: 1}]", "optim.d_steps=2")
WGAN_CLIP = (
    "loss.objective=wgan",
    "loss.d_clip=0.3",
    "optim.d_steps=2",
    "optim.name=rmsprop",
    "optim.beta2=0.9",
    "optim.g_lr={from: 0.002, to: 0.00001, kimg: 768}",
    "optim.d_lr={from: 0.003, to: 0.00001, kimg: 768}",
    "model.mapping_layers=2",
    "ema.kimg=18",
)
R1_R2 = ("loss.objective=relativistic", "loss.r1_gamma=0.1", "loss.terms=[{name: r2, weight: 0.1}]")


class Case(NamedTuple):
    name: str
    kimg: float  # 0: uniform noise instead of a generator
    overrides: tuple[str, ...] = ()  # changes to COMMON

    @property
    def points(self) -> str:
        return self.name.split()[0]


CASES = [
    Case("ring noise", 0),
    Case("ring logistic r1", 256, ("loss.r1_gamma=0.1",)),
    Case("ring wgan gradient_penalty", 256, WGAN_GP),
    Case("ring wgan clip", 768, WGAN_CLIP),
    Case("ring lsgan", 256, ("loss.objective=lsgan",)),
    Case("ring hinge r1", 256, ("loss.objective=hinge", "loss.r1_gamma=0.1")),
    Case("ring relativistic r1+r2", 256, R1_R2),
    Case("ring logistic dragan", 256, ("loss.terms=[{name: dragan, weight: 1}]",)),
    Case("ring saturating", 256, ("loss.objective=saturating",)),
    Case("grid25 noise", 0),
    Case("grid25 logistic r1", 384, ("loss.r1_gamma=0.1",)),
    Case("grid25 wgan gradient_penalty", 384, WGAN_GP),
    Case("grid25 relativistic r1+r2", 384, R1_R2),
]


def samples_of(case: Case, seed: int, scale: float) -> torch.Tensor:
    """Samples [SAMPLES, 2] of the generator that a case trains, or of the control."""
    if not case.kimg:
        return 2.8 * torch.rand([SAMPLES, 2], generator=generator(seed, "noise")) - 1.4
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silence:
        given = [f"run={folder}/run", f"data.url=points:{case.points}", f"seed={seed}"]
        given += [f"train.total_kimg={case.kimg * scale}", *COMMON.split(), *case.overrides]
        config = load_config(None, given)
        with contextlib.redirect_stderr(silence), contextlib.redirect_stdout(silence):
            trainer = Trainer(config, load_points(config.data.url), Devices(config))
            with contextlib.closing(trainer):
                trainer.train()
    G = trainer.state.G_ema
    with torch.no_grad():
        return G(torch.randn([SAMPLES, G.z_dim], generator=generator(seed, "modes"))).flatten(1)


def measured(case: Case, samples: torch.Tensor) -> dict[str, Any]:
    """The numbers of a case's row."""
    centres, deviation = MIXTURES[case.points]
    found = mode_coverage(samples, torch.from_numpy(centres), deviation, LEAST_SHARE)
    ratio = min(found["modes"] / len(centres), found["high_quality"] / LEAST_NEAR)
    return {"case": case.name, "ratio": ratio, "modes": int(found["modes"]), "near": round(found["high_quality"], 3)}


def train(case: Case, seed: int, scale: float) -> tuple[dict[str, Any], np.ndarray]:
    """Train a case. Return its row, and samples of its generator, float32 [SAMPLES, 2]."""
    start = time.perf_counter()
    samples = samples_of(case, seed, scale)
    seconds = {"seconds": round(time.perf_counter() - start, 1)}
    return measured(case, samples) | seconds, samples.numpy()


def draw(rows: list[dict[str, Any]], samples: list[np.ndarray], path: Path) -> None:
    """Draw one panel for each case, with the samples and a circle of three standard deviations around every mode."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for k, (row, points) in enumerate(zip(rows, samples, strict=True)):
        axes = figure.add_subplot(lines, columns, k + 1)
        centres, deviation = MIXTURES[row["case"].split()[0]]
        across = [6 * deviation] * len(centres)
        axes.scatter(*points.T, s=1, color="tab:blue", alpha=0.4, linewidths=0)
        how: dict[str, Any] = {"units": "xy", "offsets": centres, "offset_transform": axes.transData}
        axes.add_collection(
            EllipseCollection(across, across, [0] * len(centres), **how, facecolors="none", edgecolors="tab:red")
        )
        axes.set_title(f"{row['case']}\n{row['modes']} of {len(centres)}, {row['near']:.0%} near", fontsize=9)
        axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of every case's length")
    parser.add_argument("--processes", type=int, default=2, help="cases at a time, of one thread each")
    parser.add_argument("--figure", type=Path, default=Path("runs") / "modes.png")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only in case.name]
    if not cases:
        parser.error(f"no case contains {args.only!r}: choose from {', '.join(case.name for case in CASES)}")
    print(f"{'case':32} {'modes':>5} {'near':>6} {'ratio':>6} {'seconds':>8}")
    rows, samples = [], []
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for row, points in pool.map(partial(train, seed=args.seed, scale=args.scale), cases):
            rows.append(row)
            samples.append(points)
            numbers = f"{row['modes']:5} {row['near']:6.2f} {row['ratio']:6.2f} {row['seconds']:8.1f}"
            print(f"{row['case']:32} {numbers}", flush=True)
    draw(rows, samples, args.figure)
    print(f"figure: {args.figure}")
    for row in rows:
        print(json.dumps(row))
    if passed := [row["case"] for row in rows if row["case"].endswith("noise") and row["ratio"] >= 1]:
        raise SystemExit(f"the control passes, so that the others say nothing: {', '.join(passed)}")


if __name__ == "__main__":
    main()
