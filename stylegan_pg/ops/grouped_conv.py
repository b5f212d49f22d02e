"""Grouped convolutions whose second derivatives take as many operations for any number of groups.

PyTorch computes them group by group, which is a hundred launches for a hundred groups. A convolution is linear in the
images and in the weights. Its derivatives are two operators, which give the gradients of the images and of the weights,
and the derivatives of each of the three operators are the two others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stylegan_pg.ops import decomposed
from stylegan_pg.ops.operators import operator

_op = torch.library.Library("stylegan_pg", "FRAGMENT")
# x [N, I, H, W], weight [O, I / groups, kh, kw], y [N, O, H + 2 padding - kh + 1, W + 2 padding - kw + 1].
_op.define("grouped_conv(Tensor x, Tensor weight, int groups, int padding) -> Tensor")
_op.define("grouped_conv_images(Tensor dy, Tensor weight, int groups, int padding, SymInt[2] size) -> Tensor")
_op.define("grouped_conv_weight(Tensor x, Tensor dy, int groups, int padding, SymInt[2] kernel) -> Tensor")


def _layout(t: torch.Tensor) -> torch.memory_format:
    """The layout of a tensor; one that fits both, such as an image of one pixel, counts as contiguous."""
    last = t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _laid_out(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient in the layout of the images, which those that are computed from it then have, too."""
    return t.contiguous(memory_format=_layout(like))


def _empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_layout(like))


def _fake(x, weight, groups, padding):
    size = [n + 2 * padding - k + 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    return _empty(x, x.shape[0], weight.shape[0], *size)


def _fake_images(dy, weight, groups, padding, size):
    return _empty(dy, dy.shape[0], weight.shape[1] * groups, *size)


def _fake_weight(x, dy, groups, padding, kernel):
    return _empty(x, dy.shape[1], x.shape[1] // groups, *kernel)


def _compute(x, weight, groups, padding):
    y = F.conv2d(x, weight, padding=padding, groups=groups)
    return y.contiguous(memory_format=_layout(x))


def _derivative(dy, x, weight, groups, padding, *wanted: bool):
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups, [*wanted, False]
    )


def _compute_images(dy, weight, groups, padding, size):
    if dy.device.type == "cpu":  # of `like`, which takes no time, only the form and layout are used
        like = _fake_images(dy, weight, groups, padding, size)
        dx = _derivative(dy, like, weight, groups, padding, True, False)[0]
    else:
        dx = F.conv_transpose2d(dy, weight, padding=padding, groups=groups)
    return dx.contiguous(memory_format=_layout(dy))


def _compute_weight(x, dy, groups, padding, kernel):
    like = x.new_empty([1]).expand(dy.shape[1], x.shape[1] // groups, *kernel)
    dw = _derivative(dy, x, like, groups, padding, False, True)[1]
    return dw.contiguous(memory_format=_layout(x))


def _setup(ctx, inputs, output):
    x, weight, *ctx.args = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    dy = _laid_out(dy, x)
    of_x, of_weight = ctx.needs_input_grad[:2]
    dx = _images(dy, weight, *ctx.args, x.shape[2:]) if of_x else None
    dw = _weight(x, dy, *ctx.args, weight.shape[2:]) if of_weight else None
    return dx, dw, None, None


def _setup_images(ctx, inputs, output):
    dy, weight, *ctx.args, _ = inputs
    ctx.save_for_backward(dy, weight)


def _backward_images(ctx, g):
    dy, weight = ctx.saved_tensors
    g = _laid_out(g, dy)
    of_dy, of_weight = ctx.needs_input_grad[:2]
    ddy = _conv(g, weight, *ctx.args) if of_dy else None
    dw = _weight(g, dy, *ctx.args, weight.shape[2:]) if of_weight else None
    return ddy, dw, None, None, None


def _setup_weight(ctx, inputs, output):
    x, dy, *ctx.args, _ = inputs
    ctx.save_for_backward(x, dy)


def _backward_weight(ctx, g):
    x, dy = ctx.saved_tensors
    of_x, of_dy = ctx.needs_input_grad[:2]
    dx = _images(dy, g, *ctx.args, x.shape[2:]) if of_x else None
    ddy = _conv(x, g, *ctx.args) if of_dy else None
    return dx, ddy, None, None, None


_conv: Any = operator(_op, "grouped_conv", _compute, _fake, _setup, _backward)
_images: Any = operator(_op, "grouped_conv_images", _compute_images, _fake_images, _setup_images, _backward_images)
_weight: Any = operator(_op, "grouped_conv_weight", _compute_weight, _fake_weight, _setup_weight, _backward_weight)


def grouped_conv(x: torch.Tensor, weight: torch.Tensor, *, groups: int, padding: int = 0) -> torch.Tensor:
    """F.conv2d(x, weight, padding=padding, groups=groups), with fast derivatives of every order.

    Args:
        x: [N, I, H, W] in any layout.
        weight: [O, I / groups, kh, kw], in x's dtype.
        groups: Divides I and O; output channels of one group see the input channels of that group only.
        padding: The number of zeros around the images.

    Returns:
        [N, O, H + 2 padding - kh + 1, W + 2 padding - kw + 1] in x's dtype and layout.

    Raises:
        ValueError: if the shapes or dtypes do not fit.
    """
    fits = x.ndim == weight.ndim == 4 and groups > 0 and x.shape[1] == weight.shape[1] * groups
    if not fits or weight.shape[0] % groups or x.dtype != weight.dtype:
        raise ValueError(
            f"grouped_conv: weights {list(weight.shape)} ({weight.dtype}) in {groups} groups do not fit x "
            f"{list(x.shape)} ({x.dtype})"
        )
    if padding < 0 or any(n + 2 * padding < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)):
        raise ValueError(f"grouped_conv: {list(x.shape[2:])} with padding={padding} is smaller than the kernel")
    if decomposed.wanted():
        return F.conv2d(x, weight, padding=padding, groups=groups)
    return _conv(x, weight, groups, padding)
