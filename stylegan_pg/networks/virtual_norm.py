"""Virtual batch normalisation: every image is normalised by a reference batch, which is chosen once, and by itself
(Salimans et al. 2016, section 3.5).

A network keeps its reference batch as a buffer and passes it in front of each batch, so that the first rows in every
layer are those of the reference batch. No two images of a batch meet, so nothing depends on how a batch is dealt out,
and a generator computes the same for a latent wherever it is used.
"""

from __future__ import annotations

import torch
from torch import nn


class VirtualBatchNorm(nn.Module):
    """[n + N, C, ...] -> [n + N, C, ...], of which the first n = `references` are the reference batch.

    Those are normalised by their own statistics. Each further image is normalised by the mean and the variance of the
    values of n + 1 images, of the reference batch and its own, so that its own weight is 1 / (n + 1).
    """

    def __init__(self, features: int, references: int, eps: float = 1e-5):
        super().__init__()
        self.references, self.eps = references, eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        reference, rest = x[: self.references], x[self.references :]
        within = list(range(2, x.ndim))
        mean, variance = moments(reference, [0, *within])
        own_mean, own_variance = moments(rest, within) if within else (rest, torch.zeros_like(rest))
        own = 1 / (self.references + 1)
        joint = torch.lerp(mean.expand_as(own_mean), own_mean, own)
        # The variance of a mixture, without the difference of large squares.
        spread = (1 - own) * (variance + (mean - joint).square()) + own * (own_variance + (own_mean - joint).square())
        normal = torch.cat(
            [(reference - mean) * (variance + self.eps).rsqrt(), (rest - joint) * (spread + self.eps).rsqrt()]
        )
        shape = [1, -1, *[1] * len(within)]
        return normal * self.weight.reshape(shape) + self.bias.reshape(shape)


def moments(x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance over some dimensions, which are kept with the length 1."""
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return mean, variance


def normalized(kind: str, features: int, references: int) -> list[nn.Module]:
    """The layers that normalise `features` channels: one for "batch" or "virtual", none for "none"."""
    if kind == "batch":
        return [nn.BatchNorm2d(features)]
    return [VirtualBatchNorm(features, references)] if kind == "virtual" else []
