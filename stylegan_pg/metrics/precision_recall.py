"""Precision and recall of VGG16's features (Kynkaanniemi et al. 2019)."""

from __future__ import annotations

import torch

from stylegan_pg.metrics.accumulators import Rows
from stylegan_pg.metrics.base import FeatureMetric, Tools


class PrecisionRecall(FeatureMetric):
    """pr50k3_full: `_precision` and `_recall` of 50,000 generated images against all real ones, with 3 neighbours. The
    number of neighbours is fixed."""

    kind, example = "pr", "pr50k3_full"
    pattern = r"pr(?P<count>[1-9]\d*?k?)3" + FeatureMetric.REAL_IMAGES
    network, feature = "vgg16", "fc2"
    accumulates = Rows
    lower_is_better = False
    headline = "_precision"
    least_images = 4

    def compute(self, real: torch.Tensor, generated: torch.Tensor, tools: Tools) -> dict[str, float]:
        # On the device, as all distances between two large sets are computed.
        precision, recall = precision_recall(real.to(tools.device), generated.to(tools.device))
        return {"_precision": precision, "_recall": recall}


def _radii(x: torch.Tensor, neighbour: int, block: int) -> torch.Tensor:
    """Return the distance [n] of each row [n, d] to its neighbour of that rank, where it is itself the zeroth."""
    return torch.cat([torch.cdist(part, x).kthvalue(neighbour + 1).values for part in x.split(block)])


def precision_recall(
    real: torch.Tensor, fake: torch.Tensor, *, neighbour: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Return precision and recall of features [n, d] (Kynkaanniemi et al. 2019, equation 2): the share of generated
    images within the reach of a real one, and of real ones within the reach of a generated one. The reach of an image
    is the distance to its neighbour of that rank in its own set.

    Args:
        block: The number of rows whose distances to all others are computed at a time.

    Raises:
        ValueError: if a set has too few images.
    """
    if min(len(real), len(fake)) <= neighbour:
        raise ValueError(f"precision and recall need more than {neighbour} images of each kind")

    def covered(queries: torch.Tensor, by: torch.Tensor) -> float:
        radii = _radii(by, neighbour, block)
        inside = [(torch.cdist(part, by) <= radii).any(dim=1) for part in queries.split(block)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real), covered(real, fake)
