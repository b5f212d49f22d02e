"""Blitting and geometric augmentation, combined into one 3x3 matrix for each image that is applied once.

All operations are linear in the images and twice differentiable. Beyond its border an image continues by reflection, as
far as a transform reaches. Coordinates are folded back, so only the filter's margin is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F

from stylegan_pg.ops import upfirdn2d

# The orthonormal low-pass filter of the sym6 wavelet (Daubechies 1992, table 8.3): 12 taps of nearly linear phase.
# Up-sampling with it and down-sampling with its mirror image is the identity.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
DELAY = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)  # the filter's centre in samples, not quite 5.5


STEADY = False  # whether operations are made for all images also on CPUs, whatever the masks are


def changed(images: torch.Tensor, which: torch.Tensor, f: Callable[..., torch.Tensor], *per_image) -> torch.Tensor:
    """Apply f(images, *per_image) to the images in the mask `which` [N]; the others are unchanged.

    On a GPU, f is applied to all images, so that the host does not have to wait for the mask.
    """
    if images.is_cuda or STEADY:
        return torch.where(which[:, None, None, None], f(images, *per_image), images)
    if not which.any():
        return images
    if which.all():
        return f(images, *per_image)
    index = which.nonzero().flatten()
    return images.index_copy(0, index, f(images.index_select(0, index), *(t[index] for t in per_image)))


def mirror(images: torch.Tensor, pad: int) -> torch.Tensor:
    """Pad images [N, C, H, W] (H, W >= 2) by `pad` on every side, by reflection about the outer pixels."""
    if torch.are_deterministic_algorithms_enabled():  # this mode refuses the gradient of reflection on GPUs
        for axis in (2, 3):
            size = images.shape[axis]
            place = fold(torch.arange(-pad, size + pad, dtype=torch.float64, device=images.device), size).long()
            images = images.index_select(axis, place)
        return images
    h, w = (size - 1 for size in images.shape[2:])
    top = left = pad
    while top or left:  # a reflection reaches no further than the image; what it makes can be reflected again
        y, x = min(top, h), min(left, w)
        images = F.pad(images, [x, x, y, y], mode="reflect")
        top, left = top - y, left - x
    return images


def fold(x: torch.Tensor, size: int) -> torch.Tensor:
    """The coordinate in [0, size - 1] that corresponds to `x` in a plane of mirrored copies (outer pixels are not
    repeated)."""
    period = 2 * (size - 1)
    return (x - period * (x / period).round()).abs()


def _matrix(*rows: list) -> torch.Tensor:
    """Matrices [N, 3, 3] (float64) from two rows of numbers and tensors [N]; the third row is 0, 0, 1."""
    entries = torch.broadcast_tensors(
        *(torch.as_tensor(v, dtype=torch.float64) for row in (*rows, [0, 0, 1]) for v in row)
    )
    return torch.stack(entries, dim=-1).reshape(-1, 3, 3)


def _translation(x, y) -> torch.Tensor:
    return _matrix([1, 0, x], [0, 1, y])


def _scaling(x, y) -> torch.Tensor:
    return _matrix([x, 0, 0], [0, y, 0])


def _turn(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The inverse of a counter-clockwise rotation on the screen, [[cos, sin], [-sin, cos]], where y points down."""
    return _matrix([cos, -sin, 0], [sin, cos, 0])


def inverse(params: dict[str, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Matrices [N, 3, 3] (float64, CPU) that map an output pixel (x, y, 1) to its source position in the input, for
    images of `size` (height, width). The parameters are those of ada.draw and are applied in its order."""
    p = {k: v.double() for k, v in params.items()}
    height, width = size
    m = _translation((width - 1) / 2, (height - 1) / 2)
    if "flip" in p:
        quarters = params["turns"].long() % 4  # from a table, so that these are exact
        cos, sin = (torch.tensor(table, dtype=torch.float64)[quarters] for table in ([1, 0, -1, 0], [0, 1, 0, -1]))
        m = m @ _scaling(1 - 2 * p["flip"], 1) @ _turn(cos, sin) @ _translation(-p["shift"][:, 0], -p["shift"][:, 1])
    if "scale" in p:
        m = m @ _scaling(1 / p["scale"], 1 / p["scale"])
        m = m @ _turn(p["pre_rotation"].cos(), p["pre_rotation"].sin())
        m = m @ _scaling(1 / p["stretch"], p["stretch"])
        m = m @ _turn(p["post_rotation"].cos(), p["post_rotation"].sin())
        m = m @ _translation(-p["move"][:, 0], -p["move"][:, 1])
    return m @ _translation(-(width - 1) / 2, -(height - 1) / 2)


def instructions(params: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What `transform` needs, on the CPU: matrices [N, 3, 3] (float64), which images are copied, and which resampled.

    An image whose matrix maps whole pixels to whole pixels is copied exactly (the identity leaves it unchanged); all
    others are resampled.
    """
    m = inverse(params, size)
    identity = (m == torch.eye(3, dtype=m.dtype)).flatten(1).all(dim=1)
    whole = (m == m.round()).flatten(1).all(dim=1) & (m[:, :2, :2].det().abs() == 1)
    return {"matrix": m, "copied": whole & ~identity, "resampled": ~whole}


def transform(images: torch.Tensor, how: dict[str, torch.Tensor]) -> torch.Tensor:
    """Apply the blitting and geometric operations to images [N, C, H, W], as `instructions` says."""
    images = changed(images, how["copied"], blit, how["matrix"])
    return changed(images, how["resampled"], resample, how["matrix"])


def _sources(m: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The source positions x and y [N, h, w], not yet folded, of the output positions x [w] by y [h]."""
    m = m.to(x.device, x.dtype)[:, :, :, None, None]
    x, y = x[None, None, :], y[None, :, None]
    return m[:, 0, 0] * x + (m[:, 0, 1] * y + m[:, 0, 2]), m[:, 1, 0] * x + (m[:, 1, 1] * y + m[:, 1, 2])


def blit(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Copy pixels by inverse matrices [N, 3, 3] of integers."""
    _, c, h, w = images.shape
    x, y = (torch.arange(size, device=images.device, dtype=torch.float32) for size in (w, h))
    x, y = _sources(m, x, y)
    index = (fold(y, h) * w + fold(x, w)).long().flatten(1)
    return images.flatten(2).gather(2, index[:, None].expand(-1, c, -1)).unflatten(2, (h, w))


def resample(images: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Resample by inverse matrices [N, 3, 3]: up-sample by 2, interpolate linearly, down-sample (Karras et al. 2020,
    ADA, appendix B: sym6, against aliasing).

    Sample u of the up-sampled image lies at pixel (u - DELAY) / 2; ignoring DELAY, a flip would shift it by 0.4 pixels.
    """
    _, _, h, w = images.shape
    f = _low_pass(images.dtype, images.device)
    first = math.floor(DELAY)  # sample of the up-sampled image that is computed first; of 2h x 2w, all that is needed
    up = upfirdn2d(mirror(images, 3), f, up=2, padding=(5 - first, first - 6) * 2, gain=2)

    taps, like = len(SYM6), {"device": images.device, "dtype": images.dtype}
    x, y = ((torch.arange(2 * size + taps - 2, **like) - DELAY) / 2 for size in (w, h))
    x, y = _sources(m, x, y)
    u, v = (2 * fold(x, w) + (DELAY - first), 2 * fold(y, h) + (DELAY - first))
    return upfirdn2d(bilinear(up, u, v), f, down=2, flip_filter=True, gain=0.5)


@lru_cache(maxsize=8)
def _low_pass(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    f = torch.tensor(SYM6, dtype=dtype, device=device)
    return torch.outer(f, f)


def bilinear(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Interpolate images [N, C, H, W] at pixel coordinates x, y [N, h, w] within them -> [N, C, h, w]. The result is
    differentiable in the images to any order."""
    _, _, h, w = images.shape
    if images.is_cuda and torch.are_deterministic_algorithms_enabled():
        return gathered(images, x, y)
    grid = torch.stack([x * (2 / (w - 1)) - 1, y * (2 / (h - 1)) - 1], dim=-1)
    return _Sample.apply(images, grid)


def gathered(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`bilinear` by indexing, which is slower, but whose gradient GPUs can sum in a fixed order."""
    (_, c, h, w), size = images.shape, x.shape[1:]
    left, top = x.floor().clamp(0, w - 2), y.floor().clamp(0, h - 2)
    flat, corner = images.flatten(2), (top * w + left).long()

    def at(dy: int, dx: int) -> torch.Tensor:
        index = (corner + (dy * w + dx)).flatten(1)[:, None].expand(-1, c, -1)
        return flat.gather(2, index).unflatten(2, size)

    x, y = (x - left)[:, None], (y - top)[:, None]
    return (at(0, 0) * (1 - x) + at(0, 1) * x) * (1 - y) + (at(1, 0) * (1 - x) + at(1, 1) * x) * y


class _Sample(torch.autograd.Function):
    """F.grid_sample as a linear function of the images; PyTorch's own gradient has no second derivative in many
    versions."""

    @staticmethod
    def forward(ctx, images, grid):
        ctx.save_for_backward(grid)
        ctx.size = images.shape
        return F.grid_sample(images, grid, align_corners=True)

    @staticmethod
    def backward(ctx, *dy):
        return _Spread.apply(dy[0], *ctx.saved_tensors, ctx.size), None


class _Spread(torch.autograd.Function):
    """The transpose of _Sample."""

    @staticmethod
    def forward(ctx, dy, grid, size):
        ctx.save_for_backward(grid)
        backward = torch.ops.aten.grid_sampler_2d_backward
        return backward(dy, dy.new_empty(size), grid, 0, 0, True, [True, False])[0]

    @staticmethod
    def backward(ctx, *ddx):
        return _Sample.apply(ddx[0], *ctx.saved_tensors), None, None
