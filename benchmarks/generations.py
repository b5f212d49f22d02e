"""Five network families on the demo's faces at 32x32, for the same minutes: `python benchmarks/generations.py`.

ProGAN (WGAN-GP), StyleGAN, StyleGAN2 and R3GAN grow from 4x4, on two processes each. A short trial determines the
number of images that two cores process in at most seven minutes (--scale sets it). StyleGAN3, which does not grow, is
trained at 32x32 for as many minutes as StyleGAN2 took. StyleGAN2 is then trained at 32x32 from the beginning, for as
many FLOPs as its growing run. A figure shows samples, losses and the critics' scores of all runs
(runs/generations/figure.png). `ratio` is the sliced Wasserstein distance at the first measurement at 32x32 divided by
the distance at the end. For the row `progressive` it is the distance of the fixed run divided by that of the growing
run; growing is better if it is above 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FACES, DATA = Path("data") / "faces5000-64", Path("data") / "faces64"
CONFIG = "configs/demo.yaml"
PROCESSES = 2
EVERYONE = {
    "resolution": 32,
    "growth.start": 4,
    "growth.stable_kimg_at": "{4: 2, 8: 4, 16: 4, 32: 5}",
    "growth.fade_kimg_at": "{8: 1, 16: 2, 32: 2}",
    "train.batch": 16,
    "train.batch_at": "{4: 32, 8: 32}",
    "train.threads": 1,
    "optim.g_lr": 0.003,
    "optim.d_lr": 0.003,
    "model.low_precision": "fp32",
    "output.grid_kimg": 2,
    "output.tick_kimg": 0.25,
    "output.snapshot_kimg": 0,
    "metrics.every_kimg": 4,
    "metrics.images": 1024,
}
STYLED: dict[str, object] = {
    "model.noise": "false"
}  # the drawings have no random detail; noise would make early grids speckled
GENERATIONS: dict[str, dict[str, object]] = {
    "progan": {
        "model.name": "progan",
        "loss.objective": "wgan",
        "loss.r1_gamma_at": "{}",
        "loss.r1_gamma": 0,
        "loss.terms": "[{name: gradient_penalty, weight: 10}, {name: drift, weight: 0.001}]",
        "optim.g_lr": 0.0015,
        "optim.d_lr": 0.0015,
        "growth.stable_kimg_at": "{4: 2, 8: 3, 16: 3, 32: 3.5}",  # its penalty is computed at every step
    },
    "stylegan": STYLED
    | {
        "model.name": "stylegan",
        "model.mapping_layers": 4,
        "loss.r1_gamma_at": "{4: 1, 8: 2, 16: 5, 32: 5}",
        "loss.r1_every": 4,
        "loss.style_mixing": 0.9,
        "growth.stable_kimg_at": "{4: 2, 8: 4, 16: 4, 32: 4}",
    },
    "stylegan2": STYLED | {"loss.r1_gamma_at": "{4: 1, 8: 2, 16: 5, 32: 5}"},
    "r3gan": {
        "model.name": "r3gan",
        "model.z_dim": 64,
        "model.blocks": 1,
        "model.channels_at": "{4: 128, 8: 128, 16: 96, 32: 48}",
        "loss.objective": "relativistic",
        "loss.r1_every": 1,
        "loss.r1_gamma_at": "{4: 1, 8: 1, 16: 4, 32: 10}",
        "loss.terms": "[{name: r2, weight_at: {4: 1, 8: 1, 16: 4, 32: 10}, every: 1}]",
        "optim.g_lr": 0.001,
        "optim.d_lr": 0.001,
        "optim.beta2": 0.95,
        "growth.stable_kimg_at": "{4: 2, 8: 3, 16: 3, 32: 3}",  # its penalties are computed at every step
    },
}
FIXED: dict[str, object] = {"growth.start": "null", "train.batch_at": "{}"}
STYLEGAN3 = FIXED | {
    "model.name": "stylegan3",
    "model.channel_base": 2048,
    "loss.r1_gamma_at": "{}",
    "loss.r1_gamma": 1,
}
TRIAL: dict[str, object] = {
    "train.total_kimg": 0.48,
    "output.tick_kimg": 0.08,
    "output.grid_kimg": 0,
    "metrics.every_kimg": 0,
}
RATE = 45.0  # with so many images per second in the trial, the longest schedule above (ProGAN's) takes seven minutes
MINUTES = 7  # of StyleGAN3's run, if StyleGAN2 is not trained
SCALES = (0.5, 2.5)


def call(*command: str, **how: Any) -> float:
    """Run a command of this package, and return its seconds. If its exit code is not 0, exit with that code."""
    started = time.time()
    result = subprocess.run([sys.executable, *command], cwd=ROOT, **how)
    if result.returncode:
        sys.exit(result.returncode)
    return time.time() - started


def overrides(name: str, changes: dict[str, object], scale: float) -> list[str]:
    values = EVERYONE | changes | {"run": f"runs/generations/{name}", "data.url": str(DATA)}
    if scale != 1:
        for key in ("growth.stable_kimg_at", "growth.fade_kimg_at"):
            table = dict(part.split(":") for part in str(values[key]).strip("{}").split(","))
            values[key] = "{" + ", ".join(f"{r}: {float(kimg) * scale:g}" for r, kimg in table.items()) + "}"
    return [f"{key}={value}" for key, value in values.items()]


def train(name: str, given: list[str]) -> float:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    print(f"+ train {name}", flush=True)
    return call(*launcher, "-m", "stylegan_pg", "train", CONFIG, *given, env=env)


def lines(run: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / run / name).read_text("utf-8").splitlines()]


def rate_of(changes: dict[str, object]) -> float:
    """Return the images per second of a short trial."""
    shutil.rmtree(ROOT / "runs" / "generations" / "trial", ignore_errors=True)
    train("trial", overrides("trial", changes | TRIAL, 1.0))
    return statistics.median(line["img_per_sec"] for line in lines("runs/generations/trial", "stats.jsonl")[-4:])


def fitting_scale() -> float:
    """Return the factor by which the schedules are lengthened on this machine."""
    rate = rate_of(GENERATIONS["stylegan2"] | FIXED)
    scale = round(min(max(rate / RATE, SCALES[0]), SCALES[1]), 2)
    print(f"{rate:.0f} images a second in a trial: phases of {scale:g} times their length", flush=True)
    return scale


def flops(given: list[str]) -> tuple[float, float]:
    """Return the FLOPs of a whole run, and the FLOPs per image of its last phase."""
    from stylegan_pg.config.loading import load_config
    from stylegan_pg.config.schedule import phases
    from stylegan_pg.planning.cost import cost_of

    config = load_config(str(ROOT / CONFIG), given)
    plan = phases(config)
    each = [cost_of(config, phase, 3, 0).flops_per_image for phase in plan]
    return sum(f * (p.end - p.start) for f, p in zip(each, plan, strict=True)), each[-1]


def figure(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw samples on the left, and losses and the critic's scores over the number of images on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    fig, axes = plt.subplots(len(rows), 3, figsize=(17, 4.6 * len(rows)), squeeze=False)
    for row, (left, middle, right) in zip(rows, axes, strict=True):
        run = f"runs/generations/{row['name']}"
        grid = max((ROOT / run / "samples").glob("fakes-*.png"), key=lambda p: p.name)
        left.imshow(Image.open(grid, formats=("PNG",)).convert("RGB"))
        left.set_title(f"{row['name']}: SWD {row['swd']:.1f} after {row['minutes']:.1f} min")
        left.axis("off")
        stats = lines(run, "stats.jsonl")
        kimg = [s["nimg"] / 1000 for s in stats]
        for axis, names, title in (
            (middle, ("loss_g", "loss_d"), "losses"),
            (right, ("score_real", "score_fake"), "D's scores"),
        ):
            for name in names:
                axis.plot(kimg, [s.get(name) for s in stats], label=name, linewidth=1)
            axis.set_title(title)
            axis.set_xlabel("kimg")
            axis.legend()
            axis.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=None, help="of all phases' lengths; default: what fits")
    names = [*GENERATIONS, "stylegan3", "fixed"]
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    folder = ROOT / "runs" / "generations"
    if there := [name for name in args.only if (folder / name).exists()]:
        print(f"note: starting {', '.join(there)} afresh in {folder}")
        for name in there:
            shutil.rmtree(folder / name)
    call("demo/faces.py", str(FACES), "--count", "5000", "--size", "64")
    call("-m", "stylegan_pg", "pack", str(FACES), str(DATA), "--resolution", "64", "--format", "png")
    rows, scale = [], args.scale or fitting_scale()
    for name in args.only:
        if name == "fixed":
            total, _ = flops(overrides("stylegan2", GENERATIONS["stylegan2"], scale))
            changes = GENERATIONS["stylegan2"] | FIXED | {"train.total_kimg": 1}
            _, per_image = flops(overrides("fixed", changes, scale))
            changes["train.total_kimg"] = round(total / per_image / 1000, 3)
        elif name == "stylegan3":
            minutes = next((row["minutes"] for row in rows if row["name"] == "stylegan2"), MINUTES)
            changes = STYLEGAN3 | {"train.total_kimg": round(rate_of(STYLEGAN3) * 60 * minutes / 1000, 3)}
        else:
            changes = GENERATIONS[name]
        seconds = train(name, overrides(name, changes, scale))
        metrics = lines(f"runs/generations/{name}", "metrics.jsonl")
        measured = [line["swd"] for line in metrics if line["resolution"] == EVERYONE["resolution"]]
        rows.append({"name": name, "minutes": seconds / 60, "swd": measured[-1], "first": measured[0]})
    figure(rows, folder / "figure.png")
    by_name = {row["name"]: row for row in rows}
    print(f"{'case':<24} {'SWD':>8} {'minutes':>8} {'ratio':>7}")
    results = []
    for row in rows:
        result = {"case": f"{row['name']} 32", "ratio": row["first"] / row["swd"]}
        results.append(result | {"swd": row["swd"], "minutes": row["minutes"]})
    if {"fixed", "stylegan2"} <= by_name.keys():
        grown, fixed = by_name["stylegan2"], by_name["fixed"]
        times = {"minutes": grown["minutes"], "fixed_minutes": fixed["minutes"], "fixed_swd": fixed["swd"]}
        results.append({"case": "progressive against fixed", "ratio": fixed["swd"] / grown["swd"], **times})
    for result in results:
        swd, minutes = result.get("swd", by_name.get("stylegan2", {}).get("swd", 0.0)), result["minutes"]
        print(f"{result['case']:<24} {swd:8.2f} {minutes:8.2f} {result['ratio']:7.2f}")
    print(f"figure: {folder / 'figure.png'}")
    for result in results:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}))


if __name__ == "__main__":
    main()
