"""A benchmark of the kernels on a device, compared with plain PyTorch and with copying.

`ratio` is the time of the reference divided by the time of the kernel. `copy` is the time of copying the output into
new memory divided by the time of the kernel. `bandwidth` is the memory bandwidth of the kernel divided by that of the
copy, both computed from the bytes that must be read and written at least; 1 means the kernel is as fast as a copy.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stylegan_pg.ops import native, reference
from stylegan_pg.ops.bias_act import bias_act
from stylegan_pg.ops.filtered_lrelu import filtered_lrelu
from stylegan_pg.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d

# {device: {resolution: (batch, channels)}}. On GPUs the tensors are as large as in networks for 1024x1024, so that they
# exceed the caches.
SHAPES = {
    "cpu": {64: (8, 128), 256: (4, 64), 512: (1, 32)},
    "cuda": {64: (32, 512), 256: (16, 128), 1024: (4, 32)},
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def time_call(function: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds of one call. On a GPU this is the mean of ten consecutive calls, measured with CUDA events and
    without launch times."""
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


def median_times(
    functions: dict[str, Callable[[], Any]], seconds: float, min_rounds: int = 7, device: str = "cpu"
) -> dict[str, float]:
    """Return the median seconds of each function. In each round all functions run in a new random order. Each is called
    once before it is timed, because the previous function has filled the caches and the heap with its own data.

    Args:
        functions: The functions by name.
        seconds: The time after which no new round starts.
        min_rounds: The smallest number of rounds.
        device: "cpu" or "cuda".
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    start, rng = time.perf_counter(), random.Random(0)
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < min_rounds:
        for name, function in rng.sample(list(functions.items()), len(functions)):
            function()
            times[name].append(time_call(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def cases(x: torch.Tensor, f: torch.Tensor, b: torch.Tensor):
    """Yield (name, function that calls the kernel, function that calls the reference)."""
    ref = reference.upfirdn2d
    yield "up2", lambda: upsample2d(x, f), lambda: ref(x, f, (2, 2), (1, 1), (2, 1, 2, 1), False, 4.0)
    yield "down2", lambda: downsample2d(x, f), lambda: ref(x, f, (1, 1), (2, 2), (1, 1, 1, 1), False, 1.0)
    yield "filter", lambda: filter2d(x, f), lambda: ref(x, f, (1, 1), (1, 1), (2, 1, 2, 1), False, 1.0)
    how = {"act": "lrelu", "gain": 2**0.5, "clamp": 256.0}

    def plain():
        return reference.bias_act(x, b, None, None, "lrelu", 2**0.5, 256.0, 1)

    yield "bias", lambda: bias_act(x, b, **how), plain
    n, c, *size = x.shape
    dy, s, z = torch.randn_like(x), torch.rand(n, c, device=x.device) + 0.5, torch.randn(n, 1, *size, device=x.device)
    x_, b_, s_, z_ = (t.clone().requires_grad_(True) for t in (x, b, s, z))

    def ours_forward(b, s=None, z=None):
        return bias_act(x_, b, scale=s, noise=z, **how)

    def plain_forward(b, s=None, z=None):
        return reference.bias_act(x_, b, s, z, "lrelu", 2**0.5, 256.0, 1)

    def both(forward, *given):
        return lambda: torch.autograd.grad(forward(*given), [x_, *given], dy)[0]

    def backward(forward, *given):
        y = forward(*given)
        return lambda: torch.autograd.grad(y, [x_, *given], dy, retain_graph=True)[0]

    yield "bias forward+backward", both(ours_forward, b_), both(plain_forward, b_)
    yield "bias backward", backward(ours_forward, b_), backward(plain_forward, b_)
    # The end of a layer of StyleGAN2's generator: demodulation, noise, bias.
    yield "layer backward", backward(ours_forward, b_, s_, z_), backward(plain_forward, b_, s_, z_)


SMOOTH = [-0.002, -0.012, -0.01, 0.05, 0.18, 0.29, 0.29, 0.18, 0.05, -0.01, -0.012, -0.002]  # a low-pass filter


def filtered_cases(x: torch.Tensor, b: torch.Tensor):
    """Yield the same for filtered_lrelu, forward and backward, at the rates and with the numbers of taps of StyleGAN3.
    The reference applies separable filters along one axis after the other, too, which is its fastest form."""
    taps = torch.tensor(SMOOTH, device=x.device)
    x_, b_ = x.clone().requires_grad_(True), b.clone().requires_grad_(True)
    for name, up, u, d in (
        ("filtered up2 down2", 2, taps, taps),
        ("filtered radial", 2, taps, torch.outer(taps, taps)),
        ("filtered up4 down2", 4, taps.repeat_interleave(2) / 2, taps),
    ):
        small = x_ if up == 2 else x_[:, :, : x.shape[2] // 2, : x.shape[3] // 2].detach()
        small = reference.in_layout_of(x, small).requires_grad_(True)
        pad = (6 * up + 11) // 2  # which keeps the size for up 2, about
        mid = small.shape[2] * up + 2 * pad - 6 * up + 1
        dy = torch.randn_like(x[:, :, :1, :1]).expand(*x.shape[:2], *[(mid - 12) // 2 + 1] * 2)
        dy = reference.in_layout_of(x, dy)

        def ours(small=small, u=u, d=d, up=up, pad=pad, dy=dy):
            y = filtered_lrelu(small, u, d, b_, up=up, down=2, padding=pad, clamp=256.0)
            return torch.autograd.grad(y, [small, b_], dy)[0]

        def plain(small=small, u=u, d=d, up=up, pad=pad, dy=dy):
            y = reference.filtered_lrelu(small, u, d, b_, up, 2, (pad,) * 4, 2**0.5, 0.2, 256.0)
            return torch.autograd.grad(y, [small, b_], dy)[0]

        yield name, ours, plain


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
                for op, ours, plain in itertools.chain(cases(x, f, b), filtered_cases(x, b)):
                    name = f"{op} {dtype} {layout} {resolution}"
                    if only not in name:
                        continue
                    out = ours().clone()
                    t = median_times({"ours": ours, "plain": plain, "copy": out.clone}, seconds, device=device)
                    # The forward pass reads x and writes y; the backward pass reads x and dy and writes dx.
                    # filtered_lrelu also writes and reads the slopes, but not x in the backward pass.
                    moved = x.nbytes * (5 if "forward" in op else 3) if "backward" in op else x.nbytes + out.nbytes
                    if "filtered" in op:
                        moved = 4 * out.nbytes + 2 * out.numel() * (4 if "up4" in op else 1)
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
