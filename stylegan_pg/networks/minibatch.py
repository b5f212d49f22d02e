"""Minibatch discrimination: D sees how close an image is to the others of its group (Salimans et al. 2016, section
3.2)."""

from __future__ import annotations

import torch
from torch import nn


class MinibatchDiscrimination(nn.Module):
    """Features [N, features] -> closeness [N, kernels]: o(x_i)_b = the sum over the other images j of its group of
    exp(-|M_ib - M_jb|_1), with M_i = f(x_i) T and T [features, kernels, dims] (Salimans et al. 2016, equation 3).

    Images meet in groups of `group`, those that minibatch stddev compares: group m of n images is {m, m + n/group,
    ...}. N smaller than a group is one group. x may consist of several `batches`, one after another, which do not meet.
    """

    def __init__(self, features: int, kernels: int, dims: int, group: int):
        super().__init__()
        self.kernels, self.dims, self.group = kernels, dims, group
        self.weight = nn.Parameter(torch.randn(features, kernels * dims) / features**0.5)

    def forward(self, x: torch.Tensor, batches: int = 1) -> torch.Tensor:
        """
        Raises:
            ValueError: a batch is no multiple of the group.
        """
        n = len(x) // batches
        size = min(self.group, n)
        if n % size:
            raise ValueError(f"minibatch discrimination: a batch of {n} does not divide into groups of {size}")
        m = (x @ self.weight).reshape(batches, size, n // size, self.kernels, self.dims)
        distance = (m[:, :, None] - m[:, None, :]).abs().sum(dim=-1)  # [batches, size, size, groups, kernels]
        closeness = (-distance).exp().sum(dim=2) - 1  # without the image itself
        return closeness.reshape(len(x), self.kernels)


class MinibatchScore(nn.Module):
    """What minibatch discrimination adds to a score: a linear layer over the closeness. Together with the layer that
    makes scores of features, it is one layer of both side by side."""

    def __init__(self, features: int, kernels: int, dims: int, group: int):
        super().__init__()
        self.closeness = MinibatchDiscrimination(features, kernels, dims, group)
        self.linear = nn.Linear(kernels, 1, bias=False)

    def forward(self, x: torch.Tensor, batches: int = 1) -> torch.Tensor:
        """Features [N, ...] -> [N, 1]."""
        return self.linear(self.closeness(x.flatten(1), batches))
