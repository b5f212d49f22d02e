"""Training steps and generation on this CPU (or GPU: --device cuda), with the fused kernels and without.

`train 256`: the main steps of G and D, batch 2, channel_base 16384. `generate 1024`: one image, channel_base 32768. The
reference is the same computation (matrix-product demodulation, fused Adam) with plain PyTorch operations, NCHW and
fp32, and with two passes of D for real and generated images, where training makes one. It is compared with
channels_last and the kernels, in fp32, with all blocks in bf16, and with the blocks in bf16 that
model.low_precision=auto selects on this machine. `train 32`: a small network, batch 8, 128 channels. `r3gan 64`: steps
of R3GAN with R1 and R2, batch 8, 128 channels; its reference computes the penalties in passes of their own, and grouped
convolutions by F.conv2d. `stylegan3 64`: steps of StyleGAN3's config T, batch 4, 128 channels; the reference composes
the filtered leaky ReLU of separate operations. `ratio` is the time of the reference divided by that of the kernels.
With --device cuda, batches are 32 at 256 and for StyleGAN3, 4 and 8 at 1024, 64 with 768 channels in `r3gan 64`, there
is `train 1024`, and `fp16` replaces auto. `stylegan3 256 memory` compares the memory that a step of batch 2 needs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F

from stylegan_pg.config import R3GANConfig
from stylegan_pg.config.loading import load_config
from stylegan_pg.losses.objectives import logistic_d, logistic_g, relativistic_d, relativistic_g
from stylegan_pg.losses.terms import r1, squared_norms
from stylegan_pg.networks import NETWORKS, NetworkShape, layers, to_channels_last
from stylegan_pg.ops import bench, native
from stylegan_pg.training import autotune

kernels, grouped = native.compiled, layers.grouped_conv


class Size(NamedTuple):
    resolution: int
    batch: int
    base: int
    most: int
    pair: str = "stylegan2"


class Networks:
    """Build G, D and a batch. `low` is the precision at the resolutions `at`; `channels` are (base, maximum)."""

    family, mapping_layers = "stylegan2", 8

    def __init__(self, size: Size, low: str, at: list[int], layout: str, device: str):
        torch.manual_seed(0)
        nets = [net.to(device) for net in self.pair(size, low, at)]
        self.G: Any
        self.D: Any
        self.G, self.D = [to_channels_last(net) if layout == "nhwc" else net for net in nets]
        self.layout = layout
        self.z = torch.randn(size.batch, self.G.z_dim, device=device)
        self.real = torch.randn(size.batch, 3, size.resolution, size.resolution, device=device)
        if layout == "nhwc":
            self.real = self.real.contiguous(memory_format=torch.channels_last)

    def pair(self, size: Size, low: str, at: list[int]) -> list[Any]:
        how: dict[str, Any] = {"resolution": size.resolution, "channel_base": size.base, "channel_max": size.most}
        how |= {"low_precision": low, "low_precision_at": at, "conv_clamp": 256.0}
        pair = NETWORKS[self.family]
        return [pair.G(mapping_layers=self.mapping_layers, **how), pair.D(**how)]


class Step(Networks):
    """One training step."""

    def __init__(self, *how: Any):
        super().__init__(*how)
        self.opts = [torch.optim.Adam(n.parameters(), lr=1e-4, betas=(0.0, 0.99), fused=True) for n in (self.G, self.D)]

    def __call__(self) -> None:
        self.D.requires_grad_(False)
        logistic_g(self.D(self.G(self.z))).mean().backward()
        self.finish(0)
        self.D.requires_grad_(True)
        with torch.no_grad():
            fake = self.G(self.z)
        if self.layout == "nhwc":  # as in training
            real_scores, fake_scores = self.D(torch.cat([self.real, fake]), batches=2).chunk(2)
        else:
            real_scores, fake_scores = self.D(self.real), self.D(fake)
        logistic_d(real_scores, fake_scores).mean().backward()
        self.finish(1)

    def finish(self, player: int) -> None:
        self.opts[player].step()
        self.opts[player].zero_grad()


class R3GANStep(Step):
    """One training step of R3GAN."""

    family = "r3gan"

    def pair(self, size: Size, low: str, at: list[int]) -> list[Any]:
        model = R3GANConfig(z_dim=64, channel_base=size.base, channel_max=size.most)
        shape, pair = NetworkShape(size.resolution, size.resolution, False, 3, 0, 1), NETWORKS["r3gan"]
        how = {"low_precision": low, "low_precision_at": at}
        return [pair.G(**pair.g_kwargs(model, shape) | how), pair.D(**pair.d_kwargs(model, shape) | how)]

    def __call__(self) -> None:
        self.D.requires_grad_(False)
        fake = self.D(self.G(self.z))
        with torch.no_grad():
            real = self.D(self.real)
        relativistic_g(fake, real).mean().backward()
        self.finish(0)
        self.D.requires_grad_(True)
        with torch.no_grad():
            generated = self.G(self.z)
        images = [t.detach().requires_grad_(True) for t in (self.real, generated)]
        if self.layout == "nhwc":  # as in training
            scores = [self.D(t) for t in images]
            penalties = squared_norms(scores, images)
            (relativistic_d(*scores)[:, 0] + sum(penalties)).mean().backward()
        else:
            relativistic_d(self.D(self.real), self.D(generated)).mean().backward()
            for t in images:
                r1(self.D(t), t).mean().backward()
        self.finish(1)


class StyleGAN3Step(Step):
    family, mapping_layers = "stylegan3", 2


class Generation(Networks):
    @torch.inference_mode()
    def __call__(self) -> None:
        self.G.eval()(self.z)


def plainly(function):
    """Return the same function with the reference operations."""

    def call() -> None:
        native.compiled, layers.grouped_conv = lambda x: None, F.conv2d
        try:
            function()
        finally:
            native.compiled, layers.grouped_conv = kernels, grouped

    return call


GROUPS: dict[str, dict[str, tuple[Any, Size]]] = {
    "cpu": {
        "train 32": (Step, Size(32, 8, 4096, 128)),
        "train 256": (Step, Size(256, 2, 16384, 512)),
        "r3gan 64": (R3GANStep, Size(64, 8, 4096, 128)),
        "stylegan3 64": (StyleGAN3Step, Size(64, 4, 4096, 128)),
        "generate 1024": (Generation, Size(1024, 1, 32768, 512)),
    },
    "cuda": {
        "train 256": (Step, Size(256, 32, 16384, 512)),
        "train 1024": (Step, Size(1024, 4, 32768, 512)),
        "r3gan 64": (R3GANStep, Size(64, 64, 24576, 768)),
        "stylegan3 64": (StyleGAN3Step, Size(64, 32, 16384, 512)),
        "generate 1024": (Generation, Size(1024, 8, 32768, 512)),
    },
}


MEMORY = Size(256, 2, 16384, 512)  # of `stylegan3 256 memory`


def peak(kernels_used: bool) -> float:
    """MiB that a training step of StyleGAN3 on the CPU needs beside the networks, Adam's moments included."""
    step = StyleGAN3Step(MEMORY, "bf16", [], "nhwc" if kernels_used else "nchw", "cpu")
    native.choose("cpu")
    before = psutil.Process().memory_info().rss
    (step if kernels_used else plainly(step))()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def memory_row() -> dict[str, Any]:
    """The memory of a step with the reference operations divided by that with the kernels, each in a new process."""
    found = []
    for which in ("ours", "reference"):
        given = [sys.executable, __file__, "--peak", which]
        found.append(float(subprocess.run(given, check=True, capture_output=True, text=True).stdout))
    ours, plain = found
    return {
        "case": "stylegan3 256 memory fp32",
        "ratio": round(plain / ours, 3),
        "ours_mib": ours,
        "reference_mib": plain,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=[*GROUPS], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each group of rows")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--peak", choices=["ours", "reference"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak == "ours"))
        return
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True  # as in training
    print(f"torch {torch.__version__}, {args.threads} threads, {native.choose(args.device).reason}")
    rows = []
    for name, (make, size) in GROUPS[args.device].items():
        if args.only not in name:
            continue
        every = [2**i for i in range(3, 11)]
        variants = {"fp32": ("bf16", []), "bf16": ("bf16", every)}
        if args.device == "cuda":
            variants["fp16"] = ("fp16", every)
        else:
            overrides = [f"resolution={size.resolution}", f"train.batch={size.batch}", "run=none", "data.url=none"]
            overrides += [f"model.name={make.family}", "loss.pl_weight=0"]
            overrides += [f"model.channel_base={size.base}", f"model.channel_max={size.most}", "train.total_kimg=1"]
            chosen, why = autotune.choose_precision(load_config(None, overrides), torch.device("cpu"))
            print(f"{name}: {why}")
            variants["auto"] = ("bf16", chosen)
        runs = {k: make(size, low, at, "nhwc", args.device) for k, (low, at) in variants.items()}
        runs["reference"] = plainly(make(size, "bf16", [], "nchw", args.device))
        t = bench.median_times(runs, args.seconds, 3, args.device)
        for precision in variants:
            row = {"case": f"{name} {precision}", "ratio": round(t["reference"] / t[precision], 3)}
            row |= {"ours_sec": round(t[precision], 4), "reference_sec": round(t["reference"], 4)}
            row["img_per_sec"] = round(size.batch / t[precision], 1)
            rows.append(row)
            print(f"{row['case']:24} {row['ours_sec']:9.4f} s  {row['reference_sec']:9.4f} s  {row['ratio']:6.2f}")
    if args.device == "cpu" and args.only in "stylegan3 256 memory":
        rows.append(row := memory_row())
        print(f"{row['case']:24} {row['ours_mib']:7.0f} MiB {row['reference_mib']:9.0f} MiB  {row['ratio']:6.2f}")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
