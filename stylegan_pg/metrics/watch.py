"""A watch for collapse and memorisation during training, which costs little enough to be on by default.

A few hundred samples of fixed latents are reduced to thumbnails and compared with thumbnails of real pictures. How near
is near follows from the real pictures themselves: it is a share (NEAR) of the median distance between a real picture
and the nearest other one. Samples that are so near to one another are near-duplicates, which a collapsed generator
makes; samples that are so near to a real picture are copies, which a memorising one makes. The same shares among the
real pictures themselves are subtracted, so that a dataset with duplicates gives no alarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stylegan_pg.config import Config
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.images.decode import MODES
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.images import over_white
from stylegan_pg.inference.generate import images_of
from stylegan_pg.rng import generator

SAMPLES = 256
REALS = 2048  # pictures that samples are compared with, at most
SIDE = 32  # of a thumbnail
NEAR = 0.3  # of the median distance between a real picture and the nearest other one
MANY = 0.25  # share of near-duplicates or copies from which on there is a warning
FEWEST = 16  # real pictures; fewer say nothing about distances


class Signs(NamedTuple):
    """What a comparison of samples with real pictures gives.

    nearest: the median distance from a sample to the nearest real picture, divided by that from a real picture to the
        nearest other one. duplicates: share of the samples that are near another sample, above that share among as
        many real pictures. copies: the same of samples that are near a real picture, as estimated for the whole dataset
        if only some of its pictures are compared.
    """

    nearest: float
    duplicates: float
    copies: float

    def warning(self) -> str:
        """What is wrong, and what may help; "" if nothing is."""
        found = []
        if self.duplicates >= MANY:
            found.append(
                f"collapse: {self.duplicates:.0%} of the samples nearly equal another one (a larger weight of R1, "
                "minibatch discrimination or the term diversity may help)"
            )
        if self.copies >= MANY:
            found.append(
                f"memorisation: {self.copies:.0%} of the samples nearly equal a real picture (more pictures or "
                "augment.mode=ada may help)"
            )
        return "; ".join(found)


def thumbnails(images: torch.Tensor) -> torch.Tensor:
    """uint8 [n, C, H, W] -> float32 [n, values], pictures of at most SIDE pixels per side, by the mean of areas."""
    small = over_white(images).float()
    if max(small.shape[2:]) > SIDE:
        scale = SIDE / max(small.shape[2:])
        small = F.adaptive_avg_pool2d(small, [max(round(side * scale), 1) for side in small.shape[2:]])
    return small.flatten(1)


def nearest(values: torch.Tensor, others: torch.Tensor, same: bool = False) -> torch.Tensor:
    """The distance [n] from each of values [n, d] to the nearest of others [m, d]; if they are the `same`, in that the
    first n of those are the values, to the nearest other one."""
    distance = torch.cdist(values, others, compute_mode="donot_use_mm_for_euclid_dist")
    if same:
        distance[:, : len(values)].fill_diagonal_(torch.inf)
    return distance.min(dim=1).values


def compare(samples: torch.Tensor, reals: torch.Tensor, count: int, mirror: bool = False, width: int = 0) -> Signs:
    """Look for signs of collapse and memorisation.

    Args:
        samples: thumbnails [n, values] of generated pictures. reals: [m, values] of real ones, m at least n.
        count: pictures of the dataset. mirror: compare with mirrored real pictures, too, which are `width` pixels wide.
    """
    known = reals
    if mirror:
        known = torch.cat([reals, reals.unflatten(1, (-1, width)).flip(2).flatten(1)])
    some = reals[: len(samples)]
    usual = nearest(some, reals, same=True)
    near = NEAR * float(usual.median())

    def share(distances: torch.Tensor, of_real: torch.Tensor) -> float:
        return float((distances < near).double().mean() - (of_real < near).double().mean())

    to_real = nearest(samples, known)
    duplicates = share(nearest(samples, samples, same=True), nearest(some, some, same=True))
    copies = share(to_real, usual) * count / len(reals)
    ratio = float(to_real.median()) / max(float(usual.median()), 1e-9)
    return Signs(ratio, max(duplicates, 0.0), min(max(copies, 0.0), 1.0))


class Watch:
    """The watch of one run. The real pictures are the first ones that the run is shown, which are read once for each
    resolution."""

    def __init__(self, config: Config, index: DatasetIndex):
        self.config, self.index = config, index
        self.known: tuple[int, Sequence[int], torch.Tensor] | None = None  # resolution, ordinals, thumbnails

    def possible(self, G: Any) -> bool:
        """Whether the dataset has pictures, and enough of them, and a generator makes such pictures of latents."""
        channels = self.index.channels
        alike = getattr(G, "img_channels", channels) == channels and hasattr(G, "z_dim")
        return alike and channels in MODES and self.index.count >= FEWEST

    def reals(self, resolution: int) -> tuple[Sequence[int], torch.Tensor]:
        """Ordinals and thumbnails of real pictures."""
        if self.known is None or self.known[0] != resolution:
            order = self.index.order(self.config.seed, self.config.data.window)
            shown = (order.at(n)[1] for n in range(min(REALS, self.index.count)))
            ordinals, table = list(dict.fromkeys(shown)), self.index.table(resolution)
            parts = [thumbnails(read_batch(table, ordinals[i : i + 64])) for i in range(0, len(ordinals), 64)]
            self.known = resolution, ordinals, torch.cat(parts)
        return self.known[1:]

    def look(self, G: Any, resolution: int, alpha: float, conditions: Conditions | None) -> Signs:
        """Compare samples of a generator with real pictures. It is the same on any number of ranks, one of which calls
        it.

        Args:
            G: a generator, such as G_ema. alpha: of the fade. conditions: those of the real images.

        Raises:
            OSError, RunError: a picture cannot be read, or the images are not finite.
        """
        ordinals, reals = self.reals(resolution)
        count = min(SAMPLES, len(reals))
        z = torch.randn([count, G.z_dim], generator=generator(self.config.seed, "watch"))
        c = None if conditions is None else conditions.at(ordinals[:count])
        batch = max(1, min(32, 2**20 // (reals.shape[1] * (resolution // SIDE + 1) ** 2)))
        samples = torch.cat([thumbnails(images) for images in images_of(G, z, c, batch=batch, alpha=alpha)])
        size = self.index.size_at(resolution)
        width = size[1] if max(size) <= SIDE else max(round(size[1] * SIDE / max(size)), 1)
        return compare(samples, reals, self.index.count, self.config.data.mirror, width)
