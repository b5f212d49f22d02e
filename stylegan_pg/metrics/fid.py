"""The Frechet distance of Inception's features (Heusel et al. 2017)."""

from __future__ import annotations

import torch

from stylegan_pg.metrics.accumulators import Moments
from stylegan_pg.metrics.base import COUNT, FeatureMetric, Settings


class FrechetDistance(FeatureMetric):
    """fid50k_full is the Frechet distance between Inception's features of all real images and of 50,000 generated
    ones."""

    kind, example = "fid", "fid50k_full"
    pattern = f"fid(?P<count>{COUNT}){FeatureMetric.REAL_IMAGES}"
    network, feature = "inception", "pool"
    accumulator_class = Moments

    def compute(self, real: Moments, generated: Moments, settings: Settings) -> dict[str, float]:
        return {"": frechet_distance(real, generated)}


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the two Gaussians (Heusel et al. 2017, equation 6).

    The trace of the square root is the sum of the square roots of the eigenvalues of S_a S_b. With S_a = L L^T, these
    are the eigenvalues of the symmetric matrix L^T S_b L, which a symmetric eigensolver computes several times faster
    and as real numbers. If S_a = A^T A with few rows A, they are those of the small matrix A S_b A^T. If the Cholesky
    decomposition fails because the covariance is singular, L is computed from its eigenvectors.
    """
    few_a, few_b = a.centred(), b.centred()
    if few_a is not None and few_b is not None:
        # Singular values of the small product are used, because squaring it would lose half of the digits.
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
        root = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()  # eigvalsh reads one triangle only
        traces = trace_a + cov_b.trace()
    return float((a.mean() - b.mean()).square().sum() + traces - 2 * root)
