"""Make the folder of files that a version leaves behind, which later versions must be able to read, or read it:

python tests/golden/fixtures.py FOLDER
python tests/golden/fixtures.py --read FOLDER

The first form adds to FOLDER, in which there may be configurations (*.yaml), a packed dataset, two run folders that
were stopped half-way, a snapshot of each family of networks, and expected.json: what the runs end in, what the
snapshots give, and what `train --dry-run` says of the configurations. All paths in them are relative to FOLDER. The
training is in float64, so that other processors give the same numbers but for rounding. The second form prints what
expected.json would hold; it works in FOLDER, so that should be a copy.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pictures
import reading
import yaml
from cases import own_keys
from PIL import Image

BASE = {
    "resolution": 16,
    "seed": 5,
    "data.url": "data",
    "data.workers": 0,
    "model.z_dim": 6,
    "model.w_dim": 6,
    "model.mapping_layers": 2,
    "model.channel_base": 64,
    "model.channel_max": 4,
    "optim.g_lr": 0.003,
    "train.dtype": "float64",
    "train.device": "cpu",
    "train.threads": 1,
    "train.batch": 8,
    "loss.r1_gamma": 1,
    "loss.r1_every": 2,
    "loss.pl_every": 2,
    "output.grid": "[3,2]",
    "output.grid_kimg": 0.032,
    "output.tick_kimg": 0.008,
    "output.snapshot_kimg": 0,
    "output.trackers": "[]",
    "checkpoint.every_kimg": 0.016,
    "checkpoint.keep": 1,
}
GROWING = {"growth.start": 8, "growth.stable_kimg": 0.04, "growth.fade_kimg": 0.16}
WGAN = {
    "loss.objective": "wgan",
    "loss.r1_gamma": 0,
    "loss.pl_weight": 0,
    "loss.terms": "[{name: gradient_penalty, weight: 10}, {name: drift, weight: 0.001}]",
}
ADA = {"augment.mode": "ada", "augment.p": 0.3, "augment.interval": 2, "augment.kimg": 0.1}
# {run that is stopped: (overrides, processes, nimg at which it is requested to stop)}
STOPPED = {
    "fade": (GROWING | {"metrics.every_kimg": 0.048, "metrics.images": 16}, 0, 88),
    "ada": (
        {"growth.start": 8, "growth.stable_kimg": 0.04, "growth.fade_kimg": 0.08, "growth.optimizer": "carry"}
        | WGAN
        | ADA
        | {"model.name": "progan", "data.conditional": "true", "optim.d_steps": 2, "data.mirror": "true"},
        2,
        80,
    ),
}
SHORT = {"train.total_kimg": 0.032, "output.grid_kimg": 0}
SNAPSHOTS = {
    "mlp": {"model.name": "mlp", "resolution": 8, "loss.pl_weight": 0},
    "progan": {"model.name": "progan", "growth.start": 8, "growth.stable_kimg": 0.016, "growth.fade_kimg": 0.032}
    | WGAN,
    "stylegan": {"model.name": "stylegan", "loss.pl_weight": 0},
    "stylegan2": {"data.conditional": "true", "model.g_architecture": "orig"},
}
METRICS = ["--metrics", "fid16_full,swd16", "--extractor", "pixels", "--batch", "8", "--no-cache"]


def stopped(name: str, overrides: dict[str, Any], ranks: int, nimg: int, folder: Path) -> None:
    """Train until `nimg` or slightly longer, and then request the run to stop, as a cluster does."""
    values = own_keys(BASE | overrides | {"run": f"run-{name}"}, overrides.get("model.name", ""))
    arguments = ["train", "made.yml", *(f"{key}={value}" for key, value in values.items())]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    process = subprocess.Popen([sys.executable, *launcher, "-m", commands.PACKAGE, *arguments], cwd=folder)
    file, status = folder / f"run-{name}" / "status.json", {}
    while process.poll() is None and status.get("nimg", 0) < nimg:
        time.sleep(0.01)
        status = json.loads(file.read_text()) if file.exists() else {}
    os.kill(status["ranks"][0]["pid"], signal.SIGTERM)
    process.wait()


def clean(run: Path) -> None:
    """Remove the name of the machine from the files of a run."""
    (run / ".lock").unlink()
    status = json.loads((run / "status.json").read_text())
    for number, rank in enumerate(status["ranks"]):
        rank |= {"host": "host", "pid": 1000 + number}
    (run / "status.json").write_text(json.dumps(status))


def results(folder: Path) -> dict[str, Any]:
    """Return the results of the fixtures in `folder`: the ends of the runs, which are resumed there, the images and
    metrics of the snapshots, and the plans of the configurations."""
    runs = {}
    for name in STOPPED:
        commands.call(["train", f"run-{name}"], folder, folder / f"run-{name}.txt")
        runs[name] = reading.summary(reading.recording(folder / f"run-{name}"))
    pictures_of, metrics = {}, {}
    for name in SNAPSHOTS:
        snapshot, out, said = f"snapshots/{name}.safetensors", folder / name, folder / f"{name}.txt"
        commands.call(["sample", snapshot, "--seeds", "0-3", "--out", name], folder, folder / "sample.txt")
        pictures_of[name] = [
            np.asarray(Image.open(path)).mean(axis=(0, 1)).tolist() for path in sorted(out.glob("*.png"))
        ]
        commands.call(["metrics", snapshot, "--data", "data", "--out", f"{name}-metrics", *METRICS], folder, said)
        (row,) = [json.loads(line) for line in said.read_text().splitlines() if line.startswith('{"')]
        metrics[name] = {key: value for key, value in row.items() if isinstance(value, float)}
    plans = {path.stem: planned(path) for path in sorted(folder.glob("*.yaml"))}
    return {"runs": runs, "pictures": pictures_of, "metrics": metrics, "plans": plans}


def planned(config: Path) -> dict[str, Any]:
    """Return the keys that `train --dry-run` prints for a configuration, and the phases with kimg, batch and rates."""
    said = config.with_suffix(".txt")
    commands.call(["train", config.name, "--dry-run"], config.parent, said)
    lines = [line for line in said.read_text().splitlines() if not line.startswith("note: ")]
    keys, _, rest = "\n".join(lines).partition("\n\n")
    phases = re.findall(r"^(\d+x\d+ (?:fade|stable)) +(\S+) +(\S+) +(\S+) +(\S+)", rest, re.MULTILINE)
    return {"keys": yaml.safe_load(keys), "phases": [" ".join(row) for row in phases]}


def make(folder: Path) -> None:
    """Create all files of the folder except expected.json."""
    for i in range(18):
        path = folder / "pictures" / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures.picture(500 + i, (16, 16), 3).save(path)
    (folder / "made.yml").write_text("run: none\ndata: {url: data}\n")
    packing = "pack pictures data --resolution 16 --lowest 8 --format png --workers 0"
    commands.call(packing.split(), folder, folder / "pack.txt")
    for name, (overrides, ranks, nimg) in STOPPED.items():
        stopped(name, overrides, ranks, nimg, folder)
        clean(folder / f"run-{name}")
    (folder / "snapshots").mkdir()
    for name, overrides in SNAPSHOTS.items():
        values = own_keys(BASE | SHORT | overrides | {"run": f"made-{name}"}, name)
        arguments = ["train", "made.yml", *(f"{key}={value}" for key, value in values.items())]
        commands.call(arguments, folder, folder / f"made-{name}.txt")
        shutil.copy(reading.final_snapshot(folder / f"made-{name}"), folder / "snapshots" / f"{name}.safetensors")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with commands.temporary_folder() as work:
        for path in out.glob("*.yaml"):
            shutil.copy(path, work)
        make(work)
        for name in ("data", "snapshots", *(f"run-{name}" for name in STOPPED)):
            shutil.copytree(work / name, out / name, symlinks=True)
        (out / "expected.json").write_text(reading.compact(results(work)))


if __name__ == "__main__":
    commands.import_libraries()
    folder = Path(sys.argv[-1]).resolve()
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(results(folder)))
    else:
        main(folder)
