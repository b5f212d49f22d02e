"""Texts as pictures of one-hot characters [N, alphabet, 1, length], and the residual 1-D convolutions that make and
judge them (Gulrajani et al. 2017, section 5.3 and appendix; the widths, 5 blocks and the factor 0.3 of their public
code).

A generator's output is a distribution over the alphabet at each place. Gumbel-softmax draws from it in a differentiable
way (Jang et al. 2017, equation 2; Maddison et al. 2017); its noise is part of the latent, so that a text is a function
of its latent as pictures are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import CharsConfig
from stylegan_pg.networks.form import NetworkShape
from stylegan_pg.networks.latent_law import with_law
from stylegan_pg.networks.ranges import checked

KERNEL = 5  # places that a convolution sees
SHARE = 0.3  # factor of a residual branch


def to_one_hot(texts: Sequence[str], alphabet: str, length: int) -> torch.Tensor:
    """Texts as float32 [N, alphabet, 1, length]: the first `length` characters, filled up with spaces.

    A character that the alphabet lacks is taken in lower case, or else becomes a space.
    """
    places = {character: i for i, character in enumerate(alphabet)}
    space = places[" "]
    rows = torch.full([len(texts), length], space, dtype=torch.int64)
    for row, text in zip(rows, texts, strict=True):
        found = [places.get(character, places.get(character.lower(), space)) for character in text[:length]]
        row[: len(found)] = torch.tensor(found, dtype=torch.int64)
    return nn.functional.one_hot(rows, len(alphabet)).float().transpose(1, 2)[:, :, None]


def to_texts(characters: torch.Tensor, alphabet: str) -> list[str]:
    """The likeliest text of each distribution in [N, alphabet, 1, length], without spaces at its end."""
    places = characters[:, :, 0].argmax(dim=1).tolist()
    return ["".join(alphabet[i] for i in row).rstrip() for row in places]


def gumbel(noise: torch.Tensor) -> torch.Tensor:
    """Numbers of N(0, 1) transformed to the Gumbel distribution: -log(-log u), u being their distribution function."""
    return -torch.log((-torch.special.log_ndtr(noise)).clamp(min=torch.finfo(noise.dtype).tiny))


def to_characters(logits: torch.Tensor, output: str, temperature: float, noise: torch.Tensor | None) -> torch.Tensor:
    """Distributions [N, alphabet, length] from logits of that shape.

    Args:
        output: "softmax", or "gumbel" for softmax((logits + Gumbel noise) / temperature), or "straight_through" for the
            one-hot maximum of that with its gradient (Jang et al. 2017, section 2.2).
        temperature: tau. noise: N(0, 1) of the same shape; not needed for softmax.
    """
    if output == "softmax" or noise is None:
        return torch.softmax(logits / temperature, dim=1)
    soft = torch.softmax((logits + gumbel(noise)) / temperature, dim=1)
    if output == "gumbel":
        return soft
    hard = nn.functional.one_hot(soft.argmax(dim=1), soft.shape[1]).to(soft.dtype).transpose(1, 2)
    return hard + (soft - soft.detach())


class Block(nn.Module):
    """x [N, width, length] -> x + 0.3 conv(relu(conv(relu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2),
            nn.ReLU(),
            nn.Conv1d(width, width, KERNEL, padding=KERNEL // 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + SHARE * self.layers(x)


class Generator(nn.Module):
    """z [N, G.z_dim], c [N, c_dim] -> distributions over the alphabet [N, alphabet, 1, length].

    G.z_dim is the argument z_dim, and for Gumbel-softmax alphabet * length more numbers, which choose the characters.
    """

    @checked
    def __init__(
        self,
        *,
        resolution: int,
        alphabet: str,
        length: int,
        c_dim: int = 0,
        z_dim: int = 128,
        width: int = 512,
        depth: int = 5,
        output: str = "softmax",
        temperature: float = 1.0,
        latent: str = "normal",
    ):
        super().__init__()
        self.resolution, self.img_channels, self.img_size = resolution, len(alphabet), (1, length)
        self.alphabet, self.length, self.c_dim = alphabet, length, c_dim
        self.content_dim, self.width, self.law = z_dim, width, latent
        self.output, self.temperature = output, temperature
        self.z_dim = z_dim if output == "softmax" else z_dim + len(alphabet) * length
        self.begin = nn.Linear(z_dim + c_dim, width * length)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.end = nn.Conv1d(width, len(alphabet), 1)

    def logits(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [N, alphabet, length] of latents [N, z_dim], of whose numbers those for choices are not used."""
        x = with_law(z[:, : self.content_dim], self.law)
        if c is not None and self.c_dim:
            x = torch.cat([x, c.to(x.dtype)], dim=1)
        return self.end(self.blocks(self.begin(x).reshape(-1, self.width, self.length)))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.logits(z, c)
        noise = None if self.output == "softmax" else z[:, self.content_dim :].reshape(logits.shape)
        return to_characters(logits, self.output, self.temperature, noise)[:, :, None]

    def texts(self, z: torch.Tensor, c: torch.Tensor | None = None) -> list[str]:
        """The texts of latents."""
        return to_texts(self(z, c), self.alphabet)


class Discriminator(nn.Module):
    """Distributions over the alphabet [N, alphabet, 1, length] and c [N, c_dim], as constant channels -> [N, 1]."""

    @checked
    def __init__(self, *, alphabet: str, length: int, c_dim: int = 0, width: int = 512, depth: int = 5):
        super().__init__()
        self.img_channels, self.img_size, self.c_dim = len(alphabet), (1, length), c_dim
        self.begin = nn.Conv1d(len(alphabet) + c_dim, width, 1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.end = nn.Linear(width * length, 1)

    @property
    def score_layer(self) -> nn.Module:
        return self.end

    def forward(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        x = images[:, :, 0]
        if c is not None and self.c_dim:
            x = torch.cat([x, c.to(x.dtype)[:, :, None].expand(-1, -1, x.shape[2])], dim=1)
        return self.end(self.blocks(self.begin(x)).flatten(1))


def _common(model: CharsConfig, shape: NetworkShape) -> dict[str, Any]:
    return {
        "alphabet": model.alphabet,
        "length": model.length,
        "c_dim": shape.c_dim,
        "width": model.channel_max,
        "depth": model.depth,
    }


def generator_kwargs(model: CharsConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    further = {"output": model.output, "temperature": model.temperature, "latent": model.latent}
    return {**_common(model, shape), "resolution": shape.resolution, "z_dim": model.z_dim, **further}


def discriminator_kwargs(model: CharsConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    return _common(model, shape)
