"""What a generator makes of its latents before anything else: the law that they follow, and codes with a meaning.

Latents are drawn from N(0, 1) everywhere (training, `sample`, seeds, interpolation, editing, exports). A generator with
another law transforms them first, element by element, so that every tool works with every law.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class Codes(NamedTuple):
    """The codes of N latents."""

    categories: list[torch.Tensor]  # int64 [N] of each categorical code
    continuous: torch.Tensor  # [N, continuous] in (-1, 1)


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

    @property
    def sizes(self) -> list[int]:
        """How many numbers of z the noise, each categorical code and the continuous codes take."""
        return [self.noise_dim, *self.categories, self.continuous]

    def codes(self, z: torch.Tensor) -> Codes:
        """The codes of latents [N, z_dim]."""
        _, *codes, uniform = z.split(self.sizes, dim=1)
        return Codes([code.argmax(dim=1) for code in codes], with_law(uniform, "uniform"))

    def with_codes(
        self,
        z: torch.Tensor,
        categories: Mapping[int, int | torch.Tensor] | None = None,
        continuous: Mapping[int, float | torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Latents [N, z_dim] that differ from z in the given codes only, as a new tensor.

        Args:
            categories: {number of a categorical code: its category, one or int64 [N]}.
            continuous: {number of a continuous code: its value in (-1, 1), one or [N]}; from 0 on, as the categories.

        Raises:
            ValueError: there is no such code, category or value.
        """
        z, rows = z.clone(), torch.arange(len(z), device=z.device)
        parts = z.split(self.sizes, dim=1)  # views of the copy
        for i, category in (categories or {}).items():
            if not 0 <= i < len(self.categories):
                raise ValueError(f"there is no categorical code {i}: there are {len(self.categories)}, from 0 on")
            chosen = torch.as_tensor(category, device=z.device).expand(len(z))
            if not ((chosen >= 0) & (chosen < self.categories[i])).all():
                raise ValueError(f"categories of code {i} are from 0 to {self.categories[i] - 1}, not {category}")
            code, largest = parts[1 + i], parts[1 + i].argmax(dim=1)
            value, other = code[rows, largest], code[rows, chosen]  # change places, so that the code remains typical
            code[rows, largest] = other
            code[rows, chosen] = value
        for i, number in (continuous or {}).items():
            if not 0 <= i < self.continuous:
                raise ValueError(f"there is no continuous code {i}: there are {self.continuous}, from 0 on")
            wanted = torch.as_tensor(number, dtype=z.dtype, device=z.device)
            if not (wanted.abs() < 1).all():
                raise ValueError(f"continuous codes are between -1 and 1, not {number}")
            parts[-1][:, i] = torch.erfinv(wanted) * math.sqrt(2)
        return z

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if not self.categories and not self.continuous:
            return with_law(z, self.law)
        noise, *codes, uniform = z.split(self.sizes, dim=1)
        hot = [torch.zeros_like(code).scatter(1, code.argmax(dim=1, keepdim=True), 1.0) for code in codes]
        return torch.cat([with_law(noise, self.law), *hot, with_law(uniform, "uniform")], dim=1)
