"""Spectral normalisation of a discriminator (Miyato et al. 2018, "Spectral Normalization for Generative Adversarial
Networks"): the weight that a layer multiplies with has the largest singular value 1.

It is that of the weight [O, ...] as a matrix of O rows, as in the paper and in torch's parametrisation, whose numbers
this one reproduces; that is also done for grouped convolutions. The singular vectors are estimated by power iteration.
torch makes an iteration in each forward pass in training mode, so the vectors would depend on how many passes a step
has. Here forward passes change nothing: `move_vectors` makes one iteration, and the system calls it once a step, before
D's main loss.

Layers with equalised learning rate multiply their weight by a constant when it is used. The product is what is
normalised; the constant then has no effect, and neither has the scale of the stored weight. Gains of activations, such
as sqrt(2) behind leaky ReLU, remain.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

EPS = 1e-12
ITERATIONS = 15  # at the start, so that the first steps know the norms
WEIGHTS = ("weight", "basis")  # names of layers' weights; a basis is a depthwise convolution's (networks/r3gan.py)


class SpectralNorm(nn.Module):
    """A parametrisation of a weight: W -> W / (sigma * gain), with sigma = u^T W v.

    Args:
        weight: [O, ...], or with another `dim` that of the outputs.
        gain: the constant that the layer multiplies its weight by.
    """

    changing_buffers = ("u", "v")
    u: torch.Tensor  # [O], unit length
    v: torch.Tensor  # [inputs], unit length

    def __init__(self, weight: torch.Tensor, dim: int = 0, gain: float = 1.0):
        super().__init__()
        self.dim, self.gain = dim, gain
        for name, size in zip("uv", self.matrix(weight).shape, strict=True):
            self.register_buffer(name, F.normalize(weight.new_empty(size).normal_(), dim=0, eps=EPS))
        for _ in range(ITERATIONS):
            self.move(weight)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.movedim(self.dim, 0).flatten(1)

    @torch.no_grad()
    def move(self, weight: torch.Tensor) -> None:
        """One power iteration, u = W v / |W v| and v = W^T u / |W^T u| (Miyato et al. 2018, algorithm 1)."""
        matrix = self.matrix(weight.detach())
        self.u.copy_(F.normalize(matrix @ self.v, dim=0, eps=EPS))
        self.v.copy_(F.normalize(matrix.t() @ self.u, dim=0, eps=EPS))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        # The vectors are constants of the derivative; clones, because they are changed before it may be taken.
        u, v = self.u.clone(), self.v.clone()
        sigma = torch.dot(u, self.matrix(weight) @ v)
        return weight / (sigma if self.gain == 1 else sigma * self.gain)


def add_spectral_norm(net: nn.Module) -> nn.Module:
    """Normalise the weights of all convolutions and dense layers of a network: every parameter named as in WEIGHTS that
    has at least two dimensions. Returns the network.

    A weight that begins at zero (the last one of R3GAN's residual blocks) has no norm to be divided by. It is drawn
    from N(0, 1 / inputs) instead.
    """
    for layer in list(net.modules()):
        for name in WEIGHTS:
            weight = layer._parameters.get(name)
            if weight is None or weight.ndim < 2:
                continue
            if not weight.is_meta and not weight.any():
                nn.init.normal_(weight, std=1 / math.sqrt(weight[0].numel()))
            transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
            norm = SpectralNorm(weight, int(transposed), getattr(layer, f"{name}_gain", 1.0))
            parametrize.register_parametrization(layer, name, norm)
    return net


def move_vectors(net: nn.Module) -> None:
    """One power iteration for each weight that `add_spectral_norm` has normalised."""
    for layer in net.modules():
        chains: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
        for chain in chains.values():
            for norm in chain:
                if isinstance(norm, SpectralNorm):
                    norm.move(chain.original)
