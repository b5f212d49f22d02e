"""The filtered leaky ReLU: a leaky ReLU at a temporarily higher sampling rate, between two low-pass filters.

Karras et al. 2021, "Alias-free generative adversarial networks", section 3: the activation of a signal has frequencies
that the grid of pixels cannot represent. It is therefore applied to an up-sampled image, and a filter removes the new
frequencies before the image is down-sampled.

The gradient up-samples with the second filter, multiplies by the activation's slopes, and down-samples with the first
filter. It is linear, and its own gradient has the same form, so one operator provides derivatives of every order. The
kernels record the slopes in two bits for each value at the temporary rate, and nothing else is kept for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from stylegan_pg.ops import calls, decomposed, native, operators, reference
from stylegan_pg.ops.calls import Stages, taps

_op = torch.library.Library("stylegan_pg", "FRAGMENT")
_op.define(
    "filtered_lrelu(Tensor x, Tensor? up_filter, Tensor? down_filter, Tensor? bias, int up, int down, "
    "SymInt[4] padding, float gain, float slope, float? clamp, bool record) -> (Tensor, Tensor)"
)
_op.define(
    "filtered_lrelu_gradient(Tensor g, Tensor slopes, Tensor? first, Tensor? second, int up, int down, "
    "SymInt[4] offsets, SymInt[2] mid, SymInt[2] out, float[2] gains, bool correlate, bool channels_last, float gain, "
    "float slope, bool sums) -> (Tensor, Tensor)"
)

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
            f"{taps(up_filter)} and {taps(down_filter)}"
        )


def _sizes(x, up_filter, down_filter, up, down, padding):
    """Return (height, width) at the temporary rate, where the activation is applied, and (height, width) of the
    result."""
    left, right, top, bottom = padding
    (uh, uw), (dh, dw) = taps(up_filter), taps(down_filter)
    mid_h, mid_w = x.shape[2] * up + top + bottom - uh + 1, x.shape[3] * up + left + right - uw + 1
    return (mid_h, mid_w), ((mid_h - dh) // down + 1, (mid_w - dw) // down + 1)


def _stages(x, up_filter, down_filter, up, down, padding):
    """Return the linear part of the operation."""
    mid, out = _sizes(x, up_filter, down_filter, up, down, padding)
    offsets = [padding[0], padding[2], 0, 0]
    return Stages(up_filter, down_filter, up, down, offsets, mid, out, (float(up * up), 1.0), False)


def _kernels(x, stages):
    """Return the kernels if they support this case. If they do not, there is one warning."""
    kernels = native.compiled(x)
    if kernels is not None and not calls.has_filtered_lrelu(stages):
        native.warn_no_kernel("filtered_lrelu", x)
        return None
    return kernels


# ---------------------------------------------------------------------------------------------------- the operation


def _value(x, up_filter, down_filter, bias, up, down, padding, gain, slope, clamp, record):
    args = (x, up_filter, down_filter, bias, up, down, padding, gain, slope, clamp)
    _check(*args)
    stages = _stages(x, up_filter, down_filter, up, down, padding)
    kernels = _kernels(x, stages)
    if kernels is not None:
        mode, layout = "record" if record else "plain", reference.layout_of(x)
        return calls.filtered_lrelu(kernels, mode, x, None, bias, stages, layout, (gain, slope, clamp))[:2]
    slopes = x.new_empty([0], dtype=torch.uint8)
    if record:
        z = x if bias is None else x + bias.to(x.dtype).reshape(1, -1, 1, 1)
        z = reference.filtered(z, up_filter, up, 1, padding, float(up * up))
        slopes = _recorded(
            z, gain, slope, clamp, calls.slopes_shape(x.shape, stages.mid, reference.is_channels_last(x))
        )
    y = reference.filtered_lrelu(*args)
    return y.clone() if y is x else y, slopes  # an operator's output must not be its input


def _recorded(z, gain, slope, clamp, shape):
    """Return the slopes of the activation at z [N, C, H, W], two bits for each: 0 for z > 0, 1 for the leaky side, 2
    where the clamp limits the value."""
    codes = (~(z > 0)).to(torch.uint8)
    if clamp is not None:
        codes = codes.masked_fill((F.leaky_relu(z, slope) * gain).abs() > clamp, 2)
    codes = F.pad(codes.contiguous(), [0, -codes.shape[-1] % 4]).unflatten(-1, [-1, 4])
    packed = codes[..., 0] | codes[..., 1] << 2 | codes[..., 2] << 4 | codes[..., 3] << 6
    return F.pad(
        packed, [n for have, want in zip(packed.shape[:0:-1], shape[:0:-1], strict=True) for n in (0, want - have)]
    )


def _slopes_of(packed, c, mid, gain, slope, dtype):
    """Return the slopes [N, C, *mid] that `_recorded` has packed."""
    packed = packed[:, :c, : mid[0], : (mid[1] + 3) // 4]
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)[..., : mid[1]]
    return torch.tensor([gain, gain * slope, 0.0], dtype=dtype, device=packed.device)[codes.long()]


def _fake(x, up_filter, down_filter, bias, up, down, padding, gain, slope, clamp, record):
    _check(x, up_filter, down_filter, bias, up, down, padding, gain, slope, clamp)
    mid, out = _sizes(x, up_filter, down_filter, up, down, padding)
    layout = reference.layout_of(x)
    y = torch.empty([x.shape[0], x.shape[1], *out], dtype=x.dtype, device=x.device, memory_format=layout)
    shape = calls.slopes_shape(x.shape, mid, layout == torch.channels_last) if record else [0]
    return y, x.new_empty(shape, dtype=torch.uint8)


def _setup(ctx, inputs, output):
    x, up_filter, down_filter, bias, up, down, padding, gain, slope, _, record = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], up_filter, down_filter)
    ctx.how = (up, down, padding, reference.is_channels_last(x), gain, slope, record)
    ctx.size, ctx.bias = x.shape, None if bias is None else bias.dtype


def _backward(ctx, dy, _):
    slopes, up_filter, down_filter = ctx.saved_tensors
    up, down, padding, last, gain, slope, record = ctx.how
    nothing: list[Any] = [None] * 11
    if dy is None:
        return tuple(nothing)
    if not record:
        raise RuntimeError("filtered_lrelu: the slopes that the gradient needs were not recorded")
    with_bias = ctx.bias is not None and ctx.needs_input_grad[3]
    mid, out = _sizes(torch.empty(ctx.size, device="meta"), up_filter, down_filter, up, down, padding)
    how = Stages(
        up_filter, down_filter, up, down, [padding[0], padding[2], 0, 0], mid, out, (float(up * up), 1.0), False
    )
    dx, sums = _gradient(dy, slopes, how.transposed(ctx.size[2:]), last, gain, slope, with_bias)
    if with_bias:
        nothing[3] = sums.to(ctx.bias)
    return dx, *nothing[1:]


# ------------------------------------------------------------------------------------------------------ its gradients


def _gradient(g, slopes, s, last, gain, slope, sums):
    """Call the operator of gradients. The arguments from `s.first` to `s.correlate` are those of Stages."""
    offsets, mid, out, gains = map(list, (s.offsets, s.mid, s.out, s.gains))
    how = (s.first, s.second, s.up, s.down, offsets, mid, out, gains, s.correlate, last, gain, slope, sums)
    return _gradient_op(g, slopes, *how)


def _check_gradient(g, slopes, s, last):
    """Check the arguments, on which the kernels' memory accesses rely.

    Raises:
        ValueError: if shapes do not fit.
    """
    if g.ndim != 4 or len(s.offsets) != 4 or len(s.mid) != 2 or len(s.out) != 2:
        raise ValueError(f"filtered_lrelu: a gradient must be [N, C, H, W], not {list(g.shape)}")
    if slopes.device != g.device:
        raise ValueError(f"filtered_lrelu: the gradient is on {g.device}, the slopes on {slopes.device}")
    shape = calls.slopes_shape(g.shape, s.mid, last)
    if list(slopes.shape) != shape or slopes.dtype != torch.uint8 or not slopes.is_contiguous():
        raise ValueError(f"filtered_lrelu: the slopes must be uint8 {shape}, not {slopes.dtype} {list(slopes.shape)}")
    if not 1 <= min(s.up, s.down) <= max(s.up, s.down) <= MAX_FACTOR:
        raise ValueError(f"filtered_lrelu: the factors up={s.up}, down={s.down} must be 1 to {MAX_FACTOR}")
    if min(*s.mid, *s.out) < 0 or max(*taps(s.first), *taps(s.second)) > MAX_TAPS:
        raise ValueError(f"filtered_lrelu: impossible sizes {list(s.mid)} and {list(s.out)}")


def _linear(g, slopes, first, second, up, down, offsets, mid, out, gains, correlate, last, gain, slope, sums):
    s = Stages(first, second, up, down, offsets, mid, out, (gains[0], gains[1]), correlate)
    _check_gradient(g, slopes, s, last)
    kernels, layout = _kernels(g, s), torch.channels_last if last else torch.contiguous_format
    if kernels is not None:
        fused = sums and kernels.kind == "cpu"  # on a GPU, PyTorch's reductions are as fast
        y, _, total = calls.filtered_lrelu(kernels, "masked", g, slopes, None, s, layout, (gain, slope, None), fused)
    else:
        (h, w), (left1, top1, left2, top2) = g.shape[2:], offsets
        (kh1, kw1), (kh2, kw2) = taps(first), taps(second)
        pad1 = (left1, mid[1] + kw1 - 1 - w * up - left1, top1, mid[0] + kh1 - 1 - h * up - top1)
        right2, bottom2 = (out[1] - 1) * down + kw2 - mid[1] - left2, (out[0] - 1) * down + kh2 - mid[0] - top2
        y = reference.filtered(g.contiguous(memory_format=layout), first, up, 1, pad1, gains[0], correlate)
        y = y * _slopes_of(slopes, g.shape[1], mid, gain, slope, y.dtype)
        y = reference.filtered(y, second, 1, down, (left2, right2, top2, bottom2), gains[1], correlate)
        y, total = y.contiguous(memory_format=layout), None
    if sums and total is None:
        total = y.sum(dim=(0, 2, 3), dtype=calls.sums_of(y.dtype))
    return y, g.new_empty([0]) if total is None else total


def _fake_linear(g, slopes, first, second, up, down, offsets, mid, out, gains, correlate, last, gain, slope, sums):
    s = Stages(first, second, up, down, offsets, mid, out, (gains[0], gains[1]), correlate)
    _check_gradient(g, slopes, s, last)
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty([*g.shape[:2], *out], dtype=g.dtype, device=g.device, memory_format=layout)
    return y, g.new_empty([g.shape[1]], dtype=calls.sums_of(g.dtype)) if sums else g.new_empty([0])


def _setup_linear(ctx, inputs, output):
    g, slopes, first, second, *ctx.how = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slopes, first, second)
    ctx.size, ctx.dtype = g.shape, g.dtype


def _backward_linear(ctx, dy, d_sums):
    slopes, first, second = ctx.saved_tensors
    up, down, offsets, mid, out, gains, correlate, last, gain, slope, sums = ctx.how
    if d_sums is not None and sums:  # all values of a channel have the same share in its sum
        shared = d_sums.to(ctx.dtype).reshape(1, -1, 1, 1)
        dy = shared.expand(*ctx.size[:2], *out) if dy is None else dy + shared
    if dy is None:
        return (None,) * 15
    s = Stages(first, second, up, down, offsets, mid, out, (gains[0], gains[1]), correlate)
    return _gradient(dy, slopes, s.transposed(ctx.size[2:]), last, gain, slope, False)[0], *[None] * 14


_value_op = operators.operator(_op, "filtered_lrelu", _value, _fake, _setup, _backward)
_gradient_op = operators.operator(
    _op, "filtered_lrelu_gradient", _linear, _fake_linear, _setup_linear, _backward_linear
)


def _four(padding: int | Sequence[int]) -> list[int]:
    """Return [left, right, top, bottom], given one number, (x, y) or all four."""
    if isinstance(padding, int):
        return [padding] * 4
    return [padding[0], padding[0], padding[1], padding[1]] if len(padding) == 2 else list(padding)


_narrow: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # filter -> (version, the filter in float32)


def _float32(f: torch.Tensor | None) -> torch.Tensor | None:
    """A filter in float32, which is the same tensor at every call, so that its taps are read from a GPU once."""
    if f is None or f.dtype == torch.float32:
        return f
    if torch.compiler.is_compiling() or f.is_inference():
        return f.float()
    known = _narrow.get(f)
    if known is None or known[0] != f._version:
        known = _narrow[f] = f._version, f.float()
    return known[1]


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
    # On the meta device steps are measured (planning/cost.py): as they are where there is a kernel.
    if decomposed.wanted():
        _check(*args)
        return decomposed.filtered_lrelu(*args)
    if not torch.compiler.is_compiling() and not x.is_meta and native.compiled(x) is None:
        _check(*args)
        return reference.filtered_lrelu(*args)
    record = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias))
    return _value_op(*args, record)[0]
