"""Codes of pictures, as the encoder of a snapshot of the family `codes` computes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from stylegan_pg.data.datasets.opening import load_index
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.errors import UsageError


class Codes(NamedTuple):
    """Codes of a dataset's pictures, in the order of the dataset."""

    codes: torch.Tensor  # float32 [N, z_dim]
    classes: torch.Tensor  # int64 [N], -1 without a class


@torch.no_grad()
def codes_of(G: Any, data: str, *, batch: int = 256) -> Codes:
    """The codes of all pictures of a packed dataset.

    Args:
        G: what load_snapshot returns. data: the dataset, as data.url names it. batch: pictures at a time.

    Raises:
        UsageError: the generator has no encoder, or the dataset does not fit it. RunError, OSError: it cannot be read.
    """
    if not hasattr(G, "encode"):
        raise UsageError("this generator has no encoder: take a snapshot of a run with model.name=codes")
    rows, columns = G.img_size
    index = load_index(data, (rows * 4 // G.resolution, columns * 4 // G.resolution))
    if G.resolution not in index.resolutions or index.channels != G.img_channels:
        raise UsageError(
            f"the generator encodes pictures of resolution {G.resolution} with {G.img_channels} channels, and "
            f"{index.path} has resolutions {', '.join(map(str, index.resolutions))} with {index.channels}"
        )
    table, place = index.table(G.resolution), next(G.parameters())

    def encoded() -> Iterator[torch.Tensor]:
        for i in range(0, len(table), batch):
            images = read_batch(table, list(range(i, min(i + batch, len(table)))))
            yield G.encode(images.to(place.device, place.dtype) / 127.5 - 1).float().cpu()

    return Codes(torch.cat([*encoded()]), torch.from_numpy(table.label.astype(np.int64)))
