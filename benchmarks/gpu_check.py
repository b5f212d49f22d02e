"""Everything that a GPU should be asked, in under eight minutes: `make gpu-check`, or `python benchmarks/gpu_check.py`.

- `tests`: the tests marked `gpu`.
- `kernels`: the compiled kernels against plain PyTorch (stylegan_pg/ops/bench.py), at 256x256.
- `train`: steps of StyleGAN2 at 256x256 and 1024x1024, batch 4, 8 and 32, with lazy terms at their intervals: time,
  images per second, the time that the device is busy, the host's share (in which the device waits), and memory; then
  with replayed steps (train.graphs).
- `recipes`: steps of stylegan3-t-256 and r3gan-ffhq256 with batch 32.
- `replay`: whether replayed steps have the same bits.
- `resume`: under train.deterministic, a run that is interrupted and continued has the same weights, bit for bit, as one
  that is not.

Each check is a process of its own with a time limit, so that none can stop the others; what went wrong is a line of the
table. At the end, there is one line of JSON for each row. The ratio of `train` is the busy share of the time; that of
replayed steps, the time without replay over theirs; of other checks 1 if they succeeded, else 0. `--device cpu --tiny`
tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]  # with "case", "ratio" and "about", which the table shows
STEPS = 16  # R1 is computed once in as many steps, path length four times


def device_facts(device: str) -> str:
    if device == "cpu":
        return f"CPU, torch {torch.__version__}"
    p = torch.cuda.get_device_properties(0)
    memory = f"{p.total_memory / 2**30:.0f} GiB"
    return f"{p.name}, {memory}, compute {p.major}.{p.minor}, torch {torch.__version__}, CUDA {torch.version.cuda}"


# --------------------------------------------------------------------------------------------------- checks


def check_tests(device: str, tiny: bool) -> Iterator[Row]:
    chosen = ["tests/test_operations.py", "-k", "view"] if tiny else ["-m", "gpu", "tests"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"case": "tests gpu", "ratio": float(done.returncode == 0), "about": "; ".join([*lines[-1:], *failed])}


def check_kernels(device: str, tiny: bool) -> Iterator[Row]:
    from stylegan_pg.ops import bench, native

    choice = native.choose(device)
    yield {"case": "kernels chosen", "ratio": float(choice.name == device), "about": f"{choice.name} ({choice.reason})"}
    for row in bench.rows(device, 0.02 if tiny else 0.2, "64" if tiny else "256"):
        about = f"{row['ratio']:.2f} times as fast as plain PyTorch, {row['gb_per_sec']:.0f} GB/s"
        yield row | {"case": f"kernels {row['case']}", "about": f"{about} ({row['bandwidth']:.2f} of a copy's)"}


def check_train(device: str, tiny: bool, resolution: int, batch: int) -> Iterator[Row]:
    from engines import engine_of

    base, most = (256, 16) if tiny else (16384 if resolution < 1024 else 32768, 512)
    keys = [f"model.channel_base={base}", f"model.channel_max={most}"]
    case, count, eager = f"train {resolution} batch {batch}", 2 if tiny else STEPS, 0.0
    for graphs in ("off", "auto"):
        engine, step = engine_of(resolution, batch, device, [*keys, f"train.graphs={graphs}"])
        for _ in range(2 if graphs == "off" else 4 * count):  # until lazy terms are captured, too
            step()
        wait(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(count):
            step()
        wait(device)
        seconds = (time.perf_counter() - started) / count
        memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        row: Row = {"case": case if graphs == "off" else f"{case} replayed", "ms": 1000 * seconds, "gib": memory}
        row |= {"img_per_sec": batch / seconds, "micro_batch": engine.state.micro_batches.size}
        about = f"{row['ms']:.1f} ms a step, {row['img_per_sec']:.1f} img/s, {memory:.1f} GiB"
        if graphs == "off":
            eager, busy = seconds, busy_seconds(step, count) if device == "cuda" else seconds
            row |= {"ratio": round(busy / seconds, 3), "busy_ms": 1000 * busy}
            about += f", micro-batch {row['micro_batch']}, {row['busy_ms']:.1f} ms busy, "
            yield row | {"about": f"{about}host's share {1 - row['ratio']:.0%}"}
        else:
            row["ratio"] = round(eager / seconds, 3)
            how = f"{row['ratio']:.2f} times as fast as operation by operation"
            yield row | {"about": f"{about}, {how if engine.replay.captured else 'but nothing was replayed'}"}
        del engine, step


def check_recipes(device: str, tiny: bool) -> Iterator[Row]:
    """Images per second of recipes with the whole batch in one pass; the ratio is the busy share of the time."""
    from engines import engine_of

    for recipe, more in (("stylegan3-t-256", []), ("r3gan-ffhq256", ["augment.p=0.3"])):
        small = ["model.channel_base=64", "model.channel_max=16", "model.low_precision=fp32"] if tiny else []
        resolution, batch, count = (16, 4, 2) if tiny else (256, 32, STEPS)
        engine, step = engine_of(resolution, batch, device, [*more, *small, "train.micro_batch=0"], recipe)
        step()
        wait(device)
        started = time.perf_counter()
        for _ in range(count):
            step()
        wait(device)
        seconds = (time.perf_counter() - started) / count
        busy = busy_seconds(step, count) if device == "cuda" else seconds
        row: Row = {"case": f"recipe {recipe} batch {batch}", "ratio": round(busy / seconds, 3), "ms": 1000 * seconds}
        row |= {"img_per_sec": batch / seconds, "micro_batch": engine.state.micro_batches.size}
        about = f"{row['ms']:.1f} ms a step, {row['img_per_sec']:.1f} img/s, micro-batch {row['micro_batch']}"
        yield row | {"about": f"{about}, host's share {1 - row['ratio']:.0%}"}
        del engine, step


def check_replay(device: str, tiny: bool) -> Iterator[Row]:
    """Whether replayed steps have the bits of others, under deterministic algorithms."""
    from engines import engine_of

    torch.use_deterministic_algorithms(True, warn_only=True)
    tensors, captured = [], 0
    for graphs in ("off", "auto"):
        keys = ["model.channel_base=512", "model.channel_max=32", "loss.r1_every=2", "loss.pl_every=2"]
        engine, step = engine_of(32, 8, device, [*keys, "train.deterministic=true", f"train.graphs={graphs}"])
        for _ in range(16):
            step()
        captured = engine.replay.captured
        tensors.append({name: t.clone() for name, t in engine.state.tensors().items()})
    unlike = [name for name, t in tensors[0].items() if not torch.equal(t, tensors[1][name])]
    about = f"they differ: {unlike[:3]}" if unlike else f"{len(tensors[0])} tensors are equal after 16 steps"
    if not captured:
        about += ", but nothing was replayed"
    yield {"case": "replay bits", "ratio": float(not unlike and (captured > 0 or device == "cpu")), "about": about}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def busy_seconds(step: Callable[[], None], count: int) -> float:
    """Seconds of a step in which the device computes, by PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / count


def check_resume(device: str, tiny: bool) -> Iterator[Row]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        data = _data(top)
        whole, parted = top / "whole", top / "parted"
        _trained(whole, data, device, 0.064)
        _trained(parted, data, device, 0.032)
        _trained(parted, data, device, 0.064)
        found = [load_file(next((run / "snapshots").glob("000000kimg064*.safetensors"))) for run in (whole, parted)]
        unlike = [name for name, t in found[0].items() if not torch.equal(t, found[1][name])]
    about = f"{len(found[0])} tensors of the last snapshot are equal" if not unlike else f"they differ: {unlike[:3]}"
    yield {"case": "resume deterministic", "ratio": float(not unlike), "about": about}


def _data(top: Path) -> Path:
    import numpy as np
    from PIL import Image

    from stylegan_pg.data.pack.pack import pack

    pictures = top / "pictures"
    pictures.mkdir()
    for i in range(64):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    pack(pictures, top / "data", resolution=32, progress=False)
    return top / "data"


def _trained(run: Path, data: Path, device: str, kimg: float) -> None:
    """Train, or continue, to `kimg` thousand images."""
    settings = run.with_suffix(".yaml")
    settings.write_text(f"run: {run}\ndata: {{url: {data}}}\n")
    given = f"{settings} resolution=32 growth.start=16 growth.stable_kimg=0.016 growth.fade_kimg=0.016"
    given += f" train.total_kimg={kimg} train.batch=8 train.device={device} train.deterministic=true data.workers=0"
    given += " model.channel_base=512 model.channel_max=32 output.trackers=[] checkpoint.every_kimg=0.008"
    command = [sys.executable, "-m", "stylegan_pg", "train", *given.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"training ended with exit code {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}")


CHECKS: dict[str, tuple[Callable[..., Iterator[Row]], int]] = {  # with seconds that each may take
    "tests": (check_tests, 200),
    "kernels": (check_kernels, 90),
    "resume": (check_resume, 90),
    "replay": (check_replay, 60),
    "train": (check_train, 100),
    "recipes": (check_recipes, 90),
}


# ------------------------------------------------------------------------------------------------- one after another


def cases(tiny: bool, only: str) -> Iterator[list[str]]:
    sizes = [(16, 4)] if tiny else [(r, batch) for r in (256, 1024) for batch in (4, 8, 32)]
    for name in CHECKS:
        if only in name:
            yield from ([name, str(r), str(batch)] for r, batch in sizes) if name == "train" else [[name]]


def in_a_process(case: list[str], args: argparse.Namespace, seconds: float) -> Iterator[Row]:
    """The rows of a check, or one that says why there are none."""
    how = ["--device", args.device, *(["--tiny"] if args.tiny else []), "--child", *case]
    name = " ".join([*case[:2], *(["batch", case[2]] if len(case) > 2 else [])])
    try:
        done = subprocess.run([sys.executable, __file__, *how], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        yield from _rows((error.stdout or b"").decode())
        yield {"case": name, "ratio": 0.0, "about": f"stopped after {seconds:.0f} s"}
        return
    yield from _rows(done.stdout)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        yield {"case": name, "ratio": 0.0, "about": f"exit code {done.returncode}: {why[:300]}"}


def _rows(output: str) -> list[Row]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"case"') and line.endswith("}")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no check begins")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, *sizes = args.child
        for row in CHECKS[name][0](args.device, args.tiny, *map(int, sizes)):
            print(json.dumps(row), flush=True)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; --device cpu --tiny tries the script", file=sys.stderr)
        return 2
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    print(device_facts(args.device))
    started, rows = time.monotonic(), list[Row]()
    for case in cases(args.tiny, args.only):
        left = 60 * args.minutes - (time.monotonic() - started)
        limit = min(CHECKS[case[0]][1], left)
        found = [{"case": " ".join(case), "ratio": 0.0, "about": "not begun: no time was left"}] if limit < 5 else None
        for row in found or in_a_process(case, args, limit):
            rows.append(row)
            print(f"{row['case']:<44} {row['about']}", flush=True)
    print(f"{time.monotonic() - started:.0f} s in all")
    for row in rows:
        print(json.dumps(row))
    return 0 if all(row["ratio"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
