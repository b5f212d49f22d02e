"""The sliced Wasserstein distance between two sets of images, scale by scale (Karras et al. 2018, section 5).

Images are decomposed into Laplacian pyramids, and random 7x7 neighbourhoods of each level are the features. The
distance between the two distributions of features is averaged over random one-dimensional projections, where sorting
computes it. Small values at a coarse level mean similar large-scale structure, at the finest level similar texture. No
network is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.accumulators import Accumulator
from stylegan_pg.metrics.base import COUNT, ImageMetric, ImageSet, Tools
from stylegan_pg.rng import derive, generator

NEIGHBOURHOOD = 7
COARSEST = 16
LEAST = 8

Size = tuple[int, int]  # (height, width) of a level
Patches = dict[Size, list[tuple[int, torch.Tensor]]]  # with the number of the first image


def _name(size: Size) -> str:
    return f"swd_{size[0]}" if size[0] == size[1] else f"swd_{size[0]}x{size[1]}"


def _key(size: Size) -> Sequence[int]:
    """Return the part of the key of random numbers that stands for a level."""
    return size[:1] if size[0] == size[1] else size


def _binomial(x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Filter [N, C, H, W] with [1, 4, 6, 4, 1] / 16 along both axes; the borders are mirrored."""
    x = F.pad(x, [2, 2, 2, 2], mode="reflect")
    for axis in (3, 2):
        # Five shifted views: four times as fast on a CPU as a depthwise convolution, and the same bits in any batch.
        a, b, c, d, e = (x.narrow(axis, i, x.shape[axis] - 4) for i in range(5))
        x = ((a + e) + 4 * (b + d) + 6 * c) * (gain**0.5 / 16)
    return x


def _sort_rows(x: torch.Tensor) -> torch.Tensor:
    """Sort each row of float32 [rows, n] in place. numpy sorts values alone, which takes a tenth of the time of torch's
    sort with its indices, and it releases the interpreter's lock meanwhile."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(np.ndarray.sort, x.numpy()))
    return x


def laplacian_pyramid(images: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Return the Laplacian pyramid of float32 [N, C, H, W] (Burt and Adelson 1983): `levels` images, each half the size
    of the one before. Each is the difference to the up-sampled next level, and the last is the low-pass rest."""
    pyramid = []
    for _ in range(levels - 1):
        low = _binomial(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = low
        pyramid.append(images - _binomial(spread, gain=4.0))
        images = low.contiguous()
    return [*pyramid, images]


class PatchCollector(Accumulator):
    """Accumulates the neighbourhoods of one set of images.

    Levels are halved as long as sides are even and the smaller one stays at 16 pixels or more.

    Args:
        size: (height, width) of the images, at least 8 pixels each; channels: of the images.
        patches_per_image: neighbourhoods at each level of each image.
        seed: places follow from it and the image's number alone, not from how images are batched.

    Raises:
        UsageError: for images that are too small.
    """

    statistic = "patches"

    def __init__(self, size: tuple[int, int], channels: int, *, patches_per_image: int = 128, seed: int = 0):
        if min(size) < LEAST:
            raise UsageError(
                f"the sliced Wasserstein distance needs images of {LEAST} pixels or more on each side, "
                f"not {size[0]}x{size[1]}"
            )
        self.channels, self.patches_per_image, self.seed = channels, patches_per_image, seed
        self.levels = [size]
        while min(size) >= 2 * COARSEST and size[0] % 2 == size[1] % 2 == 0:
            size = size[0] // 2, size[1] // 2
            self.levels.append(size)
        self.count = 0
        self._patches: Patches = {size: [] for size in self.levels}

    def add(self, values: torch.Tensor, first: int | None = None) -> None:
        """Take in uint8 images [N, C, H, W]; `first` is the number of the first of them, by default the next one.

        Raises:
            UsageError: if the images have another shape or type.
        """
        expected = (self.channels, *self.levels[0])
        if values.dtype != torch.uint8 or values.ndim != 4 or tuple(values.shape[1:]) != expected:
            raise UsageError(
                f"the sliced Wasserstein distance expects uint8 images of shape [N, {', '.join(map(str, expected))}], "
                f"not {str(values.dtype).removeprefix('torch.')} {list(values.shape)}: convert them before"
            )
        first = self.count if first is None else first
        for part in values.split(16):  # its pyramid stays in the processor's cache
            self._add(part, first)
            first += len(part)

    def _add(self, images: torch.Tensor, first: int) -> None:
        n, k = len(images), self.patches_per_image
        pyramid = laplacian_pyramid(images.float(), len(self.levels))
        offsets = torch.arange(NEIGHBOURHOOD)
        for size, level in zip(self.levels, pyramid, strict=True):
            places = [self._places(size, first + i) for i in range(n)]
            rows, columns = (torch.stack(axis)[:, :, None] + offsets for axis in zip(*places, strict=True))
            rows, columns = rows[:, :, :, None], columns[:, :, None, :]  # [N, k, 7, 1] and [N, k, 1, 7]
            image = torch.arange(n)[:, None, None, None]
            patches = level.permute(0, 2, 3, 1)[image, rows, columns]  # [N, k, 7, 7, C]
            self._patches[size].append((first, patches.reshape(n * k, -1, self.channels)))
        self.count += n

    def _places(self, size: Size, number: int) -> list[torch.Tensor]:
        """Return top rows and left columns, [k] each, of one image's neighbourhoods at one level."""
        g = generator(self.seed, "patches", *_key(size), number)
        return [torch.randint(side - NEIGHBOURHOOD + 1, [self.patches_per_image], generator=g) for side in size]

    def merge(self, other: PatchCollector) -> None:
        self.count += other.count
        for size, parts in other._patches.items():
            self._patches[size] += parts

    def result(self) -> dict[Size, torch.Tensor]:
        """Return {(height, width) of a level: float32 [N * patches_per_image, 49 * C]}, where each channel has mean 0
        and standard deviation 1 over the whole set.

        Raises:
            UsageError: if no images were added.
        """
        if not self.count:
            raise UsageError("no images to take the sliced Wasserstein distance of: add some first")
        result = {}
        for size, parts in self._patches.items():
            x = torch.cat([patches for _, patches in sorted(parts, key=lambda part: part[0])])
            variance, mean = torch.var_mean(x, dim=[0, 1], correction=0)
            result[size] = x.sub_(mean).div_(variance.sqrt().clamp(min=1e-12)).flatten(1)
        return result


def sliced_wasserstein(
    real: dict[Size, torch.Tensor],
    fake: dict[Size, torch.Tensor],
    *,
    repeats: int = 4,
    directions: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """Return {"swd_64": ..., "swd_32": ..., "swd_16": ..., "swd": their mean}, times 1000 as in the paper. The name of
    a level that is not square is "swd_64x96".

    Both sides are what `result` gave. Where one has more rows, its first ones count.

    Raises:
        UsageError: if the two have different levels or channels.
    """
    if {size: t.shape[1] for size, t in real.items()} != {size: t.shape[1] for size, t in fake.items()}:
        raise UsageError("the two sets of images have different sizes or channels")
    result: dict[str, float] = {}
    for size in real:
        n = min(len(real[size]), len(fake[size]))
        a, b = real[size][:n], fake[size][:n]
        distances = []
        for repeat in range(repeats):
            g = generator(seed, "directions", *_key(size), repeat)
            d = torch.randn([a.shape[1], directions], generator=g)
            d = (d / d.norm(dim=0)).t().contiguous()
            pa, pb = (_sort_rows(d @ x.t()) for x in (a, b))
            distances.append(pa.sub_(pb).abs_().mean().item())
        result[_name(size)] = 1000 * sum(distances) / repeats
    result["swd"] = sum(result.values()) / len(real)
    return result


class SlicedWasserstein(ImageMetric):
    """swd: the sliced Wasserstein distance between 8192 generated images and as many real ones, for each scale (`_64`,
    `_32`, ...) and as the mean over the scales."""

    kind, example = "swd", "swd"
    pattern = f"swd(?P<count>{COUNT})?"
    default_count, counted_by_option = 8192, True
    compares = True
    accumulates = PatchCollector
    least_side = LEAST

    def samples(self, real_images: int) -> int:
        return min(self.count, real_images)  # what one side has more of would not count

    def accumulator(self, images: ImageSet) -> Accumulator:
        return PatchCollector(images.size, min(images.channels, 3), seed=derive(images.seed, images.side))

    def compute(
        self, real: dict[Size, torch.Tensor], generated: dict[Size, torch.Tensor], tools: Tools
    ) -> dict[str, float]:
        found = sliced_wasserstein(real, generated, seed=tools.seed)
        return {name.removeprefix("swd"): value for name, value in found.items()}
