"""The operations of one training step, each of which a GPU's host has to launch: `python benchmarks/launches.py`.

They are counted on the CPU (stylegan_pg/planning/operations.py), where the same ones are made; their number does not
depend on the numbers of channels and images. `plain`: a step of G and one of D of StyleGAN2, with Adam and the moving
average, at a resolution. `lazy`: the same with R1 and path length regularisation. `progan` and `stylegan`: those
networks, with the terms that their configurations make at every step. `transfers`: copies between host and device.
`host reads`: operations whose results the host waits for. The ratio is 1,454 (at 64x64) or the count of November 2026
(at 256x256) over the count.
"""

from __future__ import annotations

import json

import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.points import load_points
from stylegan_pg.data.loader.loader import Batch
from stylegan_pg.planning.operations import Operations
from stylegan_pg.systems.gan import GAN
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.train_state import TrainState

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


class Pictures:
    """As much of a dataset as a training state asks for."""

    path, count, channels, base, label_names, fields, others = "none", 1, 3, (4, 4), (), {}, {}

    def table(self, resolution: int):
        return load_points("points:ring").table(4)


def counted(resolution: int, keys: list[str]) -> Operations:
    """The operations of the third step of a run."""
    given = f"run=none data.url=none resolution={resolution} train.batch=4 train.total_kimg=1000 train.device=cpu"
    small = ["model.channel_max=16", "model.channel_base=1024"]
    config = load_config(None, [*given.split(), *small, *keys])
    state = TrainState(config, Pictures(), Devices(config), GAN(config))  # type: ignore[arg-type]  # see Pictures
    state.enter(phases(config)[0])
    engine, images = Engine(state), torch.zeros([4, 3, resolution, resolution], dtype=torch.uint8)
    for _ in range(2):
        engine.step(Batch({"image": images}))
    with Operations() as operations:
        engine.step(Batch({"image": images}))
    return operations


def main() -> None:
    rows = []
    print(f"{'case':<12} {'operations':>10} {'transfers':>10} {'host reads':>11} {'ratio':>6}")
    for case, (resolution, reference, keys) in CASES.items():
        found = counted(resolution, keys)
        number, reads = len(found.made), len(found.reads)
        ratio = reference / number
        print(f"{case:<12} {number:>10} {len(found.transfers):>10} {reads:>11} {ratio:>6.2f}")
        row = {"case": case, "ratio": ratio, "operations": number, "transfers": len(found.transfers)}
        rows.append(row | {"host_reads": reads, "most": dict(found.counts().most_common(8))})
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
