"""The scaling of training: `python benchmarks/scaling.py` (about seven minutes; the part about links needs root and
`ip`).

`32 ...`, `64 ...`: 2 processes of 1 thread compared with 1 process of 2 threads and 1 process of 1 thread, with the
same global batch at two image sizes. `ratio` is the time of a step of the single process divided by that of the two
processes. `link ... mbit`: two hosts (network namespaces) with a link of that speed. `ratio` is the time of a step that
the model of `stylegan-pg plan` predicts (stylegan_pg/planning/scaling.py, from the computation measured without a
limit, the bytes of the parameters, and the overlap), divided by the measured time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import clusters
import harness
from measuring import packed

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.planning import scaling
from stylegan_pg.planning.cost import cost_of

SIZES = {32: {"train__batch": 16, "model__channel_max": 64}, 64: {"train__batch": 16, "model__channel_max": 32}}
LINKS = (40, 200)  # Mbit/s
STEPS = 16


def arguments(run: Path, data: Path, resolution: int, **changes: object) -> list[str]:
    """Return a `train` command at one resolution, with R1 and path length, which logs every step to stats.jsonl."""
    size: dict[str, Any] = SIZES[resolution]
    kimg = size["train__batch"] / 1000
    how = {"resolution": resolution, "growth__start": "null", "model__channel_base": 4096, "output__grid_kimg": 0}
    how |= {"output__tick_kimg": kimg, "train__total_kimg": STEPS * kimg, "checkpoint__every_kimg": 1000}
    how |= {"train__check_ranks_every": 1000, "model__noise": "false", "data__workers": 0}
    return harness.arguments(run, data, **(how | size | changes))


def step_seconds(run: Path) -> float:
    """Return the median time of a pair of steps in the second half of a run. Every second step has the lazy terms."""
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    at = [line["elapsed_sec"] for line in lines]
    return statistics.median(b - a for a, b in zip(at[len(at) // 2 : -2], at[len(at) // 2 + 2 :], strict=True)) / 2


def processes(folder: Path, data: Path, resolution: int, rounds: int) -> list[dict[str, Any]]:
    ways = {"2 of 1 thread": (2, 1), "1 of 2 threads": (0, 2), "1 of 1 thread": (0, 1)}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for k in range(rounds):
        for way, (ranks, threads) in ways.items():
            run = folder / f"{resolution}-{way.replace(' ', '')}-{k}"
            args = arguments(run, data, resolution, train__threads=threads)
            environment = harness.environment() | {"OMP_NUM_THREADS": str(threads)}
            harness.finish(harness.start(args, ranks=ranks, env=environment), timeout=600)
            found[way].append(step_seconds(run))
    ours = found.pop("2 of 1 thread")
    return [
        {
            "case": f"{resolution} 2 of 1 thread against {way}",
            "ratio": round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 3),
            "ms": round(1000 * statistics.median(ours), 1),
            "other_ms": round(1000 * statistics.median(theirs), 1),
        }
        for way, theirs in found.items()
    ]


def links(folder: Path, data: Path) -> list[dict[str, Any]]:
    """Measure steps of two hosts without a limit of the link, and over slow links."""
    measured: dict[int, float] = {}
    for rate in (0, *LINKS):
        run, where = folder / f"link{rate}", folder / f"hosts{rate}"
        where.mkdir()
        hosts = clusters.Hosts(2, where)
        try:
            if rate:
                hosts.limit(1, f"{rate}mbit")
            args = arguments(run, data, 32, train__threads=1, train__bucket_mib=0.5)[1:]
            for i in range(2):
                hosts.start(i, str(clusters.LAUNCH / "torchrun.sh"), *args)
            hosts.join(timeout=600)
        finally:
            hosts.close()
        measured[rate] = step_seconds(run)
    config = load_config(str(folder / "link0.yaml"), arguments(folder / "link0", data, 32, train__bucket_mib=0.5)[2:])
    phase = phases(config)[0]
    cost = cost_of(config, phase, 3, 0)
    flops = phase.batch / 2 * cost.flops_per_image / measured[0]  # the effective FLOP/s of each host
    rows = []
    for rate in LINKS:
        expected = scaling.step(config, phase, cost, 2, flops, scaling.Link(rate * 1e6, 1e-4))
        row = {"case": f"link {rate} mbit", "ratio": round(expected.seconds / measured[rate], 3)}
        row |= {"ms": round(1000 * measured[rate], 1), "model_ms": round(1000 * expected.seconds, 1)}
        rows.append(row | {"unlimited_ms": round(1000 * measured[0], 1)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="processes or links")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def report(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        for row in more:
            print(f"{row['case']:40} " + "  ".join(f"{k} {v}" for k, v in row.items() if k != "case"), flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, data = packed(folder, 64)
        if args.only in "processes":
            for resolution in SIZES:
                report(processes(folder, data, resolution, args.rounds))
        if args.only in "links":
            if why := clusters.Hosts.missing():
                print(f"links are left out: {why}", flush=True)
            else:
                report(links(folder, data))
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
