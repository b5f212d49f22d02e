"""The complete demo: draw faces, pack them, train, and show the results. See `make demo`.

Usage: python demo/run.py CONFIG [key=value ...]. Every part continues from existing results, so a demo that was stopped
is resumed by the same command.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stylegan_pg.distributed import launcher
from stylegan_pg.errors import TO_BE_CONTINUED
from stylegan_pg.monitoring import console

FACES = 5000
parts: list[subprocess.Popen[str]] = []  # the last part is running, or has ended
requests: list[int] = []  # the signals that requested a stop


def stop(number: int, _: object) -> None:
    """Pass a request to stop on to the running part; the demo ends with it."""
    requests.append(number)
    for part in parts[-1:]:
        with contextlib.suppress(ProcessLookupError):
            part.send_signal(number)
    if not parts:
        os._exit(TO_BE_CONTINUED)  # no part has been started


def call(*command: str, capture: bool = False) -> str:
    """Run a command of this package in a separate process. If its exit code is not 0, exit with that code. After a
    request to stop, exit with the code of a stopped run."""
    print("+", " ".join(command), flush=True)
    env = os.environ | {launcher.SCRIPTS: f"{os.environ.get(launcher.SCRIPTS, '')} {os.getpid()}".strip()}
    parts.append(
        subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE if capture else None, text=True, env=env)
    )
    for number in requests[:1]:  # the signal arrived while the part was being started
        parts[-1].send_signal(number)
    output, _ = parts[-1].communicate()
    if requests:
        sys.exit(TO_BE_CONTINUED)
    if code := parts[-1].returncode:
        sys.exit(code if code > 0 else 128 - code)  # shells report signals in this way
    return output or ""


def progress_figure(samples: Path, out: Path, faces: int = 8, most: int = 8) -> None:
    """Draw one row for each of up to `most` times of the run, with the first faces of the grid of fixed seeds."""
    import numpy as np
    import torch
    from PIL import Image

    from stylegan_pg.checkpoint.names import in_order
    from stylegan_pg.images import save_image

    grids = in_order(samples.glob("fakes-*.png"))
    chosen = sorted({round(i * (len(grids) - 1) / (most - 1)) for i in range(most)})
    rows = []
    size = max(Image.open(p, formats=("PNG",)).size[0] for p in grids) // 8
    for i in chosen:
        picture = Image.open(grids[i], formats=("PNG",)).convert("RGB")
        cell = picture.size[0] // 8  # output.grid has eight columns
        row = picture.crop((0, 0, faces * cell, cell)).resize((faces * size, size), Image.Resampling.NEAREST)
        rows.append(np.asarray(row))
    save_image(torch.from_numpy(np.concatenate(rows).transpose(2, 0, 1).copy()), out)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    console.tolerate("stdout", "stderr")
    from stylegan_pg.checkpoint.names import in_order
    from stylegan_pg.config.loading import load_config

    name, overrides = sys.argv[1], sys.argv[2:]
    config = load_config(name, overrides)
    run, size = Path(config.run), config.resolution
    faces = Path("data") / f"faces{FACES}-{size}"
    call("demo/faces.py", str(faces), "--count", str(FACES), "--size", str(size))
    call("-m", "stylegan_pg", "pack", str(faces), config.data.url, "--resolution", str(size), "--format", "png")
    started = time.monotonic()
    call("-m", "stylegan_pg", "train", name, *overrides)
    minutes = (time.monotonic() - started) / 60

    snapshot = in_order((run / "snapshots").glob("*.safetensors"))[-1]
    out = run / "pictures"
    common = ("--out", str(out))
    call("-m", "stylegan_pg", "sample", str(snapshot), "--seeds", "0-63", "--grid", *common)
    call("-m", "stylegan_pg", "sample", str(snapshot), "--seeds", "1,5,9,12,1", "--interpolate", "8", *common)
    progress_figure(run / "samples", out / "progress.png")
    measured = call(
        "-m", "stylegan_pg", "metrics", str(snapshot), "--data", config.data.url, "--images", "4096", capture=True
    )
    values = json.loads(measured)
    print()
    print(f"training took {minutes:.1f} minutes, {run}")
    print("sliced Wasserstein distance x1000: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items() if "swd" in k))
    print(f"snapshot            {snapshot}")
    print(f"64 faces            {out / 'grid.png'}")
    print(f"interpolation       {out / 'interpolation.png'}")
    print(f"over the training   {out / 'progress.png'}")
    print((faces / "CREDITS.txt").read_text("utf-8").strip())


if __name__ == "__main__":
    main()
