"""The Frechet distance of Inception's features (Heusel et al. 2017)."""

from __future__ import annotations

import torch

from stylegan_pg.metrics.accumulators import Moments
from stylegan_pg.metrics.base import COUNT, FeatureMetric, Tools


class FrechetDistance(FeatureMetric):
    """fid50k_full: the Frechet distance between all real images and 50,000 generated ones, by Inception's features."""

    kind, example = "fid", "fid50k_full"
    pattern = f"fid(?P<count>{COUNT}){FeatureMetric.REAL_IMAGES}"
    network, feature = "inception", "pool"
    accumulates = Moments

    def compute(self, real: Moments, generated: Moments, tools: Tools) -> dict[str, float]:
        return {"": frechet_distance(real, generated)}


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the two Gaussians (Heusel et al. 2017, equation 6).

    The trace of the root is the sum of the roots of the eigenvalues of S_a S_b. With S_a = L L^T they are those of the
    symmetric L^T S_b L, which an eigensolver for symmetric matrices finds several times as fast and as real numbers;
    with S_a = A^T A of few rows A, those of the small A S_b A^T. Where Cholesky fails, the covariance being singular,
    L comes from its eigenvectors.
    """
    few_a, few_b = a.centred(), b.centred()
    if few_a is not None and few_b is not None:
        # The singular values of a small product; its square would lose half of the digits.
        root = torch.linalg.svdvals(few_a @ few_b.t()).sum()
        traces = few_a.square().sum() + few_b.square().sum()
    else:
        if few_a is None and few_b is not None:
            few_a, few_b, a, b = few_b, few_a, b, a
        cov_b = b.covariance()
        if few_a is not None:
            product, trace_a = few_a @ cov_b @ few_a.t(), few_a.square().sum()
        else:
            cov_a = a.covariance()
            factor, failed = torch.linalg.cholesky_ex(cov_a)
            if failed:
                values, vectors = torch.linalg.eigh(cov_a)
                factor = vectors * values.clamp(min=0).sqrt()
            product, trace_a = factor.t() @ cov_b @ factor, cov_a.trace()
        root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()  # which reads one triangle
        traces = trace_a + cov_b.trace()
    return float((a.mean() - b.mean()).square().sum() + traces - 2 * root)
