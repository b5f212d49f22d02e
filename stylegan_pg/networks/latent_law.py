"""What a generator makes of its latents before anything else: the law that they follow, and codes with a meaning.

Latents are drawn from N(0, 1) everywhere (training, `sample`, seeds, interpolation, editing, exports). A generator with
another law transforms them first, element by element, so that every tool works with every law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

LAWS = ("normal", "uniform", "truncated")
LIMIT = 2.0  # of truncated latents, in standard deviations (Brock et al. 2019, section 3.1)
LARGEST = 1 - 2.0**-24  # the last float32 below 1


def with_law(z: torch.Tensor, law: str) -> torch.Tensor:
    """Latents of N(0, 1) transformed to another law by its inverse distribution function.

    Args:
        z: latents, of any shape. law: "normal" (no change), "uniform" in (-1, 1), or "truncated", N(0, 1) restricted to
            [-2, 2].
    """
    if law == "normal":
        return z
    uniform = torch.erf(z / math.sqrt(2))
    if law == "uniform":
        return uniform
    inside = (uniform * math.erf(LIMIT / math.sqrt(2))).clamp(-LARGEST, LARGEST)
    return torch.erfinv(inside) * math.sqrt(2)


class LatentLaw(nn.Module):
    """z [N, z_dim] of N(0, 1) -> [N, z_dim]: noise of a law, categorical codes and continuous codes.

    A categorical code of K categories takes K numbers of z, of which the largest gets 1 and the others 0: each category
    has the probability 1 / K. A continuous code is uniform in (-1, 1) (Chen et al. 2016, section 7.1). It has no
    parameters.

    Args:
        z_dim: length of z, with all codes.
        law: that of the noise, see `with_law`.
        categories: the sizes of the categorical codes. continuous: number of the continuous codes.

    Raises:
        ValueError: the codes do not fit into z, or the law is not known.
    """

    def __init__(self, z_dim: int, law: str = "normal", categories: Sequence[int] = (), continuous: int = 0):
        super().__init__()
        self.z_dim, self.law, self.categories, self.continuous = z_dim, law, list(categories), continuous
        self.noise_dim = z_dim - sum(self.categories) - continuous
        if law not in LAWS:
            raise ValueError(f"latent is {law!r}, where it must be {' or '.join(LAWS)}")
        if self.noise_dim < 0:
            raise ValueError(f"z_dim is {z_dim}, which is less than the codes take")

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if not self.categories and not self.continuous:
            return with_law(z, self.law)
        noise, *codes, uniform = z.split([self.noise_dim, *self.categories, self.continuous], dim=1)
        hot = [nn.functional.one_hot(code.argmax(dim=1), code.shape[1]).to(z.dtype) for code in codes]
        return torch.cat([with_law(noise, self.law), *hot, with_law(uniform, "uniform")], dim=1)
