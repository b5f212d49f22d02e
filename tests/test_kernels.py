"""Every implementation of the operators against the definition: values, both derivatives, layouts, number formats, and
what PyTorch asks of an operator (schema, fake tensors, export, compile)."""

import itertools
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from stylegan_pg.errors import RunError
from stylegan_pg.ops import ACTIVATIONS, bias_act, calls, native, reference, setup_filter, upfirdn2d

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SMOOTH = ("tanh", "sigmoid", "softplus", "swish")
OPS = torch.ops.stylegan_pg


@pytest.fixture(params=["kernels", "formulas"])
def implementation(request, monkeypatch):
    """The compiled kernels, or the operators' own formulas where there are none."""
    if request.param == "formulas":
        monkeypatch.setattr(native, "compiled", lambda x: None)
    elif native.choose("cpu").built is None:
        pytest.skip(f"no compiled kernels here: {native.choose('cpu').why}")
    return request.param


def numbers(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = max(float(expected.detach().double().abs().max()), 1e-30) if expected.numel() else 1.0
    error = (
        float((actual.detach().double() - expected.detach().double()).abs().max()) / scale if expected.numel() else 0.0
    )
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


# --- upfirdn2d --------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 9), (2, 3), (5, 4), (8, 8), (33, 17), (16, 130)]
FILTERS = {
    "1331": setup_filter([1, 3, 3, 1]),
    "asymmetric 4x4": torch.outer(torch.tensor([1.0, 2, 3, 5]), torch.tensor([2.0, -1, 4, 3])) / 50,
    "full 4x4": numbers(4, 4, seed=5).float(),
    "3x5": numbers(3, 5, seed=6).float(),
    "1x1": torch.tensor([[0.7]]),
    "12 taps": setup_filter(range(1, 13)),
    "7x1": numbers(7, 1, seed=7).float(),
    "zero": torch.zeros(2, 2),
}
PADDINGS = [(2, 1, 2, 1), (1, 1, 1, 1), (3, 0, 0, 4), (-1, 12, 11, -1), (12, 12, 12, 12)]
FACTORS = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((3, 2), (1, 3)), ((2, 1), (1, 2)), ((2, 2), (2, 2))]


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_upfirdn2d_is_the_reference(size, name):
    """Exhaustive over factors, paddings, orientation, layouts and formats; channels beside and beyond vector widths."""
    f = FILTERS[name]
    checked = 0
    for (up, down), padding, flip, layout in itertools.product(FACTORS, PADDINGS, (False, True), LAYOUTS):
        for channels, dtype, tolerance in ((3, torch.float64, 1e-13), (17, torch.float32, 1e-6)):
            x = numbers(2, channels, *size, dtype=dtype).contiguous(memory_format=layout)
            left, right, top, bottom = padding
            if size[0] * up[1] + top + bottom < f.shape[0] or size[1] * up[0] + left + right < f.shape[1]:
                with pytest.raises(ValueError, match="smaller than the filter"):
                    upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip)
                continue
            expected = reference.upfirdn2d(x, f, up, down, padding, flip, 1.7)
            y = upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=1.7)
            assert y.is_contiguous(memory_format=reference.layout_of(x))
            # Exactly separable filters are summed in another order; the others may differ in the last bit only.
            close(y, expected, tolerance)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("shape", [(1, 1, 3, 9001), (1, 300, 3, 61), (2, 1, 1, 9)])
@pytest.mark.parametrize("padding", [(2, 3), (9000, 2), (3, 9001)])
def test_upfirdn2d_in_several_pieces_of_a_row(shape, padding):
    """Rows longer than what is worked on at a time, pieces of them that lie in the padding as a whole."""
    x = numbers(*shape, dtype=torch.float32)
    if shape[1] > 1:
        x, padding = x.contiguous(memory_format=torch.channels_last), tuple(min(p, 90) for p in padding)
    padding = (*padding, 11, 11)
    for name, (up, down) in itertools.product(("1331", "full 4x4", "12 taps"), FACTORS):
        y = upfirdn2d(x, FILTERS[name], up=up, down=down, padding=padding)
        close(y, reference.upfirdn2d(x, FILTERS[name], up, down, padding, False, 1.0), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how", [{"up": 2, "padding": (2, 1, 2, 1)}, {"down": 2, "padding": 1}, {"padding": 2}])
def test_upfirdn2d_in_bfloat16_rounds_once(how, layout):
    """The result is the float32 one, rounded: nothing in between is kept in 8 bits."""
    for name, width in itertools.product(("1331", "full 4x4", "12 taps"), (71, 21, 5)):
        x = numbers(2, 24, 19, width, dtype=torch.bfloat16).contiguous(memory_format=layout)
        padding = 12 if name == "12 taps" else how["padding"]
        y = upfirdn2d(x, FILTERS[name], **(how | {"padding": padding}))
        expected = upfirdn2d(x.float(), FILTERS[name], **(how | {"padding": padding}))
        assert y.dtype == torch.bfloat16
        if native.compiled(x) is not None:
            torch.testing.assert_close(y, expected.bfloat16(), rtol=1 / 128, atol=1e-6)
        close(y.float(), expected, 2e-2)


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
@pytest.mark.parametrize("channels", [31, 32, 33, 48, 64, 100, 1040])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3), (16, 34), (37, 70)])
def test_halving_of_pixels(size, channels):
    """Pixels of many values are halved in registers, two rows at a time: the same sums as plane by plane, bit for bit.
    Rows left over, channels beyond whole packs, pieces of rows, padding and cropping on each side."""
    checked = 0
    for padding, name in itertools.product(
        [(1, 1, 1, 1), (3, 0, 0, 4), (-1, 9, 8, -1), (6, 5, 7, 6)], ("1331", "asymmetric 4x4")
    ):
        f, (left, right, top, bottom) = FILTERS[name], padding
        if size[0] + top + bottom < 4 or size[1] + left + right < 4:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            x = numbers(2, channels, *size, seed=channels, dtype=dtype)
            y = upfirdn2d(x.contiguous(memory_format=torch.channels_last), f, down=2, padding=padding, gain=1.3)
            if channels > 1 and size != (1, 1):
                assert y.shape[2] * y.shape[3] == 1 or not y.is_contiguous()
            expected = upfirdn2d(x, f, down=2, padding=padding, gain=1.3)
            torch.testing.assert_close(y, expected, rtol=0, atol=0)
            if dtype == torch.float32:
                close(y, reference.upfirdn2d(x, f, (1, 1), (2, 2), padding, False, 1.3), 1e-6)
            checked += 1
    assert checked >= 4


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
def test_bfloat16_is_rounded_as_pytorch_does():
    """Every value there is, next to ties, subnormals, infinities and NaN too, by packs and one by one."""
    f = torch.zeros(4, 4)
    f[1, 1] = 1.0
    values = torch.arange(2**16).to(torch.int16).view(torch.bfloat16).reshape(1, 64, 32, 32)
    for layout in LAYOUTS:
        x = values.contiguous(memory_format=layout)
        y = bias_act(x, gain=1.0 + 2.0**-9, clamp=None)  # next to ties
        expected = (x.float() * (1.0 + 2.0**-9)).to(torch.bfloat16)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    finite = torch.where(values.float().abs() < 1e30, values, 0.0).repeat(1, 1, 2, 2)
    for gain in (1.0 + 2.0**-9, 1.0 + 2.0**-8, 1 / 3):
        x = finite.contiguous(memory_format=torch.channels_last)
        y = upfirdn2d(x, f, down=2, padding=(1, 2, 1, 2), flip_filter=True, gain=gain)
        expected = (finite[:, :, ::2, ::2].float() * torch.tensor(gain)).to(torch.bfloat16)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
    spoilt = torch.ones(1, 40, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    spoilt[0, 3, 0, 0], spoilt[0, 39, 4, 5] = float("nan"), float("inf")
    y = upfirdn2d(spoilt, FILTERS["1331"], down=2, padding=1)
    expected = reference.upfirdn2d(spoilt, FILTERS["1331"], (1, 1), (2, 2), (1, 1, 1, 1), False, 1.0)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02, equal_nan=True)
    assert y.isnan().sum() == 1
    assert y.isinf().sum() == 4


def test_upfirdn2d_of_odd_memory():
    """Slices, expanded and transposed tensors are what they look like; an empty batch stays empty."""
    f, base = FILTERS["asymmetric 4x4"], numbers(3, 8, 20, 22, dtype=torch.float32)
    for x in (base[:, ::2], base[1:2, :, 3:, 1:-2], base.transpose(2, 3), base[:, :1].expand(-1, 5, -1, -1)):
        close(upfirdn2d(x, f, padding=2), upfirdn2d(x.clone().contiguous(), f, padding=2), 0)
    assert upfirdn2d(base[:0], f, up=2, padding=2).shape == (0, 8, 41, 45)
    assert bias_act(base[:0], torch.ones(8), act="lrelu").shape == (0, 8, 20, 22)
    one_dimensional = torch.tensor([1.0, 3, 3, 1]) / 8
    close(upfirdn2d(base, one_dimensional, padding=2), upfirdn2d(base, FILTERS["1331"], padding=2), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_layout_of_x(implementation, layout):
    """As the fake implementations promise, whatever the layouts of the gradients are."""
    x = numbers(2, 6, 8, 8).contiguous(memory_format=layout)
    other = numbers(2, 6, 8, 8).contiguous(memory_format=next(m for m in LAYOUTS if m != layout))
    tail_ = (x, numbers(6), None, None, "swish", 1.0, None, 1)
    results = [OPS.upfirdn2d(x, FILTERS["1331"], [1, 1], [2, 2], [1, 1, 1, 1], False, 1.0), OPS.bias_act(*tail_)]
    results += [OPS.bias_act_slope(other, *tail_), OPS.bias_act_curvature(other, other, *tail_)]
    results += [OPS.bias_act_backward(other, *tail_, [True, False, False])[0]]
    for y in results:
        assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dim", range(4))
def test_channels_last_stays_so_along_every_dimension(implementation, dim):
    """Values, both derivatives, and the layouts that the fake implementations promise."""
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


def test_opcheck_of_channels_last_with_scale_and_noise(implementation):
    how = tail("bias scale noise", (2, 3, 4, 5))
    how["x"] = how["x"].contiguous(memory_format=torch.channels_last)
    inputs = [t.requires_grad_(True) for t in how.values() if t is not None]
    rest, dy = ("swish", 1.3, 0.9, 1), numbers(2, 3, 4, 5, seed=4)
    torch.library.opcheck(OPS.bias_act, (*inputs, *rest))
    torch.library.opcheck(OPS.bias_act_slope, (dy.clone().requires_grad_(True), *inputs, *rest))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(OPS.bias_act_backward, (dy, *plain, *rest, [True, True, True]))


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_derivatives_of_vectors_and_rows(implementation, act):
    """Where there is nothing to sum over: a bias along the only dimension, a factor for each value."""
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


@pytest.mark.parametrize("size", [(4, 0), (0, 4), (0, 0)])
def test_padding_alone_is_zeros(size):
    for layout, (up, down) in itertools.product(LAYOUTS, ((1, 1), (2, 1), (1, 2))):
        x = torch.zeros(2, 3, *size).contiguous(memory_format=layout)
        y = upfirdn2d(x, FILTERS["1331"], up=up, down=down, padding=4)
        assert y.numel()
        assert not y.any()


def test_no_channels_no_rows_and_no_pixels():
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


def test_a_filter_is_taken_as_float32(implementation):
    f = torch.tensor([[0.1, 0.3], [0.4, 0.7]], dtype=torch.float64)
    x = numbers(1, 2, 5, 6)
    assert torch.equal(upfirdn2d(x, f, padding=1), upfirdn2d(x, f.float(), padding=1))
    assert not torch.equal(
        upfirdn2d(x, f.float(), padding=1), reference.upfirdn2d(x, f, (1, 1), (1, 1), (1,) * 4, False, 1.0)
    )


@pytest.mark.parametrize("taps", [[1, 3, 3, 1], [0.1, 0.3, 0.4, 0.2], [0.1, 0.6, 0.4, 0.7], [0.8, 0.2, 0.4, 0.9]])
def test_rounded_filters_are_still_separable(taps):
    """Normalised in float32, they are outer products up to that only; in float64 they are taken as they are."""
    f = setup_filter(taps)
    assert calls.factors(f, False, 1.0) is not None
    assert calls.factors(FILTERS["full 4x4"], False, 1.0) is None
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    if native.compiled(x) is None:
        pytest.skip("no compiled kernels here")
    response = upfirdn2d(x, f, padding=2)[0, 0, 3:7, 3:7]
    close(response, f, 4e-7)
    row, column = divmod(int(f.argmax()), 4)
    fx, fy = f[row], f[:, column] / f[row, column]
    assert torch.equal(response, torch.outer(fy, fx)), "the taps of one step, not the factors of two"
    assert torch.equal(upfirdn2d(x.double(), f, padding=2)[0, 0, 3:7, 3:7], f.double())


def test_strict_mode_names_what_has_no_kernel(monkeypatch, capsys):
    """Number formats and sizes; in auto mode plain PyTorch stands in, and sizes are told once."""
    half, x = torch.ones(2, 3, dtype=torch.float16), numbers(1, 2, 8, 8)
    monkeypatch.setattr(native, "_refused", set())
    for mode in ("auto", "strict"):
        monkeypatch.setattr(native, "mode", lambda mode=mode: mode)
        find = native._kernels.__wrapped__
        if mode == "auto":
            assert find("cpu", half.dtype) is None
            native.refused("upfirdn2d", x)
            native.refused("upfirdn2d", x)
            assert capsys.readouterr().err.count("warning: plain PyTorch stands in: upfirdn2d has no kernel for") == 1
            continue
        with pytest.raises(RunError, match=r"no kernels for torch.float16 on cpu \(STYLEGAN_PG_KERNELS=strict\)"):
            find("cpu", half.dtype)
        with pytest.raises(RunError, match=r"no kernels for torch\.float32 on mps"):
            find("mps", torch.float32)
        assert find("meta", torch.float32) is None
        with pytest.raises(RunError, match=r"upfirdn2d has no kernel for torch.float64 \[1, 2, 8, 8\] on cpu"):
            native.refused("upfirdn2d", x)


class Refusing:
    """A library without a kernel for anything."""

    def __getattr__(self, name):
        return lambda *args: -1


def test_what_a_kernel_refuses_is_computed_by_the_reference(monkeypatch, capsys):
    library: Any = Refusing()
    monkeypatch.setattr(native, "compiled", lambda x: calls.Kernels("cuda", library))
    monkeypatch.setattr(native, "_refused", set())
    x, f = numbers(1, 2, 8, 8), FILTERS["1331"]
    for _ in range(2):
        close(upfirdn2d(x, f, padding=2), reference.upfirdn2d(x, f, (1, 1), (1, 1), (2,) * 4, False, 1.0), 0)
        close(bias_act(x, act="swish"), reference.bias_act(x, None, None, None, "swish", 2**0.5, None, 1), 0)
    assert capsys.readouterr().err.count("warning:") == 2


def test_tensors_on_another_device_are_named():
    """Their addresses would mean nothing where x is."""
    kernels = native.compiled(torch.ones(1))
    if kernels is None:
        pytest.skip("no compiled kernels here")
    with pytest.raises(ValueError, match="x is on cpu, bias on meta"):
        calls.Tail(kernels, torch.ones(2, 3), torch.ones(3, device="meta"), None, None, "relu", 1.0, None, 1)


def test_bad_arguments_are_named():
    x, f = numbers(1, 2, 4, 4), FILTERS["1331"]
    with pytest.raises(ValueError, match="at least 1"):
        upfirdn2d(x, f, up=0)
    with pytest.raises(ValueError, match=r"must be \[N, C, H, W\]"):
        upfirdn2d(x[0], f)
    for match, how in {
        "unknown activation 'gelu'": {"act": "gelu"},
        r"a bias \[3\]": {"bias": torch.ones(3)},
        r"scale must be \[N, C\]": {"scale": torch.ones(2, 3)},
        "noise must be": {"noise": torch.ones(1, 2, 4, 4)},
        "need dim=1": {"scale": torch.ones(1, 2), "dim": 2},
        "no dimension 4": {"bias": torch.ones(1), "dim": 4},
        "no dimension -5": {"bias": torch.ones(4), "dim": -5},
        "clamp must be at least 0, not -1": {"clamp": -1},
        "not nan": {"clamp": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=match):
            bias_act(x, **how)


def test_results_do_not_depend_on_the_number_of_threads():
    x, dy = numbers(3, 40, 70, 50, dtype=torch.float32), numbers(3, 40, 70, 50, seed=1, dtype=torch.float32)
    inputs = [x, numbers(40, dtype=torch.float32), numbers(3, 40, dtype=torch.float32)]
    inputs = [t.requires_grad_(True) for t in [*inputs, numbers(3, 1, 70, 50, dtype=torch.float32)]]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = bias_act(inputs[0], inputs[1], scale=inputs[2], noise=inputs[3], act="lrelu")
            results.append([y, upfirdn2d(x, FILTERS["1331"], up=2, padding=2), *torch.autograd.grad(y, inputs, dy)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# --- bias_act ---------------------------------------------------------------------------------------------------------


def tail(kind: str, shape, dtype=torch.float64):
    """Arguments of bias_act: x away from the activations' kinks, and what `kind` names."""
    x = numbers(*shape, dtype=torch.float64)
    x = x.sign() * (x.abs() + 0.4)
    n, c = shape[0], shape[1]
    size = [1, 1, *shape[2:]] if "shared" in kind else [n, 1, *shape[2:]]
    return {
        "x": x.to(dtype),
        "bias": (0.1 * numbers(c, seed=1).clamp(-1, 1)).to(dtype) if "bias" in kind else None,
        "scale": (numbers(1 if "shared" in kind else n, c, seed=2).abs() + 0.8).to(dtype) if "scale" in kind else None,
        "noise": (0.1 * numbers(*size, seed=3).clamp(-1, 1)).to(dtype) if "noise" in kind else None,
    }


KINDS = ["", "bias", "scale", "noise", "bias scale noise", "bias scale noise shared"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_and_its_backward_are_the_reference(implementation, act, kind, layout):
    """In the training formats, at sizes around the kernels' chunks, with and without the clamp's edge in reach."""
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
                # Sums over many elements, in another order.
                close(a, b, tolerance if name == "x" else 100 * tolerance)


@pytest.mark.parametrize("kind", ["", "bias", "bias scale noise", "bias scale noise shared"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_of_both_orders(implementation, act, kind):
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
    clamp = float(magnitudes[middle : middle + 2].mean())  # in the widest gap, away from every value
    assert gradcheck(lambda *t: call(*t, clamp=clamp), inputs)
    assert gradgradcheck(lambda *t: call(*t, clamp=clamp).square(), inputs, fast_mode=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_dimension_can_have_the_bias(implementation, act):
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
def test_derivatives_in_bfloat16_are_those_of_float32(layout):
    """Forward, backward and the derivative of the backward, rounded a few times on the way."""
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


# --- as operators of PyTorch ------------------------------------------------------------------------------------------


def test_opcheck_upfirdn2d(implementation):
    x, f = numbers(2, 3, 6, 5).requires_grad_(True), FILTERS["asymmetric 4x4"]
    for up, down in FACTORS:
        torch.library.opcheck(OPS.upfirdn2d, (x, f, list(up), list(down), [2, 3, 4, 3], False, 1.5))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(True)
    torch.library.opcheck(OPS.upfirdn2d, (last, f, [2, 2], [1, 1], [2, 1, 2, 1], True, 4.0))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_opcheck_bias_act(implementation, act):
    how = tail("bias scale noise", (2, 3, 4, 5))
    inputs = [t.requires_grad_(True) for t in how.values()]
    rest = (act, 1.3, 0.9, 1)
    torch.library.opcheck(OPS.bias_act, (*inputs, *rest))
    torch.library.opcheck(OPS.bias_act, (inputs[0], None, None, None, *rest))
    dy = numbers(2, 3, 4, 5, seed=4)
    torch.library.opcheck(OPS.bias_act_slope, (dy.clone().requires_grad_(True), *inputs, *rest))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(OPS.bias_act_curvature, (dy, dy.flip(0), *plain, *rest))
    for wanted in ([True, True, True], [False, True, False]):
        torch.library.opcheck(OPS.bias_act_backward, (dy, *plain, *rest, wanted))


class Layers(torch.nn.Module):
    f: torch.Tensor

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(numbers(4, dtype=torch.float32))
        self.register_buffer("f", setup_filter([1, 3, 3, 1]))

    def forward(self, x):
        x = bias_act(upfirdn2d(x, self.f, up=2, padding=(2, 1, 2, 1), gain=4.0), self.bias, act="lrelu", clamp=2.0)
        return bias_act(upfirdn2d(x, self.f, down=2, padding=1), scale=x.mean(dim=[2, 3]), act="swish")


def test_export_and_compile_of_inference(implementation):
    net, x = Layers().eval(), numbers(3, 4, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        expected = net(x)
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        close(exported.module()(x), expected, 1e-6)
        close(exported.module()(x[:2]), net(x[:2]), 1e-6)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        close(compiled(x), expected, 1e-6)
    if implementation == "kernels":
        assert "stylegan_pg.upfirdn2d" in exported.graph_module.code


def test_compiled_training_step():
    """One derivative goes through torch.compile, too."""
    net, x = Layers(), numbers(3, 4, 8, 8, dtype=torch.float32)
    net(x).square().sum().backward()
    assert net.bias.grad is not None
    expected, net.bias.grad = net.bias.grad.clone(), None
    torch.compile(net, backend="aot_eager")(x).square().sum().backward()
    close(net.bias.grad, expected, 1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_curvature_is_the_formulas(monkeypatch, act):
    """g h f''(z), of which straight lines have none, with clamped values beside others; in both layouts."""
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


def test_a_third_derivative_says_no():
    x = numbers(3).requires_grad_(True)
    y = OPS.bias_act(x, None, None, None, "swish", 1.0, None, 0)
    first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="first and second order only"):
        torch.autograd.grad(second.sum(), x)
