"""One whole training step at 1024x1024, with every term, on the CPU, and the memory it took.

python tests/campaigns/full_size_steps.py [CONFIG fade|stable]: without arguments all architectures in both phases, each
in a process of its own (about half an hour on two cores).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

CASES = [
    (config, phase)
    for config in ("progan-celebahq1024", "stylegan-ffhq1024", "ffhq1024")
    for phase in ("fade", "stable")
]


class Index:
    """A stand-in for a dataset of RGB images without labels."""

    path, count, channels, label_names, base = "none", 1, 3, (), (4, 4)

    def table(self, resolution: int) -> SimpleNamespace:
        return SimpleNamespace(label=None)


def step(name: str, kind: str) -> dict[str, float]:
    """Return the seconds of one step on one image, and the peak memory of this process in GiB."""
    import torch

    from stylegan_pg.config.loading import load_config
    from stylegan_pg.config.schedule import phases
    from stylegan_pg.data.loader.loader import Batch
    from stylegan_pg.training.devices import Devices
    from stylegan_pg.training.engine import Engine
    from stylegan_pg.training.train_state import TrainState

    one = ["train.batch=1", "train.batch_at={}", "train.micro_batch=1", "train.micro_batch_at={}"]
    config = load_config(name, [*one, "train.device=cpu", "model.low_precision=fp32", "data.url=none"])
    last = [p for p in phases(config) if p.resolution == 1024 and p.fade == (kind == "fade")][-1]
    state = TrainState(config, Index(), Devices(config))  # type: ignore[arg-type]  # what a step needs of a DatasetIndex
    state.enter(last)
    state.nimg = last.start
    started = time.time()
    done = Engine(state).step(Batch({"image": torch.randint(0, 256, [1, 3, 1024, 1024], dtype=torch.uint8)}))
    assert not done.faults, done.faults
    stats = done.stats
    expected = {"loss_g", "loss_d"}.union(*(set(reports) for reports in reports_of(state.system)))
    assert expected <= stats.keys(), expected - stats.keys()
    return {"seconds": time.time() - started, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def reports_of(system) -> list[tuple[str, ...]]:
    from stylegan_pg.losses import TERMS

    return [TERMS[term.name].reports for term in system.terms]


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(step(*sys.argv[1:])))
        return
    for name, kind in CASES:
        done = subprocess.run([sys.executable, __file__, name, kind], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} {kind}: {done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:<24} {kind:<7} {result['seconds']:7.1f} s  {result['gib']:6.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
