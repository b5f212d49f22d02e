"""The cost of a checkpoint during training: `python benchmarks/checkpoint_stall.py` (about five minutes).

Once a minute, the script writes a G and a D with the given number of parameters, the EMA of G, and Adam's moments of
both. In the row `stall`, `ratio` is the fraction of time for which training waits for a checkpoint, that is, for the
copy. In the row `beside`, it is the fraction of work that is lost by waiting and by the simultaneous writing; matrix
products on all threads stand for training. Writing uses one of the few CPU cores; it takes nothing from training on a
GPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from stylegan_pg.checkpoint import checkpoint


def tensors_of(millions: float, device: str) -> dict[str, torch.Tensor]:
    """Return the float32 tensors of a checkpoint: G, G_ema and D, and two moments each for G and D. G and D have half
    of the parameters each."""
    layers = 40
    side = int((millions * 1e6 / 2 / layers) ** 0.5)
    parts = ("G", "G_ema", "D", "opt_G/exp_avg", "opt_G/exp_avg_sq", "opt_D/exp_avg", "opt_D/exp_avg_sq")
    return {f"{part}/{i}": torch.randn(side, side, device=device) for part in parts for i in range(layers)}


def work(seconds: float, a: torch.Tensor) -> int:
    steps, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        (a @ a).sum().item()
        steps += 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=60, help="millions of parameters of G and D together")
    parser.add_argument(
        "--minutes", type=int, default=2, help="number of minutes with a checkpoint each, and as many without"
    )
    parser.add_argument("--minute", type=float, default=60, help="seconds from one checkpoint to the next")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exits normally, so that the written files are removed
    tensors = tensors_of(args.parameters, args.device)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    print(f"{size / 2**20:.0f} MiB in {len(tensors)} tensors, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        start = time.perf_counter()
        checkpoint.write(checkpoint.path_for(Path(folder), 1), tensors, {"nimg": 1})
        foreground = time.perf_counter() - start
        print(f"in the foreground: {foreground:.2f} s")
        writer = checkpoint.Writer(Path(folder), keep=1)
        a = torch.randn(768, 768, device=args.device)
        work(2, a)
        stalls, beside, alone = [], [], []
        for i in range(args.minutes + 1):  # the first one allocates its memory and is not counted
            start = time.perf_counter()
            writer.start(i + 2, tensors, {"nimg": i})
            stalls.append(time.perf_counter() - start)
            if i == 0:
                writer.wait()
                print(f"first copy: {stalls.pop():.2f} s")
                continue
            beside.append(work(args.minute - stalls[-1], a))
            assert writer.outcome(wait=True) == (i + 2, "")
            alone.append(work(args.minute, a))
    stall, lost = statistics.mean(stalls), 1 - statistics.mean(beside) / statistics.mean(alone)
    print(f"training waits for: {stall:.3f} s, {100 * stall / args.minute:.2f} % of the time")
    print(f"work done in the time of a checkpoint, the wait included: {100 * lost:.2f} % less")
    about = f"{args.parameters:g}M every {args.minute:g} s"
    foreground, stall = round(foreground, 3), round(stall, 4)
    print(json.dumps({"case": f"stall {about}", "ratio": stall / args.minute, "seconds": stall, "write": foreground}))
    print(json.dumps({"case": f"beside {about}", "ratio": round(lost, 5)}))


if __name__ == "__main__":
    main()
