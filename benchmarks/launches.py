"""The operations of one training step, each of which a GPU's host has to launch: `python benchmarks/launches.py`.

They are counted on the CPU (stylegan_pg/planning/operations.py), where the same ones are made; their number does not
depend on the numbers of channels and images. The backward pass of bias_act counts once; on a GPU it is two launches if
the sums of several parts of a tensor have to be added. `plain`: a step of G and one of D of StyleGAN2, with Adam and
the moving average, at a resolution. `lazy`: the same with R1 and path length regularisation. `progan` and `stylegan`:
those networks, with the terms that their configurations make at every step.
`transfers`: copies from the host to the device,
one of the pictures and one for each dtype of what is drawn, all made while the device computes the step before.
`host reads`: operations whose results the host waits for before it has started all of them; it reads losses and
gradients once, at the end of the step. `us/operation`: microseconds of this CPU's step for each of its operations; at
64x64, with these few channels, nearly all of it is what a GPU's host does, too. The ratio is 1,454 (at 64x64) or the
count of November 2026 (at 256x256) over the count.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple
from unittest.mock import patch

from engines import engine_of

from stylegan_pg.planning.operations import Operations, tensors_in

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


class Counts(NamedTuple):
    operations: Operations  # of a step
    reads: int  # by the host, before all operations of the step are started
    copies: int  # to the device that a GPU would need for the step
    seconds: float  # of a later step


def counted(resolution: int, keys: list[str]) -> Counts:
    """What the third step of a run takes."""
    small = ["model.channel_max=16", "model.channel_base=1024"]
    engine, step = engine_of(resolution, 4, "cpu", [*small, *keys])
    step()
    step()
    reads, start = list[int](), engine.start

    def observed(*given: Any) -> Any:
        made = start(*given)
        reads.append(len(operations.reads))
        return made

    # The next step's draws are made on the host.
    with Operations() as operations, patch.object(engine, "prepare"), patch.object(engine, "start", observed):
        step()
    drawn = {t.dtype for t in tensors_in(engine.draws.values)}  # what the step before has prepared for this one
    step()
    started = time.perf_counter()
    step()
    return Counts(operations, sum(reads), 1 + len(drawn), time.perf_counter() - started)


def main() -> None:
    rows = []
    print(f"{'case':<12} {'operations':>10} {'transfers':>10} {'host reads':>11} {'ratio':>6} {'us/operation':>13}")
    for case, (resolution, reference, keys) in CASES.items():
        found = counted(resolution, keys)
        number = len(found.operations.made)
        ratio, cost = reference / number, 1e6 * found.seconds / number
        print(f"{case:<12} {number:>10} {found.copies:>10} {found.reads:>11} {ratio:>6.2f} {cost:>13.1f}")
        row = {"case": case, "ratio": ratio, "operations": number, "transfers": found.copies}
        row |= {"host_reads": found.reads, "us_per_operation": round(cost, 1)}
        rows.append(row | {"most": dict(found.operations.counts().most_common(8))})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
