"""Training engines without a dataset, for benchmarks of single steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases
from stylegan_pg.data.datasets.points import load_points
from stylegan_pg.data.loader.loader import Batch
from stylegan_pg.systems.gan import GAN
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.engine import Engine
from stylegan_pg.training.replay import graphs_of
from stylegan_pg.training.train_state import TrainState


class Pictures:
    """As much of a dataset as a training state asks for."""

    path, count, channels, base, label_names, fields, others = "none", 1, 3, (4, 4), (), {}, {}

    def table(self, resolution: int):
        return load_points("points:ring").table(4)


def engine_of(
    resolution: int, batch: int, device: str, keys: Sequence[str], recipe: str | None = None
) -> tuple[Engine, Callable[[], None]]:
    """An engine at full resolution, and a function that makes a training step on pictures of noise.

    Args:
        keys: overrides of the configuration, such as "model=progan".
        recipe: the name of one in configs/; None: the default configuration.
    """
    given = f"run=none data.url=none resolution={resolution} train.batch={batch} train.device={device}"
    config = load_config(recipe, [*given.split(), "train.total_kimg=1000", *keys])
    state = TrainState(config, Pictures(), Devices(config), GAN(config))  # type: ignore[arg-type]  # see Pictures
    state.enter(phases(config)[-1])
    engine = Engine(state, graphs_of(config.train.graphs, state.device))
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, [batch, 3, resolution, resolution], dtype=torch.uint8, generator=numbers)
    images = images.pin_memory() if device == "cuda" else images

    def step() -> None:
        outcome = engine.step(Batch({"image": images}))
        for line in (*outcome.notes, *outcome.faults):
            print(f"note: {line}")

    return engine, step
