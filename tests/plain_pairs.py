"""Plain pairs of networks, z -> picture -> score without a mapping, and a program that trains one of them.

python plain_pairs.py KIND CONFIG [KEY=VALUE ...]
"""

import sys

import torch
from torch import nn

from stylegan_pg import GAN, Pair, load_config, train

Z_DIM = 8


class PlainGenerator(nn.Module):
    """z [N, 8] -> images [N, 3, 8, 8]. `norm` is a function that creates a normalisation for a number of channels."""

    def __init__(self, norm: str = "none"):
        super().__init__()
        bias = norm != "batch"  # otherwise its gradient would be only rounding, which Adam would amplify
        self.dense, self.conv = nn.Linear(Z_DIM, 6 * 16, bias), nn.ConvTranspose2d(6, 3, 4, 2, 1)
        self.norm = nn.BatchNorm2d(6) if norm == "batch" else nn.Identity()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.conv(torch.relu(self.norm(self.dense(z).reshape(-1, 6, 4, 4)))))


class PlainDiscriminator(nn.Module):
    """Images [N, 3, 8, 8] -> scores [N, 1]; with `patches` -> a list of two scales, [N, 1, 4, 4] and [N, 1, 8, 8]."""

    def __init__(self, norm: str = "none", patches: bool = False):
        super().__init__()
        spectral = nn.utils.parametrizations.spectral_norm if norm == "spectral" else lambda layer: layer
        self.conv = spectral(nn.Conv2d(3, 6, 4, 2, 1, bias=norm != "batch"))
        self.dense = nn.Linear(6 * 16, 1)
        self.norm = nn.BatchNorm2d(6) if norm == "batch" else nn.Identity()
        self.patches = (nn.Conv2d(6, 1, 1), nn.Conv2d(3, 1, 1)) if patches else ()
        self.scores = nn.ModuleList(self.patches)

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        x = torch.nn.functional.leaky_relu(self.norm(self.conv(images)), 0.2)
        if self.scores:
            return [self.scores[0](x), self.scores[1](images)]
        return self.dense(x.flatten(1))


class ConditionalGenerator(PlainGenerator):
    """A PlainGenerator that also takes labels c [N, 3]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, Z_DIM, bias=False)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(z if c is None else z + self.embed(c))


class ConditionalDiscriminator(PlainDiscriminator):
    """With a projection of the label (Miyato and Koyama 2018)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 6 * 16, bias=False)

    def forward(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        x = torch.nn.functional.leaky_relu(self.conv(images), 0.2).flatten(1)
        score = self.dense(x)
        return score if c is None else score + (self.embed(c) * x).sum(dim=1, keepdim=True)


def pair_of(kind: str) -> Pair:
    if kind == "conditional":
        return Pair(ConditionalGenerator, ConditionalDiscriminator, lambda *_: {}, lambda *_: {})
    g = {"norm": "batch" if kind == "batch" else "none"}
    d = {"norm": kind if kind in ("batch", "spectral") else "none", "patches": kind == "patches"}
    return Pair(PlainGenerator, PlainDiscriminator, lambda *_: g, lambda *_: d)


if __name__ == "__main__":
    settings = load_config(sys.argv[2], sys.argv[3:])
    sys.exit(train(settings, system=GAN(settings, pair_of(sys.argv[1]))))
