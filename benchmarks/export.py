"""Exported generators against eager PyTorch on this CPU: `python benchmarks/export.py`.

StyleGAN2 with random weights and the channels of the published networks makes pictures of 64x64, 256x256 and 1024x1024,
one at a time. The columns are milliseconds per picture: `reference` is the generator in eager PyTorch with plain
operations, `kernels` the same with this package's kernels, and `export` the exported program, which ONNX Runtime
(onnx), PyTorch (torch: the graph of the .pt2 file as it is) or compiled code (aoti) runs on the same threads. `ratio`
is the reference's time over the export's, `kernels ratio` that of the kernels over it. Each number is the median of
runs that alternate between the three. `difference` is the largest difference of the images, as a share of their range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint.snapshot import load_snapshot, save_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.export.checking import check
from stylegan_pg.export.formats import FORMATS, converting
from stylegan_pg.export.program import Wanted, example, program_of, rebuilt
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.ops import native, plain_operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="onnx,torch,aoti")
    parser.add_argument("--sizes", default="64,256,1024")
    parser.add_argument("--network", default="stylegan2", help="stylegan2, stylegan, progan, stylegan3 or r3gan")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, kernels: {native.choose('cpu').name}")
    print(f"{'case':12} {'reference':>10} {'kernels':>10} {'export':>10} {'ratio':>7} {'kernels ratio':>14} difference")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, args.sizes.split(",")):
            for to in args.formats.split(","):
                row = measured(args.network, size, to, Path(folder), args.seconds)
                rows.append(row)
                times = " ".join(f"{row[name]:10.1f}" for name in ("reference_ms", "kernels_ms", "export_ms"))
                ratios = f"{row['ratio']:7.2f} {row['kernels_ratio']:14.2f} {row['difference']:11.1e}"
                print(f"{row['case']:12} {times} {ratios}", flush=True)
    for row in rows:
        print(json.dumps(row))


@torch.no_grad()
def measured(network: str, size: int, to: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One row."""
    path = folder / "G.safetensors"
    kwargs = NETWORKS[network].g_kwargs(MODELS[network](), NetworkShape(size, size, False, 3, 0, 4))
    torch.manual_seed(0)
    save_snapshot(path, NETWORKS[network].G(**kwargs), {"network": network, "kwargs": kwargs, "alpha": 1.0})
    G = load_snapshot(path)
    program, form = program_of(G, Wanted()), FORMATS[to]
    target = folder / f"G{form.suffix}"
    with converting(target.name):
        form.write(program, "cpu", target)
        run = form.load(target, "cpu")
    worst, _ = check(run, rebuilt(G, "fp32"), program, target.name)
    inputs = example(program, batch=1)

    def reference() -> None:
        with plain_operations():
            program(**inputs)

    functions = {"reference": reference, "kernels": lambda: program(**inputs), "export": lambda: run(inputs)}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["export"]) < 3:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - begin))
    found = {f"{name}_ms": round(statistics.median(each), 2) for name, each in times.items()}
    return {
        "case": f"{to} {size}",
        "ratio": round(found["reference_ms"] / found["export_ms"], 3),
        "kernels_ratio": round(found["kernels_ms"] / found["export_ms"], 3),
        **found,
        "difference": worst,
        "network": network,
    }


if __name__ == "__main__":
    main()
