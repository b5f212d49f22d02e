"""A generator held against a dataset, by metric name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.data.index import SampleTable, load_index
from stylegan_pg.data.stream import one_hot, read_batch
from stylegan_pg.errors import UsageError
from stylegan_pg.generate import choose_device, images_of
from stylegan_pg.metrics.swd import PatchCollector, sliced_wasserstein
from stylegan_pg.rng import derive, generator
from stylegan_pg.snapshot import load_snapshot

NAMES = ("swd",)


def check_names(names: Sequence[str]) -> None:
    """Raises UsageError for a metric that does not exist."""
    for name in names:
        if name not in NAMES:
            raise UsageError(f"unknown metric {name!r}: choose from {', '.join(NAMES)}")


class SlicedWasserstein:
    """Sliced Wasserstein distance to one dataset at one resolution; the real side is computed once.

    `images` real ones (fewer if the dataset is smaller) are a random choice that follows from `seed`, and so are the
    latents; the training's own random streams are not touched.
    """

    def __init__(self, table: SampleTable, images: int, seed: int = 0):
        self.table, self.seed = table, seed
        self.images = min(images, len(table))
        order = torch.randperm(len(table), generator=generator(seed, "swd-real"))
        self.ordinals = order[: self.images].tolist()
        self._real: dict[int, torch.Tensor] | None = None

    def _collector(self, side: str) -> PatchCollector:
        return PatchCollector(self.table.resolution, self.table.channels, seed=derive(self.seed, side))

    def __call__(self, G: Any, *, batch: int = 32, psi: float = 1.0, **how) -> dict[str, float]:
        """{"swd_64": ..., "swd_32": ..., "swd": mean}, times 1000, for images of G at truncation psi."""
        if self._real is None:
            real = self._collector("real")
            for i in range(0, self.images, 256):
                real.add(read_batch(self.table, self.ordinals[i : i + 256]))
            self._real = real.descriptors()
        fake = self._collector("fake")
        z = torch.randn([self.images, G.z_dim], generator=generator(self.seed, "swd-z"))
        c = None
        if G.c_dim:
            c = one_hot(self.table.label[self.ordinals], G.c_dim)
        for images in images_of(G, z, c, batch=batch, psi=psi, **how):
            fake.add(images)
        return sliced_wasserstein(self._real, fake.descriptors(), seed=self.seed)


def evaluate_snapshot(
    snapshot: Path, data: str, *, names: Sequence[str], images: int, psi: float, batch: int, device: str
) -> dict[str, float | int | str]:
    """Measure a snapshot against a packed dataset: {"snapshot", "resolution", "images", "psi", metric: value, ...}.

    Raises:
        UsageError: unknown metrics, unreadable snapshots or datasets, or ones that do not fit together.
    """
    check_names(names)
    G = load_snapshot(snapshot, choose_device(device))
    index = load_index(data)
    if index.channels != G.img_channels:
        raise UsageError(f"{snapshot} makes images of {G.img_channels} channels, {data} has {index.channels}")
    if G.c_dim and len(index.label_names) != G.c_dim:
        raise UsageError(f"{snapshot} knows {G.c_dim} classes, {data} has {len(index.label_names)}")
    distance = SlicedWasserstein(index.table(G.resolution), images)
    values = distance(G, batch=batch, psi=psi)
    return {
        "snapshot": str(snapshot),
        "resolution": G.resolution,
        "images": distance.images,
        "psi": psi,
        **values,
    }
