"""The fused kernels on this CPU, compared with plain PyTorch and with copying: `python benchmarks/kernels.py`.

The rows are up2, down2 and filter (with 4 taps, as in the networks), bias (leaky ReLU, gain, clamp), forward +
backward of bias, its backward pass alone, and the backward pass of a layer with scale and noise as well. They are
measured in fp32 and bf16, NCHW and channels_last (nhwc), at [8, 128, 64, 64], [4, 64, 256, 256] and [1, 32, 512, 512].
stylegan_pg/ops/bench.py explains the columns.
"""

from __future__ import annotations

import argparse
import json

import torch

from stylegan_pg.ops import bench, native


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
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
