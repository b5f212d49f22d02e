"""The fused operations at the end of a layer: bias, activation, gain and clamp, and optionally demodulation and noise.

With z = x * scale + noise + bias and y = f(z) = clamp(act(z) * gain), a network needs three element-wise operators:
f(z), g f'(z) and g h f''(z). The backward pass uses g f'(z), and its own derivative uses the third, so gradient
penalties can be differentiated. If no second derivative is needed, one fused operator computes the whole backward pass.
"""

from __future__ import annotations

import torch

from stylegan_pg.ops import calls, decomposed, native, reference
from stylegan_pg.ops.operators import operator
from stylegan_pg.ops.reference import ACTIVATIONS

_PIECEWISE_LINEAR = ("linear", "relu", "lrelu")  # the second derivative is zero
_op = torch.library.Library("stylegan_pg", "FRAGMENT")
_TAIL = "Tensor x, Tensor? bias, Tensor? scale, Tensor? noise, str act, float gain, float? clamp, int dim"
_op.define(f"bias_act({_TAIL}) -> Tensor")
_op.define(f"bias_act_slope(Tensor g, {_TAIL}) -> Tensor")
_op.define(f"bias_act_curvature(Tensor g, Tensor h, {_TAIL}) -> Tensor")
_op.define(f"bias_act_backward(Tensor dy, {_TAIL}, bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor)")


# -------------------------------------------------------------------------------------------------- implementations


def _check(x, bias, scale, noise, act, gain, clamp, dim, *gradients):
    """Check the shapes, on which the kernels' memory accesses rely. `gradients` must have x's shape.

    Raises:
        ValueError: as bias_act.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"bias_act: unknown activation {act!r}: choose from {', '.join(ACTIVATIONS)}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"bias_act: the clamp must be at least 0, not {clamp}")
    if not 0 <= dim < max(x.ndim, 1):
        raise ValueError(f"bias_act: there is no dimension {dim} in {list(x.shape)}")
    if bias is not None and list(bias.shape) != [x.shape[dim]]:
        raise ValueError(
            f"bias_act: the bias {list(bias.shape)} does not have the size of dimension {dim} of {list(x.shape)}"
        )
    if (scale is not None or noise is not None) and (dim != 1 or x.ndim < 2):
        raise ValueError("bias_act: scale and noise need dim=1")
    if scale is not None and (scale.ndim != 2 or scale.shape[1] != x.shape[1] or scale.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"bias_act: scale must be [N, C] or [1, C], not {list(scale.shape)} for x {list(x.shape)}")
    if noise is not None and (
        noise.ndim != x.ndim
        or noise.shape[1] != 1
        or noise.shape[2:] != x.shape[2:]
        or noise.shape[0] not in (1, x.shape[0])
    ):
        raise ValueError(f"bias_act: noise must be [N or 1, 1, ...], not {list(noise.shape)} for x {list(x.shape)}")
    for t in gradients:
        if t.shape != x.shape or t.device != x.device:
            found = f"{list(t.shape)} on {t.device} for x {list(x.shape)} on {x.device}"
            raise ValueError(f"bias_act: a gradient must have the shape and device of x, not {found}")


def _pre_activation(x, bias, scale, noise, dim):
    return reference.bias_act(x, bias, scale, noise, "linear", 1.0, None, dim)


def _compiled(order, given, tail):
    """Compute one of the three operators with a compiled kernel, or return None if there is no kernel.

    Args:
        order: 0 for f(z), 1 for g f'(z), 2 for g h f''(z).
        given: The tensors g and h, as far as the operator has them.
        tail: The remaining arguments, from x on.
    """
    kernels = native.compiled(tail[0])
    if kernels is None:
        return None
    out = calls.BiasAct(kernels, *tail).elementwise(order, *given)
    if out is None:
        native.warn_no_kernel("bias_act", tail[0])
    return out


def _value(x, bias, scale, noise, act, gain, clamp, dim):
    _check(x, bias, scale, noise, act, gain, clamp, dim)
    y = _compiled(0, (), (x, bias, scale, noise, act, gain, clamp, dim))
    if y is None:
        y = reference.in_layout_of(x, reference.bias_act(x, bias, scale, noise, act, gain, clamp, dim))
    return y.clone() if y is x else y  # an operator's output must not be its input


def _slope(g, x, bias, scale, noise, act, gain, clamp, dim):
    _check(x, bias, scale, noise, act, gain, clamp, dim, g)
    out = _compiled(1, (g,), (x, bias, scale, noise, act, gain, clamp, dim))
    if out is not None:
        return out
    z = _pre_activation(x, bias, scale, noise, dim)
    return reference.in_layout_of(x, _unclamped(g * reference.DERIVATIVES[act][0](z) * gain, z, act, gain, clamp))


def _curvature(g, h, x, bias, scale, noise, act, gain, clamp, dim):
    _check(x, bias, scale, noise, act, gain, clamp, dim, g, h)
    out = _compiled(2, (g, h), (x, bias, scale, noise, act, gain, clamp, dim))
    if out is not None:
        return out
    z = _pre_activation(x, bias, scale, noise, dim)
    return reference.in_layout_of(x, _unclamped(g * h * reference.DERIVATIVES[act][1](z) * gain, z, act, gain, clamp))


def _unclamped(out, z, act, gain, clamp):
    """Return `out` with zeros at all positions where the clamp limits the value."""
    if clamp is None:
        return out
    return out.masked_fill((ACTIVATIONS[act][0](z) * gain).abs() > clamp, 0)


def _is_z(act, gain, clamp):
    """Return whether y = z, so that both have the same gradient."""
    return act == "linear" and gain == 1 and clamp is None


def _gradients(dz, x, bias, scale, noise, dim, wanted=(True, True, True)):
    """Return dx, dbias, dscale and dnoise, given the gradient of z. Their shapes and dtypes are those of x, bias, scale
    and noise. `wanted` selects which of the last three are computed; the others are None, as those of missing tensors
    are."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    dx, dbias, dscale, dnoise = dz, None, None, None
    if bias is not None and wanted[0]:
        dbias = _summed(dz, [i for i in range(dz.ndim) if i != dim], acc).to(bias.dtype)
    if scale is not None:
        dx = dz * scale.to(dz.dtype).reshape([*scale.shape, *[1] * (dz.ndim - 2)])
    if scale is not None and wanted[1]:
        dscale = _summed(dz * x, list(range(2, dz.ndim)), acc).sum_to_size(scale.shape).to(scale.dtype)
    if noise is not None and wanted[2]:
        dnoise = dz.sum(dim=1, keepdim=True, dtype=acc).sum_to_size(noise.shape).to(noise.dtype)
    return dx, dbias, dscale, dnoise


def _summed(t, dims, dtype):
    """Return the sum over the dimensions `dims`. If there are none, nothing is summed (PyTorch would sum over all)."""
    return t.sum(dim=dims, dtype=dtype) if dims else t.to(dtype)


def _fused_backward(dy, x, bias, scale, noise, act, gain, clamp, dim, wanted):
    """Compute `_gradients` of `_slope`, in one pass over memory if there is a compiled kernel. `wanted` selects which
    of dbias, dscale and dnoise are computed; the others are empty tensors."""
    _check_wanted(x, bias, scale, noise, act, gain, clamp, dim, wanted, dy)
    kernels, tail = native.compiled(x), (x, bias, scale, noise, act, gain, clamp, dim)
    found = None if kernels is None else calls.BiasAct(kernels, *tail).backward(dy, wanted)
    if found is None:
        # An operator's output must not be its input. Without a scale, dx would be dy if dz were.
        same = scale is not None and _is_z(act, gain, clamp)
        dx, *rest = _gradients(dy if same else _slope(dy, *tail), x, bias, scale, noise, dim, wanted)
        dx = reference.in_layout_of(x, dx)
    else:
        dx, dbias, dscale, dnoise = found
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        if dscale is not None:
            dscale = dscale.sum_to_size(scale.shape).to(scale.dtype)
        if dnoise is not None:
            dnoise = dnoise.reshape(len(dnoise), *noise.shape[1:]).sum_to_size(noise.shape).to(noise.dtype)
        rest = [dbias, dscale, dnoise]
    return dx, *(t if want and t is not None else x.new_empty([0]) for t, want in zip(rest, wanted, strict=True))


def _check_wanted(x, bias, scale, noise, act, gain, clamp, dim, wanted, dy):
    _check(x, bias, scale, noise, act, gain, clamp, dim, dy)
    given = [t is not None for t in (bias, scale, noise)]
    if len(wanted) != 3 or any(want and not is_there for want, is_there in zip(wanted, given, strict=True)):
        raise ValueError(f"bias_act: gradients of missing tensors are requested: {list(wanted)} of {given}")


def _fake(x, *rest):
    _check(x, *rest)
    return torch.empty_like(x, memory_format=reference.layout_of(x))


def _fake_slope(g, x, *rest):
    return _fake(x, *rest, g)


def _fake_curvature(g, h, x, *rest):
    return _fake(x, *rest, g, h)


def _fake_backward(dy, x, bias, scale, noise, act, gain, clamp, dim, wanted):
    _check_wanted(x, bias, scale, noise, act, gain, clamp, dim, wanted, dy)
    given = [torch.empty_like(t) if w else x.new_empty([0]) for t, w in zip((bias, scale, noise), wanted, strict=True)]
    return torch.empty_like(x, memory_format=reference.layout_of(x)), *given


# --------------------------------------------------------------------------------------------------------- autograd


def _setup_value(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.args = inputs[4:]


def _backward_value(ctx, dy):
    x, bias, scale, noise = ctx.saved_tensors
    act, gain, clamp, dim = ctx.args
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        if _is_z(act, gain, clamp):
            dz = reference.in_layout_of(x, dy)
        else:
            dz = _slope_op(dy, x, bias, scale, noise, act, gain, clamp, dim)
        return *_gradients(dz, x, bias, scale, noise, dim, needs[1:4]), None, None, None, None
    wanted = [t is not None and need for t, need in zip((bias, scale, noise), needs[1:4], strict=True)]
    dx, *rest = _backward_op(dy, x, bias, scale, noise, act, gain, clamp, dim, wanted)
    return dx, *(t if want else None for t, want in zip(rest, wanted, strict=True)), None, None, None, None


def _setup_slope(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.args = inputs[5:]


def _backward_slope(ctx, gg):
    g, x, bias, scale, noise = ctx.saved_tensors
    act, gain, clamp, dim = ctx.args
    dg = _slope_op(gg, x, bias, scale, noise, act, gain, clamp, dim)
    if act in _PIECEWISE_LINEAR:
        return dg, *[None] * 8
    dz = _curvature_op(gg, g, x, bias, scale, noise, act, gain, clamp, dim)
    return dg, *_gradients(dz, x, bias, scale, noise, dim, ctx.needs_input_grad[2:5]), None, None, None, None


def _backward_curvature(ctx, ggg):
    raise RuntimeError("bias_act has derivatives of the first and second order only")


def _no_setup(ctx, inputs, output):
    pass


_value_op = operator(_op, "bias_act", _value, _fake, _setup_value, _backward_value)
_slope_op = operator(_op, "bias_act_slope", _slope, _fake_slope, _setup_slope, _backward_slope)
_curvature_op = operator(_op, "bias_act_curvature", _curvature, _fake_curvature, _no_setup, _backward_curvature)
_backward_op = operator(_op, "bias_act_backward", _fused_backward, _fake_backward)


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    dim: int = 1,
) -> torch.Tensor:
    """Compute clamp(act(x * scale + noise + bias) * gain).

    Args:
        x: A float tensor of any shape. If it is channels_last, so is the result; otherwise the result is contiguous.
        bias: [x.shape[dim]] or None.
        scale: [N, C] or [1, C], a factor for each channel of each sample of x [N, C, ...], or None.
        noise: [N, 1, ...] or [1, 1, ...], which is added to all channels of x [N, C, ...] alike, or None.
        act: A key of ACTIVATIONS. The leaky ReLU has slope 0.2.
        gain: The factor after the activation. None selects the activation's default (sqrt(2) for ReLU and leaky ReLU).
        clamp: The largest magnitude after the gain, at least 0; None for no limit.
        dim: The dimension of x to which the bias belongs. It must be 1 if scale or noise is given.

    Returns:
        A tensor with the shape and dtype of x, differentiable twice.

    Raises:
        ValueError: if shapes do not fit, the activation is unknown, or the clamp is below 0.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"bias_act: unknown activation {act!r}: choose from {', '.join(ACTIVATIONS)}")
    if not -x.ndim <= dim < x.ndim and not (bias is scale is noise is None):
        raise ValueError(f"bias_act: there is no dimension {dim} in {list(x.shape)}")
    dim = dim % max(x.ndim, 1)
    gain = ACTIVATIONS[act][1] if gain is None else float(gain)
    clamp = None if clamp is None else float(clamp)
    # On the meta device steps are measured (planning/cost.py): as they are where there is a kernel.
    without = not torch.compiler.is_compiling() and not x.is_meta and native.compiled(x) is None
    if without or decomposed.wanted():
        _check(x, bias, scale, noise, act, gain, clamp, dim)
        return reference.bias_act(x, bias, scale, noise, act, gain, clamp, dim)
    return _value_op(x, bias, scale, noise, act, gain, clamp, dim)
