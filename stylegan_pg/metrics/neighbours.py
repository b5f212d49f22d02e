"""An image of samples beside their nearest real images, which shows whether a generator memorises its training data."""

from __future__ import annotations

from typing import Any

import torch

from stylegan_pg.data.classes import labels_to_c
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.images import tile
from stylegan_pg.inference.generate import images_of, latents
from stylegan_pg.metrics import base, gather
from stylegan_pg.metrics.base import Settings
from stylegan_pg.metrics.features import Extractor, load_extractor


def nearest_real(
    G: Any, index: DatasetIndex, settings: Settings, count: int, psi: float, nearest: int = 7
) -> torch.Tensor | None:
    """Return one image uint8 [C, H, W] on rank 0 and None on the other ranks. Each of its `count` rows shows a sample
    and the `nearest` real images with the smallest Euclidean distance of features. All ranks must call this function;
    the result does not depend on their number.

    Raises:
        UsageError: if the extractor cannot be loaded or does not return "pool".
    """
    table = index.table(G.resolution)
    nearest = min(nearest, len(table))
    with dist.together():
        extract = load_extractor(
            settings.extractor or "inception", settings.weights, settings.device, settings.precision
        )
        z, c = latents(range(count), G.z_dim), labels_to_c(G, None, count)
        samples = torch.cat(list(images_of(G, z, c, batch=settings.batch, psi=psi)))
        wanted = torch.cat([_pool(extract, part) for part in samples.split(settings.batch)])
        best, which = torch.empty([count, 0]), torch.empty([count, 0], dtype=torch.int64)
        for block in gather.own_blocks(len(table)):
            end = min((block + 1) * base.BLOCK, len(table))
            for part in torch.arange(block * base.BLOCK, end).split(settings.batch):
                distance = torch.cdist(wanted, _pool(extract, read_batch(table, part.tolist())))
                best, which = _nearest([(best, which), (distance, part.expand(count, -1))], nearest)
    parts, picture = dist.gather_on_main((best, which)), None
    with dist.main_decides():
        if parts is not None:
            _, which = _nearest(parts, nearest)
            rows = [torch.cat([samples[i : i + 1], read_batch(table, which[i].tolist())]) for i in range(count)]
            picture = tile(torch.cat(rows), nearest + 1)
    return picture


def _pool(extract: Extractor, images: torch.Tensor) -> torch.Tensor:
    """Return the features "pool" of images, [n, d]."""
    return gather.select_feature(extract(images), "pool", extract.identity)


def _nearest(parts: list[Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge several pairs (distances, ordinals), each [n, any number], into the `count` nearest. If distances are
    equal, the lower ordinals come first."""
    distances, ordinals = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
    first = ordinals.argsort(dim=1)
    distances, ordinals = distances.gather(1, first), ordinals.gather(1, first)
    distances, near = distances.sort(dim=1, stable=True)
    return distances[:, :count], ordinals.gather(1, near)[:, :count]
