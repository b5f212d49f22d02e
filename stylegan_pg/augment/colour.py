"""Augmentation that changes values but does not move pixels: colour, frequency bands, noise and cutout.

Colour and noise do not change the alpha channel of an image that has one (2 or 4 channels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from stylegan_pg.augment import geometry
from stylegan_pg.augment.geometry import changed, mirror

# The low-pass filter of the sym2 wavelet (Daubechies' 4 taps) in closed form.
SYM2 = tuple(t / (4 * math.sqrt(2)) for t in (1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5))


def colours(images: torch.Tensor) -> int:
    """The number of colour channels, 1 or 3; a further channel is alpha."""
    return 3 if images.shape[1] >= 3 else 1


def on_colours(images: torch.Tensor, f) -> torch.Tensor:
    """Apply f to the colour channels of [N, C, H, W]."""
    k = colours(images)
    return f(images) if k == images.shape[1] else torch.cat([f(images[:, :k]), images[:, k:]], dim=1)


# ----------------------------------------------------------------------------------------------------------- colour


def matrix(params: dict[str, torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrix [N, count, count] and offset [N, count] (float64) of the colour operations, in the order of ada.draw.

    Hue and saturation have no effect on grey (count = 1), as they act around the axis of the greys.
    """
    p = {k: params[k].double()[:, None, None] for k in ("brightness", "contrast", "luma_flip", "hue", "saturation")}
    one = torch.eye(count, dtype=torch.float64)
    luma = torch.full([count, count], 1 / count, dtype=torch.float64)  # v v^T of the unit vector along the greys
    factor = p["contrast"] * (one - 2 * luma * p["luma_flip"])
    offset = p["contrast"] * p["brightness"] * (1 - 2 * p["luma_flip"])  # the following operations map grey to grey
    if count == 3:
        cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=torch.float64) / math.sqrt(3)
        hue = luma + (one - luma) * p["hue"].cos() + cross * p["hue"].sin()  # Rodrigues' formula
        hue = torch.where(p["hue"] == 0, one, hue)
        saturation = torch.where(p["saturation"] == 1, one, luma + (one - luma) * p["saturation"])
        factor = saturation @ hue @ factor
    return factor, offset[:, :, 0].expand(-1, count)


def instructions(params: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """What `recolour` needs, on the CPU, for images of `count` colours: see `matrix`, and which images change."""
    factor, offset = matrix(params, count)
    one = torch.eye(count, dtype=factor.dtype)
    which = (factor != one).flatten(1).any(dim=1) | (offset != 0).any(dim=1)
    return {"factor": factor, "offset": offset, "recoloured": which}


def recolour(images: torch.Tensor, how: dict[str, torch.Tensor]) -> torch.Tensor:
    """Apply the colour operations to [N, C, H, W], as `instructions` says."""

    def f(x: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return on_colours(x, lambda y: _affine(y, factor, offset))

    return changed(images, how["recoloured"], f, how["factor"], how["offset"])


def _affine(x: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    factor, offset = (t.to(x.device, x.dtype) for t in (factor, offset))
    return torch.baddbmm(offset[:, :, None], factor, x.flatten(2)).unflatten(2, x.shape[2:])


# ---------------------------------------------------------------------------------------------------------- filters


def _convolve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.conv1d(a[None, None], b.flip(0)[None, None], padding=len(b) - 1)[0, 0]


def _spread(f: torch.Tensor, step: int) -> torch.Tensor:
    """f(z^step): the filter with its taps `step` apart."""
    out = f.new_zeros([(len(f) - 1) * step + 1])
    out[::step] = f
    return out


def bands() -> torch.Tensor:
    """Zero-phase filters [4, 43] (float64) of the frequency bands up to pi/8, pi/4, pi/2 and pi, which sum to 1.

    They form an undecimated wavelet tree: with the low-pass filter H and L = H(z)H(1/z)/2, the highest band is 1 - L,
    and L is split again at half the frequency (Karras et al. 2020, ADA, appendix B).
    """
    low = torch.tensor(SYM2, dtype=torch.float64)
    low = _convolve(low, low.flip(0)) / 2
    high = -low
    high[len(high) // 2] += 1  # orthonormal filters are complementary in power
    tree = [torch.ones([1], dtype=torch.float64)]  # from the whole downwards
    found = []
    for step in (1, 2, 4):
        found.append(_convolve(tree[-1], _spread(high, step)))
        tree.append(_convolve(tree[-1], _spread(low, step)))
    found.append(tree[-1])
    width = max(len(f) for f in found)
    return torch.stack([F.pad(f, [(width - len(f)) // 2] * 2) for f in reversed(found)])


def filters(gains: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `equalise` needs, on the CPU, for gains [N, 4] of the bands."""
    return {"taps": gains.double() @ bands(), "filtered": (gains != 1).any(dim=1)}


def equalise(images: torch.Tensor, how: dict[str, torch.Tensor]) -> torch.Tensor:
    """Amplify the four frequency bands of [N, C, H, W] along rows and columns, as `filters` says."""
    return changed(images, how["filtered"], _filter, how["taps"])


def _filter(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    f = taps.to(x.device, x.dtype).repeat_interleave(c, dim=0)[:, None]
    x = mirror(x, taps.shape[1] // 2).reshape(1, n * c, h + taps.shape[1] - 1, w + taps.shape[1] - 1)
    x = F.conv2d(F.conv2d(x, f[:, :, None, :], groups=n * c), f[:, :, :, None], groups=n * c)
    return x.reshape(n, c, h, w)


# ------------------------------------------------------------------------------------------------- noise and cutout


def add_noise(images: torch.Tensor, sigma: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    """Add N(0, sigma^2) to every colour of every pixel; the noise [colours, H, W] of an image depends on its seed."""
    return changed(images, sigma != 0, _noisy, sigma, seed)


def _noisy(x: torch.Tensor, sigma: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
    size = [colours(x), *x.shape[2:]]
    if x.is_cuda or geometry.STEADY:
        noise = torch.cat([hashed_normal(one, size) for one in seed.split(1)])  # one by one, to save memory
    else:
        noise = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(int(s))) for s in seed])
    noise = (noise * sigma[:, None, None, None]).to(x.dtype)
    return on_colours(x, lambda y: y + noise)


def hashed_normal(seed: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """N(0, 1) numbers [N, *size] (float32) that follow from seeds [N] (int64) on any device, without a generator: the
    hash function splitmix64 (Steele et al. 2014) of seed and position, and the transform of Box and Muller (1958)."""
    count = math.prod(size)
    position = torch.arange(1, 2 * count + 1, device=seed.device) * -7046029254386353131  # 0x9E3779B97F4A7C15
    z = seed[:, None] + position
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shifted(z, shift)) * factor
    u = _shifted(z ^ _shifted(z, 31), 40).float() / 2**24  # in [0, 1)
    radius, angle = (1 - u[:, :count]).log().mul(-2).sqrt(), u[:, count:] * (2 * math.pi)
    return (radius * angle.cos()).reshape(-1, *size)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """z >> by of unsigned numbers."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def cut_out(images: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Set a rectangle of each image to 0 (mid-grey, half transparent).

    `box` [N, 3] holds its centre x, y and its side, as fractions of the image's sides. A pixel is set if its centre
    lies inside.
    """
    return changed(images, box[:, 2] > 0, _cut, box)


def _cut(x: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    box = box.double()
    columns, rows = (
        ((torch.arange(size, device=x.device) + 0.5) / size - box[:, i, None]).abs() < box[:, 2, None] / 2
        for i, size in enumerate((x.shape[3], x.shape[2]))
    )
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, torch.zeros_like(x), x)
