"""The Inception score (Salimans et al. 2016)."""

from __future__ import annotations

import numpy as np
import torch

from stylegan_pg.metrics.accumulators import Accumulator
from stylegan_pg.metrics.base import COUNT, ImageMetric, ImageSet, Settings


class ClassDivergence(Accumulator):
    """Accumulates the Inception score: the exponential of the mean Kullback-Leibler divergence between each image's
    class probabilities and the mean probabilities of its split (Salimans et al. 2016, section 4). An image's number
    determines its split, so only sums per split are stored.

    Args:
        count: The total number of images.
        splits: The number of random subsets. The score is computed for each, and reported as mean and standard
            deviation.
        seed: The seed of the random assignment of images to splits.
    """

    statistic = "divergence"

    def __init__(self, count: int, splits: int = 10, seed: int = 2020):
        self.splits = min(splits, count)
        order = np.random.RandomState(seed).permutation(count)
        self.split_of = np.empty(count, np.int64)
        for i in range(self.splits):
            self.split_of[order[i * count // self.splits : (i + 1) * count // self.splits]] = i
        self.sums: torch.Tensor | None = None  # [splits, classes + 2]: probabilities, negative entropy, count

    def add(self, values: torch.Tensor, first: int = 0) -> None:
        """Add the logits [n, classes] of the images with the numbers `first` to `first + n - 1`."""
        logits = values.detach().cpu().double()
        p, log_p = logits.softmax(dim=1), logits.log_softmax(dim=1)
        rows = torch.cat([p, (p * log_p).sum(dim=1, keepdim=True), torch.ones(len(p), 1, dtype=p.dtype)], dim=1)
        if self.sums is None:
            self.sums = torch.zeros(self.splits, rows.shape[1], dtype=torch.float64)
        self.sums.index_add_(0, torch.from_numpy(self.split_of[first : first + len(rows)]), rows)

    def merge(self, other: ClassDivergence) -> None:
        if other.sums is not None:
            self.sums = other.sums if self.sums is None else self.sums + other.sums

    def result(self) -> tuple[float, float]:
        """Return mean and standard deviation of the score over the splits."""
        assert self.sums is not None
        n = self.sums[:, -1:]
        q, entropy = self.sums[:, :-2] / n, self.sums[:, -2] / n[:, 0]
        scores = (entropy - torch.special.xlogy(q, q).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


class InceptionScore(ImageMetric):
    """is50k is the Inception score of 50,000 generated images; is50k_std is its standard deviation over ten splits."""

    kind, example = "is", "is50k"
    pattern = f"is(?P<count>{COUNT})"
    network, feature = "inception", "logits"
    accumulator_class = ClassDivergence
    lower_is_better = False

    def accumulator(self, images: ImageSet) -> Accumulator:
        return ClassDivergence(self.count)

    def compute(self, real: None, generated: tuple[float, float], settings: Settings) -> dict[str, float]:
        mean, deviation = generated
        return {"": mean, "_std": deviation}
