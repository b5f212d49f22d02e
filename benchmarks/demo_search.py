"""Recipes for the demo, each trained for as many minutes on the demo's faces: `python benchmarks/demo_search.py`.

Every recipe is a set of changes of a configuration (default: configs/demo.yaml). It is trained until its end or until
the last of `--marks` (minutes of training), whatever comes first. The sliced Wasserstein distance (SWD) of G_ema to all
faces is measured afterwards, of the last snapshots before each of the marks, and the faces of the last one are drawn.
The runs and the pictures of each recipe are in runs/demo-search. `ratio` is the SWD of the recipe `before` divided by
that of the recipe, both at the last mark. Run it on a quiet machine: the recipes are compared by minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FACES, DATA = Path("data") / "faces5000-64", Path("data") / "faces64"
QUIET = {
    "data.url": str(DATA),
    "output.trackers": "[]",
    "output.grid_kimg": 0,
    "output.snapshot_kimg": 0.5,
    "metrics.every_kimg": 0,
    "checkpoint.every_kimg": 1000,
}
BEFORE = {  # the demo until the end of 2026
    "model.low_precision": "fp32",
    "growth.stable_kimg_at": "{8: 6, 16: 5, 32: 7, 64: 6}",
    "growth.fade_kimg_at": "{16: 3, 32: 3, 64: 2}",
    "optim.g_lr": 0.003,
    "optim.d_lr": 0.003,
    "loss.r1_gamma_at": "{8: 2, 16: 5, 32: 5, 64: 5}",
    "train.batch": 16,
    "train.batch_at": "{8: 32}",
}
SHORT = {  # a short way to 64x64 with small batches
    **BEFORE,
    "growth.stable_kimg_at": "{8: 4, 16: 5, 32: 8, 64: 24}",
    "growth.fade_kimg_at": "{16: 3, 32: 3, 64: 3}",
    "optim.g_lr": "{from: 0.003, to: 0.0003, kimg: 16, start: 34}",
    "optim.d_lr": "{from: 0.003, to: 0.0003, kimg: 16, start: 34}",
    "train.batch_at": "{8: 32, 16: 32}",
}
R3GAN = {"config": "configs/r3gan-demo.yaml"}


def gamma(values: str) -> dict[str, str]:
    """Both penalties of R3GAN with these weights by resolution."""
    return {"loss.r1_gamma_at": values, "loss.terms": f"[{{name: r2, weight_at: {values}, every: 1}}]"}


RECIPES: dict[str, dict[str, Any]] = {
    "demo": {},
    "before": BEFORE,
    "before, gamma 0.5": BEFORE | {"loss.r1_gamma_at": "{8: 0.5, 16: 0.5, 32: 0.5, 64: 0.5}"},
    "short, gamma 0.5": SHORT | {"loss.r1_gamma_at": "{8: 0.5, 16: 0.5, 32: 0.5, 64: 0.5}"},
    "short, gamma 0.2": SHORT | {"loss.r1_gamma_at": "{8: 0.2, 16: 0.2, 32: 0.2, 64: 0.2}"},
    "gamma 1": {"loss.r1_gamma_at": "{8: 1, 16: 1, 32: 1, 64: 1}"},
    "from 16x16": {"growth.start": 16, "growth.stable_kimg_at": "{16: 10, 32: 12, 64: 50}"},
    "not growing": {"growth.start": 64},
    "two ranks": {"ranks": 2},
    "r3gan": R3GAN,
    "r3gan, large gamma": R3GAN | gamma("{8: 1, 16: 4, 32: 10, 64: 20}"),
    "r3gan, smaller gamma": R3GAN | gamma("{8: 0.2, 16: 0.3, 32: 0.4, 64: 0.5}"),
    "r3gan, not growing": R3GAN  # as many images as take the same time
    | {
        "growth.start": 64,
        "growth.stable_kimg_at": "{64: 33}",
        "optim.g_lr": "{from: 0.001, to: 0.0001, kimg: 14, start: 19, shape: cosine}",
        "optim.d_lr": "{from: 0.001, to: 0.0001, kimg: 14, start: 19, shape: cosine}",
    },
}


def folder_of(name: str) -> Path:
    return ROOT / "runs" / "demo-search" / name.replace(", ", "-").replace(" ", "-")


def command(*arguments: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, text=True, **how)


def train(name: str, recipe: dict[str, Any], most: float) -> list[tuple[float, Path]]:
    """Train a recipe for at most so many minutes -> (minutes of training, file) of its snapshots, in order."""
    run, recipe = folder_of(name), dict(recipe)
    shutil.rmtree(run, ignore_errors=True)
    config, ranks = recipe.pop("config", "configs/demo.yaml"), recipe.pop("ranks", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    values = [f"{key}={value}" for key, value in (QUIET | recipe | {"run": str(run)}).items()]
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if ranks > 1 else {})
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "stylegan_pg", "train", config, *values],
        cwd=ROOT,
        env=env,
        stdout=run.with_suffix(".txt").open("w"),
        stderr=subprocess.STDOUT,
    )
    began = None
    while process.poll() is None:
        if began is None and (run / "stats.jsonl").exists():
            began = time.time()  # start-up does not count
        if began is not None and time.time() - began > most * 60:
            process.send_signal(signal.SIGTERM)
            process.wait()
        time.sleep(0.2)
    if process.returncode not in (0, 75) or began is None:
        sys.exit(f"{name} failed: see {run.with_suffix('.txt')}")
    found = sorted((run / "snapshots").glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    return [((path.stat().st_mtime - began) / 60, path) for path in found]


def swd(snapshot: Path) -> float:
    given = ["-m", "stylegan_pg", "metrics", str(snapshot), "--data", str(DATA), "--images", "4096"]
    values = json.loads(command(*given, stdout=subprocess.PIPE).stdout)
    return values["swd"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*RECIPES], choices=[*RECIPES], metavar="NAME", help="recipes")
    parser.add_argument("--marks", nargs="+", type=float, default=[3, 6, 10], help="minutes at which SWD is measured")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command("demo/faces.py", str(FACES), "--count", "5000", "--size", "64")
    command("-m", "stylegan_pg", "pack", str(FACES), str(DATA), "--resolution", "64", "--format", "png")
    (ROOT / "runs" / "demo-search").mkdir(parents=True, exist_ok=True)
    rows = []
    print(f"{'case':<24} " + " ".join(f"{f'{mark:g} min':>8}" for mark in args.marks) + "  kimg", flush=True)
    for name in args.only:
        snapshots = train(name, RECIPES[name] | {"seed": args.seed}, args.marks[-1])
        reached = [[path for minutes, path in snapshots if minutes <= mark][-1:] for mark in args.marks]
        values = [swd(found[0]) if found else None for found in reached]
        last = (reached[-1] or [snapshots[0][1]])[0]
        out = ["--out", str(folder_of(name) / "pictures")]
        command("-m", "stylegan_pg", "sample", str(last), "--seeds", "0-63", "--grid", *out)
        nimg = json.loads((last.parent.parent / "stats.jsonl").read_text("utf-8").splitlines()[-1])["nimg"]
        rows.append({"case": name, "swd": dict(zip(map(str, args.marks), values, strict=True)), "kimg": nimg / 1000})
        shown = " ".join(f"{'-' if value is None else f'{value:.1f}':>8}" for value in values)
        print(f"{name:<24} {shown}  {nimg / 1000:.1f}", flush=True)
    final = {row["case"]: list(row["swd"].values())[-1] for row in rows}
    for row in rows:
        before, now = final.get("before"), final[row["case"]]
        print(json.dumps(row | {"ratio": round(before / now, 3) if before and now else None}))


if __name__ == "__main__":
    main()
