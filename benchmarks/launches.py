"""The operations of one training step, each of which a GPU's host has to launch: `python benchmarks/launches.py`.

They are counted on the CPU (stylegan_pg/planning/operations.py), where the same ones are made; their number does not
depend on the numbers of channels and images. `plain`: a step of G and one of D of StyleGAN2, with Adam and the moving
average, at a resolution. `lazy`: the same with R1 and path length regularisation. `progan` and `stylegan`: those
networks, with the terms that their configurations make at every step. `transfers`: copies between host and device.
`host reads`: operations whose results the host waits for. `us/operation`: microseconds of this CPU's step for each of
its operations; at 64x64, with these few channels, nearly all of it is what a GPU's host does, too. The ratio is 1,454
(at 64x64) or the count of November 2026 (at 256x256) over the count.
"""

from __future__ import annotations

import json
import time

from engines import engine_of

from stylegan_pg.planning.operations import Operations

PLAIN = ["loss.r1_gamma=0", "loss.pl_weight=0"]
LAZY = ["loss.r1_every=1", "loss.pl_every=1"]
WGAN_GP = ["loss.objective=wgan", "loss.terms=[{name: gradient_penalty, weight: 10}, {name: drift, weight: 0.001}]"]
CASES = {  # name: (resolution, reference count, keys)
    "plain 64": (64, 1454, PLAIN),
    "plain 256": (256, 1896, PLAIN),
    "lazy 256": (256, 4297, LAZY),
    "progan 64": (64, 1454, ["model=progan", *PLAIN, *WGAN_GP]),
    "stylegan 64": (64, 1454, ["model=stylegan", "loss.pl_weight=0", "loss.r1_every=1"]),
}


def counted(resolution: int, keys: list[str]) -> tuple[Operations, float]:
    """The operations of the third step of a run, and the seconds that a later one takes."""
    small = ["model.channel_max=16", "model.channel_base=1024"]
    _, step = engine_of(resolution, 4, "cpu", [*small, *keys])
    step()
    step()
    with Operations() as operations:
        step()
    started = time.perf_counter()
    step()
    return operations, time.perf_counter() - started


def main() -> None:
    rows = []
    print(f"{'case':<12} {'operations':>10} {'transfers':>10} {'host reads':>11} {'ratio':>6} {'us/operation':>13}")
    for case, (resolution, reference, keys) in CASES.items():
        found, seconds = counted(resolution, keys)
        number, reads = len(found.made), len(found.reads)
        ratio, cost = reference / number, 1e6 * seconds / number
        print(f"{case:<12} {number:>10} {len(found.transfers):>10} {reads:>11} {ratio:>6.2f} {cost:>13.1f}")
        row = {"case": case, "ratio": ratio, "operations": number, "transfers": len(found.transfers)}
        row |= {"host_reads": reads, "us_per_operation": round(cost, 1)}
        rows.append(row | {"most": dict(found.counts().most_common(8))})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
