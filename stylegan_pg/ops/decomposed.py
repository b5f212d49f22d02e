"""The operators as ordinary operations of PyTorch, for programs that leave PyTorch (torch.export, ONNX).

Within `plain_operations`, the public functions of this room call what is defined here instead of an operator of this
package, which other runtimes do not know. Every operation returns a new tensor and works with sizes that stay symbolic.
The results equal those of ops/reference.py but for rounding. No kernels are used, and derivatives are autograd's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F

_wanted: ContextVar[bool] = ContextVar("plain_operations", default=False)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Within the block, the functions of this room are made of ordinary operations of PyTorch."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)


def wanted() -> bool:
    """Return whether the caller is within `plain_operations`."""
    return _wanted.get()


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    """Compute reference.upfirdn2d, whose arguments are the same."""
    left, right, top, bottom = padding
    f = (f.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * gain).to(x.dtype)
    if not flip_filter:
        f = f.flip([0, 1])
    x = _zeros_inserted(x, up[0], up[1])
    channels = x.shape[1]
    weight = f[None, None].expand(channels, 1, *f.shape)
    # Padding within the convolution spares a pass over memory. It is possible where both sides have the same.
    if left == right >= 0 and top == bottom >= 0:
        return _strided(F.conv2d(x, weight, padding=(top, left), groups=channels), down)
    x = F.pad(x, [left, right, top, bottom])  # negative numbers crop
    return _strided(F.conv2d(x, weight, groups=channels), down)


def _zeros_inserted(x: torch.Tensor, up_x: int, up_y: int) -> torch.Tensor:
    """up - 1 zeros after each value: [N, C, H, W] -> [N, C, H up_y, W up_x]."""
    if up_x == up_y == 1:
        return x
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up_x - 1, 0, 0, 0, up_y - 1])
    return x.reshape(n, c, h * up_y, w * up_x)


def _strided(x: torch.Tensor, down: Sequence[int]) -> torch.Tensor:
    return x if tuple(down) == (1, 1) else x[:, :, :: down[1], :: down[0]]


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
    """Compute reference.filtered_lrelu, whose arguments are the same."""
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(1, -1, 1, 1)
    x = F.leaky_relu(_filtered(x, up_filter, up, 1, padding, float(up * up)), slope)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return _filtered(x, down_filter, 1, down, (0, 0, 0, 0), 1.0)


def _filtered(
    x: torch.Tensor, f: torch.Tensor | None, up: int, down: int, padding: Sequence[int], gain: float
) -> torch.Tensor:
    """A filter [k] is applied to columns and rows in turn; None is a single tap of 1."""
    left, right, top, bottom = padding
    if f is None:
        f = torch.ones([1], dtype=torch.float32, device=x.device)
    if f.ndim == 2:
        return upfirdn2d(x, f, (up, up), (down, down), padding, False, gain)
    x = upfirdn2d(x, f[:, None], (1, up), (1, down), (0, 0, top, bottom), False, gain)
    return upfirdn2d(x, f[None, :], (up, 1), (down, 1), (left, right, 0, 0), False, 1.0)
