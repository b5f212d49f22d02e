"""Techniques for training GANs (Salimans et al. 2016, "Improved Techniques for Training GANs") and a penalty for equal
outputs, as pure functions of tensors. losses/terms.py makes terms of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def group_means(values: torch.Tensor, group: int) -> torch.Tensor:
    """The mean of values [N, ...] over each group, [N / group, ...]. Group m is {m, m + N/group, m + 2 N/group, ...},
    as everywhere; N smaller than a group is one group.

    Raises:
        ValueError: N is no multiple of the group.
    """
    n = len(values)
    size = min(group, n)
    if n % size:
        raise ValueError(f"a batch of {n} does not divide into groups of {size}")
    return values.reshape(size, n // size, *values.shape[1:]).mean(dim=0)


def feature_matching(fake: torch.Tensor, real: torch.Tensor, group: int, norm: str = "l2") -> torch.Tensor:
    """The distance between the mean features of generated and of real images, for each image the one of its group, [N]
    (Salimans et al. 2016, section 3.1).

    Args:
        fake, real: features [N, ...] of D. group: images that a mean is of. norm: "l2" is the squared Euclidean norm of
            the text, "l1" the mean absolute difference of the authors' code.
    """
    apart = (group_means(fake, group) - group_means(real, group)).flatten(1)
    distance = apart.square().sum(dim=1) if norm == "l2" else apart.abs().mean(dim=1)
    return distance.repeat(len(fake) // len(distance))


def diversity(images: Sequence[torch.Tensor], latents: Sequence[torch.Tensor]) -> torch.Tensor:
    """How far the i-th images of two batches differ, relative to their latents: the ratio [N] of the mean absolute
    differences (Yang et al. 2019, equation 2; Mao et al. 2019, equation 3).

    Args:
        images: two batches [N, C, H, W]. latents: theirs, [N, z_dim].
    """
    far, apart = ((a - b).abs().flatten(1).mean(dim=1) for a, b in (images, latents))
    return far / apart.clamp(min=1e-8)


def squared_distance(weights: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> torch.Tensor:
    """||theta - mean||^2 over all tensors of both lists, of shape [] (Salimans et al. 2016, section 3.3)."""
    parts = [(w - mean).square().sum() for w, mean in zip(weights, means, strict=True)]
    return torch.stack(parts).sum()
