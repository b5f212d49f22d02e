"""The sliced Wasserstein distance between two sets of images, scale by scale (Karras et al. 2018, section 5).

Images are decomposed into Laplacian pyramids, and random 7x7 neighbourhoods of each level are the features. The
distance between the two distributions of features is averaged over random one-dimensional projections, where it is
computed by sorting. A small value at a coarse level means similar large-scale structure; a small value at the finest
level means similar texture. The metric needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from stylegan_pg.errors import UsageError
from stylegan_pg.metrics.accumulators import Accumulator
from stylegan_pg.metrics.base import COUNT, ImageMetric, ImageSet, Settings
from stylegan_pg.rng import derive, generator

PATCH = 7
MIN_LEVEL = 16  # pixels of the smaller side of the coarsest level
MIN_SIDE = 8  # pixels of the smaller side of an image

Size = tuple[int, int]  # (height, width) of a level
Patches = dict[Size, list[tuple[int, torch.Tensor]]]  # {level: [(number of the first image, patches)]}


def _name(size: Size) -> str:
    return f"swd_{size[0]}" if size[0] == size[1] else f"swd_{size[0]}x{size[1]}"


def _key(size: Size) -> Sequence[int]:
    """Return the part of a random stream's key that identifies a level."""
    return size[:1] if size[0] == size[1] else size


def _binomial(x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """Filter [N, C, H, W] with [1, 4, 6, 4, 1] / 16 along both axes; the borders are mirrored."""
    x = F.pad(x, [2, 2, 2, 2], mode="reflect")
    for axis in (3, 2):
        # On a CPU, five shifted views are four times as fast as a depthwise convolution, and the bits of the result do
        # not depend on the batch size.
        a, b, c, d, e = (x.narrow(axis, i, x.shape[axis] - 4) for i in range(5))
        x = ((a + e) + 4 * (b + d) + 6 * c) * (gain**0.5 / 16)
    return x


def _sort_rows(x: torch.Tensor) -> torch.Tensor:
    """Sort each row of float32 [rows, n] in place. NumPy's sort is ten times as fast as torch's, which also returns
    indices, and it releases the global interpreter lock."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(np.ndarray.sort, x.numpy()))
    return x


def laplacian_pyramid(images: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Return the Laplacian pyramid of float32 [N, C, H, W] (Burt and Adelson 1983): `levels` tensors, each half the
    size of the previous one. Each level but the last is the difference between the image and its up-sampled low-pass
    copy; the last level is the remaining low-pass image."""
    pyramid = []
    for _ in range(levels - 1):
        low = _binomial(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = low
        pyramid.append(images - _binomial(spread, gain=4.0))
        images = low.contiguous()
    return [*pyramid, images]


class PatchCollector(Accumulator):
    """Accumulates random 7x7 patches of one set of images.

    The pyramid has another level as long as both sides are even and half of the smaller side is at least 16 pixels.

    Args:
        size: (height, width) of the images, at least 8 pixels each.
        channels: The number of channels of the images.
        patches_per_image: The number of patches at each level of each image.
        seed: The positions of an image's patches are a function of this seed and the image's number.

    Raises:
        UsageError: if the images are too small.
    """

    statistic = "patches"

    def __init__(self, size: tuple[int, int], channels: int, *, patches_per_image: int = 128, seed: int = 0):
        if min(size) < MIN_SIDE:
            raise UsageError(
                f"the sliced Wasserstein distance needs images of {MIN_SIDE} pixels or more on each side, "
                f"not {size[0]}x{size[1]}"
            )
        self.channels, self.patches_per_image, self.seed = channels, patches_per_image, seed
        self.levels = [size]
        while min(size) >= 2 * MIN_LEVEL and size[0] % 2 == size[1] % 2 == 0:
            size = size[0] // 2, size[1] // 2
            self.levels.append(size)
        self.count = 0
        self._patches: Patches = {size: [] for size in self.levels}

    def add(self, values: torch.Tensor, first: int | None = None) -> None:
        """Add uint8 images [N, C, H, W]. `first` is the number of the first image; by default, numbers continue.

        Raises:
            UsageError: if the images have a wrong shape or dtype.
        """
        expected = (self.channels, *self.levels[0])
        if values.dtype != torch.uint8 or values.ndim != 4 or tuple(values.shape[1:]) != expected:
            raise UsageError(
                f"the sliced Wasserstein distance expects uint8 images of shape [N, {', '.join(map(str, expected))}], "
                f"not {str(values.dtype).removeprefix('torch.')} {list(values.shape)}: convert the images first"
            )
        first = self.count if first is None else first
        for part in values.split(16):  # the pyramid of 16 images fits into the processor's cache
            self._add(part, first)
            first += len(part)

    def _add(self, images: torch.Tensor, first: int) -> None:
        n, k = len(images), self.patches_per_image
        pyramid = laplacian_pyramid(images.float(), len(self.levels))
        offsets = torch.arange(PATCH)
        for size, level in zip(self.levels, pyramid, strict=True):
            positions = [self._positions(size, first + i) for i in range(n)]
            rows, columns = (torch.stack(axis)[:, :, None] + offsets for axis in zip(*positions, strict=True))
            rows, columns = rows[:, :, :, None], columns[:, :, None, :]  # [N, k, 7, 1] and [N, k, 1, 7]
            image = torch.arange(n)[:, None, None, None]
            patches = level.permute(0, 2, 3, 1)[image, rows, columns]  # [N, k, 7, 7, C]
            self._patches[size].append((first, patches.reshape(n * k, -1, self.channels)))
        self.count += n

    def _positions(self, size: Size, number: int) -> list[torch.Tensor]:
        """Return the top rows [k] and left columns [k] of one image's patches at one level."""
        g = generator(self.seed, "patches", *_key(size), number)
        return [torch.randint(side - PATCH + 1, [self.patches_per_image], generator=g) for side in size]

    def merge(self, other: PatchCollector) -> None:
        self.count += other.count
        for size, parts in other._patches.items():
            self._patches[size] += parts

    def result(self) -> dict[Size, torch.Tensor]:
        """Return {(height, width) of a level: float32 [N * patches_per_image, 49 * C]}. Each channel is normalised to
        mean 0 and standard deviation 1 over the whole set.

        Raises:
            UsageError: if no images were added.
        """
        if not self.count:
            raise UsageError("the sliced Wasserstein distance needs images: add some first")
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
    """Compute the sliced Wasserstein distance at each level.

    Args:
        real, fake: Results of PatchCollector. If one side has more patches, only its first ones are used.
        repeats: The number of sets of random directions.
        directions: The number of random directions in each set.
        seed: The seed of the directions.

    Returns:
        {"swd_64": ..., "swd_32": ..., "swd_16": ..., "swd": their mean}, multiplied by 1000 as in the paper. A level
        that is not square is named "swd_64x96".

    Raises:
        UsageError: if the two sides have different levels or channels.
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
    """swd is the sliced Wasserstein distance between 8192 generated images and the same number of real ones: swd_64,
    swd_32, ... are the values at each scale, and swd is their mean."""

    kind, example = "swd", "swd"
    pattern = f"swd(?P<count>{COUNT})?"
    default_count, counted_by_option = 8192, True
    uses_real_images = True
    accumulator_class = PatchCollector
    min_side = MIN_SIDE

    def samples(self, real_images: int) -> int:
        return min(self.count, real_images)  # both sides are cut to the same number of patches

    def accumulator(self, images: ImageSet) -> Accumulator:
        return PatchCollector(images.size, min(images.channels, 3), seed=derive(images.seed, images.side))

    def compute(
        self, real: dict[Size, torch.Tensor], generated: dict[Size, torch.Tensor], settings: Settings
    ) -> dict[str, float]:
        found = sliced_wasserstein(real, generated, seed=settings.seed)
        return {name.removeprefix("swd"): value for name, value in found.items()}
