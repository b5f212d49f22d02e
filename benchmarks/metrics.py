"""Metrics compared with torch-fidelity's command line: `python benchmarks/metrics.py`.

`fid 64 fp32`, `fid 256 fp32`: both programs in separate processes, on the same 2 x 256 images with the same (random)
Inception weights. `ratio` is torch-fidelity's time divided by this package's, `memory` the same for the peak memory,
and `difference` the relative difference of the two values. `bf16`: this package in bfloat16, torch-fidelity in float32.
`cached`: with cached statistics of the real images (`ratio_to_their_cached`: torch-fidelity with its cache as well).
`frechet 2048`: the Frechet distance only, computed from statistics of 5000 and of 500 samples. `memory`: this package's
peak memory with 4 times as many images, divided by the peak with these (1 means constant).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from stylegan_pg.data.pack.pack import pack
from stylegan_pg.metrics.accumulators import Moments
from stylegan_pg.metrics.fid import frechet_distance

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from measuring import random_inception

FILLS = {"theirs": "theirs cached", "fp32": "cached", "bf16": "cached bf16"}


def pictures(folder: Path, count: int, resolution: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, [6 + seed, 6 + seed, 3], dtype=np.uint8))
        small.resize((resolution, resolution), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
    return folder


def measured(command: list[str], cache: Path) -> tuple[float, float, dict[str, Any]]:
    """Run a process. Return its seconds, its peak memory in MiB, and the JSON that it printed."""
    start = time.perf_counter()
    environment = os.environ | {"STYLEGAN_PG_CACHE": str(cache)}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(command)} failed")
    value, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    return time.perf_counter() - start, usage.ru_maxrss / 1024, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print(f"{row['case']:24} " + "  ".join(f"{k} {v}" for k, v in row.items() if k != "case"), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "inception.pth"
        random_inception(weights)
        for resolution in (64, 256):
            if args.only in f"fid {resolution} fp32 bf16 cached memory":
                processes(folder, weights, resolution, args, report)
    for count in (5000, 500):
        case = "frechet 2048" + (" few samples" if count < 2048 else "")
        if args.only in case:
            frechet(count, case, args.rounds, report)
    for row in rows:
        print(json.dumps(row))


def processes(folder: Path, weights: Path, resolution: int, args: argparse.Namespace, report: Any) -> None:
    sides, packed = [], []
    for seed, side in enumerate(("real", "fake")):
        sides.append(pictures(folder / f"{side}{resolution}", args.images, resolution, seed))
        packed.append(folder / f"packed-{side}{resolution}")
        pack(str(sides[-1]), packed[-1], resolution=resolution, lowest=resolution, format="png", progress=False)
    many = pictures(folder / f"many{resolution}", 4 * args.images, resolution, 2)
    packed.append(folder / f"packed-many{resolution}")
    pack(str(many), packed[-1], resolution=resolution, lowest=resolution, format="png", progress=False)
    theirs = ["-m", "torch_fidelity.fidelity", "--fid", "--json", "--silent", "--input1", str(sides[1])]
    theirs += ["--input2", str(sides[0]), "--feature-extractor-weights-path", str(weights)]
    theirs += ["--cpu"] if args.device == "cpu" else ["--gpu", "0"]
    theirs += ["--cache-root", str(folder / "theirs")]

    def ours(made: Path, count: int, *options: str) -> list[str]:
        command = ["-m", "stylegan_pg", "metrics", str(made), "--data", str(packed[0]), "--device", args.device]
        return [*command, "--metrics", f"fid{count}_full", "--weights", str(weights), *options]

    named = ["--input2-cache-name", f"real{resolution}"]
    variants = {
        "theirs": [*theirs, "--no-cache"],
        "theirs cached": [*theirs, *named],
        "fp32": ours(packed[1], args.images, "--no-cache"),
        "bf16": ours(packed[1], args.images, "--no-cache", "--precision", "bf16"),
        "cached": ours(packed[1], args.images),
        "cached bf16": ours(packed[1], args.images, "--precision", "bf16"),
        "many": ours(packed[2], 4 * args.images),
    }
    cache = folder / f"cache{resolution}"
    # The first run with a cache is also measured: nothing is cached before it, and its statistics are cached.
    found: dict[str, list[Any]] = {name: [] for name in variants}
    for i in range(args.rounds):
        for name, command in variants.items():
            if i == 0:
                command = variants[FILLS.get(name, name)]
            if name != "many" or not i:  # only the memory of this case is used
                found[name].append(measured(command, cache))
                print("  {:14} {:7.1f} s {:7.0f} MiB".format(name, *found[name][-1]), file=sys.stderr, flush=True)
    seconds, memory = ({n: statistics.median(r[i] for r in runs) for n, runs in found.items()} for i in (0, 1))
    number = {
        n: next(v for k, v in runs[0][2].items() if k.startswith(("fid", "frechet"))) for n, runs in found.items()
    }
    for name in ("fp32", "bf16", "cached", "cached bf16"):
        peer = "theirs cached" if name.startswith("cached") else "theirs"
        report(
            {
                "case": f"fid {resolution} {name}" + (" fp32" if name == "cached" else ""),
                "ratio": round(seconds["theirs"] / seconds[name], 3),
                "ratio_to_their_cached": round(seconds["theirs cached"] / seconds[name], 3),
                "ours_sec": round(seconds[name], 2),
                "theirs_sec": round(seconds[peer], 2),
                "memory": round(memory[peer] / memory[name], 3),
                "ours_mib": round(memory[name]),
                "difference": float(f"{number[name] / number['theirs'] - 1:.3g}"),
            }
        )
    report({"case": f"fid {resolution} memory", "ratio": round(memory["many"] / memory["fp32"], 3)})


def frechet(count: int, case: str, rounds: int, report: Any) -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=[2048, 2048]) / 45
    a, b = (torch.from_numpy(rng.normal(size=[count, 2048]) @ mix + i / 50).float() for i in range(2))
    ours, theirs = [], [fid_features_to_statistics(x) for x in (a, b)]
    for x in (a, b):
        ours.append(Moments(2048))
        for part in x.split(64):
            ours[-1].add(part)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(max(rounds, 5)):  # the first call allocates its memory
        for name, function in (
            ("ours", lambda: frechet_distance(ours[0], ours[1])),
            ("theirs", lambda: fid_statistics_to_metric(theirs[0], theirs[1], False)["frechet_inception_distance"]),
        ):
            time.sleep(0.2)  # the threads of OpenBLAS occupy the cores for a while after a call
            start = time.perf_counter()
            value = function()
            times[name].append(time.perf_counter() - start)
            times[f"{name} value"] = [value]
    t = {name: statistics.median(values) for name, values in times.items()}
    report(
        {
            "case": case,
            "ratio": round(t["theirs"] / t["ours"], 3),
            "ours_sec": round(t["ours"], 3),
            "theirs_sec": round(t["theirs"], 3),
            "difference": float(f"{t['ours value'] / t['theirs value'] - 1:.3g}"),
        }
    )


if __name__ == "__main__":
    main()
