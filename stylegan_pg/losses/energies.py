"""Losses of systems whose discriminator gives energies (errors of an autoencoder): BEGAN and EBGAN."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def energy_g(fake: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """The energy of generated pictures, which G minimises (Zhao et al. 2017, equation 2; Berthelot et al. 2017, section
    3.3)."""
    return fake


def ebgan_d(real: torch.Tensor, fake: torch.Tensor, margin: float) -> torch.Tensor:
    """E(x) + max(0, margin - E(G(z))), of the shape of the energies (Zhao et al. 2017, equation 1)."""
    return real + F.relu(margin - fake)


def began_d(real: torch.Tensor, fake: torch.Tensor, k: float | torch.Tensor) -> torch.Tensor:
    """L(x) - k L(G(z)), of the shape of the errors (Berthelot et al. 2017, section 3.4)."""
    return real - k * fake


def moved_balance(k: float, real: float, fake: float, gamma: float, rate: float) -> float:
    """BEGAN's k after a step whose mean errors are `real` and `fake`: k + rate (gamma real - fake), within [0, 1]
    (Berthelot et al. 2017, section 3.4)."""
    return min(max(k + rate * (gamma * real - fake), 0.0), 1.0)


def convergence(real: float, fake: float, gamma: float) -> float:
    """BEGAN's measure of convergence, L(x) + |gamma L(x) - L(G(z))| (Berthelot et al. 2017, section 3.4.1)."""
    return real + abs(gamma * real - fake)


def pulling_away(codes: torch.Tensor, group: int) -> torch.Tensor:
    """The pulling-away term [N] of codes [N, size]: for each, the mean squared cosine between it and the others of its
    group (Zhao et al. 2017, equation 7); its mean is the published term of each group.

    Images i, i + N / group, i + 2 N / group, ... form a group. A code of length 0 has the cosine 0.

    Raises:
        ValueError: N is no multiple of `group`, or `group` is less than 2.
    """
    n = len(codes)
    if group < 2 or n % group:
        raise ValueError(f"the pulling-away term compares groups of 2 codes or more, and {n} are no groups of {group}")
    units = F.normalize(codes, dim=1).reshape(group, n // group, -1).transpose(0, 1)
    squares = (units @ units.transpose(1, 2)).square()
    others = squares.sum(dim=2) - squares.diagonal(dim1=1, dim2=2)
    return (others / (group - 1)).transpose(0, 1).reshape(n)
