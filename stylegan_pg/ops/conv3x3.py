"""Convolutions of 3x3 in 16 bits on CPUs that have no instructions for them, with a quarter of the multiplications.

Winograd's minimal filtering (Lavin and Gray 2016, "Fast algorithms for convolutional neural networks") computes tiles
of 4x4 outputs from transforms of the inputs and of the weights. It rounds more than the definition, by about a factor of
ten: too much for float32, nothing beside the rounding of 16 bits. All derivatives are made of the same two operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stylegan_pg.ops import calls, native
from stylegan_pg.ops.operators import operator

LEAST_TILES = 64  # with fewer, transforming the weights takes longer than is gained
LEAST_CHANNELS = 16

_op = torch.library.Library("stylegan_pg", "FRAGMENT")
_op.define("conv3x3(Tensor x, Tensor weight, bool turned) -> Tensor")
_op.define("conv3x3_weight(Tensor x, Tensor dy) -> Tensor")


def _kernels(x):
    kernels = native.compiled(x)
    return kernels if kernels is not None and kernels.kind == "cpu" else None  # GPUs have cuDNN


def _turned(weight):
    """The weights of the transposed convolution: inputs and outputs change places, and both axes their direction."""
    return weight.transpose(0, 1).flip([2, 3])


def _exact(x):
    """What sums are made of where there is no kernel."""
    return x if x.dtype == torch.float64 else x.float()


def _compute(x, weight, turned):
    if (kernels := _kernels(x)) is not None:
        return calls.conv3x3(kernels, x, weight, turned)
    y = F.conv2d(_exact(x), _exact(_turned(weight) if turned else weight), padding=1)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _fake(x, weight, turned):
    size = [x.shape[0], weight.shape[1 if turned else 0], *x.shape[2:]]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _weight_compute(x, dy):
    if (kernels := _kernels(x)) is not None:
        return calls.conv3x3_weight(kernels, x, dy)
    dw = torch.nn.grad.conv2d_weight(_exact(x), [dy.shape[1], x.shape[1], 3, 3], _exact(dy), padding=1)
    return dw.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _weight_fake(x, dy):
    size = [dy.shape[1], x.shape[1], 3, 3]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup(ctx, inputs, output):
    x, weight, ctx.turned = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    of_x, of_weight = ctx.needs_input_grad[:2]
    dx = _conv(dy, weight, not ctx.turned) if of_x else None
    # Of turned weights the gradient is turned, which exchanging x and dy does.
    dw = _gradient(*((dy, x) if ctx.turned else (x, dy))) if of_weight else None
    return dx, dw, None


def _weight_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _weight_backward(ctx, g):
    x, dy = ctx.saved_tensors
    of_x, of_dy = ctx.needs_input_grad
    return _conv(dy, g, True) if of_x else None, _conv(x, g, False) if of_dy else None


_conv = operator(_op, "conv3x3", _compute, _fake, _setup, _backward)
_gradient = operator(_op, "conv3x3_weight", _weight_compute, _weight_fake, _weight_setup, _weight_backward)


def conv3x3_pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether conv3x3 is faster here than the definition in float32: kernels [3, 3], channels_last, large enough."""
    n, c, h, w = x.shape
    return (
        weight.shape[2:] == (3, 3)
        and min(c, weight.shape[0]) >= LEAST_CHANNELS
        and n * -(-h // 4) * -(-w // 4) >= LEAST_TILES
        and x.is_contiguous(memory_format=torch.channels_last)
        and _kernels(x) is not None
    )


def conv3x3(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """F.conv2d(x, weight, padding=1) in channels_last, of the sums in float32 (float64 for float64).

    Args:
        x: [N, I, H, W] of any size and layout.
        weight: [O, I, 3, 3] of x's dtype.

    Returns:
        [N, O, H, W], of x's dtype, differentiable as often as one likes.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    if x.ndim != 4 or weight.ndim != 4 or list(weight.shape[1:]) != [x.shape[1], 3, 3]:
        raise ValueError(f"conv3x3: weights {list(weight.shape)} are not [O, I, 3, 3] for x {list(x.shape)}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"conv3x3: x is {x.dtype} on {x.device}, the weights {weight.dtype} on {weight.device}")
    return _conv(x, weight, False)
