"""The filtered leaky ReLU: its definition compared with scipy, the kernels compared with the reference (values and
derivatives), and PyTorch's requirements of operators."""

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import LAYOUTS, OPS, close, numbers
from scipy.signal import convolve2d
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import stylegan_pg.planning.cost  # noqa: F401  # which tells the FLOP counter of the operators
from stylegan_pg.ops import calls, filtered_lrelu, native, reference

LOW12 = torch.tensor([-0.002, -0.012, -0.01, 0.05, 0.18, 0.29, 0.29, 0.18, 0.05, -0.01, -0.012, -0.002])
FILTERS = {
    "12 and 12 taps": (LOW12, LOW12),
    "asymmetric": (numbers(11, seed=1).float() / 3, numbers(5, seed=2).float() / 2),
    "24 taps": (numbers(24, seed=3).float() / 5, LOW12),
    "radial": (LOW12, numbers(12, 12, seed=4).float() / 12),
    "both 2-D": (numbers(5, 3, seed=5).float() / 4, numbers(4, 7, seed=6).float() / 5),
    "none": (None, None),
    "none and 9 taps": (None, numbers(9, seed=7).float() / 3),
}
PADDINGS = [(11, 10, 9, 12), (-1, 26, 25, -2), (9, 9, 9, 9)]
FACTORS = list(itertools.product((1, 2, 4), (1, 2, 4)))


def applicable(x, u, d, up, padding):
    """Whether both filters fit into the image."""
    (uh, uw), (dh, dw), (left, right, top, bottom) = calls.taps(u), calls.taps(d), padding
    mid = x.shape[2] * up + top + bottom - uh + 1, x.shape[3] * up + left + right - uw + 1
    return mid[0] >= dh and mid[1] >= dw


def definition(x, u, d, b, up, down, padding, gain, slope, clamp):
    """The operation by scipy, plane by plane."""

    def full(f):
        return (
            np.ones([1, 1])
            if f is None
            else (torch.outer(f.double(), f.double()) if f.ndim == 1 else f.double()).numpy()
        )

    left, right, top, bottom = padding
    n, c, h, w = x.shape
    spread = np.zeros([n, c, h * up, w * up])
    spread[:, :, ::up, ::up] = x.numpy() + b.numpy()[:, None, None]
    spread = np.pad(spread, [(0, 0), (0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))])
    spread = spread[:, :, max(-top, 0) :, max(-left, 0) :]
    spread = spread[:, :, : spread.shape[2] - max(-bottom, 0), : spread.shape[3] - max(-right, 0)]
    planes = []
    for plane in spread.reshape(n * c, *spread.shape[2:]):
        z = convolve2d(plane, full(u), mode="valid") * up**2
        a = np.where(z < 0, z * slope, z) * gain
        a = a if clamp is None else a.clip(-clamp, clamp)
        planes.append(convolve2d(a, full(d), mode="valid")[::down, ::down])
    return np.stack(planes).reshape(n, c, *planes[0].shape)


@pytest.mark.parametrize("name", FILTERS)
def test_it_agrees_with_its_definition(name):
    u, d = FILTERS[name]
    x, b = numbers(2, 2, 7, 9), numbers(2, seed=1)
    checked = 0
    for (up, down), padding, clamp, slope in zip(
        FACTORS, itertools.cycle(PADDINGS), itertools.cycle((None, 0.4)), itertools.cycle((0.2, 1.0, 0.0)), strict=False
    ):
        if not applicable(x, u, d, up, padding):
            continue
        expected = definition(x, u, d, b, up, down, padding, 1.3, slope, clamp)
        for layout in LAYOUTS:
            given = x.contiguous(memory_format=layout)
            y = filtered_lrelu(given, u, d, b, up=up, down=down, padding=padding, gain=1.3, slope=slope, clamp=clamp)
            assert y.is_contiguous(memory_format=layout)
            np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("name", FILTERS)
def test_values_and_gradients_equal_the_reference(name, factors):
    """Sizes below and above a vector and several segments of a row; numbers of channels that fill vectors or not."""
    (u, d), (up, down) = FILTERS[name], factors
    checked = 0
    for (c, size), padding, layout in itertools.product(
        [(3, (5, 7)), (17, (1, 1)), (16, (19, 34)), (1, (17, 331))], PADDINGS, LAYOUTS
    ):
        x, b = numbers(2, c, *size).contiguous(memory_format=layout).requires_grad_(True), numbers(c, seed=1)
        b.requires_grad_(True)
        if not applicable(x, u, d, up, padding):
            with pytest.raises(ValueError, match="smaller than the filters"):
                filtered_lrelu(x, u, d, b, up=up, down=down, padding=padding)
            continue
        clamp = 1.5 if c == 3 else None
        y = filtered_lrelu(x, u, d, b, up=up, down=down, padding=padding, gain=1.3, slope=0.3, clamp=clamp)
        expected = reference.filtered_lrelu(x, u, d, b, up, down, padding, 1.3, 0.3, clamp)
        close(y, expected, 1e-12)
        dy = numbers(*y.shape, seed=2)
        for actual, wanted in zip(*(torch.autograd.grad(t, [x, b], dy) for t in (y, expected)), strict=True):
            close(actual, wanted, 1e-12)
        with torch.no_grad():
            assert torch.equal(
                filtered_lrelu(x, u, d, b, up=up, down=down, padding=padding, gain=1.3, slope=0.3, clamp=clamp), y
            )
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_lower_precision(dtype, tolerance, layout):
    """Inputs are far enough from the kink for the slopes not to depend on rounding, except for few."""
    for (up, down), name in itertools.product(((2, 2), (4, 2), (2, 4), (1, 1)), ("12 and 12 taps", "radial")):
        u, d = FILTERS[name]
        x, b = numbers(2, 19, 13, 20).to(dtype).contiguous(memory_format=layout), numbers(19, seed=1).float()
        ours, exact = (
            [t.clone().requires_grad_(True) for t in (x, b)],
            [t.double().requires_grad_(True) for t in (x, b)],
        )
        y = filtered_lrelu(ours[0], u, d, ours[1], up=up, down=down, padding=9, clamp=2.0)
        expected = reference.filtered_lrelu(exact[0], u, d, exact[1], up, down, (9,) * 4, 2**0.5, 0.2, 2.0)
        assert y.dtype == dtype
        # Plain PyTorch also rounds between the operations.
        bound = tolerance if native.compiled(x) is not None else 8 * tolerance
        close(y.double(), expected, bound)
        dy = numbers(*y.shape, seed=2).to(dtype)
        given, wanted = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, exact, dy.double())
        for a, e in zip(given, wanted, strict=True):
            assert float((a.double() - e).norm() / e.norm()) < 5 * bound


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_first_and_second_derivatives(implementation, clamp, layout):
    for (up, down), name, padding in (
        ((2, 2), "asymmetric", (7, 6, 5, 8)),
        ((4, 2), "24 taps", (9, 12, 10, 11)),
        ((1, 4), "both 2-D", (6, 3, 4, 7)),
        ((2, 1), "none and 9 taps", (3, 2, 4, -1)),
    ):
        u, d = FILTERS[name]
        x, b = numbers(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_(True), numbers(3, seed=1)
        how = {"up": up, "down": down, "padding": padding, "gain": 1.3, "clamp": clamp}
        f = functools.partial(lambda x, b, u, d, how: filtered_lrelu(x, u, d, b, **how), u=u, d=d, how=how)
        inputs = [x, b.requires_grad_(True)]
        assert gradcheck(f, inputs)
        assert gradgradcheck(lambda x, b, f=f: f(x, b).square(), inputs, fast_mode=True)


def test_derivatives_of_higher_order_equal_those_of_the_reference():
    """A penalty of the gradient, of which the gradient is taken twice."""
    u, d = FILTERS["radial"]
    x, b, results = numbers(2, 3, 8, 7), numbers(3, seed=1), []
    for function in (
        lambda x, b: filtered_lrelu(x, u, d, b, up=2, down=2, padding=9, clamp=1.0),
        lambda x, b: reference.filtered_lrelu(x, u, d, b, 2, 2, (9,) * 4, 2**0.5, 0.2, 1.0),
    ):
        inputs = [t.clone().requires_grad_(True) for t in (x, b)]
        first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.pow(2).sum() for g in first]).sum(), inputs, create_graph=True)
        third = torch.autograd.grad(torch.stack([g.sum() for g in second]).sum(), inputs)
        results.append([*first, *second, *third])
    for a, e in zip(*results, strict=True):
        close(a, e, 1e-11)


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_little_is_kept_for_the_gradient(layout):
    """Two bits for each value at the temporary rate, of which there are four for each input."""
    x = numbers(2, 32, 60, 60, dtype=torch.float32).contiguous(memory_format=layout).requires_grad_(True)
    saved: dict[int, int] = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        filtered_lrelu(x, LOW12, LOW12, torch.zeros(32), up=2, down=2, padding=9)
    assert sum(saved.values()) < 0.3 * x.nbytes


def test_results_do_not_depend_on_the_number_of_threads():
    before, results = torch.get_num_threads(), []
    x, b = numbers(1, 5, 90, 70, dtype=torch.float32).requires_grad_(True), numbers(5, dtype=torch.float32)
    b.requires_grad_(True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = filtered_lrelu(x, LOW12, LOW12, b, up=2, down=2, padding=9)
            results.append([y, *torch.autograd.grad(y, [x, b], numbers(*y.shape, dtype=torch.float32))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, e in zip(results[0], other, strict=True):
            assert torch.equal(a, e)


def test_strided_empty_and_half_open_inputs(implementation):
    base = numbers(3, 8, 12, 14)
    for x in (base[:, ::2], base[1:2, :, 3:, 1:-2], base.transpose(2, 3), base[:, :1].expand(-1, 5, -1, -1)):
        how: dict[str, Any] = {"up": 2, "down": 2, "padding": 9}
        a, e = (filtered_lrelu(t, LOW12, LOW12, **how) for t in (x, x.clone(memory_format=torch.contiguous_format)))
        close(a, e, 1e-14)
    assert filtered_lrelu(base[:0], LOW12, LOW12, up=2, padding=12).shape == (0, 8, 26, 30)
    assert not filtered_lrelu(base[:, :, :0], LOW12, LOW12, torch.ones(8), padding=13).any()  # no bias in the padding
    close(filtered_lrelu(base, gain=1.0, slope=1.0), base, 0)
    spoilt = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    spoilt[0, 0, 4, 4] = float("nan")
    assert filtered_lrelu(spoilt, torch.ones(3), clamp=1.0).isnan().sum() == 9


def test_opcheck(implementation):
    u, d = FILTERS["radial"]
    for layout in LAYOUTS:
        # At the temporary rate there are 16 x 64 values, so that all bytes of the recorded slopes are used.
        x = numbers(2, 16, 8, 32).contiguous(memory_format=layout).requires_grad_(True)
        b = numbers(16, seed=1).requires_grad_(True)
        args = (x, u, d, b, 2, 2, [6, 5, 6, 5], 1.3, 0.2, 0.8)
        torch.library.opcheck(OPS.filtered_lrelu, (*args, True))
        with torch.no_grad():
            torch.library.opcheck(OPS.filtered_lrelu, (*args, False), test_utils=("test_schema", "test_faketensor"))
            y, slopes = OPS.filtered_lrelu(*args, True)
        dy = numbers(*y.shape, seed=2)
        how = (slopes, d, u, 2, 2, [11, 11, 5, 5], [16, 64], [8, 32], [1.0, 4.0], True, layout == LAYOUTS[1], 1.3, 0.2)
        torch.library.opcheck(OPS.filtered_lrelu_gradient, (dy.clone().requires_grad_(True), *how, False))
        torch.library.opcheck(OPS.filtered_lrelu_gradient, (dy, *how, True))
        dx, sums = OPS.filtered_lrelu_gradient(dy, *how, True)
        close(sums, dx.sum(dim=(0, 2, 3)), 1e-13)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(numbers(4, dtype=torch.float32))

    def forward(self, x):
        return filtered_lrelu(x, LOW12, LOW12, self.bias, up=2, down=2, padding=9, clamp=1.0)


def test_export_and_compile(implementation):
    net, x = Layer(), numbers(3, 4, 8, 9, dtype=torch.float32)
    with torch.no_grad():
        expected = net(x)
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        close(exported.module()(x[:2]), expected[:2], 1e-6)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x).square().sum(), [net.bias])[0] for f in (net, compiled)]
    close(results[1], results[0], 1e-5)


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
def test_each_pass_is_one_operation():
    """As far as a GPU's host is concerned, which launches them; the sum for the bias is a part of it on the CPU."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, b = numbers(2, 3, 8, 9).requires_grad_(True), numbers(3).requires_grad_(True)
    with Names():
        y = filtered_lrelu(x, LOW12, LOW12, b, up=2, down=2, padding=9)
        torch.autograd.grad(y, [x, b], y.detach())
    ours = [name for name in names if name.startswith("stylegan_pg.")]
    assert ours == ["stylegan_pg.filtered_lrelu.default", "stylegan_pg.filtered_lrelu_gradient.default"]
    assert {name for name in names if name not in ours} <= {"aten.detach.default", "aten.empty.memory_format"}


def test_flops_are_those_of_the_filters():
    """Separable filters are applied along one axis after the other, and inserted zeros are not multiplied."""
    x = torch.zeros(2, 3, 8, 9, requires_grad=True)
    for u, d in ((LOW12, LOW12), (LOW12, FILTERS["radial"][1])):
        with FlopCounterMode(display=False) as counter:
            y = filtered_lrelu(x, u, d, up=2, down=2, padding=9)
        forward = 2 * 2 * 3 * (6 * (8 + 23) * 25 + (12 * (6 * 25 + 6 * 7) if d.ndim == 1 else 144 * 6 * 7))
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y.sum(), x)
        backward = 6 * (6 + 23) * 25 if d.ndim == 1 else 36 * 23 * 25
        assert counter.get_total_flops() == 2 * 2 * 3 * (backward + 12 * (8 * 25 + 8 * 9))


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
def test_cases_without_a_kernel_use_the_reference_with_one_warning(monkeypatch, capsys):
    monkeypatch.setattr(native, "_warned", set())
    x, b = numbers(1, 2, 9, 8).requires_grad_(True), numbers(2, seed=1).requires_grad_(True)
    taps = numbers(49, seed=2).float()
    for up, f, padding in ((3, LOW12, (9, 8, 7, 10)), (2, taps, (40,) * 4)):
        y = filtered_lrelu(x, f, LOW12, b, up=up, down=2, padding=padding, clamp=0.5)
        e = reference.filtered_lrelu(x, f, LOW12, b, up, 2, padding, 2**0.5, 0.2, 0.5)
        close(y, e, 1e-13)
        for a, w in zip(*(torch.autograd.grad(t.square().sum(), [x, b]) for t in (y, e)), strict=True):
            close(a, w, 1e-12)
    assert capsys.readouterr().err.count("warning:") == 1


def test_bad_arguments_are_errors():
    x = numbers(1, 2, 8, 8)
    for match, how in {
        r"the bias \[3\] must be \[2\]": {"bias": torch.ones(3)},
        r"up_filter must be \[k\] or \[kh, kw\]": {"up_filter": torch.ones(2, 2, 2)},
        "down_filter must be": {"down_filter": torch.ones(0)},
        "up=0, down=1 must be 1 to": {"up": 0},
        "must be left, right, top and bottom": {"padding": (1, 2, 3)},
        "smaller than the filters": {"down_filter": torch.ones(9)},
        "gain=nan and slope=0.2 must be finite": {"gain": float("nan")},
        "the clamp must be at least 0, not -1": {"clamp": -1},
    }.items():
        with pytest.raises(ValueError, match=match):
            filtered_lrelu(x, **how)
    with pytest.raises(ValueError, match=r"x must be \[N, C, H, W\]"):
        filtered_lrelu(x[0])
