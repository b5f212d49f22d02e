"""The metrics that there are, and what their names say about how they are measured.

fid50k_full: Frechet distance of 50,000 generated images and the whole real set; without _full as many real ones as
generated. kid50k_full, pr50k3_full: the same for the kernel distance, and for precision and recall among 3 neighbours.
is50k: the Inception score. ppl2_wend: perceptual path length of 50,000 pairs in w (or z), at the ends of paths (wfull:
all along). swd, ms_ssim: sliced Wasserstein distance and multi-scale structural similarity, which need no network.
Counts can be others (fid2048_full, pr2563: 256 images, swd4096, ppl2_wend10k); _mirror adds the mirrored copies of the
real images, _psi0.7 truncates.

Whatever the metric, RGBA images are seen over white. Networks get grey images as three equal channels, and images of
any shape resized to the network's own square.
"""

from __future__ import annotations

import math
import re

from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.base import Metric
from stylegan_pg.metrics.fid import FrechetDistance
from stylegan_pg.metrics.inception_score import InceptionScore
from stylegan_pg.metrics.kid import KernelDistance
from stylegan_pg.metrics.ms_ssim import StructuralSimilarity
from stylegan_pg.metrics.path_length import PathLength
from stylegan_pg.metrics.precision_recall import PrecisionRecall
from stylegan_pg.metrics.swd import SlicedWasserstein
from stylegan_pg.untrusted import printable

METRICS: dict[str, type[Metric]] = {
    "fid": FrechetDistance,
    "kid": KernelDistance,
    "pr": PrecisionRecall,
    "is": InceptionScore,
    "ppl2": PathLength,
    "swd": SlicedWasserstein,
    "ms_ssim": StructuralSimilarity,
}
MOST_IMAGES = 10_000_000
_PSI = r"(?:_psi(?P<psi>\d+(?:\.\d+)?))?"


def parse(name: str, *, psi: float = 1.0, images: int | None = None) -> Metric:
    """Return the metric of this name.

    Args:
        psi: The truncation if the name does not say.
        images: The number of samples if the name does not say, for metrics that are `counted_by_option`.

    Raises:
        UsageError: if no metric has this name, or its numbers are too large.
    """
    stated = name.strip()
    metric, groups = _match(stated, name)
    count = images if images and metric.counted_by_option else metric.default_count
    if text := groups.pop("count"):  # which may be longer than Python takes for a number
        count = int(text.removesuffix("k")[:12]) * (1000 if text.endswith("k") else 1)
    if count > MOST_IMAGES:
        raise UsageError(f"metric {printable(repr(name), 60)} is of more than {MOST_IMAGES} images: give fewer")
    if text := groups.pop("psi"):
        psi = float(text)
        if not math.isfinite(psi):
            raise UsageError(f"metric {printable(repr(name), 60)}: psi must be a finite number")
    elif psi != 1:
        stated += f"_psi{psi:.9g}"
    return metric(stated, count, psi=psi, **metric.parts(groups))


def _match(stated: str, name: str) -> tuple[type[Metric], dict[str, str | None]]:
    """Return the class that a name belongs to, and the groups of its pattern."""
    for metric in METRICS.values():
        if m := re.fullmatch(metric.pattern + _PSI, stated):
            return metric, m.groupdict()
    examples = ", ".join(metric.example for metric in METRICS.values())
    raise UsageError(
        f"unknown metric {printable(repr(name), 60)}: choose for example from {examples}; counts can be others "
        "(fid2048_full), _mirror and _psi0.7 may follow"
    )
