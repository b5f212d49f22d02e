"""Up-sample by zero insertion, pad, filter with an FIR kernel and down-sample, as one linear operation.

Being linear, its gradient is the same operation with up and down exchanged and the filter flipped, so one autograd
Function serves derivatives of every order (Karras et al. 2020, "Analyzing and improving the image quality of
StyleGAN", use it around every change of resolution).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def setup_filter(taps: Sequence[float], *, gain: float = 1.0) -> torch.Tensor:
    """The 2-D filter [k, k] (float32) that is the outer product of `taps`, normalised to the sum `gain`."""
    f = torch.tensor(list(taps), dtype=torch.float32)
    f = torch.outer(f, f)
    return f * (gain / f.sum())


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _four(padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Left, right, top, bottom from one number, (x, y) or all four."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        return (padding[0], padding[0], padding[1], padding[1])
    left, right, top, bottom = padding
    return left, right, top, bottom


def _reference(x, f, up, down, padding, flip_filter, gain):
    """The definition: insert zeros, pad or crop, correlate every channel with the (flipped) filter, keep every n-th."""
    n, c, h, w = x.shape
    up_x, up_y = up
    if up != (1, 1):
        # The layout is kept: depth-wise convolution is several times as fast in channels_last on CPUs.
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty([n, c, h * up_y, w * up_x], dtype=x.dtype, device=x.device, memory_format=layout).zero_()
        y[:, :, ::up_y, ::up_x] = x
        x = y
    left, right, top, bottom = padding
    if left != right or top != bottom or left < 0 or top < 0:
        x, left, top = F.pad(x, padding), 0, 0
    f = (f * gain).to(x.dtype)
    if not flip_filter:  # true convolution
        f = f.flip([0, 1])
    f = f[None, None].expand(c, 1, -1, -1).contiguous()
    return F.conv2d(x, f, stride=(down[1], down[0]), padding=(top, left), groups=c)


class _Upfirdn2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f, up, down, padding, flip_filter, gain):
        ctx.save_for_backward(f)
        ctx.args = up, down, padding, flip_filter, gain
        ctx.in_size = x.shape[2:]
        y = _reference(x, f, up, down, padding, flip_filter, gain)
        ctx.out_size = y.shape[2:]
        return y

    @staticmethod
    def backward(ctx, *grads):
        (f,) = ctx.saved_tensors
        (up_x, up_y), (down_x, down_y), (left, _, top, _), flip_filter, gain = ctx.args
        (in_h, in_w), (out_h, out_w), (fh, fw) = ctx.in_size, ctx.out_size, f.shape
        # The padding that makes the transposed operation return exactly the input's size.
        padding = (
            fw - left - 1,
            in_w * up_x - out_w * down_x + left - up_x + 1,
            fh - top - 1,
            in_h * up_y - out_h * down_y + top - up_y + 1,
        )
        dx = _Upfirdn2d.apply(grads[0], f, (down_x, down_y), (up_x, up_y), padding, not flip_filter, gain)
        return dx, None, None, None, None, None, None


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
    """Zero-insertion up-sampling, padding, FIR filtering and down-sampling of [N, C, H, W].

    Args:
        x: float tensor [N, C, H, W].
        f: filter [kh, kw], float32; no gradient flows to it.
        up, down: integer factors, one number or (x, y).
        padding: zeros around the up-sampled image, one number, (x, y) or (left, right, top, bottom); negative crops.
        flip_filter: False convolves, True correlates.
        gain: factor on the result.

    Returns:
        [N, C, (H*up + top + bottom - kh) // down + 1, (W*up + left + right - kw) // down + 1], x's dtype.
    """
    return _Upfirdn2d.apply(x, f, _pair(up), _pair(down), _four(padding), flip_filter, float(gain))  # type: ignore  # apply is untyped


def filter2d(x: torch.Tensor, f: torch.Tensor, *, padding: int | Sequence[int] = 0, gain: float = 1.0) -> torch.Tensor:
    """Blur that keeps the size; `padding` comes on top of what the filter itself needs."""
    left, right, top, bottom = _four(padding)
    fh, fw = f.shape
    pad = (left + fw // 2, right + (fw - 1) // 2, top + fh // 2, bottom + (fh - 1) // 2)
    return upfirdn2d(x, f, padding=pad, gain=gain)


def upsample2d(x: torch.Tensor, f: torch.Tensor, *, up: int = 2, padding: int = 0, gain: float = 1.0) -> torch.Tensor:
    """Up-sample by `up`, keeping the brightness (gain up^2 inside); `padding` counts output pixels."""
    (fh, fw), p = f.shape, padding
    pad = (p + (fw + up - 1) // 2, p + (fw - up) // 2, p + (fh + up - 1) // 2, p + (fh - up) // 2)
    return upfirdn2d(x, f, up=up, padding=pad, gain=gain * up * up)


def downsample2d(
    x: torch.Tensor, f: torch.Tensor, *, down: int = 2, padding: int = 0, gain: float = 1.0
) -> torch.Tensor:
    """Filter and keep every `down`-th pixel; `padding` counts input pixels."""
    (fh, fw), p = f.shape, padding
    pad = (p + (fw - down + 1) // 2, p + (fw - down) // 2, p + (fh - down + 1) // 2, p + (fh - down) // 2)
    return upfirdn2d(x, f, down=down, padding=pad, gain=gain)
