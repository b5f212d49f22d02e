"""Whole training steps and generation on this CPU, with the fused kernels and without.

`train 256`: G's and D's main step, batch 2, channel_base 16384; `generate 1024`: one image, channel_base 32768. The
reference is the same computation (matrix-product demodulation, fused Adam) with plain PyTorch operations, NCHW, fp32;
ours is channels_last with the kernels, in fp32, with all blocks in bf16, and with those that model.low_precision=auto
chooses here. `train 32`: a small network, batch 8, 128 channels. `ratio` is the reference's time over ours.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from stylegan_pg import tuning
from stylegan_pg.losses import logistic_d, logistic_g
from stylegan_pg.networks import NETWORKS, to_channels_last
from stylegan_pg.ops import bench, native
from stylegan_pg.settings import load_config

kernels = native.compiled


def networks(resolution: int, channels: tuple[int, int], at: list[int], layout: str) -> tuple[Any, Any]:
    """G and D, in bfloat16 `at` these resolutions; channels are base and most."""
    torch.manual_seed(0)
    how: dict[str, Any] = {"resolution": resolution, "channel_base": channels[0], "channel_max": channels[1]}
    how |= {"low_precision": "bf16", "low_precision_at": at, "conv_clamp": 256.0}
    pair = NETWORKS["stylegan2"]
    nets = pair.G(mapping_layers=8, **how), pair.D(**how)
    return tuple(to_channels_last(net) if layout == "nhwc" else net for net in nets)  # type: ignore[return-value]  # two of them


class Step:
    """One training step of a pair of networks of its own."""

    def __init__(self, resolution: int, batch: int, channels: tuple[int, int], at: list[int], layout: str):
        self.G, self.D = networks(resolution, channels, at, layout)
        self.opts = [torch.optim.Adam(n.parameters(), lr=1e-4, betas=(0.0, 0.99), fused=True) for n in (self.G, self.D)]
        self.z, self.real = torch.randn(batch, 512), torch.randn(batch, 3, resolution, resolution)
        if layout == "nhwc":
            self.real = self.real.contiguous(memory_format=torch.channels_last)

    def __call__(self) -> None:
        self.D.requires_grad_(False)
        logistic_g(self.D(self.G(self.z))).mean().backward()
        self.finish(0)
        self.D.requires_grad_(True)
        with torch.no_grad():
            fake = self.G(self.z)
        logistic_d(self.D(self.real), self.D(fake)).mean().backward()
        self.finish(1)

    def finish(self, player: int) -> None:
        self.opts[player].step()
        self.opts[player].zero_grad()


class Generation:
    def __init__(self, resolution: int, _batch: int, channels: tuple[int, int], at: list[int], layout: str):
        self.G = networks(resolution, channels, at, layout)[0].eval()
        self.z = torch.randn(1, 512)

    @torch.inference_mode()
    def __call__(self) -> None:
        self.G(self.z)


def plainly(function):
    """The same with the reference operations."""

    def call() -> None:
        native.compiled = lambda x: None
        try:
            function()
        finally:
            native.compiled = kernels

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each group of rows")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {native.choose('cpu').why}")
    groups: dict[str, tuple[Any, int, int, tuple[int, int]]] = {
        "train 32": (Step, 32, 8, (4096, 128)),
        "train 256": (Step, 256, 2, (16384, 512)),
        "generate 1024": (Generation, 1024, 1, (32768, 512)),
    }
    rows = []
    for name, (make, resolution, batch, channels) in groups.items():
        if args.only not in name:
            continue
        overrides = [f"resolution={resolution}", f"train.batch={batch}", "run=none", "data.url=none"]
        overrides += [f"model.channel_base={channels[0]}", f"model.channel_max={channels[1]}", "train.total_kimg=1"]
        chosen, why = tuning.choose_precision(load_config(None, overrides), torch.device("cpu"))
        print(f"{name}: {why}")
        every = [2**i for i in range(3, 11)]
        t = bench.interleaved(
            {
                "reference": plainly(make(resolution, batch, channels, [], "nchw")),
                "fp32": make(resolution, batch, channels, [], "nhwc"),
                "bf16": make(resolution, batch, channels, every, "nhwc"),
                "auto": make(resolution, batch, channels, chosen, "nhwc"),
            },
            args.seconds,
            least=3,
        )
        for precision in ("fp32", "bf16", "auto"):
            row = {"case": f"{name} {precision}", "ratio": round(t["reference"] / t[precision], 3)}
            row |= {"ours_sec": round(t[precision], 3), "reference_sec": round(t["reference"], 3)}
            rows.append(row)
            print(f"{row['case']:24} {row['ours_sec']:8.3f} s  {row['reference_sec']:8.3f} s  {row['ratio']:6.2f}")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
