"""Calls of the compiled kernels, which are plain C functions, with PyTorch tensors.

Both libraries implement upfirdn2d, bias_act, the backward pass of bias_act, and filtered_lrelu. The functions of the
CUDA library that launch kernels also take the device and the stream. The CPU library also implements convolutions. A C
function returns 0, or -1 if it does not support the dtype or size. In the latter case the functions below return None
and the caller uses the reference. Convolutions and filtered_lrelu are called only if a kernel exists.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from stylegan_pg.ops import pool
from stylegan_pg.ops.reference import ACTIVATIONS, is_channels_last

# The C++ sources contain the same codes.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ACTS = {name: i for i, name in enumerate(ACTIVATIONS)}
# A filter counts as separable if it differs from an outer product by at most this fraction of its largest tap. This is
# the rounding error of an outer product in float32 that was normalised.
ROUNDING = 4e-7

_PTR, _I64, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_BIAS_ACT = [_I64, _I64, _I64, _INT, _PTR, _PTR, _I64, _PTR, _I64, _DOUBLE, _DOUBLE]
_FILTERED = [*[_I64] * 12, *[_INT] * 10, *[_DOUBLE] * 5]
_WHERE = [_INT, _PTR]  # device, stream
SIGNATURES = {
    "cpu": {
        "upfirdn2d": [_INT, _PTR, _PTR, _PTR, *[_I64] * 6, *[_INT] * 10, _DOUBLE],
        "bias_act": [_INT, _INT, _INT, _PTR, _PTR, _PTR, _PTR, *_BIAS_ACT],
        "bias_act_backward": [_INT, _INT, *[_PTR] * 6, *_BIAS_ACT],
        "filtered_lrelu": [_INT, _INT, *[_PTR] * 7, *_FILTERED],
        "conv3x3": [*[_INT] * 3, *[_PTR] * 4, *[_I64] * 12],
        "conv3x3_weight": [*[_INT] * 2, *[_PTR] * 4, *[_I64] * 11],
        "conv3x3_workspace": [*[_INT] * 4, *[_I64] * 6, _PTR],
    },
    "cuda": {
        "upfirdn2d": [*_WHERE, _INT, _PTR, _PTR, _PTR, _PTR, *[_I64] * 6, *[_INT] * 10, _DOUBLE],
        "bias_act": [*_WHERE, _INT, _INT, _INT, _PTR, _PTR, _PTR, _PTR, *_BIAS_ACT],
        "bias_act_backward": [*_WHERE, _INT, _INT, *[_PTR] * 7, *_BIAS_ACT],
        "bias_act_backward_workspace": [*[_INT] * 4, *[_I64] * 3, _INT, _I64, _I64, _PTR],
        "filtered_lrelu": [*_WHERE, _INT, _INT, *[_PTR] * 8, *_FILTERED],
    },
}


@dataclass(frozen=True, eq=False)
class Kernels:
    """A loaded library for one kind of device, "cpu" or "cuda"."""

    kind: str
    lib: ctypes.CDLL
    functions: dict[str, Any] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self):
        for name, types in SIGNATURES[self.kind].items():
            self.functions[name] = getattr(self.lib, f"spg_{name}_{self.kind}")
            self.functions[name].argtypes = types

    def call(self, name: str, x: torch.Tensor, *args: Any) -> bool:
        """Call a function on x's device, in PyTorch's current stream. Return False if it does not support the
        arguments.

        Raises:
            RuntimeError: if CUDA cannot launch the kernel, or the host is out of memory.
        """
        function = self.functions[name]
        if self.kind == "cpu":
            code = function(*args)
        elif x.is_cuda:
            with torch.cuda.device(x.device):
                code = function(x.device.index, torch.cuda.current_stream().cuda_stream, *args)
        else:  # the device code was compiled for the CPU (kernels/shim)
            code = function(0, None, *args)
        if code == -2:  # optim/optimizer_step.py recognises PyTorch's wording of an out-of-memory error
            raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory for the sums of {name}")
        if code > 0:
            raise RuntimeError(f"{name} on {x.device}: the launch failed with CUDA error {code}")
        return code == 0


def sums_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of `dtype` are accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(x: torch.Tensor) -> tuple[torch.Tensor, torch.memory_format]:
    """Return x without gaps in memory, in its own layout, and the layout."""
    if is_channels_last(x):
        return x, torch.channels_last
    return x.contiguous(), torch.contiguous_format


def _packed(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return t as a contiguous tensor of this dtype. Most tensors already are, and checking this is faster than a
    conversion without effect."""
    return t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous()


def separable_factors(f: torch.Tensor, correlate: bool, gain: float) -> list[float] | None:
    """Decompose gain times the filter [4, 4], flipped unless `correlate`, into an outer product.

    Returns:
        The 4 values of the horizontal and the 4 values of the vertical factor, or None if the filter is not separable
        or has another size.
    """
    if list(f.shape) != [4, 4]:
        return None
    f = f.double() * gain if correlate else f.double().flip([0, 1]) * gain
    row, column = divmod(int(f.abs().argmax()), 4)
    if not math.isfinite(float(f[row, column])) or not f[row, column]:
        return None
    fx, fy = f[row], f[:, column] / f[row, column]
    if (torch.outer(fy, fx) - f).abs().max() > ROUNDING * f.abs().max():
        return None
    return [*fx.tolist(), *fy.tolist()]


_on_host: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # filter -> {(version, ...): floats}


def _cached_on_host(f: torch.Tensor, key: tuple[Any, ...], compute: Callable[[], Sequence[float] | None]):
    """Return what `compute` makes of a filter, as C floats or None. It is cached for each filter, because reading a
    filter's values makes the CPU wait for the GPU."""
    known: dict = _on_host.setdefault(f, {})  # type: ignore[assignment]  # setdefault returns the dictionary itself
    key = (0 if f.is_inference() else f._version, *key)
    if key not in known:
        found = compute()
        known[key] = None if found is None else (ctypes.c_float * len(found))(*found)
    return known[key]


def _cached_factors(f: torch.Tensor, correlate: bool, gain: float):
    if list(f.shape) != [4, 4]:  # others have none; a filter that is made anew for each call is not read
        return None
    return _cached_on_host(f, (correlate, gain), lambda: separable_factors(f.cpu(), correlate, gain))


def _host_taps(f: torch.Tensor):
    """Return the taps of a filter [k], and None for a filter [kh, kw]."""
    return None if f.ndim == 2 else _cached_on_host(f, ("taps",), lambda: f.cpu().tolist())


def upfirdn2d(
    kernels: Kernels,
    x: torch.Tensor,
    f: torch.Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
    out_size: tuple[int, int],
) -> torch.Tensor | None:
    """Compute reference.upfirdn2d with a compiled kernel, or return None. `out_size` is (height, width)."""
    x, layout = dense(x)
    n, c, h, w = x.shape
    y = pool.empty([n, c, *out_size], x, layout)
    separable = (_cached_factors(f, flip_filter, gain),) if kernels.kind == "cuda" else ()
    f = _packed(f.to(x.device), torch.float32)
    done = kernels.call(
        "upfirdn2d", x, DTYPES[x.dtype], x.data_ptr(), y.data_ptr(), f.data_ptr(), *separable, n, c, h, w, *out_size,
        *up, *down, padding[0], padding[2], *f.shape, layout == torch.channels_last, flip_filter, gain,
    )  # fmt: skip
    return y if done else None


@functools.lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.full(shape, value, dtype=dtype)


def _address(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


class BiasAct:
    """A call of bias_act, its derivatives or its backward pass. The constructor converts their common arguments to the
    form that the kernels expect."""

    def __init__(self, kernels: Kernels, x, bias, scale, noise, act: str, gain: float, clamp: float | None, dim: int):
        for name, t in (("bias", bias), ("scale", scale), ("noise", noise)):
            if t is not None and t.device != x.device:  # its address would be invalid on x's device
                raise ValueError(f"bias_act: x is on {x.device}, {name} on {t.device}")
        self.kernels = kernels
        self.x, self.layout = dense(x)
        self.act = ACTS[act]
        shape = list(x.shape) or [1]
        if self.layout == torch.channels_last and dim == 1:
            self.n, self.c, self.inner, self.pixels = shape[0], shape[1], shape[2] * shape[3], True
        else:
            if self.layout == torch.channels_last:  # the shape in the order of memory; scale and noise need dim 1
                shape, dim = [shape[i] for i in (0, 2, 3, 1)], (0, 3, 1, 2)[dim]
            self.n, self.c, self.inner = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
            self.pixels = False
            if self.inner == 1 and scale is None and noise is None:  # rows of c values
                self.n, self.inner, self.pixels = 1, self.n, True
        if self.pixels and self.n > 65535 and scale is None and noise is None:  # a GPU's grid has at most 65535 layers
            self.n, self.inner = 1, self.n * self.inner
        acc = sums_of(x.dtype)
        self.acc = acc
        self.noise = None if noise is None else _packed(noise, acc)
        if kernels.kind == "cpu":  # the CPU kernels always need a bias and a scale
            bias = _constant(0.0, acc, self.c) if bias is None else bias
            scale = _constant(1.0, acc, 1, self.c) if scale is None else scale
        self.bias = None if bias is None else _packed(bias, acc)
        self.scale = None if scale is None else _packed(scale, acc)
        self.args = (
            self.n, self.c, self.inner, self.pixels, _address(self.bias),
            _address(self.scale), self.c if self.scale is not None and self.scale.shape[0] > 1 else 0,
            _address(self.noise), self.inner if self.noise is not None and self.noise.shape[0] > 1 else 0,
            gain, -1.0 if clamp is None else clamp,
        )  # fmt: skip

    def like_x(self, t: torch.Tensor) -> torch.Tensor:
        return t.to(self.x.dtype).contiguous(memory_format=self.layout)

    def elementwise(self, order: int, *given: torch.Tensor) -> torch.Tensor | None:
        """Compute f(z) for order 0, g f'(z) for order 1, and g h f''(z) for order 2. Return None without a kernel."""
        out = pool.empty(self.x.shape, self.x, self.layout)
        tensors = [self.like_x(t) for t in given]  # the list keeps the tensors alive while their addresses are used
        g, h = ([t.data_ptr() for t in tensors] + [None, None])[:2]
        code = DTYPES[out.dtype]
        done = self.kernels.call(
            "bias_act", out, code, self.act, order, self.x.data_ptr(), g, h, out.data_ptr(), *self.args
        )
        return out if done else None

    def backward(self, dy: torch.Tensor, wanted: Sequence[bool]) -> list[torch.Tensor | None] | None:
        """Compute dx and those gradients of bias, scale and noise that are wanted, in one pass over memory.

        Args:
            dy: The gradient of the result, with x's shape.
            wanted: Whether the gradients of bias, scale and noise are computed. The tensors must exist.

        Returns:
            dx in x's dtype, and dbias [c], dscale [n, c] and dnoise [n, inner] in the accumulating dtype, or None for
            those that are not wanted. If all samples share a scale or noise, the CUDA kernels also add over the
            samples, so that its gradient has one row. None if there is no kernel for this size.

        Raises:
            RuntimeError: if the host has no memory for the sums, or CUDA cannot launch the kernels.
        """
        dy, cuda = self.like_x(dy), self.kernels.kind == "cuda"
        if cuda and self.scale is None and not any(wanted):  # dx is g f'(z)
            dx = self.elementwise(1, dy)
            return None if dx is None else [dx, None, None, None]
        scale_stride, noise_stride = self.args[6], self.args[8]
        empty = functools.partial(torch.empty, dtype=self.acc, device=dy.device)
        room: list[torch.Tensor | None] = []  # for sums over parts of the tensor
        if cuda:
            count = _partial_sums(self.kernels, DTYPES[dy.dtype], *wanted, *self.args[:4], scale_stride, noise_stride)
            if count is None:
                return None
            room = [empty([count]) if count else None]
        rows = [1 if cuda and not stride else self.n for stride in (scale_stride, noise_stride)]
        sizes = ([self.c], [rows[0], self.c], [rows[1], self.inner])
        sums = [empty(size) if want else None for size, want in zip(sizes, wanted, strict=True)]
        dx = pool.empty(self.x.shape, self.x, self.layout)
        addresses = [dy.data_ptr(), self.x.data_ptr(), dx.data_ptr(), *map(_address, [*sums, *room])]
        done = self.kernels.call("bias_act_backward", dx, DTYPES[dx.dtype], self.act, *addresses, *self.args)
        return [dx, *sums] if done else None


@functools.lru_cache(maxsize=4096)
def _partial_sums(kernels: Kernels, *how: int) -> int | None:
    """Return the number of values for which the backward pass of bias_act on a GPU needs memory, or None if there is no
    kernel for this size."""
    count = ctypes.c_int64()
    code = kernels.functions["bias_act_backward_workspace"](*how, ctypes.addressof(count))
    return count.value if code == 0 else None


@dataclass(frozen=True)
class Stages:
    """The linear part of filtered_lrelu or of one of its derivatives: two filters around the temporary rate.

    Stage 1 inserts `up` - 1 zeros after each value, pads and filters; stage 2 pads, filters and keeps every `down`-th
    value. `offsets` are the zeros at the left and the top, before stage 1 and before stage 2: (left1, top1, left2,
    top2). `mid` is the (height, width) at the temporary rate, `out` that of the result. `first` and `second` are the
    filters (None for one tap of 1), `gains` their factors. They are used as correlations if `correlate`.
    """

    first: torch.Tensor | None
    second: torch.Tensor | None
    up: int
    down: int
    offsets: Sequence[int]
    mid: Sequence[int]
    out: Sequence[int]
    gains: tuple[float, float]
    correlate: bool

    def transposed(self, in_size: Sequence[int]) -> Stages:
        """Return the stages of the gradient, given the (height, width) of the input."""
        (kh1, kw1), (kh2, kw2), (left1, top1, left2, top2) = taps(self.first), taps(self.second), self.offsets
        return Stages(
            first=self.second,
            second=self.first,
            up=self.down,
            down=self.up,
            offsets=[kw2 - 1 - left2, kh2 - 1 - top2, kw1 - 1 - left1, kh1 - 1 - top1],
            mid=self.mid,
            out=in_size,
            gains=(self.gains[1], self.gains[0]),
            correlate=not self.correlate,
        )


def taps(f: torch.Tensor | None) -> tuple[int, int]:
    """Return the numbers of rows and columns of a filter [kh, kw], [k] or None."""
    return (1, 1) if f is None else (f.shape[0], f.shape[-1])


def has_filtered_lrelu(s: Stages) -> bool:
    """Return whether the kernels support these stages, and therefore also the transposed ones."""
    return {s.up, s.down} <= {1, 2, 4} and max(*taps(s.first), *taps(s.second)) <= MOST_TAPS


MOST_TAPS = 48  # of filtered_lrelu's kernels, per axis


def slopes_shape(shape: Sequence[int], mid: Sequence[int], channels_last: bool) -> list[int]:
    """Return the shape of the recorded slopes, two bits for each value of [N, C, *mid]. Only the kernel knows how they
    are arranged; the shape is the smallest that suffices for all kernels, so that it can be known without them."""
    n, c, (h, w) = shape[0], shape[1], mid
    return [n, (c + 15) // 16 * 16 if channels_last else c, (h + 3) // 4 * 4, (w + 63) // 64 * 16]


def filtered_lrelu(
    kernels: Kernels,
    mode: str,
    x: torch.Tensor,
    slopes: torch.Tensor | None,
    bias: torch.Tensor | None,
    s: Stages,
    layout: torch.memory_format,
    activation: tuple[float, float, float | None],
    with_sums: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute ops.filtered_lrelu or a derivative with a compiled kernel.

    Args:
        kernels: The library.
        mode: "plain", "record" (which also returns the activation's slopes), or "masked" (which multiplies by recorded
            slopes instead of an activation).
        x, bias: The input, of the layout that the result gets, and what is added to it.
        slopes: The recorded slopes, if the mode is "masked".
        s: What is computed before and after the activation.
        layout: The layout of x and of the result, which is also that of the slopes.
        activation: gain, slope and clamp.
        with_sums: Whether the sums of the result over all but the channels are computed (on the CPU only).

    Raises:
        RuntimeError: if there is no kernel, although `has_filtered_lrelu`.
    """
    x = x.contiguous(memory_format=layout)
    acc, (n, c, h, w) = sums_of(x.dtype), x.shape
    y = pool.empty([n, c, *s.out], x, layout)
    if mode == "record":
        shape = slopes_shape(x.shape, s.mid, layout == torch.channels_last)
        slopes = pool.empty(shape, x, torch.contiguous_format, torch.uint8)
    filters = [_ones(x.device) if f is None else _packed(f.to(x.device), torch.float32) for f in (s.first, s.second)]
    bias = None if bias is None else _packed(bias, acc)
    if bias is not None and bias.device != x.device:
        raise ValueError(f"filtered_lrelu: x is on {x.device}, bias on {bias.device}")
    sums = torch.empty([c], dtype=acc) if with_sums else None
    sizes = [number for f in filters for number in (*taps(f), f.ndim == 1)]
    gain, slope, clamp = activation
    only_here = (_address(sums),) if kernels.kind == "cpu" else tuple(map(_host_taps, filters))
    done = kernels.call(
        "filtered_lrelu", x, DTYPES[x.dtype], ("plain", "record", "masked").index(mode), x.data_ptr(), y.data_ptr(),
        _address(slopes), _address(bias), *only_here, *(f.data_ptr() for f in filters), n, c, h, w, *s.mid,
        *s.out, *s.offsets, s.up, s.down, *sizes, layout == torch.channels_last, s.correlate, *s.gains,
        gain, slope, -1.0 if clamp is None else clamp,
    )  # fmt: skip
    if not done:
        raise RuntimeError(f"filtered_lrelu has no kernel for {x.dtype} {list(x.shape)} on {x.device.type}")
    return y, x.new_empty([0], dtype=torch.uint8) if slopes is None else slopes, sums


@functools.lru_cache(maxsize=16)
def _ones(device: torch.device) -> torch.Tensor:
    """Return the filter of a single tap of 1."""
    return torch.ones([1], device=device)


def _conv3x3_workspace(kernels: Kernels, x: torch.Tensor, gradient: bool, transposed: bool, stride: int, *sizes: int):
    """Allocate working memory for the convolutions below. `sizes` are N, I, the H' and W' of the result, and O.

    Raises:
        RuntimeError: if there is no kernel for this dtype or stride.
    """
    size, how = ctypes.c_int64(), (DTYPES[x.dtype], gradient, transposed, stride)
    if not kernels.call("conv3x3_workspace", x, *how, *sizes, torch.get_num_threads(), ctypes.addressof(size)):
        raise RuntimeError(f"conv3x3: there is no kernel for {x.dtype} at stride {stride}")
    return pool.empty([size.value], x, torch.contiguous_format, torch.uint8)


def conv3x3(
    kernels: Kernels,
    x: torch.Tensor,
    weight: torch.Tensor,
    swapped: bool,
    transposed: bool,
    stride: int,
    size: Sequence[int],
) -> torch.Tensor:
    """Convolve x [N, I, H, W] with weights [O, I, 3, 3] ([I, O, 3, 3] if `swapped`) on the CPU. The result is
    [N, O, *size] in channels_last."""
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.to(sums_of(x.dtype))
    (n, ins, h, w), order = x.shape, (1, 0) if swapped else (0, 1)
    outs = weight.shape[order[0]]
    room = _conv3x3_workspace(kernels, x, False, transposed, stride, n, ins, *size, outs)
    y = pool.empty([n, outs, *size], x, torch.channels_last)
    strides = [weight.stride(i) for i in (*order, 2, 3)]
    kernels.call(
        "conv3x3", x, DTYPES[x.dtype], transposed, stride, x.data_ptr(), weight.data_ptr(), y.data_ptr(),
        room.data_ptr(), n, h, w, ins, *size, outs, *strides, torch.get_num_threads(),
    )  # fmt: skip
    return y


def conv3x3_weight(kernels: Kernels, x: torch.Tensor, dy: torch.Tensor, swapped: bool, stride: int) -> torch.Tensor:
    """Compute the gradient of the weights, [O, I, 3, 3] ([I, O, 3, 3] if `swapped`) in channels_last, on the CPU. The
    arguments are the input x [N, I, H, W] and the gradient dy [N, O, H', W'] of a convolution that is not
    transposed."""
    x, dy = (t.to(x.dtype).contiguous(memory_format=torch.channels_last) for t in (x, dy))
    (n, ins, h, w), (_, outs, *size) = x.shape, dy.shape
    order = (1, 0) if swapped else (0, 1)
    room = _conv3x3_workspace(kernels, x, True, False, stride, n, ins, *size, outs)
    dw = pool.empty([*((outs, ins)[i] for i in order), 3, 3], x, torch.channels_last, sums_of(x.dtype))
    strides = [dw.stride(i) for i in (*order, 2, 3)]
    kernels.call(
        "conv3x3_weight", x, DTYPES[x.dtype], stride, x.data_ptr(), dy.data_ptr(), dw.data_ptr(), room.data_ptr(), n, h,
        w, ins, *size, outs, *strides,
    )  # fmt: skip
    return dw
