"""bfloat16 3x3 convolutions with fewer multiplications, for CPUs without bfloat16 instructions.

Winograd's minimal filtering (Lavin and Gray 2016, "Fast algorithms for convolutional neural networks") computes tiles
of outputs from transforms of the inputs and of the weights. Its rounding error is about ten times that of direct
convolution, which is too large for float32 but negligible compared with the rounding to bfloat16. Derivatives of every
order use the same two operators.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.jit._trace import is_tracing
from torch.nn.grad import conv2d_weight

from stylegan_pg.ops import calls, decomposed, native
from stylegan_pg.ops.calls import sums_of
from stylegan_pg.ops.operators import operator

# {stride: smallest number}. With fewer tiles, the transform of the weights takes longer than the algorithm saves; with
# fewer channels, the transform of the images does. Tiles are counted per image, so that the choice, and therefore the
# result for an image, does not depend on the batch size.
MIN_TILES = {1: 64, 2: 128}
MIN_CHANNELS = {1: 16, 2: 32}

_op = torch.library.Library("stylegan_pg", "FRAGMENT")
# For x [N, I, H, W] and a result [N, O, *size], the weights are [O, I, 3, 3], or [I, O, 3, 3] if `swapped`.
_op.define("conv3x3(Tensor x, Tensor weight, bool swapped, bool transposed, int stride, SymInt[2] size) -> Tensor")
# The gradient of the weights, for a convolution that is not transposed.
_op.define("conv3x3_weight(Tensor x, Tensor dy, bool swapped, int stride) -> Tensor")


def _check(x, weight, swapped, transposed, stride, size):
    """Check the shapes, on which the kernels' memory accesses rely.

    Raises:
        ValueError: as conv3x3, and if `size` is not the size of the result.
    """
    if x.ndim != 4 or weight.ndim != 4 or list(weight.shape[2:]) != [3, 3]:
        raise ValueError(f"conv3x3: weights {list(weight.shape)} are not [O, I, 3, 3] for x {list(x.shape)}")
    if weight.shape[0 if swapped else 1] != x.shape[1]:
        form = "[I, O, 3, 3]" if swapped else "[O, I, 3, 3]"
        raise ValueError(f"conv3x3: weights {list(weight.shape)} are not {form} for x {list(x.shape)}")
    _check_sizes(x, transposed, stride, size)
    if x.device != weight.device:  # its address would be invalid on x's device
        raise ValueError(f"conv3x3: x is on {x.device}, the weights on {weight.device}")


def _check_sizes(x, transposed, stride, size):
    if stride not in (1, 2):
        raise ValueError(f"conv3x3: the stride must be 1 or 2, not {stride}")
    if stride == 2 and not transposed and min(x.shape[2:]) < 3:
        raise ValueError(f"conv3x3: {list(x.shape[2:])} is smaller than the kernel")
    natural, spare = _size(x, transposed, stride), int(transposed and stride == 2)
    if len(size) != 2 or not all(n <= m <= n + spare for n, m in zip(natural, size, strict=True)):
        raise ValueError(f"conv3x3: the result for x {list(x.shape)} has the size {natural}, not {list(size)}")


def _check_weight(x, dy, stride):
    if x.ndim != 4 or dy.ndim != 4 or len(x) != len(dy):
        raise ValueError(f"conv3x3: x {list(x.shape)} and the gradient {list(dy.shape)} are not [N, ...] of one batch")
    _check_sizes(x, False, stride, dy.shape[2:])
    if x.device != dy.device:
        raise ValueError(f"conv3x3: x is on {x.device}, the gradient on {dy.device}")


def _kernels(x):
    kernels = native.compiled(x) if x.dtype in (torch.bfloat16, torch.float64) else None
    return kernels if kernels is not None and kernels.kind == "cpu" else None  # GPUs have cuDNN


def _exact(x):
    return x.to(sums_of(x.dtype))


def _padding(stride):
    return 1 if stride == 1 else 0


def _compute(x, weight, swapped, transposed, stride, size):
    _check(x, weight, swapped, transposed, stride, size)
    if (kernels := _kernels(x)) is not None:
        return calls.conv3x3(kernels, x, weight, swapped, transposed, stride, size)
    with torch.autocast(x.device.type, enabled=False):
        return _defined(x, weight, swapped, transposed, stride, size)


def _defined(x, weight, swapped, transposed, stride, size):
    if not x.numel() or not weight.numel():  # PyTorch treats empty tensors differently
        return _empty(x, weight, swapped, size).zero_()
    how = {"stride": stride, "padding": _padding(stride)}
    weight = weight.transpose(0, 1) if swapped != transposed else weight
    if transposed:
        natural = [(n - 1) * stride + 3 - 2 * how["padding"] for n in x.shape[2:]]
        how["output_padding"] = [n - m for n, m in zip(size, natural, strict=True)]
        y = F.conv_transpose2d(_exact(x), weight, **how)
    else:
        y = F.conv2d(_exact(x), weight, **how)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _fake(x, weight, swapped, transposed, stride, size):
    _check(x, weight, swapped, transposed, stride, size)
    return _empty(x, weight, swapped, size)


def _empty(x, weight, swapped, size):
    shape = [x.shape[0], weight.shape[1 if swapped else 0], *size]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _weight_compute(x, dy, swapped, stride):
    _check_weight(x, dy, stride)
    if (kernels := _kernels(x)) is not None:
        return calls.conv3x3_weight(kernels, x, dy, swapped, stride)
    if not x.numel() or not dy.numel():
        return _weight_fake(x, dy, swapped, stride).zero_()
    shape = [dy.shape[1], x.shape[1], 3, 3]
    with torch.autocast(x.device.type, enabled=False):
        dw = conv2d_weight(_exact(x), shape, _exact(dy), stride=stride, padding=_padding(stride))
    return (dw.transpose(0, 1) if swapped else dw).contiguous(memory_format=torch.channels_last)


def _weight_fake(x, dy, swapped, stride):
    _check_weight(x, dy, stride)
    channels = [x.shape[1], dy.shape[1]] if swapped else [dy.shape[1], x.shape[1]]
    shape = [*channels, 3, 3]
    return torch.empty(shape, dtype=sums_of(x.dtype), device=x.device, memory_format=torch.channels_last)


def _setup(ctx, inputs, output):
    x, weight, *ctx.args, _ = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    swapped, transposed, stride = ctx.args
    of_x, of_weight = ctx.needs_input_grad[:2]
    dx = _conv(dy, weight, not swapped, not transposed, stride, ctx.size) if of_x else None
    dw = None
    if of_weight:  # a transposed convolution is the adjoint of a convolution from y to x
        dw = _gradient(dy, x, not swapped, stride) if transposed else _gradient(x, dy, swapped, stride)
    return dx, dw, None, None, None, None


def _weight_setup(ctx, inputs, output):
    x, dy, *ctx.args = inputs
    ctx.save_for_backward(x, dy)


def _weight_backward(ctx, g):
    x, dy = ctx.saved_tensors
    swapped, stride = ctx.args
    of_x, of_dy = ctx.needs_input_grad[:2]
    dx = _conv(dy, g, not swapped, True, stride, x.shape[2:]) if of_x else None
    return dx, _conv(x, g, swapped, False, stride, dy.shape[2:]) if of_dy else None, None, None


_conv = operator(_op, "conv3x3", _compute, _fake, _setup, _backward)
_gradient = operator(_op, "conv3x3_weight", _weight_compute, _weight_fake, _weight_setup, _weight_backward)


def _size(x, transposed, stride):
    """Return the height and width of the result."""
    if stride == 1:
        return list(x.shape[2:])
    return [2 * n + 1 if transposed else (n - 1) // 2 for n in x.shape[2:]]


def conv3x3_is_faster(x: torch.Tensor, weight: torch.Tensor, *, transposed: bool = False, stride: int = 1) -> bool:
    """Return whether conv3x3 is faster than F.conv2d in float32 on this machine for these tensors. They must be 3x3,
    channels_last and large enough."""
    if torch.compiler.is_compiling() or is_tracing() or decomposed.wanted():  # the sizes may not be known yet
        return False
    if weight.shape[2:] != (3, 3) or min(x.shape[1], weight.shape[0]) < MIN_CHANNELS[stride]:
        return False
    rows, columns = _size(x, transposed, stride)
    side = 8 if transposed and stride == 2 else 4  # the tile sizes of kernels/cpu/minimal.h
    tiles = -(-rows // side) * -(-columns // side)
    return tiles >= MIN_TILES[stride] and x.is_contiguous(memory_format=torch.channels_last) and _kernels(x) is not None


def conv3x3(x: torch.Tensor, weight: torch.Tensor, *, transposed: bool = False, stride: int = 1) -> torch.Tensor:
    """Compute a 3x3 convolution. Sums are accumulated in float32 (float64 for float64) and rounded once.

    Args:
        x: [N, I, H, W] in any layout.
        weight: [O, I, 3, 3], also for a transposed convolution. It is used as float32 (float64 for float64).
        transposed: Whether F.conv_transpose2d with weight.transpose(0, 1) is computed instead of F.conv2d.
        stride: 1 with padding 1, or 2 without padding.

    Returns:
        [N, O, H', W'] in x's dtype and in channels_last, differentiable to any order. H' is H at stride 1, (H - 1) // 2
        at stride 2, and 2 H + 1 for a transposed convolution at stride 2. W' is computed likewise.

    Raises:
        ValueError: if the stride is not 1 or 2, or the shapes do not fit.
    """
    size = _size(x, transposed, stride)
    _check(x, weight, False, transposed, stride, size)
    return _conv(x, weight.to(sums_of(x.dtype)), False, transposed, stride, size)
