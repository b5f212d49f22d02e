"""A benchmark of the kernels on a device, against plain PyTorch and against copying.

`ratio` is the reference's time divided by the kernel's; `copy` is the time of copying a tensor like the output into new
memory divided by the kernel's; `bandwidth` compares the bytes per second that both must move at least, so 1 is the
speed of a copy.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stylegan_pg.ops import native, reference
from stylegan_pg.ops.bias_act import bias_act
from stylegan_pg.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d

# Batch and channels at a resolution; for a GPU those of networks at 1024x1024, which exceed its caches.
SHAPES = {
    "cpu": {64: (8, 128), 256: (4, 64), 512: (1, 32)},
    "cuda": {64: (32, 512), 256: (16, 128), 1024: (4, 32)},
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def clocked(function: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call. On a GPU it is the mean of ten consecutive calls by the GPU's clock, without launch
    times."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e4


def interleaved(
    functions: dict[str, Callable[[], Any]], seconds: float, least: int = 7, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each function. They run in turn, in a new random order in each round. Each is called once
    before it is timed, as a function that runs after another one finds caches and heap filled by that."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    start, dice = time.perf_counter(), random.Random(0)
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < least:
        for name, function in dice.sample(list(functions.items()), len(functions)):
            function()
            times[name].append(clocked(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def cases(x: torch.Tensor, f: torch.Tensor, b: torch.Tensor):
    """Rows of (name, function that calls the kernel, function that calls the reference)."""
    ref = reference.upfirdn2d
    yield "up2", lambda: upsample2d(x, f), lambda: ref(x, f, (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0)
    yield "down2", lambda: downsample2d(x, f), lambda: ref(x, f, (1, 1), (2, 2), (1, 1, 1, 1), False, 1.0)
    yield "filter", lambda: filter2d(x, f), lambda: ref(x, f, (1, 1), (1, 1), (2, 1, 2, 1), False, 1.0)
    how = {"act": "lrelu", "gain": 2**0.5, "clamp": 256.0}

    def plain():
        return reference.bias_act(x, b, None, None, "lrelu", 2**0.5, 256.0, 1)

    yield "bias", lambda: bias_act(x, b, **how), plain
    dy = torch.randn_like(x)
    x_, b_ = x.clone().requires_grad_(True), b.clone().requires_grad_(True)

    def ours_both():
        return torch.autograd.grad(bias_act(x_, b_, **how), [x_, b_], dy)[0]

    def plain_both():
        y = reference.bias_act(x_, b_, None, None, "lrelu", 2**0.5, 256.0, 1)
        return torch.autograd.grad(y, [x_, b_], dy)[0]

    yield "bias forward+backward", ours_both, plain_both


def rows(device: str, seconds: float, only: str = "") -> Iterator[dict[str, Any]]:
    """Yield one row for each operation, dtype, layout and size as soon as it is measured."""
    f = setup_filter([1, 3, 3, 1]).to(device)
    formats = [d for d in DTYPES if DTYPES[d] in native.SUPPORTED.get(device, (torch.float32,))]
    for resolution, (n, c) in SHAPES[device].items():
        for dtype in formats:
            for layout, memory_format in LAYOUTS.items():
                x = torch.randn(n, c, resolution, resolution, device=device).to(DTYPES[dtype])
                x = x.contiguous(memory_format=memory_format)
                b = torch.randn(c, device=device)
                for op, ours, plain in cases(x, f, b):
                    name = f"{op} {dtype} {layout} {resolution}"
                    if only not in name:
                        continue
                    out = ours().clone()
                    t = interleaved({"ours": ours, "plain": plain, "copy": out.clone}, seconds, device=device)
                    # The forward pass moves x and y, the backward pass x, dy and dx.
                    moved = 5 * x.nbytes if "backward" in op else x.nbytes + out.nbytes
                    copy = t["copy"] / t["ours"]
                    yield {
                        "case": name,
                        "ratio": round(t["plain"] / t["ours"], 3),
                        "copy": round(copy, 3),
                        "bandwidth": round(copy * moved / (2 * out.nbytes), 3),
                        "ours_ms": round(t["ours"] * 1e3, 3),
                        "reference_ms": round(t["plain"] * 1e3, 3),
                        "gb_per_sec": round(moved / t["ours"] / 1e9, 2),
                    }


HEAD = f"{'case':36} {'ours ms':>9} {'ref ms':>9} {'ratio':>7} {'copy':>6} {'bandwidth':>9} {'GB/s':>7}"


def line(row: dict[str, Any]) -> str:
    """Format a row for the table with the heading HEAD."""
    return (
        f"{row['case']:36} {row['ours_ms']:9.3f} {row['reference_ms']:9.3f} {row['ratio']:7.2f} {row['copy']:6.2f} "
        f"{row['bandwidth']:9.2f} {row['gb_per_sec']:7.1f}"
    )
