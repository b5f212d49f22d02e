"""How many modes of a known distribution a generator covers, for experiments with toy data."""

from __future__ import annotations

import torch


def mode_coverage(samples: torch.Tensor, centres: torch.Tensor, deviation: float) -> dict[str, float]:
    """Of a mixture of Gaussians: how many modes [m, d] have a sample within 3 deviations of it, and the share of the
    samples [n, d] that lie so near to any (Srivastava et al. 2017, section 4.1)."""
    distance, nearest = torch.cdist(samples.double(), centres.double()).min(dim=1)
    good = distance <= 3 * deviation
    return {"modes": float(len(nearest[good].unique())), "high_quality": float(good.double().mean())}


def class_coverage(labels: torch.Tensor, classes: int) -> dict[str, float]:
    """Of labels [n] that a classifier gave to samples of a dataset of equally frequent classes (stacked digits): how
    many classes appear, and the divergence of their frequencies from equal ones (Metz et al. 2017, section 3.3)."""
    p = torch.bincount(labels, minlength=classes).double() / max(len(labels), 1)
    return {"modes": float((p > 0).sum()), "kl": float(torch.special.xlogy(p, p * classes).sum())}
