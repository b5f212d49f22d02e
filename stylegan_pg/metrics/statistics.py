"""From features to numbers: moments that are streamed and merged exactly, and the distances between two sets.

Features are float32 [n, d]. What is compared is real and generated ("fake") images, in this order.
"""

from __future__ import annotations

import math

import numpy as np
import torch


class Moments:
    """Count, mean and scatter of rows [d] in float64, whatever the number of rows: up to d of them are kept as they
    are, more become their sum [d] and second moment [d, d], so memory is d^2 numbers at most.

    Sums of different parts merge exactly: any number of ranks and any batches give the same up to float64's rounding.
    """

    def __init__(self, d: int):
        self.d, self.count = d, 0
        self.rows: list[torch.Tensor] | None = []
        self.total = self.second = torch.empty(0, dtype=torch.float64)  # once there are more rows

    def add(self, features: torch.Tensor) -> None:
        """Rows [n, d] of any float type."""
        if not len(features):
            return
        self.count += len(features)
        if self.rows is not None and self.count <= self.d:
            self.rows.append(features.detach().cpu().double())
            return
        self._condense()
        self._accumulate(features.detach().cpu().double())

    def _condense(self) -> None:
        if self.rows is not None:
            rows, self.rows = self.rows, None
            self.total = torch.zeros(self.d, dtype=torch.float64)
            self.second = torch.zeros(self.d, self.d, dtype=torch.float64)
            for part in rows:
                self._accumulate(part)

    def _accumulate(self, x: torch.Tensor) -> None:
        self.total += x.sum(dim=0)
        self.second.addmm_(x.t(), x)

    def merge(self, other: Moments) -> None:
        """Take in what another has seen."""
        if other.rows is not None:
            for part in other.rows:
                self.add(part)
        else:
            self._condense()
            self.total += other.total
            self.second += other.second
            self.count += other.count

    def mean(self) -> torch.Tensor:
        """float64 [d]"""
        total = self.total if self.rows is None else torch.cat(self.rows).sum(dim=0)
        return total / self.count

    def centred(self) -> torch.Tensor | None:
        """Rows A [n, d] with A^T A the covariance, where there are so few that they were kept."""
        if self.rows is None:
            return None
        rows = torch.cat(self.rows)
        return (rows - rows.sum(dim=0) / self.count).div_(math.sqrt(max(self.count - 1, 1)))

    def covariance(self) -> torch.Tensor:
        """Unbiased, float64 [d, d]."""
        rows = self.centred()
        if rows is not None:
            return rows.t() @ rows
        mean = self.mean()
        n = max(self.count - 1, 1)
        return torch.addr(self.second, mean, mean, beta=1 / n, alpha=-self.count / n)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors that `from_state` makes the same moments of."""
        count = torch.tensor([self.count, self.d])
        if self.rows is not None:
            return {"count": count, "rows": torch.cat([torch.empty(0, self.d, dtype=torch.float64), *self.rows])}
        return {"count": count, "total": self.total, "second": self.second}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Moments:
        """
        Raises:
            ValueError, KeyError: for tensors that are no moments.
        """
        count, d = (int(n) for n in state["count"])
        self = cls(d)
        self.count = count
        if "rows" in state:
            self.rows = [state["rows"].double()]
            fits = state["rows"].shape == (count, d)
        else:
            self.rows, self.total, self.second = None, state["total"].double(), state["second"].double()
            fits = self.total.shape == (d,) and self.second.shape == (d, d)
        if not fits or count < 1:
            raise ValueError(f"{count} rows of {d} features do not fit their tensors")
        return self


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of the two Gaussians (Heusel et al. 2017, equation 6).

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


def kernel_distance(
    real: torch.Tensor, fake: torch.Tensor, *, subsets: int = 100, most: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets of `most` rows, of the unbiased squared maximum mean
    discrepancy under the kernel (x . y / d + 1)^3 (Binkowski et al. 2018, section 4)."""
    n, d = min(most, len(real), len(fake)), real.shape[1]
    if n < 2:
        raise ValueError("the kernel distance needs two images of each kind")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = fake[torch.from_numpy(rng.choice(len(fake), n, replace=False))].double()
        y = real[torch.from_numpy(rng.choice(len(real), n, replace=False))].double()
        kxx, kyy, kxy = ((s @ t.t() / d + 1) ** 3 for s, t in ((x, x), (y, y), (x, y)))
        same = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (n * (n - 1))
        values.append(float(same - 2 * kxy.mean()))
    return float(np.mean(values)), float(np.std(values))


class InceptionScore:
    """exp of the mean divergence of each image's class probabilities from those of its split (Salimans et al. 2016,
    section 4), summed up as the images come: which split one belongs to is known from its number.

    Args:
        count: images in all.
        splits: the score is the mean over so many parts of a random order.
    """

    def __init__(self, count: int, splits: int = 10, seed: int = 2020):
        self.splits = min(splits, count)
        order = np.random.RandomState(seed).permutation(count)
        self.split_of = np.empty(count, np.int64)
        for i in range(self.splits):
            self.split_of[order[i * count // self.splits : (i + 1) * count // self.splits]] = i
        self.sums: torch.Tensor | None = None  # [splits, classes + 2]: probabilities, negative entropy, count

    def add(self, numbers: range | list[int], logits: torch.Tensor) -> None:
        """Logits [n, classes] of the images with these numbers."""
        logits = logits.detach().cpu().double()
        p, log_p = logits.softmax(dim=1), logits.log_softmax(dim=1)
        rows = torch.cat([p, (p * log_p).sum(dim=1, keepdim=True), torch.ones(len(p), 1, dtype=p.dtype)], dim=1)
        if self.sums is None:
            self.sums = torch.zeros(self.splits, rows.shape[1], dtype=torch.float64)
        self.sums.index_add_(0, torch.from_numpy(self.split_of[list(numbers)]), rows)

    def merge(self, other: InceptionScore) -> None:
        if other.sums is not None:
            self.sums = other.sums if self.sums is None else self.sums + other.sums

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        assert self.sums is not None
        n = self.sums[:, -1:]
        q, entropy = self.sums[:, :-2] / n, self.sums[:, -2] / n[:, 0]
        scores = (entropy - torch.special.xlogy(q, q).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


def _radii(x: torch.Tensor, neighbour: int, block: int) -> torch.Tensor:
    """Distance of each row to its neighbour of that rank, itself being the zeroth."""
    return torch.cat([torch.cdist(part, x).kthvalue(neighbour + 1).values for part in x.split(block)])


def precision_recall(
    real: torch.Tensor, fake: torch.Tensor, *, neighbour: int = 3, block: int = 1024
) -> tuple[float, float]:
    """Share of generated images within a real one's reach, and of real ones within a generated one's; an image's reach
    is the distance to its third-nearest neighbour of its kind (Kynkaanniemi et al. 2019, equation 2).

    Raises:
        ValueError: for fewer images than neighbours.
    """
    if min(len(real), len(fake)) <= neighbour:
        raise ValueError(f"precision and recall need more than {neighbour} images of each kind")

    def covered(queries: torch.Tensor, by: torch.Tensor) -> float:
        radii = _radii(by, neighbour, block)
        inside = [(torch.cdist(part, by) <= radii).any(dim=1) for part in queries.split(block)]
        return float(torch.cat(inside).double().mean())

    return covered(fake, real), covered(real, fake)


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
