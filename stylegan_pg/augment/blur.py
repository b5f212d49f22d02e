"""The Gaussian blur of what D sees at the begin of training (Karras et al. 2021, "Alias-free generative adversarial
networks", appendix: configuration R). It is applied before augmentation, and differentiable twice."""

from __future__ import annotations

import math

import torch

from stylegan_pg.ops.upfirdn2d import upfirdn2d


def radius(sigma: float) -> int:
    """Pixels on each side of a pixel that the blur takes into account, floor(3 sigma); 0: there is no blur."""
    return math.floor(3 * sigma)


def taps(sigma: float, device: torch.device) -> torch.Tensor:
    """The filter float32 [2 radius + 1]: 2^-(x/sigma)^2 at x = -radius..radius, normalised to the sum 1. It is computed
    on the device, to which the host sends nothing."""
    r = radius(sigma)
    x = torch.arange(-r, r + 1, device=device, dtype=torch.float32)
    f = x.div(sigma).square().neg().exp2()
    return f / f.sum()


def blur(images: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] filtered along both axes with f [odd number], with zeros around them: the same shape, dtype
    and layout."""
    r = f.numel() // 2
    rows = upfirdn2d(images, f[None, :], padding=(r, r, 0, 0))
    return upfirdn2d(rows, f[:, None], padding=(0, 0, r, r))
