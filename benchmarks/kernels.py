"""The fused kernels on this CPU, compared with plain PyTorch and with copying: `python benchmarks/kernels.py`.

The rows are up2, down2 and filter (with 4 taps, as in the networks), bias (leaky ReLU, gain, clamp), forward +
backward of bias, its backward pass alone, the backward pass of a layer with scale and noise as well, and forward +
backward of the filtered leaky ReLU (`filtered`, with the rates and filters of StyleGAN3). They are measured in fp32 and
bf16, NCHW and channels_last (nhwc), at [8, 128, 64, 64], [4, 64, 256, 256] and [1, 32, 512, 512].
stylegan_pg/ops/bench.py explains the columns. The last rows, `filtered memory`, compare the memory that a forward pass
keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from stylegan_pg.ops import bench, filtered_lrelu, native, reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    choice = native.choose("cpu")
    print(f"torch {torch.__version__}, {args.threads} threads, {choice.name} ({choice.reason})")
    print(bench.HEAD)
    rows = []
    for row in bench.rows("cpu", args.seconds, args.only):
        rows.append(row)
        print(bench.line(row), flush=True)
    for row in memory_rows(args.only):
        rows.append(row)
        print(f"{row['case']:36} keeps {row['kept_mib']:.1f} MiB, the reference {row['reference_mib']:.1f}", flush=True)
    for row in rows:
        print(json.dumps(row))


def memory_rows(only: str) -> Iterator[dict[str, Any]]:
    """What the filtered leaky ReLU keeps for its backward pass, at [4, 64, 256, 256]; `ratio` is the reference's over
    ours."""
    taps = torch.tensor(bench.SMOOTH)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        case = f"filtered memory {name}"
        if only not in case:
            continue
        x = torch.randn(4, 64, 256, 256).to(dtype).requires_grad_(True)
        ours = kept(lambda x=x: filtered_lrelu(x, taps, taps, up=2, down=2, padding=11, clamp=256.0))
        plain = kept(lambda x=x: reference.filtered_lrelu(x, taps, taps, None, 2, 2, (11,) * 4, 2**0.5, 0.2, 256.0))
        yield {"case": case, "ratio": plain / ours, "kept_mib": ours / 2**20, "reference_mib": plain / 2**20}


def kept(function: Callable[[], torch.Tensor]) -> int:
    """The bytes that autograd keeps for the backward pass of a function."""
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()  # while y exists, no storage of the graph is used again
        total = sum(found.values())
        del y
    return total


if __name__ == "__main__":
    main()
