"""The registry of metrics, and the parser of their names. A name states how the metric is measured.

| name | meaning |
|---|---|
| fid50k_full | Frechet distance between 50,000 generated images and all real ones |
| fid50k | the same with as many real images as generated ones |
| kid50k_full | kernel distance |
| pr50k3_full | precision and recall with 3 neighbours |
| is50k | Inception score |
| ppl2_wend, ppl2_zend | perceptual path length of 50,000 pairs in w or z, at the ends of paths |
| ppl2_wfull, ppl2_zfull | the same at random positions of the paths |
| eqt_int50k, eqt_frac50k | equivariance to translation by whole pixels, or by any distance, in dB |
| eqr50k | equivariance to rotation, in dB |
| swd, ms_ssim | sliced Wasserstein distance, multi-scale structural similarity; they need no network |

Other counts are possible: fid2048_full, swd4096, ppl2_wend10k, and pr2563 (256 images, 3 neighbours). The suffix
_mirror adds mirrored copies of the real images; _psi0.7 sets the truncation.

RGBA images are composited over white for every metric. Feature networks receive grey images as three equal channels,
and images of every size resized to the square that the network expects.
"""

from __future__ import annotations

import math
import re

from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.base import Metric
from stylegan_pg.metrics.equivariance import Equivariance
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
    "eq": Equivariance,
    "swd": SlicedWasserstein,
    "ms_ssim": StructuralSimilarity,
}
MAX_IMAGES = 10_000_000
_PSI = r"(?:_psi(?P<psi>\d+(?:\.\d+)?))?"


def parse(name: str, *, psi: float = 1.0, images: int | None = None) -> Metric:
    """Return the metric of this name.

    Args:
        name: The name, such as "fid50k_full".
        psi: The truncation if the name contains none.
        images: The number of samples if the name contains none, for metrics that are `counted_by_option`.

    Raises:
        UsageError: if no metric has this name, or a number in it is too large.
    """
    stated = name.strip()
    metric, groups = _match(stated, name)
    count = images if images and metric.counted_by_option else metric.default_count
    if text := groups.pop("count"):  # only 12 digits are converted: int() refuses very long texts
        count = int(text.removesuffix("k")[:12]) * (1000 if text.endswith("k") else 1)
    if count > MAX_IMAGES:
        raise UsageError(
            f"metric {printable(repr(name), 60)} needs more than {MAX_IMAGES} images: choose a smaller number"
        )
    if text := groups.pop("psi"):
        psi = float(text)
        if not math.isfinite(psi):
            raise UsageError(f"metric {printable(repr(name), 60)}: psi must be a finite number")
    elif psi != 1:
        stated += f"_psi{psi:.9g}"
    return metric(stated, count, psi=psi, **metric.fields_from_name(groups))


def _match(stated: str, name: str) -> tuple[type[Metric], dict[str, str | None]]:
    """Return the class whose pattern matches a name, and the matched groups."""
    for metric in METRICS.values():
        if m := re.fullmatch(metric.pattern + _PSI, stated):
            return metric, m.groupdict()
    examples = ", ".join(metric.example for metric in METRICS.values())
    raise UsageError(
        f"unknown metric {printable(repr(name), 60)}: examples are {examples}; other numbers of images "
        "(fid2048_full) and the suffixes _mirror and _psi0.7 are possible"
    )
