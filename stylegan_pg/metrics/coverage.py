"""The number of modes of a known distribution that a generator covers, for experiments with toy data."""

from __future__ import annotations

import torch


def mode_coverage(
    samples: torch.Tensor, centres: torch.Tensor, deviation: float, least: float = 0.0
) -> dict[str, float]:
    """Return how many modes of a mixture of Gaussians are covered by samples, and the fraction of samples near a mode
    (Srivastava et al. 2017, section 4.1).

    A mode counts there with one sample, so that uniform noise covers all of them. `least` asks for more.

    Args:
        samples: The samples [n, d].
        centres: The means of the modes [m, d].
        deviation: The standard deviation of every mode. A sample is near a mode within 3 standard deviations.
        least: The fraction of all samples that must be near a mode for it to be covered; at least one sample must be.

    Returns:
        {"modes": the number of covered modes, "high_quality": the fraction of samples near a mode}
    """
    distance, nearest = torch.cdist(samples.double(), centres.double()).min(dim=1)
    good = distance <= 3 * deviation
    counts = torch.bincount(nearest[good], minlength=len(centres))
    covered = counts >= max(least * len(samples), 1)
    return {"modes": float(covered.sum()), "high_quality": float(good.double().mean())}


def class_coverage(labels: torch.Tensor, classes: int) -> dict[str, float]:
    """Return the number of classes among the labels of samples, and how far their frequencies are from uniform, for a
    dataset of equally frequent classes such as stacked digits (Metz et al. 2017, section 3.3).

    Args:
        labels: int64 [n], the labels that a classifier assigned to samples.
        classes: The number of classes of the dataset.

    Returns:
        {"modes": the number of classes that occur, "kl": the Kullback-Leibler divergence from the uniform
        distribution, in nats}
    """
    p = torch.bincount(labels, minlength=classes).double() / max(len(labels), 1)
    return {"modes": float((p > 0).sum()), "kl": float(torch.special.xlogy(p, p * classes).sum())}
