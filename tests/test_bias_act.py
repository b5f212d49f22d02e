"""The kernels of bias_act compared with the reference: values, two derivatives, layouts and number formats."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import FILTERS, KINDS, LAYOUTS, OPS, close, numbers, tail
from torch.autograd import gradcheck, gradgradcheck

from stylegan_pg.ops import ACTIVATIONS, bias_act, native, reference, upfirdn2d


@pytest.mark.parametrize("dim", range(4))
def test_channels_last_with_a_bias_along_every_dimension(implementation, dim):
    """Values, both derivatives, and layouts are as the fake implementations state."""
    x = numbers(3, 6, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_(True)
    b = (0.1 * numbers(x.shape[dim], seed=1)).requires_grad_(True)
    dy = numbers(3, 6, 4, 5, seed=2)
    rest = (None, None, "swish", 1.3, None, dim)
    y, expected = OPS.bias_act(x, b, *rest), reference.bias_act(x, b, *rest)
    close(y, expected, 1e-12)
    for t in (y, *(torch.autograd.grad(y, x, dy, create_graph=c, retain_graph=True)[0] for c in (False, True))):
        assert t.is_contiguous(memory_format=torch.channels_last)
    for a, e in zip(torch.autograd.grad(y, [x, b], dy), torch.autograd.grad(expected, [x, b], dy), strict=True):
        close(a, e, 1e-12)
    assert gradgradcheck(lambda x, b: OPS.bias_act(x, b, *rest).square(), [x, b], fast_mode=True)
    torch.library.opcheck(OPS.bias_act, (x, b, *rest))
    plain, dy = x.detach(), dy.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OPS.bias_act_slope, (dy.clone().requires_grad_(True), x, b, *rest))
    torch.library.opcheck(OPS.bias_act_curvature, (dy, dy.flip(0), plain, b.detach(), *rest))
    torch.library.opcheck(OPS.bias_act_backward, (dy, plain, b.detach(), *rest, [True, False, False]))


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_derivatives_without_sums(implementation, act):
    """A bias along the only dimension or a factor for each value needs no sums in the backward pass."""
    for kind, shape in (("bias", (5,)), ("scale", (4, 3)), ("bias scale noise", (4, 3)), ("scale shared", (4, 3))):
        how = tail(kind, shape) if len(shape) > 1 else {"x": numbers(*shape), "bias": 0.1 * numbers(*shape, seed=1)}
        names = [k for k, t in how.items() if t is not None]
        inputs = [how[k].requires_grad_(True) for k in names]

        dim = len(shape) - 1

        def call(*tensors, names=names, dim=dim):
            given = dict(zip(names, tensors, strict=True))
            return OPS.bias_act(*(given.get(k) for k in ("x", "bias", "scale", "noise")), act, 1.3, None, dim)

        assert gradcheck(call, inputs)
        assert gradgradcheck(lambda *t, call=call: call(*t).square(), inputs)
        given = [how.get(k) for k in ("x", "bias", "scale", "noise")]
        torch.library.opcheck(OPS.bias_act, (*given, act, 1.3, None, dim))


def test_empty_tensors():
    for shape in ((3, 0), (0, 4), (2, 0, 3, 3), (2, 3, 0, 3)):
        x, b = torch.ones(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
        noise = torch.ones(shape[0], 1, *shape[2:], requires_grad=True)
        cases: list[dict[str, Any]] = [{}, {"noise": noise}]
        for given in cases:
            for t in (x, b, noise):
                t.grad = None
            bias_act(x, b, act="lrelu", **given).sum().backward()
            for t in (x, b, *given.values()):
                assert t.grad is not None
                assert t.grad.shape == t.shape
                assert not t.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_and_its_backward_equal_the_reference(implementation, act, kind, layout):
    """The sizes are around the kernels' chunk sizes, and some values reach the clamp."""
    for shape, clamp in (((2, 5, 3, 7), 1.1), ((2, 3, 65, 67), None), ((3, 130, 9, 4), 0.9), ((1, 1, 1, 1), 256.0)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            how = tail(kind, shape, dtype)
            how["x"] = how["x"].contiguous(memory_format=layout)
            given = {k: t.clone().requires_grad_(True) for k, t in how.items() if t is not None}
            dy = numbers(*shape, seed=4, dtype=dtype)
            y = OPS.bias_act(*(given.get(k) for k in ("x", "bias", "scale", "noise")), act, 1.3, clamp, 1)
            got = torch.autograd.grad(y, list(given.values()), dy)
            plain = {k: given.get(k) for k in how}
            expected = reference.bias_act(**plain, act=act, gain=1.3, clamp=clamp, dim=1)  # type: ignore[arg-type]  # x is given
            close(y, expected, tolerance)
            for name, a, b in zip(given, got, torch.autograd.grad(expected, list(given.values()), dy), strict=True):
                # Sums over many elements are computed in another order.
                close(a, b, tolerance if name == "x" else 100 * tolerance)


@pytest.mark.parametrize("kind", ["", "bias", "bias scale noise", "bias scale noise shared"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_first_and_second_derivatives(implementation, act, kind):
    how = tail(kind, (2, 3, 2, 3))
    names = [k for k, t in how.items() if t is not None]
    inputs = [how[k].requires_grad_(True) for k in names]

    def call(*tensors, clamp=None):
        given = dict(zip(names, tensors, strict=True))
        return OPS.bias_act(*(given.get(k) for k in ("x", "bias", "scale", "noise")), act, 1.3, clamp, 1)

    assert gradcheck(call, inputs)
    assert gradgradcheck(lambda *t: call(*t).square(), inputs, fast_mode=True)
    magnitudes = call(*inputs).detach().abs().flatten().sort().values
    middle = len(magnitudes) // 2 + int(magnitudes[len(magnitudes) // 2 :].diff().argmax())
    clamp = float(
        magnitudes[middle : middle + 2].mean()
    )  # in the widest gap between magnitudes, because the derivative is undefined at the clamp
    assert gradcheck(lambda *t: call(*t, clamp=clamp), inputs)
    assert gradgradcheck(lambda *t: call(*t, clamp=clamp).square(), inputs, fast_mode=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_the_bias_can_belong_to_any_dimension(implementation, act):
    for shape in ((7,), (4, 6), (3, 4, 5), (2, 3, 4, 5), (2, 2, 3, 2, 2)):
        for dim in range(-1, len(shape)):
            x, b = numbers(*shape, dtype=torch.float32), numbers(shape[dim], seed=1, dtype=torch.float32)
            expected = reference.bias_act(x, b, None, None, act, 1.3, None, dim % len(shape))
            close(bias_act(x, b, act=act, gain=1.3, dim=dim), expected, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_act_in_bfloat16_rounds_once(layout):
    how = tail("bias scale noise", (2, 37, 15, 9), torch.float32)
    x = how["x"].bfloat16().contiguous(memory_format=layout)
    extra = {k: how[k] for k in ("scale", "noise")}
    y = bias_act(x, how["bias"], act="lrelu", clamp=2.0, **extra)
    expected = bias_act(x.float(), how["bias"], act="lrelu", clamp=2.0, **extra)
    assert y.dtype == torch.bfloat16
    if native.compiled(x) is not None:
        assert torch.equal(y, expected.bfloat16())
    close(y.float(), expected, 2e-2)


def test_infinities_and_nan():
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 0.0]])
    for act, expected in {
        "linear": [float("inf"), -float("inf"), float("nan"), 0.0],
        "relu": [float("inf"), 0.0, float("nan"), 0.0],
        "lrelu": [float("inf"), -float("inf"), float("nan"), 0.0],
    }.items():
        y = bias_act(x, act=act, gain=1.0)
        torch.testing.assert_close(y, torch.tensor([expected]), equal_nan=True)
    clamped = bias_act(x, gain=1.0, clamp=5.0)
    torch.testing.assert_close(clamped, torch.tensor([[5.0, -5.0, float("nan"), 0.0]]), equal_nan=True)
    small = torch.tensor([[1e-40, float("nan"), 3.3895e38, 1.00390625]]).bfloat16()
    torch.testing.assert_close(bias_act(small, gain=1.0), small, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_in_bfloat16_are_close_to_float32(layout):
    """Forward pass, backward pass and second derivative differ by the rounding of intermediate results only."""
    how = tail("bias scale noise", (2, 24, 9, 11), torch.float32)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        x = how["x"].bfloat16().to(dtype).contiguous(memory_format=layout).requires_grad_(True)
        bias, scale, noise = (how[k].clone().requires_grad_(True) for k in ("bias", "scale", "noise"))
        y = upfirdn2d(x, FILTERS["1331"], up=2, padding=(2, 1, 2, 1), gain=4.0)
        y = upfirdn2d(bias_act(y, bias, act="swish"), FILTERS["1331"], down=2, padding=1)
        y = bias_act(y, scale=scale, noise=noise, act="tanh")
        first = torch.autograd.grad(y.float().square().sum(), [x, bias, scale, noise], create_graph=True)
        second = torch.autograd.grad([g.float().square().sum() for g in first], [x, bias, scale, noise])
        assert [t.dtype for t in first] == [dtype, *[torch.float32] * 3]
        results.append([y, *first, *second])
    for k, (low, full) in enumerate(zip(*results, strict=True)):
        close(low.float(), full.float(), 0.02 if k < 5 else 0.1)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_second_derivative_of_kernel_and_formula_agree(monkeypatch, act):
    """g h f''(z) is zero for piecewise linear activations and for clamped values. Both layouts are tested."""
    how = tail("bias scale noise", (2, 20, 4, 5))
    g, h = numbers(2, 20, 4, 5, seed=4), numbers(2, 20, 4, 5, seed=5)
    results = []
    for layout, compiled in itertools.product(LAYOUTS, (native.compiled, lambda x: None)):
        monkeypatch.setattr(native, "compiled", compiled)
        x, *rest = (t.contiguous(memory_format=layout) if t.ndim == 4 else t for t in how.values())
        results.append(OPS.bias_act_curvature(g, h, x, *rest, act, 1.3, 0.9, 1))
    for result in results:
        close(result, results[1], 1e-12)
    assert bool(results[0].count_nonzero()) == (act not in ("linear", "relu", "lrelu"))


def test_a_third_derivative_is_an_error():
    x = numbers(3).requires_grad_(True)
    y = OPS.bias_act(x, None, None, None, "swish", 1.0, None, 0)
    first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first and second order only"):
        torch.autograd.grad(second.sum(), x)
