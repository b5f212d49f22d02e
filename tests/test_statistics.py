"""The statistics behind the metrics, compared with scipy, closed forms and brute force."""

import itertools

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage, signal

from stylegan_pg.metrics.accumulators import Moments
from stylegan_pg.metrics.coverage import class_coverage, mode_coverage
from stylegan_pg.metrics.fid import frechet_distance
from stylegan_pg.metrics.inception_score import ClassDivergence
from stylegan_pg.metrics.kid import kernel_distance
from stylegan_pg.metrics.ms_ssim import ms_ssim
from stylegan_pg.metrics.precision_recall import precision_recall


def moments(x: torch.Tensor, split: int = 50) -> Moments:
    result = Moments(x.shape[1])
    for part in x.split(split):
        result.add(part)
    return result


def gaussian(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(scale * rng.normal(size=[n, d]) @ rng.normal(size=[d, d]) + rng.normal(size=d)).float()


@pytest.mark.parametrize(("n", "m"), [(500, 400), (24, 500), (500, 24), (10, 17), (31, 32), (64, 33)])
def test_frechet_distance_agrees_with_scipy(n, m):
    """For full covariances, singular ones, and sets smaller than the number of features."""
    a, b = gaussian(n, 32, 1), gaussian(m, 32, 2, 3.0)
    mean_a, mean_b = a.double().mean(0).numpy(), b.double().mean(0).numpy()
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    values = np.linalg.eigvals(cov_a @ cov_b)
    expected = (
        ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * np.real(np.sqrt(values.astype(complex))).sum()
    )
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)
    if n > 32 and m > 32:
        root = np.real(linalg.sqrtm(cov_a @ cov_b))
        assert np.trace(root) == pytest.approx(np.real(np.sqrt(values.astype(complex))).sum(), rel=1e-9)


def test_frechet_distance_of_repeated_features():
    """A covariance of more rows than features for which the Cholesky decomposition fails."""
    a, b = gaussian(300, 16, 3), gaussian(300, 16, 4)
    twice_a, twice_b = (torch.cat([x, x], dim=1) for x in (a, b))
    expected = 2 * frechet_distance(moments(a), moments(b))
    assert frechet_distance(moments(twice_a), moments(twice_b)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_gaussians():
    """With diagonal covariances, it is a sum over the dimensions."""
    a, b = Moments(3), Moments(3)
    for m, mean, deviation in ((a, [0.0, 1, 2], [1.0, 2, 3]), (b, [1.0, 1, 0], [2.0, 2, 1])):
        corners = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1.0, 1) for z in (-1.0, 1)])
        m.add(torch.tensor(mean) + corners * torch.tensor(deviation))
    unbiased = 8 / 7  # these corners have population variance 1
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + unbiased * (1 + 4), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [20, 400])
def test_moments_merge_exactly(n):
    x = gaussian(n, 40, 5, 100.0)
    whole = moments(x, n)
    for parts, split in ((2, 7), (3, 64), (5, 1)):
        ranks = [moments(x[i::parts], split) for i in range(parts)]
        for other in ranks[1:]:
            ranks[0].merge(Moments.from_state(other.state()))
        assert ranks[0].count == n
        torch.testing.assert_close(ranks[0].mean(), whole.mean(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ranks[0].covariance(), whole.covariance(), rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(whole.covariance(), torch.from_numpy(np.cov(x.double().numpy(), rowvar=False)))
    big = max(sum(t.numel() for t in m.state().values()) for m in (whole, ranks[0]))
    assert big <= 40 * 40 + 40 + 2  # independent of the number of rows


def test_kernel_distance_is_unbiased():
    """It is near 0 between two sets of the same distribution, and detects a shift. For one subset of all samples, it
    equals the formula."""
    a, b = (gaussian(4000, 8, 6) / 4).split(2000)
    mean, deviation = kernel_distance(a, b, most=500, subsets=40)
    assert abs(mean) < deviation
    assert kernel_distance(a, a + 1, subsets=10)[0] > 0.1
    x, y = a[:30].double(), b[:30].double() + 0.5
    xx, yy, xy = (((s @ t.t() / 8 + 1) ** 3).numpy() for s, t in ((x, x), (y, y), (x, y)))
    expected = 0.0
    for i in range(30):
        for j in range(30):
            expected += (i != j) * (xx[i, j] + yy[i, j]) / (30 * 29) - 2 * xy[i, j] / 900
    assert kernel_distance(x.float(), y.float(), subsets=1)[0] == pytest.approx(expected, rel=1e-5)


def test_precision_and_recall_by_brute_force():
    real, fake = gaussian(60, 5, 8), gaussian(50, 5, 8)[:50] * 1.2

    def covered(queries, by):
        radii = [sorted(float((p - q).norm()) for q in by)[3] for p in by]
        return np.mean([any(float((x - p).norm()) <= r for p, r in zip(by, radii, strict=True)) for x in queries])

    precision, recall = precision_recall(real, fake, block=16)
    assert precision == pytest.approx(covered(fake, real))
    assert recall == pytest.approx(covered(real, fake))
    assert precision_recall(real, real.clone()) == (1, 1)
    assert precision_recall(real, real[:10] + 1e4) == (0, 0)


def test_inception_score():
    """1 for uniform predictions, and the number of classes for certain but varied ones. The order and grouping do not
    matter."""
    flat, sure = ClassDivergence(100), ClassDivergence(1000)
    flat.add(torch.zeros(100, 7))
    assert flat.result()[0] == pytest.approx(1)
    sure.add(50 * torch.eye(10)[torch.arange(1000) % 10])
    assert sure.result()[0] == pytest.approx(10, rel=0.05)
    logits = gaussian(64, 9, 9)
    whole, parts = ClassDivergence(64), [ClassDivergence(64), ClassDivergence(64)]
    whole.add(logits)
    for i in range(0, 64, 8):
        parts[i // 8 % 2].add(logits[i : i + 8], i)
    parts[0].merge(parts[1])
    assert parts[0].result() == pytest.approx(whole.result(), rel=1e-12)


def test_modes():
    centres = torch.tensor([[i, j] for i in range(5) for j in range(5)], dtype=torch.float32)
    samples = centres[:20].repeat(10, 1) + 0.01
    assert mode_coverage(samples, centres, 0.05) == {"modes": 20, "high_quality": 1}
    assert mode_coverage(samples + 0.4, centres, 0.05) == {"modes": 0, "high_quality": 0}
    assert class_coverage(torch.arange(10), 10) == {"modes": 10, "kl": pytest.approx(0)}
    assert class_coverage(torch.zeros(10, dtype=torch.int64), 10) == {"modes": 1, "kl": pytest.approx(np.log(10))}


def test_ms_ssim():
    """1 for equal images, symmetric, and decreasing with noise."""
    a = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8) * 255, 64, mode="bicubic").clamp(0, 255)
    torch.testing.assert_close(ms_ssim(a, a), torch.ones(4))
    values = [ms_ssim(a, (a + s * torch.randn_like(a)).clamp(0, 255)).mean() for s in (2, 10, 30, 90)]
    assert all(x > y for x, y in itertools.pairwise(values))
    b = a.flip(0)
    torch.testing.assert_close(ms_ssim(a, b), ms_ssim(b, a))
    assert ms_ssim(a[..., :4, :4], b[..., :4, :4]).isfinite().all()  # smaller than the window


def reference_ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Compute it for one pair, float64 [C, H, W] in 0 to 255, as in Wang et al. 2003 with the choices of ProGAN's
    metric: a two-dimensional window, and means of 2x2 pixels between the scales."""
    result = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        size = min(11, *a.shape[1:])
        line = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (1.5 * size / 11)) ** 2)
        window = (np.outer(line, line) / line.sum() ** 2)[None]
        mean_a, mean_b, aa, bb, ab = (signal.convolve(x, window, "valid") for x in (a, b, a * a, b * b, a * b))
        covariance, variances = ab - mean_a * mean_b, aa - mean_a**2 + bb - mean_b**2
        value = (2 * covariance + 0.0009 * 255**2) / (variances + 0.0009 * 255**2)
        if scale == 4:
            value *= (2 * mean_a * mean_b + 0.0001 * 255**2) / (mean_a**2 + mean_b**2 + 0.0001 * 255**2)
        result *= max(value.mean(), 0) ** weight
        if min(a.shape[1:]) > 1:
            box = np.full([1, 2, 2], 0.25)
            a, b = (ndimage.convolve(x, box, mode="reflect")[:, ::2, ::2] for x in (a, b))
    return result


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 32, 32), (1, 64, 64), (3, 64, 96), (3, 128, 128), (1, 176, 176)])
def test_ms_ssim_agrees_with_scipy(shape):
    rng = np.random.default_rng(sum(shape))
    small = rng.uniform(0, 255, [3, shape[0], -(-shape[1] // 8), -(-shape[2] // 8)])
    a = small.repeat(8, axis=2).repeat(8, axis=3)[..., : shape[1], : shape[2]]
    b = np.stack([x + s * rng.normal(size=shape) for x, s in zip(a, (5, 40, 120), strict=True)])
    a, b = (x.clip(0, 255).round() for x in (a, b))
    found = ms_ssim(torch.from_numpy(a.astype(np.uint8)), torch.from_numpy(b.astype(np.uint8)))
    expected = [reference_ms_ssim(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-4)
    assert 0.1 < expected[2] < expected[1] < expected[0] < 1
