"""The filtered leaky ReLU: a leaky ReLU at a temporarily higher sampling rate, between two low-pass filters.

Karras et al. 2021, "Alias-free generative adversarial networks", section 3: the activation of a signal has frequencies
that the grid of pixels cannot represent. It is therefore applied to an up-sampled image, and a filter removes the new
frequencies before the image is down-sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from stylegan_pg.ops import reference

MAX_FACTOR, MAX_TAPS = 1024, 1024  # limits per axis; the kernels' integers must not overflow
MAX_PADDING = 1 << 20


def _check(x, up_filter, down_filter, bias, up, down, padding, gain, slope, clamp):
    """Check the arguments, on which the kernels' memory accesses rely.

    Raises:
        ValueError: as filtered_lrelu.
    """
    if x.ndim != 4:
        raise ValueError(f"filtered_lrelu: x must be [N, C, H, W], not {list(x.shape)}")
    if bias is not None and list(bias.shape) != [x.shape[1]]:
        raise ValueError(f"filtered_lrelu: the bias {list(bias.shape)} must be [{x.shape[1]}], the channels of x")
    for name, f in (("up_filter", up_filter), ("down_filter", down_filter)):
        if f is not None and (f.ndim not in (1, 2) or min(f.shape) < 1 or max(f.shape) > MAX_TAPS):
            raise ValueError(
                f"filtered_lrelu: {name} must be [k] or [kh, kw] with 1 to {MAX_TAPS} taps along each axis, "
                f"not {list(f.shape)}"
            )
    if not 1 <= min(up, down) <= max(up, down) <= MAX_FACTOR:
        raise ValueError(f"filtered_lrelu: the factors up={up}, down={down} must be 1 to {MAX_FACTOR}")
    if len(padding) != 4 or max(*padding, *(-p for p in padding)) > MAX_PADDING:
        raise ValueError(
            f"filtered_lrelu: padding={list(padding)} must be left, right, top and bottom, each at most {MAX_PADDING}"
        )
    if not math.isfinite(gain) or not math.isfinite(slope):
        raise ValueError(f"filtered_lrelu: gain={gain} and slope={slope} must be finite")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"filtered_lrelu: the clamp must be at least 0, not {clamp}")
    (mid_h, mid_w), (out_h, out_w) = _sizes(x, up_filter, down_filter, up, down, padding)
    if min(mid_h, mid_w, out_h, out_w) < 1:
        raise ValueError(
            f"filtered_lrelu: {list(x.shape[2:])} with up={up}, padding={list(padding)} is smaller than the filters "
            f"{_taps(up_filter)} and {_taps(down_filter)}"
        )


def _taps(f):
    """Return (rows, columns) of a filter."""
    return (1, 1) if f is None else (f.shape[0], f.shape[-1])


def _sizes(x, up_filter, down_filter, up, down, padding):
    """Return (height, width) at the temporary rate, where the activation is applied, and (height, width) of the
    result."""
    left, right, top, bottom = padding
    (uh, uw), (dh, dw) = _taps(up_filter), _taps(down_filter)
    mid_h, mid_w = x.shape[2] * up + top + bottom - uh + 1, x.shape[3] * up + left + right - uw + 1
    return (mid_h, mid_w), ((mid_h - dh) // down + 1, (mid_w - dw) // down + 1)


def _four(padding: int | Sequence[int]) -> list[int]:
    """Return [left, right, top, bottom], given one number, (x, y) or all four."""
    if isinstance(padding, int):
        return [padding] * 4
    return [padding[0], padding[0], padding[1], padding[1]] if len(padding) == 2 else list(padding)


def _float32(f: torch.Tensor | None) -> torch.Tensor | None:
    return f if f is None or f.dtype == torch.float32 else f.float()


def filtered_lrelu(
    x: torch.Tensor,
    up_filter: torch.Tensor | None = None,
    down_filter: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
) -> torch.Tensor:
    """Add a bias, up-sample images [N, C, H, W], apply a leaky ReLU, and down-sample them.

    With z = conv(pad(zeros(x + bias)), up_filter) * up^2, where `zeros` inserts up - 1 zeros after each value, and
    a = clamp(leaky_relu(z, slope) * gain), the result consists of every `down`-th value of conv(a, down_filter), which
    starts with the first position at which the filter lies inside of a. Both filters are used as convolutions (Karras
    et al. 2021, section 3.2 and appendix C).

    Args:
        x: A float tensor [N, C, H, W]. The result is channels_last if x is, otherwise contiguous.
        up_filter, down_filter: Filters [k] for both directions, or [kh, kw]; None for a single tap of 1. They are used
            as float32 and get no gradient.
        bias: [C] or None.
        up, down: Integer factors for both directions.
        padding: The number of zeros around the up-sampled image before it is filtered, as one number, (x, y) or (left,
            right, top, bottom). Negative numbers crop.
        gain: The factor after the leaky ReLU, which is applied before the clamp.
        slope: The leaky ReLU's slope below 0; 1 makes the operation linear (apart from the clamp).
        clamp: The largest magnitude after the gain, at least 0; None for no limit.

    Returns:
        [N, C, (mid_h - dh) // down + 1, (mid_w - dw) // down + 1] in x's dtype, where mid_h = H*up + top + bottom - uh
        + 1, mid_w likewise, uh is the number of rows of the up filter and dh that of the down filter. It is
        differentiable twice with respect to x and bias.

    Raises:
        ValueError: if the result would be empty, if factors, filters, padding, gain, slope or clamp are out of range,
            or if shapes do not fit.
    """
    args = (
        x, _float32(up_filter), _float32(down_filter), bias, int(up), int(down), _four(padding), float(gain),
        float(slope), None if clamp is None else float(clamp),
    )  # fmt: skip
    _check(*args)
    return reference.filtered_lrelu(*args)
