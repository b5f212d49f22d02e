"""Multi-scale structural similarity (MS-SSIM) of pairs of images as a measure of diversity (Wang et al. 2003; Odena et
al. 2017, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stylegan_pg.metrics.accumulators import Rows
from stylegan_pg.metrics.base import COUNT, ImageMetric, Settings

SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class StructuralSimilarity(ImageMetric):
    """ms_ssim is the mean similarity of 10,000 pairs of generated images. A lower value means more diverse images."""

    kind, example = "ms_ssim", "ms_ssim"
    pattern = f"ms_ssim(?P<count>{COUNT})?"
    default_count, counted_by_option = 10_000, True
    accumulator_class = Rows

    def images(self, real_images: int) -> int:
        return 2 * self.count

    def observe(self, seen: torch.Tensor) -> torch.Tensor:
        return ms_ssim(seen[0::2], seen[1::2])

    def compute(self, real: None, generated: torch.Tensor, settings: Settings) -> dict[str, float]:
        return {"": float(generated.double().mean())}


def _blur(x: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Filter [n, c, h, w] with the 1-D window along both axes, without padding."""
    n, c, h, w = x.shape
    x = F.conv2d(x.reshape(n * c, 1, h, w), window[None, None, :, None])
    return F.conv2d(x, window[None, None, None, :]).flatten(1).reshape(n, c, -1, x.shape[3] - len(window) + 1)


def ms_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the multi-scale structural similarity float32 [n] of pairs of images [n, c, h, w] in [0, 255] (Wang et al.
    2003, equation 7). It is 1 for equal images. There are five scales. The Gaussian window has 11 pixels and a standard
    deviation of 1.5; for images smaller than 11 pixels it is scaled down in proportion."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    a, b = a.float(), b.float()
    result = torch.ones(len(a))
    for scale, weight in enumerate(SCALES):
        size = min(11, *a.shape[2:])
        place = torch.arange(size) - (size - 1) / 2
        window = torch.exp(-0.5 * (place / (1.5 * size / 11)) ** 2)
        window /= window.sum()
        mean_a, mean_b = _blur(a, window), _blur(b, window)
        var_a, var_b = _blur(a * a, window) - mean_a**2, _blur(b * b, window) - mean_b**2
        contrast = (2 * (_blur(a * b, window) - mean_a * mean_b) + c2) / (var_a + var_b + c2)
        value = contrast.mean(dim=[1, 2, 3])
        if scale == len(SCALES) - 1:
            value = (contrast * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)).mean(dim=[1, 2, 3])
        result *= value.clamp(min=0) ** weight
        if scale < len(SCALES) - 1 and min(a.shape[2:]) > 1:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result
