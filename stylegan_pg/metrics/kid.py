"""The kernel distance of Inception's features (Binkowski et al. 2018)."""

from __future__ import annotations

import numpy as np
import torch

from stylegan_pg.metrics.accumulators import Rows
from stylegan_pg.metrics.base import COUNT, FeatureMetric, Settings


class KernelDistance(FeatureMetric):
    """kid50k_full is the kernel distance between Inception's features of all real images and of 50,000 generated ones;
    kid50k_full_std is its standard deviation over subsets."""

    kind, example = "kid", "kid50k_full"
    pattern = f"kid(?P<count>{COUNT}){FeatureMetric.REAL_IMAGES}"
    network, feature = "inception", "pool"
    accumulator_class = Rows
    min_images = 2

    def compute(self, real: torch.Tensor, generated: torch.Tensor, settings: Settings) -> dict[str, float]:
        mean, deviation = kernel_distance(real, generated)
        return {"": mean, "_std": deviation}


def kernel_distance(
    real: torch.Tensor, fake: torch.Tensor, *, subsets: int = 100, most: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Return mean and standard deviation, over random subsets of `most` rows of both sets [n, d], of the unbiased
    squared maximum mean discrepancy under the kernel (x . y / d + 1)^3 (Binkowski et al. 2018, section 4).

    Raises:
        ValueError: for fewer than two rows.
    """
    n, d = min(most, len(real), len(fake)), real.shape[1]
    if n < 2:
        raise ValueError("the kernel distance needs at least two real and two generated images")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(rng.choice(len(fake), n, replace=False))].double()
        y = real[torch.from_numpy(rng.choice(len(real), n, replace=False))].double()
        kxx, kyy, kxy = ((s @ t.t() / d + 1) ** 3 for s, t in ((x, x), (y, y), (x, y)))
        same = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (n * (n - 1))
        values.append(float(same - 2 * kxy.mean()))
    return float(np.mean(values)), float(np.std(values))
