"""The definitions of the operators in plain PyTorch, differentiable by autograd to any order.

All other implementations must compute the same. These functions are used if there is no other implementation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

# name -> (function, default gain that keeps a unit-variance input at unit variance)
ACTIVATIONS = {
    "linear": (lambda x: x, 1.0),
    "relu": (torch.relu, math.sqrt(2)),
    "lrelu": (lambda x: F.leaky_relu(x, 0.2), math.sqrt(2)),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 1.0),
    "elu": (F.elu, 1.0),
    "selu": (F.selu, 1.0),
    "softplus": (F.softplus, 1.0),
    "swish": (F.silu, math.sqrt(2)),
}


def is_channels_last(x: torch.Tensor) -> bool:
    """Return whether [N, C, H, W] is channels_last and not also contiguous."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """Return the layout of an operator's result: channels_last if x is channels_last, otherwise contiguous."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_layout_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return y without gaps in memory, in x's layout."""
    return y.contiguous(memory_format=layout_of(x))


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    """Insert zeros, pad or crop, correlate every channel with the (flipped) filter, and keep every n-th pixel.

    `up` and `down` are (x, y), and `padding` is (left, right, top, bottom). See ops.upfirdn2d for the other arguments.
    """
    n, c, h, w = x.shape
    (up_x, up_y), (left, right, top, bottom) = up, padding
    y = x
    if (up_x, up_y) != (1, 1):
        # The layout is preserved, because depthwise convolution on CPUs is several times as fast in channels_last.
        size = [n, c, h * up_y, w * up_x]
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout_of(x)).zero_()
        y[:, :, ::up_y, ::up_x] = x
    # Padding comes before cropping, because the crop on one side may include padding of the other side.
    y = F.pad(y, [max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)])
    y = y[:, :, max(-top, 0) : y.shape[2] - max(-bottom, 0), max(-left, 0) : y.shape[3] - max(-right, 0)]
    f = (f.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * gain).to(x.dtype)
    if not flip_filter:  # convolution; F.conv2d correlates
        f = f.flip([0, 1])
    y = F.conv2d(y, f[None, None].expand(c, 1, -1, -1).contiguous(), groups=c)
    return in_layout_of(x, y[:, :, :: down[1], :: down[0]])


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    noise: torch.Tensor | None,
    act: str,
    gain: float,
    clamp: float | None,
    dim: int,
) -> torch.Tensor:
    """Compute clamp(act(x * scale + noise + bias) * gain) by separate operations. See ops.bias_act for the shapes."""
    if scale is not None:
        x = x * scale.to(x.dtype).reshape([*scale.shape, *[1] * (x.ndim - 2)])
    if noise is not None:
        x = x + noise.to(x.dtype)
    if bias is not None:
        x = x + bias.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = ACTIVATIONS[act][0](x)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def filtered_lrelu(
    x: torch.Tensor,
    up_filter: torch.Tensor | None,
    down_filter: torch.Tensor | None,
    bias: torch.Tensor | None,
    up: int,
    down: int,
    padding: Sequence[int],
    gain: float,
    slope: float,
    clamp: float | None,
) -> torch.Tensor:
    """Compute ops.filtered_lrelu by separate operations. `padding` is (left, right, top, bottom)."""
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(1, -1, 1, 1)
    y = filtered(x, up_filter, up, 1, padding, float(up * up))
    y = F.leaky_relu(y, slope)
    if gain != 1:
        y = y * gain
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    return in_layout_of(x, filtered(y, down_filter, 1, down, (0, 0, 0, 0), 1.0))


def filtered(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int,
    down: int,
    padding: Sequence[int],
    gain: float,
    flip_filter: bool = False,
) -> torch.Tensor:
    """Compute upfirdn2d with one factor for both directions. A filter [k] is applied to columns and rows in turn, and
    None is a single tap of 1."""
    left, right, top, bottom = padding
    if f is None:
        f = x.new_ones([1], dtype=torch.float32)
    if f.ndim == 2:
        return upfirdn2d(x, f, (up, up), (down, down), padding, flip_filter, gain)
    x = upfirdn2d(x, f[:, None], (1, up), (1, down), (0, 0, top, bottom), flip_filter, gain)
    return upfirdn2d(x, f[None, :], (up, 1), (down, 1), (left, right, 0, 0), flip_filter, 1.0)


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _sigmoid_slope(z):
    p = z.sigmoid()
    return p * (1 - p)


# name -> the activation's first and second derivative as functions of z
DERIVATIVES = {
    "linear": (torch.ones_like, torch.zeros_like),
    "relu": (lambda z: (z > 0).to(z.dtype), torch.zeros_like),
    "lrelu": (lambda z: torch.where(z > 0, torch.ones_like(z), 0.2), torch.zeros_like),
    "tanh": (lambda z: 1 - z.tanh().square(), lambda z: -2 * z.tanh() * (1 - z.tanh().square())),
    "sigmoid": (_sigmoid_slope, lambda z: _sigmoid_slope(z) * (1 - 2 * z.sigmoid())),
    "elu": (lambda z: z.clamp(max=0).exp(), lambda z: torch.where(z > 0, 0.0, z.clamp(max=0).exp())),
    "selu": (
        lambda z: _SELU_SCALE * torch.where(z > 0, 1.0, _SELU_ALPHA * z.clamp(max=0).exp()),
        lambda z: torch.where(z > 0, 0.0, _SELU_SCALE * _SELU_ALPHA * z.clamp(max=0).exp()),
    ),
    "softplus": (torch.sigmoid, _sigmoid_slope),
    "swish": (
        lambda z: z.sigmoid() * (1 + z * (1 - z.sigmoid())),
        lambda z: _sigmoid_slope(z) * (2 + z * (1 - 2 * z.sigmoid())),
    ),
}
