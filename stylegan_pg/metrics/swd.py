"""Sliced Wasserstein distance between two sets of images, scale by scale (Karras et al. 2018, section 5).

Images become Laplacian pyramids; random 7x7 neighbourhoods of each level are the features; the distance between their
two distributions is averaged over random one-dimensional projections, where it is a matter of sorting. Small values
at a coarse level mean similar large-scale structure, at the finest one similar texture. Needs no network weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stylegan_pg.errors import UsageError
from stylegan_pg.rng import generator

NEIGHBOURHOOD = 7
COARSEST = 16


def _binomial(x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """[N, C, H, W] filtered with [1, 4, 6, 4, 1] / 16 along both axes, borders mirrored."""
    c = x.shape[1]
    taps = torch.tensor([1.0, 4, 6, 4, 1], device=x.device) / 16 * gain**0.5
    x = F.pad(x, [2, 2, 2, 2], mode="reflect")
    x = F.conv2d(x, taps.view(1, 1, 1, 5).expand(c, 1, 1, 5).contiguous(), groups=c)
    return F.conv2d(x, taps.view(1, 1, 5, 1).expand(c, 1, 5, 1).contiguous(), groups=c)


def laplacian_pyramid(images: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """float32 [N, C, H, W] -> `levels` images, each half the size of the one before: differences to the next level's
    up-sampled copy, and the low-pass rest as the last (Burt and Adelson 1983)."""
    pyramid = []
    for _ in range(levels - 1):
        low = _binomial(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = low
        pyramid.append(images - _binomial(spread, gain=4.0))
        images = low.contiguous()
    return [*pyramid, images]


class PatchCollector:
    """Gathers the neighbourhoods of one set of images, batch by batch.

    Args:
        resolution, channels: of the images, a power of two of at least 8.
        patches_per_image: neighbourhoods at each level of each image.
        seed: places follow from it and the image's number alone, not from how images are batched.

    Raises:
        UsageError: for resolutions without a pyramid.
    """

    def __init__(self, resolution: int, channels: int, *, patches_per_image: int = 128, seed: int = 0):
        if resolution & (resolution - 1) or resolution < 8:
            raise UsageError(f"the sliced Wasserstein distance needs images of 8, 16, 32, ... pixels, not {resolution}")
        self.channels, self.patches_per_image, self.seed = channels, patches_per_image, seed
        self.levels = [resolution]
        while self.levels[-1] > COARSEST:
            self.levels.append(self.levels[-1] // 2)
        self.count = 0
        self._patches: dict[int, list[torch.Tensor]] = {r: [] for r in self.levels}

    def add(self, images: torch.Tensor) -> None:
        """uint8 [N, C, R, R]."""
        n, k = len(images), self.patches_per_image
        pyramid = laplacian_pyramid(images.float(), len(self.levels))
        offsets = torch.arange(NEIGHBOURHOOD)
        for r, level in zip(self.levels, pyramid, strict=True):
            span = r - NEIGHBOURHOOD + 1
            places = torch.stack(
                [
                    torch.randint(span, [2, k], generator=generator(self.seed, "patches", r, self.count + i))
                    for i in range(n)
                ]
            )
            rows = (places[:, 0, :, None] + offsets)[:, :, :, None]  # [N, k, 7, 1]
            columns = (places[:, 1, :, None] + offsets)[:, :, None, :]
            image = torch.arange(n)[:, None, None, None]
            patches = level.permute(0, 2, 3, 1)[image, rows, columns]  # [N, k, 7, 7, C]
            self._patches[r].append(patches.reshape(n * k, -1, self.channels))
        self.count += n

    def descriptors(self) -> dict[int, torch.Tensor]:
        """level resolution -> float32 [N * patches_per_image, 49 * C], each channel at mean 0 and deviation 1 over
        the whole set."""
        result = {}
        for r, parts in self._patches.items():
            x = torch.cat(parts)
            mean = x.double().mean(dim=[0, 1])
            deviation = (x.double() - mean).square().mean(dim=[0, 1]).sqrt().clamp(min=1e-12)
            result[r] = ((x - mean.float()) / deviation.float()).flatten(1)
        return result


def sliced_wasserstein(
    real: dict[int, torch.Tensor],
    fake: dict[int, torch.Tensor],
    *,
    repeats: int = 4,
    directions: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """{"swd_64": ..., "swd_32": ..., "swd_16": ..., "swd": their mean}, times 1000 as in the paper.

    Both sides are what `descriptors` gave. Where one has more rows, its first ones count.

    Raises:
        UsageError: if the two have different levels or channels.
    """
    if {r: t.shape[1] for r, t in real.items()} != {r: t.shape[1] for r, t in fake.items()}:
        raise UsageError("the two sets of images have different resolutions or channels")
    result: dict[str, float] = {}
    for r in real:
        n = min(len(real[r]), len(fake[r]))
        a, b = real[r][:n], fake[r][:n]
        distances = []
        for repeat in range(repeats):
            g = generator(seed, "directions", r, repeat)
            d = torch.randn([a.shape[1], directions], generator=g)
            d = d / d.norm(dim=0)
            pa, pb = (torch.sort((x @ d).t().contiguous(), dim=1).values for x in (a, b))
            distances.append((pa - pb).abs().mean().item())
        result[f"swd_{r}"] = 1000 * sum(distances) / repeats
    result["swd"] = sum(result.values()) / len(real)
    return result
