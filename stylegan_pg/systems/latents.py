"""What the generator is given for a batch: latents, labels and mixing cut-offs that follow from what they are for.

Every rank draws the global batch and takes its share, so that a run does not depend on how many ranks there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from stylegan_pg.data.classes import one_hot
from stylegan_pg.rng import generator


class Draw(NamedTuple):
    """For a global batch or a share of it."""

    z: torch.Tensor  # [n, z_dim]
    z_mix: torch.Tensor | None  # [n, z_dim], the second latent of style mixing
    cutoff: torch.Tensor | None  # [n], the first layer that takes it
    c: torch.Tensor | None  # [n, c_dim]

    def pick(self, indices: list[int], device: torch.device, dtype: torch.dtype) -> Draw:
        def take(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t[indices].to(device, dtype if t.is_floating_point() else t.dtype)

        return Draw(*map(take, self))  # type: ignore[arg-type]  # z is never None


def draw(key: tuple[int, str, int], count: int, G: Any, mixing: float, labels: Any = None, classes: int = 0) -> Draw:
    """A global batch of `count` from the random stream `key` = (seed, purpose, nimg).

    Args:
        G: its z_dim and num_ws decide the shapes; a generator with one w has nothing to mix.
        mixing: probability of two latents per image (Karras et al. 2019, section 3.1).
        labels: the real images' class numbers [images], which the labels are drawn from; with `classes` 0 there are
            none.
    """
    g = generator(*key)
    z = torch.randn([count, G.z_dim], generator=g)
    z_mix = cutoff = c = None
    if mixing > 0 and G.num_ws > 1:
        z_mix = torch.randn(z.shape, generator=g)
        cutoff = torch.randint(1, G.num_ws, [count], generator=g)
        mixed = torch.rand([count], generator=g) < mixing
        cutoff = torch.where(mixed, cutoff, G.num_ws)
    if classes:
        ordinals = torch.randint(len(labels), [count], generator=g)
        c = one_hot(labels[ordinals.numpy()], classes)
    return Draw(z, z_mix, cutoff, c)


def styles(G: Any, x: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """ws [n, num_ws, w_dim], mixed where x says so, and the w [n, w_dim] of the first latent."""
    w = G.mapping(x.z, x.c)
    ws = w[:, None].expand(-1, G.num_ws, -1)
    if x.z_mix is not None and x.cutoff is not None:
        second = G.mapping(x.z_mix, x.c)[:, None]
        layer = torch.arange(ws.shape[1], device=ws.device)[None, :, None]
        ws = torch.where(layer < x.cutoff[:, None, None], ws, second)
    return ws, w
