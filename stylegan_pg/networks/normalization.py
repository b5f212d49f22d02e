"""Batch normalisation that does not depend on how a batch is dealt out.

Plain batch normalisation in training mode couples all images that happen to be in one forward pass, so a run would
change with the number of ranks and micro-batches. Here images are coupled within groups only, the ones that minibatch
stddev compares: group m of n images is {m, m + n/group, m + 2 n/group, ...}, which are dealt out together
(schedule.deal).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class GroupedBatchNorm(_BatchNorm):
    """Batch normalisation [N, C, ...] -> [N, C, ...] (Ioffe and Szegedy 2015) over groups of `group` images; N smaller
    than a group is one group. N must otherwise be a multiple of it.

    Running statistics follow the mean of the groups' means and unbiased variances; evaluation mode uses them.
    """

    def __init__(self, like: _BatchNorm, group: int):
        super().__init__(like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats)
        self.group = group
        self.weight, self.bias = like.weight, like.bias
        for name, buffer in like.named_buffers(recurse=False):
            setattr(self, name, buffer)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs inputs [N, C, ...], not {list(input.shape)}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        if not self.training:
            return super().forward(input)
        n, c = input.shape[:2]
        size = min(self.group, n)
        groups = n // size
        grouped = input.reshape(size, groups * c, *input.shape[2:])  # image k of group m is row k groups + m
        if self.track_running_stats:
            self._follow(grouped.detach(), groups)
        repeated = [None if p is None else p.repeat(groups) for p in (self.weight, self.bias)]
        result = F.batch_norm(grouped, None, None, repeated[0], repeated[1], True, 0.0, self.eps)
        return result.reshape(input.shape)

    @torch.no_grad()
    def _follow(self, grouped: torch.Tensor, groups: int) -> None:
        """Move the running statistics towards those of `grouped` [size, groups C, ...]."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        values = grouped.transpose(0, 1).flatten(1)  # [groups C, values]
        unbiased = values.var(dim=1, correction=1 if values.shape[1] > 1 else 0)
        for running, now in ((self.running_mean, values.mean(dim=1)), (self.running_var, unbiased)):
            running.lerp_(now.reshape(groups, -1).mean(dim=0).to(running.dtype), momentum)


def group_batch_norms(net: nn.Module, group: int) -> nn.Module:
    """Replace every torch.nn.BatchNorm1d, 2d and 3d in a network by GroupedBatchNorm, with the same parameters and
    buffers under the same names; returns the network, or what replaces it."""
    if isinstance(net, _BatchNorm) and not isinstance(net, (GroupedBatchNorm, nn.SyncBatchNorm)):
        return GroupedBatchNorm(net, group).train(net.training)
    for name, child in net.named_children():
        setattr(net, name, group_batch_norms(child, group))
    return net
