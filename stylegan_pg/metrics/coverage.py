"""How many modes of a known distribution a generator covers, for experiments with toy data."""

from __future__ import annotations

import torch


def mode_coverage(samples: torch.Tensor, centres: torch.Tensor, deviation: float) -> dict[str, float]:
    """Return, for a mixture of Gaussians, how many of its modes [m, d] have a sample within 3 standard deviations, and
    the share of samples [n, d] that lie as near to any mode (Srivastava et al. 2017, section 4.1)."""
    distance, nearest = torch.cdist(samples.double(), centres.double()).min(dim=1)
    good = distance <= 3 * deviation
    return {"modes": float(len(nearest[good].unique())), "high_quality": float(good.double().mean())}


def class_coverage(labels: torch.Tensor, classes: int) -> dict[str, float]:
    """Return how many classes appear among labels [n] that a classifier gave to samples, and the divergence of their
    frequencies from equal ones, for a dataset of equally frequent classes such as stacked digits (Metz et al. 2017,
    section 3.3)."""
    p = torch.bincount(labels, minlength=classes).double() / max(len(labels), 1)
    return {"modes": float((p > 0).sum()), "kl": float(torch.special.xlogy(p, p * classes).sum())}
