"""Multiplying the parameters of several layers by their constants, in one operation (equalised learning rate; Karras et
al. 2018, section 4.1).

A layer of this package stores its parameters at unit variance, and `Scalable.factors` gives the constants that they are
multiplied by whenever they are used. One by one these multiplications would be a quarter of a training step's kernel
launches. They are made for the layers of one block at a time, not for a whole network: so the gradients of the last
blocks are complete, and their sums over the ranks begin, while the backward pass goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F


class Scalable(Protocol):
    """A layer with such parameters. Its forward pass takes them ready made, as `ready`."""

    def factors(self) -> Sequence[tuple[torch.Tensor, float]]:
        """The parameters, each with the constant that it is multiplied by."""
        ...


def scaled_parameters(*layers: Scalable) -> list[tuple[torch.Tensor, ...]]:
    """For each layer, the tensors of `factors` multiplied by their constants."""
    factors = [layer.factors() for layer in layers]
    flat = iter(scaled([t for each in factors for t, _ in each], [gain for each in factors for _, gain in each]))
    return [tuple(next(flat) for _ in each) for each in factors]


def scaled(tensors: Sequence[torch.Tensor], gains: Sequence[float]) -> list[torch.Tensor]:
    """Each tensor times its constant; those with the constant 1 are returned as they are. Differentiable twice."""
    if torch.compiler.is_compiling():  # which fuses the multiplications itself
        return [t if gain == 1 else t * gain for t, gain in zip(tensors, gains, strict=True)]
    found = list(tensors)
    changed = [i for i, gain in enumerate(gains) if gain != 1]
    if changed:
        products: Any = _Scaled.apply([gains[i] for i in changed], *(tensors[i] for i in changed))
        for i, product in zip(changed, products, strict=True):
            found[i] = product
    return found


def stacked(tensors: Sequence[torch.Tensor], gains: Sequence[float]) -> torch.Tensor:
    """L tensors with the same number of dimensions, each times its constant, as one: [L, ...]. It has the largest size
    of each dimension; smaller tensors are followed by zeros. Differentiable twice."""
    tensors = scaled(tensors, gains)
    if torch.compiler.is_compiling():
        size = _largest([t.shape for t in tensors])
        return torch.stack([F.pad(t, _after(t.shape, size)) for t in tensors])
    return _Stacked.apply(*tensors)  # type: ignore[return-value]  # apply is untyped


def unstacked(t: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The inverse of `stacked`: contiguous tensors of these shapes. Differentiable twice."""
    if torch.compiler.is_compiling():
        return [one[tuple(map(slice, shape))].contiguous() for one, shape in zip(t.unbind(), shapes, strict=True)]
    if all(tuple(shape) == t.shape[1:] for shape in shapes):
        return list(t.unbind())
    return list(_Unstacked.apply(shapes, t))  # type: ignore[arg-type]  # apply is untyped


def _largest(shapes: Sequence[Sequence[int]]) -> list[int]:
    return [max(sizes) for sizes in zip(*shapes, strict=True)]


def _after(shape: Sequence[int], size: Sequence[int]) -> list[int]:
    """The padding behind each dimension, as torch.nn.functional.pad takes it."""
    return [n for there, wanted in zip(reversed(shape), reversed(size), strict=True) for n in (0, wanted - there)]


def _parts(t: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    return [one[tuple(map(slice, shape))] for one, shape in zip(t.unbind(), shapes, strict=True)]


class _Stacked(torch.autograd.Function):
    """Stacks tensors, padded with zeros. Its backward pass returns gradients that lie in memory as their tensors do,
    because autograd would copy others one by one (the gradient of a matrix often comes transposed)."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.shapes = [t.shape for t in tensors]
        size = _largest(ctx.shapes)
        if all(list(shape) == size for shape in ctx.shapes):
            return torch.stack(tensors)
        found = tensors[0].new_zeros([len(tensors), *size])
        torch._foreach_copy_(_parts(found, ctx.shapes), tensors)  # type: ignore[attr-defined]  # not in stubs
        return found

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(unstacked(grad.contiguous(), ctx.shapes))


class _Unstacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: Sequence[Sequence[int]], t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.size = t.shape[1:]
        found = [t.new_empty(shape) for shape in shapes]
        torch._foreach_copy_(found, _parts(t, shapes))  # type: ignore[attr-defined]  # not in stubs
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        found = stacked(grads, [1.0] * len(grads))
        short = _after(found.shape[1:], ctx.size)
        return None, (F.pad(found, short) if any(short) else found)


class _Scaled(torch.autograd.Function):
    """Multiplies tensors by constants. PyTorch's own derivative of _foreach_mul would multiply one by one."""

    @staticmethod
    def forward(ctx: Any, gains: list[float], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.gains = gains
        ctx.set_materialize_grads(False)
        return tuple(torch._foreach_mul(tensors, gains))  # type: ignore[attr-defined]  # not in stubs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        needed = zip(grads, ctx.gains, ctx.needs_input_grad[1:], strict=True)
        there = [(i, g, gain) for i, (g, gain, need) in enumerate(needed) if need and g is not None]
        found: list[torch.Tensor | None] = [None] * len(grads)
        products = scaled([g for _, g, _ in there], [gain for _, _, gain in there])
        for (i, _, _), product in zip(there, products, strict=True):
            found[i] = product
        return (None, *found)
