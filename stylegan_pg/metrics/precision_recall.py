"""Precision and recall of VGG16's features (Kynkaanniemi et al. 2019)."""

from __future__ import annotations

import torch

from stylegan_pg.metrics.accumulators import Rows
from stylegan_pg.metrics.base import FeatureMetric, Settings


class PrecisionRecall(FeatureMetric):
    """pr50k3_full_precision and pr50k3_full_recall compare 50,000 generated images with all real ones, with 3 nearest
    neighbours. The number of neighbours is fixed."""

    kind, example = "pr", "pr50k3_full"
    pattern = r"pr(?P<count>[1-9]\d*?k?)3" + FeatureMetric.REAL_IMAGES
    network, feature = "vgg16", "fc2"
    accumulator_class = Rows
    lower_is_better = False
    ranked_value = "_precision"
    min_images = 4

    def compute(self, real: torch.Tensor, generated: torch.Tensor, settings: Settings) -> dict[str, float]:
        # This runs on the device, because it computes all pairwise distances between two large sets.
        precision, recall = precision_recall(real.to(settings.device), generated.to(settings.device))
        return {"_precision": precision, "_recall": recall}


def _radii(x: torch.Tensor, neighbour: int, block: int) -> torch.Tensor:
    """Return the distance [n] of each row [n, d] to its k-th nearest neighbour, with k = `neighbour`; the 0th nearest
    is the row itself."""
    return torch.cat([torch.cdist(part, x).kthvalue(neighbour + 1).values for part in x.split(block)])


def precision_recall(
    real: torch.Tensor, fake: torch.Tensor, *, neighbour: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Return precision and recall of features [n, d] (Kynkaanniemi et al. 2019, equation 2). Precision is the fraction
    of generated images that lie within the radius of some real image; recall is the fraction of real images that lie
    within the radius of some generated image. The radius of an image is the distance to its k-th nearest neighbour in
    its own set.

    Args:
        real, fake: The features [n, d] of the two sets.
        neighbour: The k of the k-th nearest neighbour.
        block: The number of rows whose distances to all others are computed at once.

    Raises:
        ValueError: if a set has too few images.
    """
    if min(len(real), len(fake)) <= neighbour:
        raise ValueError(f"precision and recall need more than {neighbour} real and {neighbour} generated images")

    def covered(queries: torch.Tensor, by: torch.Tensor) -> float:
        radii = _radii(by, neighbour, block)
        inside = [(torch.cdist(part, by) <= radii).any(dim=1) for part in queries.split(block)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real), covered(real, fake)
