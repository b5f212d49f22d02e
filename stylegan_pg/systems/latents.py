"""Inputs of a generator: latents, conditions and the cut-offs of style mixing, functions of (seed, purpose, nimg).

Every rank draws them for the global batch and takes its rows, so a run does not depend on how many ranks there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from stylegan_pg.data.conditions import Conditions


class Latents(NamedTuple):
    """Of a global batch, or of some of its images."""

    z: torch.Tensor  # [n, z_dim]
    z_mix: torch.Tensor | None  # [n, z_dim], the second latent of style mixing
    cutoff: torch.Tensor | None  # [n], the first layer that takes it
    c: torch.Tensor | None  # [n, c_dim]


def draw(g: torch.Generator, count: int, G: Any, mixing: float = 0.0, conditions: Conditions | None = None) -> Latents:
    """Latents of a global batch.

    Args:
        g: the random stream to draw from.
        count: images of the batch.
        G: its z_dim, and where it has ws its num_ws, decide the shapes.
        mixing: probability of two latents per image (Karras et al. 2019, section 3.1); ignored without several ws.
        conditions: those of the real images, from which conditions are drawn; None draws none.
    """
    z = torch.randn([count, G.z_dim], generator=g)
    z_mix = cutoff = c = None
    layers = getattr(G, "num_ws", 1)
    if mixing > 0 and layers > 1:
        z_mix = torch.randn(z.shape, generator=g)
        cutoff = torch.randint(1, layers, [count], generator=g)
        mixed = torch.rand([count], generator=g) < mixing
        cutoff = torch.where(mixed, cutoff, layers)
    if conditions is not None:
        c = conditions.at(torch.randint(len(conditions), [count], generator=g).numpy())
    return Latents(z, z_mix, cutoff, c)


def styles(G: Any, x: Latents) -> tuple[torch.Tensor, torch.Tensor]:
    """ws [n, num_ws, w_dim], mixed where x says so, and the w [n, w_dim] of the first latent."""
    if x.z_mix is None or x.cutoff is None:
        w = G.mapping(x.z, x.c)
        return w[:, None].expand(-1, G.num_ws, -1), w
    c = None if x.c is None else torch.cat([x.c, x.c])
    w, second = G.mapping(torch.cat([x.z, x.z_mix]), c).chunk(2)
    layer = torch.arange(G.num_ws, device=w.device)[None, :, None]
    return torch.where(layer < x.cutoff[:, None, None], w[:, None], second[:, None]), w
