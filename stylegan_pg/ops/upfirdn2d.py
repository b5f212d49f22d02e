"""Up-sampling by zero insertion, padding, FIR filtering and down-sampling as one linear operator.

Because it is linear, its gradient is the same operator with up and down exchanged and the filter flipped, so one
operator provides derivatives of every order. Karras et al. 2020, "Analyzing and improving the image quality of
StyleGAN", use it at every change of resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stylegan_pg.ops import calls, decomposed, native, reference
from stylegan_pg.ops.operators import operator

_op = torch.library.Library("stylegan_pg", "FRAGMENT")
_op.define(
    "upfirdn2d(Tensor x, Tensor f, int[2] up, int[2] down, SymInt[4] padding, bool flip_filter, float gain) -> Tensor"
)


MAX_TAPS, MAX_FACTOR, MAX_PADDING = 1024, 1024, 1 << 30  # limits per axis; the kernels' integers must not overflow


def setup_filter(taps: Sequence[float], *, gain: float = 1.0) -> torch.Tensor:
    """Return the 2-D filter float32 [k, k]: the outer product of `taps` with itself, normalised to the sum `gain`.

    Raises:
        ValueError: if there are no taps, or their sum is 0 or not finite.
    """
    f = torch.tensor(list(taps), dtype=torch.float32)
    f = torch.outer(f, f)
    total = float(f.sum())
    if not total or not math.isfinite(total):
        raise ValueError(f"the sum of a filter's taps must be finite and not 0, unlike that of {list(taps)[:8]}")
    return f * (gain / f.sum())


def _check(x, f, up, down, padding):
    """Check the arguments, on which the kernels' memory accesses rely.

    Raises:
        ValueError: as upfirdn2d.
    """
    if x.ndim != 4 or f.ndim != 2:
        raise ValueError(f"upfirdn2d: x must be [N, C, H, W] and f [kh, kw], not {list(x.shape)} and {list(f.shape)}")
    if len(up) != 2 or len(down) != 2 or len(padding) != 4:
        raise ValueError(
            f"upfirdn2d: up={up} and down={down} must have two numbers each, and padding={padding} must have four"
        )
    if min(*up, *down) < 1 or max(*up, *down) > MAX_FACTOR:
        raise ValueError(f"upfirdn2d: the factors up={up}, down={down} must be at least 1 and at most {MAX_FACTOR}")
    if min(f.shape) < 1 or max(f.shape) > MAX_TAPS:
        raise ValueError(f"upfirdn2d: the filter {list(f.shape)} must have 1 to {MAX_TAPS} taps along each axis")
    if max(*padding, *(-p for p in padding)) > MAX_PADDING:
        raise ValueError(f"upfirdn2d: padding={padding} is larger than {MAX_PADDING}")
    out_h, out_w = _out_size(x, f, up, down, padding)
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"upfirdn2d: {list(x.shape[2:])} with up={up}, padding={padding} is smaller than the filter {list(f.shape)}"
        )


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _four(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom), given one number, (x, y) or all four."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        return (padding[0], padding[0], padding[1], padding[1])
    left, right, top, bottom = padding
    return left, right, top, bottom


def _out_size(x, f, up, down, padding):
    """Return (height, width) of the result."""
    left, right, top, bottom = padding
    (_, _, h, w), (fh, fw) = x.shape, f.shape
    return (h * up[1] + top + bottom - fh) // down[1] + 1, (w * up[0] + left + right - fw) // down[0] + 1


def _compute(x, f, up, down, padding, flip_filter, gain):
    _check(x, f, up, down, padding)
    kernels, y = native.compiled(x), None
    if kernels is not None:
        size = _out_size(x, f, up, down, padding)
        y = calls.upfirdn2d(kernels, x, f, up, down, padding, flip_filter, gain, size)
        if y is None:
            native.warn_no_kernel("upfirdn2d", x)
    if y is None:
        y = reference.upfirdn2d(x, f, up, down, padding, flip_filter, gain)
    return y


def _fake(x, f, up, down, padding, flip_filter, gain):
    _check(x, f, up, down, padding)
    size = [x.shape[0], x.shape[1], *_out_size(x, f, up, down, padding)]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=reference.layout_of(x))


def _setup_context(ctx, inputs, output):
    x, f, *ctx.args = inputs
    ctx.save_for_backward(f)
    ctx.in_size, ctx.out_size = x.shape[2:], output.shape[2:]


def _backward(ctx, dy):
    (f,) = ctx.saved_tensors
    (up_x, up_y), (down_x, down_y), (left, _, top, _), flip_filter, gain = ctx.args
    (in_h, in_w), (out_h, out_w), (fh, fw) = ctx.in_size, ctx.out_size, f.shape
    # With this padding, the transposed operation returns exactly the input's size.
    padding = [
        fw - left - 1,
        in_w * up_x - out_w * down_x + left - up_x + 1,
        fh - top - 1,
        in_h * up_y - out_h * down_y + top - up_y + 1,
    ]
    dx = _upfirdn2d(dy, f, [down_x, down_y], [up_x, up_y], padding, not flip_filter, gain)
    return dx, None, None, None, None, None, None


_upfirdn2d = operator(_op, "upfirdn2d", _compute, _fake, _setup_context, _backward)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor,
    *,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> torch.Tensor:
    """Up-sample images [N, C, H, W] by zero insertion, pad them, apply an FIR filter, and down-sample them.

    Args:
        x: A float tensor [N, C, H, W]. The result is channels_last if x is, otherwise contiguous.
        f: The filter [kh, kw], or [k] for the outer product with itself. It is used as float32 and gets no gradient.
        up, down: Integer factors, as one number or (x, y).
        padding: The number of zeros around the up-sampled image, as one number, (x, y) or (left, right, top, bottom).
            Negative numbers crop.
        flip_filter: False for convolution, True for correlation.
        gain: A factor that multiplies the result.

    Returns:
        [N, C, (H*up + top + bottom - kh) // down + 1, (W*up + left + right - kw) // down + 1] in x's dtype.

    Raises:
        ValueError: if the result would be empty, if factors, filter or padding are out of range, or if shapes do not
            fit.
    """
    f = f if f.dtype == torch.float32 else f.float()  # the kernels use float32, and all implementations must agree
    if f.ndim == 1:
        f = torch.outer(f, f)
    up, down, padding = _pair(up), _pair(down), _four(padding)
    if decomposed.wanted():
        _check(x, f, up, down, padding)
        return decomposed.upfirdn2d(x, f, up, down, padding, flip_filter, float(gain))
    return _upfirdn2d(x, f, up, down, padding, flip_filter, float(gain))


def filter2d(x: torch.Tensor, f: torch.Tensor, *, padding: int | Sequence[int] = 0, gain: float = 1.0) -> torch.Tensor:
    """Filter [N, C, H, W] without changing its size. `padding` is added to the padding that the filter requires."""
    left, right, top, bottom = _four(padding)
    fh, fw = f.shape
    pad = (left + fw // 2, right + (fw - 1) // 2, top + fh // 2, bottom + (fh - 1) // 2)
    return upfirdn2d(x, f, padding=pad, gain=gain)


def upsample2d(x: torch.Tensor, f: torch.Tensor, *, up: int = 2, padding: int = 0, gain: float = 1.0) -> torch.Tensor:
    """Up-sample [N, C, H, W] by `up`. The gain up^2 preserves the brightness. `padding` is in output pixels."""
    (fh, fw), p = f.shape, padding
    pad = (p + (fw + up - 1) // 2, p + (fw - up) // 2, p + (fh + up - 1) // 2, p + (fh - up) // 2)
    return upfirdn2d(x, f, up=up, padding=pad, gain=gain * up * up)


def downsample2d(
    x: torch.Tensor, f: torch.Tensor, *, down: int = 2, padding: int = 0, gain: float = 1.0
) -> torch.Tensor:
    """Filter [N, C, H, W] and keep every `down`-th pixel. `padding` is in input pixels."""
    (fh, fw), p = f.shape, padding
    pad = (p + (fw - down + 1) // 2, p + (fw - down) // 2, p + (fh - down + 1) // 2, p + (fh - down) // 2)
    return upfirdn2d(x, f, down=down, padding=pad, gain=gain)
