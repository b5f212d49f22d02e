"""The CUDA kernels without a GPU: g++ compiles the same code as nvcc, through kernels/shim/cuda.h. The results are
compared with the reference and checked for races and out-of-bounds accesses. test_kernel_mutants.py shows that these
checks find faults."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import OPS, tail
from shimmed import (
    BACKWARD_SHAPES,
    CASES,
    DTYPES,
    FILTERED,
    LAYOUTS,
    LOPSIDED,
    SMOOTH,
    UNEVEN,
    check,
    check_backward,
    check_bias_act,
    check_filtered,
    random,
    report,
    run_backward,
    run_upfirdn2d,
)

from stylegan_pg.errors import RunError
from stylegan_pg.ops import (
    ACTIVATIONS,
    bias_act,
    build,
    calls,
    filtered_lrelu,
    native,
    reference,
    setup_filter,
    upfirdn2d,
)
from stylegan_pg.planning.operations import NO_LAUNCH

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_upfirdn2d_on_the_shim(shim, dtype, layout):
    """Full and partial tiles, all orders of threads, and the fast and general kernels."""
    for k, (up, down, padding) in enumerate(CASES):
        for size in ((16, 32), (7, 24), (5, 17), (1, 1)):
            x = random(2, 8, *size, dtype=dtype).contiguous(memory_format=layout)
            for flip, f in ((k % 2 == 0, LOPSIDED), (k % 2 == 1, random(3 + k % 2, 4, seed=3))):
                reach = [size[1] * up[0] + padding[0] + padding[1], size[0] * up[1] + padding[2] + padding[3]]
                if reach[0] < f.shape[1] or reach[1] < f.shape[0]:
                    continue
                y = run_upfirdn2d(shim, x, f, up, down, padding, flip, 1.5, k % 3, offset=size[0] % 2)
                check(y, reference.upfirdn2d(x.double(), f, up, down, padding, flip, 1.5), DTYPES[dtype])
    assert report(shim) == ""


@pytest.mark.parametrize("order", [0, 1, 2])
def test_tiles_beyond_one_block(shim, order):
    """Several tiles in each direction, and (in the shim) more planes than layers of the grid."""
    for dtype, size in ((torch.float16, (40, 272)), (torch.float32, (70, 136))):
        x = random(2, 2, *size, dtype=dtype)
        for up, down, padding in (CASES[0], CASES[3], CASES[5]):
            y = run_upfirdn2d(shim, x, LOPSIDED, up, down, padding, False, 2.0, order)
            check(y, reference.upfirdn2d(x.double(), LOPSIDED, up, down, padding, False, 2.0), DTYPES[dtype])
    assert report(shim) == ""


EVERY_ACT = [(act, torch.float32) for act in ACTIVATIONS]

EVERY_DTYPE = [(act, dtype) for act in ("lrelu", "swish") for dtype in DTYPES if dtype != torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("act", "dtype"), EVERY_ACT + EVERY_DTYPE)
def test_bias_act_on_the_shim(shim, act, dtype, layout):
    check_bias_act(shim, act, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_pass_of_bias_act_on_the_shim(shim, dtype, layout):
    """Every combination of wanted gradients, tiles of every form, and a curved activation without packs."""
    check_backward(shim, "lrelu", dtype, layout)
    check_backward(shim, "swish", dtype, layout, BACKWARD_SHAPES[:4], ("all",))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_backward_pass_of_every_activation_on_the_shim(shim, act, layout):
    check_backward(shim, act, torch.float32, layout, BACKWARD_SHAPES[:3], ("bias", "shared"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_the_backward_pass_do_not_depend_on_the_order_of_threads(shim, layout):
    x, dy = (random(2, 24, 36, 65, dtype=torch.bfloat16, seed=s).contiguous(memory_format=layout) for s in (0, 1))
    given = random(24), random(2, 24, seed=2), random(2, 1, 36, 65, seed=3)
    runs = [run_backward(shim, "lrelu", x, dy, given, [True] * 3, 0.9, order) for order in (0, 1, 2)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
    assert report(shim) == ""


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("name", FILTERED)
def test_filtered_lrelu_on_the_shim(shim, name, order):
    """Values and gradients, of the tiled kernel in both layouts and of the general one, in all orders of threads, with
    more tiles than blocks of the grid."""
    check_filtered(shim, name, order)


@pytest.fixture
def on_device_code(shim, monkeypatch):
    """Use the operators as on a GPU, with the shim instead of CUDA."""
    shim.spg_shim_order(2, 7)
    kernels = calls.Kernels("cuda", shim)
    monkeypatch.setattr(native, "compiled", lambda x: kernels if x.dtype in native.SUPPORTED["cuda"] else None)
    yield
    assert report(shim) == ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_and_their_derivatives_on_device_code(on_device_code, layout):
    f = setup_filter([1, 3, 3, 1])
    x = random(2, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_(True)
    cases: list[dict[str, Any]] = [{"up": 2, "padding": (2, 1, 2, 1)}, {"down": 2, "padding": 1}]
    for how in [*cases, {"padding": 2, "flip_filter": True}]:
        assert torch.autograd.gradcheck(lambda x, how=how: upfirdn2d(x, f, gain=1.5, **how), [x])
        assert torch.autograd.gradgradcheck(lambda x, how=how: upfirdn2d(x, f, gain=1.5, **how), [x])
    bias, scale, noise = (random(*s, dtype=torch.float64) for s in ((3,), (2, 3), (2, 1, 5, 6)))
    inputs = [x, *(t.requires_grad_(True) for t in (bias, scale, noise))]

    def layer(x, bias, scale, noise, act):
        return bias_act(x, bias, scale=scale, noise=noise, act=act, clamp=1.1)

    for act in ("lrelu", "swish"):
        layer_of = functools.partial(layer, act=act)
        assert torch.autograd.gradcheck(layer_of, inputs)
        assert torch.autograd.gradgradcheck(layer_of, inputs)
    bare = bias_act(random(7, 5), random(5), act="relu")
    check(bare, (random(7, 5) + random(5)).relu() * 2**0.5, 1e-6)


@pytest.mark.parametrize(
    ("kind", "shape", "wanted", "launches"),
    [
        ("bias", (8, 12), [True, False, False], 1),  # one tile
        ("bias", (4, 12, 16, 16), [True, False, False], 2),
        ("bias scale noise", (4, 12, 16, 16), [True, True, True], 2),
        ("bias scale noise shared", (4, 12, 16, 16), [True, True, True], 2),
        ("bias scale noise", (4, 12, 16, 16), [False, False, False], 1),
        ("bias", (4, 12, 16, 16), [False, False, False], 1),
    ],
)
def test_a_backward_pass_starts_at_most_two_kernels(on_device_code, shim, kind, shape, wanted, launches):
    """And no operations of PyTorch beside them that would compute anything."""
    x, *given = tail(kind, shape, torch.float32).values()
    dy, before = torch.ones_like(x), shim.spg_shim_launches()
    with torch.profiler.profile() as profile:
        OPS.bias_act_backward(dy, x, *given, "lrelu", 1.0, 2.0, 1, wanted)
    assert shim.spg_shim_launches() - before == launches
    names = {event.name.removeprefix("aten::") for event in profile.events() or ()}
    assert "stylegan_pg::bias_act_backward" in names
    assert names - NO_LAUNCH - {"to", "sum_to_size"} == {"stylegan_pg::bias_act_backward"}  # these change nothing


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needed", [("x",), ("bias",), ("scale", "noise"), ("x", "noise"), ("bias", "scale", "noise")])
def test_gradients_that_are_needed_on_device_code(on_device_code, needed, layout):
    """A gradient has the format of its tensor. Tensors that need none get none."""
    how = tail("bias scale noise shared", (3, 5, 6, 7), torch.float32)
    how["x"] = how["x"].contiguous(memory_format=layout)
    how["bias"], how["scale"] = how["bias"].double(), how["scale"].bfloat16()
    plain = functools.partial(reference.bias_act, act="lrelu", gain=2**0.5, clamp=None, dim=1)
    results = []
    for call, double in ((functools.partial(bias_act, act="lrelu"), False), (plain, True)):
        leaves = {k: t.detach().clone().requires_grad_(k in needed) for k, t in how.items()}
        y = call(**{k: t.double() if double else t for k, t in leaves.items()})
        (y * random(*y.shape, seed=5)).sum().backward()
        assert {k for k, t in leaves.items() if t.grad is not None} == set(needed)
        results.append({k: leaves[k].grad for k in needed})
    for k in needed:
        assert results[0][k].dtype == how[k].dtype
        check(results[0][k], results[1][k], 1e-2 if k == "scale" else 1e-5)


def test_empty_tensors_on_device_code(on_device_code):
    for shape in ((3, 0), (0, 4), (2, 0, 3, 3), (2, 3, 0, 3)):
        x, b = torch.ones(shape, requires_grad=True), torch.ones(shape[1], requires_grad=True)
        scale = torch.ones(shape[:2], requires_grad=True)
        bias_act(x, b, scale=scale, act="lrelu").sum().backward()
        for t in (x, b, scale):
            assert t.grad is not None
            assert t.grad.shape == t.shape
            assert not t.grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("up", "down", "second"), [(2, 2, UNEVEN), (4, 1, SMOOTH)])
def test_derivatives_of_filtered_lrelu_on_device_code(on_device_code, layout, up, down, second):
    """In float64, by the general kernel."""
    x = random(1, 2, 4, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_(True)
    bias = random(2, dtype=torch.float64, seed=1).requires_grad_(True)

    def run(x, bias):
        return filtered_lrelu(x, SMOOTH, second, bias, up=up, down=down, padding=(9, 10, 8, 11), clamp=0.6)

    assert torch.autograd.gradcheck(run, (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: run(x, bias).square(), (x, bias), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_of_filtered_lrelu_by_the_tiled_kernel(on_device_code, layout):
    """The gradient of a gradient penalty, in float32."""
    x, bias, results = random(1, 4, 9, 12).contiguous(memory_format=layout), random(4, seed=1), []
    for t, function in (
        (x, lambda x, b: filtered_lrelu(x, SMOOTH, UNEVEN, b, up=2, down=2, padding=9, clamp=0.9)),
        (x.double(), lambda x, b: reference.filtered_lrelu(x, SMOOTH, UNEVEN, b, 2, 2, (9,) * 4, 2**0.5, 0.2, 0.9)),
    ):
        inputs = [t.clone().requires_grad_(True), bias.to(t.dtype).requires_grad_(True)]
        first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        check(actual, expected, 1e-4)


def test_the_factors_of_a_filter_are_computed_once(on_device_code, monkeypatch):
    """Reading a filter's values synchronises with the GPU. They are read again if the filter changes."""
    seen = []
    find = calls.separable_factors
    monkeypatch.setattr(calls, "separable_factors", lambda *a: seen.append(a) or find(*a))
    x, f = random(1, 2, 8, 8), setup_filter([1, 3, 3, 1])
    for _ in range(3):
        y = upfirdn2d(x, f, padding=2)
    assert len(seen) == 1
    f.mul_(2)
    check(upfirdn2d(x, f, padding=2), 2 * y, 1e-6)
    assert len(seen) == 2


class Failing:
    """A library whose launches fail, like machine code for other GPUs."""

    def __getattr__(self, name):
        return lambda *args: 209


def test_a_failing_launch_is_reported(monkeypatch):
    library: Any = Failing()
    monkeypatch.setattr(native, "compiled", lambda x: calls.Kernels("cuda", library))
    with pytest.raises(RuntimeError, match="bias_act on cpu: the launch failed with CUDA error 209"):
        bias_act(random(2, 3), act="relu")


def test_a_library_that_does_not_run_here_is_not_used(monkeypatch, capsys):
    """The library can be loaded, but all its launches fail."""
    library: Any = Failing()
    monkeypatch.setattr(native, "_trial_tensors", lambda device: [torch.ones(8)])
    monkeypatch.setattr(native.build, "load", lambda kind: build.Built(library, Path("/x/kernels.so"), "prebuilt"))
    choice = native._choose.__wrapped__("cuda", "auto")
    assert choice.name == "reference"
    assert "CUDA error 209" in choice.reason
    assert "TORCH_CUDA_ARCH_LIST" in choice.remedy
    assert capsys.readouterr().err.count("warning:") == 1
    with pytest.raises(RunError, match="does not run on cpu"):
        native._choose.__wrapped__("cuda", "strict")


def test_tensors_too_large_for_one_launch_use_the_reference(on_device_code):
    """More samples than layers of the grid."""
    x = random(65537, 1, 1, 2)
    noise = random(65537, 1, 1, 2, seed=1)
    check(bias_act(x, noise=noise, act="relu", gain=1.0), (x + noise).relu(), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_beyond_31_bits(on_device_code, shim, layout):
    """The last blocks of tensors of more than 2^31 elements, of which only the used pages take memory. A 32-bit index
    would have overflowed before them."""
    # Whole numbers of iterations of the general kernel's grid, so that the last block computes the last element.
    if layout == torch.contiguous_format:
        x = torch.zeros(1, 9, 16384, 16384, dtype=torch.bfloat16)
    else:
        x = torch.zeros(1, 12288, 24576, 8, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    channels = x.shape[1]
    assert x.numel() > 2**31
    corner = x[..., -24:, -24:].copy_(random(1, channels, 24, 24)).clone()
    shim.spg_shim_last_blocks(ctypes.c_int64(1))
    try:
        bias = random(channels, seed=1)
        y = bias_act(x, bias, act="lrelu", gain=1.0)
        plain = reference.bias_act(corner.double(), bias.double(), None, None, "lrelu", 1.0, None, 1)
        check(y[:, -1:, -1:, -8:], plain[:, -1:, -1:, -8:], 1e-2)
        for wanted in ([True, False, False], [True, True, False]):
            scale = random(1, channels, seed=2)
            given = [corner.double(), bias.double(), scale.double(), None]
            dx = OPS.bias_act_backward(x, x, bias, scale, None, "lrelu", 1.0, None, 1, wanted)[0]
            plain = OPS.bias_act_slope(given[0], *given, "lrelu", 1.0, None, 1) * scale.double()[:, :, None, None]
            check(dx[:, -1:, -1:, -8:], plain[:, -1:, -1:, -8:], 1e-2)
        for f in (setup_filter([1, 3, 3, 1]), random(3, 4, seed=2)):  # the fast kernel and the general one
            fh, fw = f.shape
            y = upfirdn2d(x, f, padding=(fw - 1, 0, fh - 1, 0))
            plain = reference.upfirdn2d(corner.double(), f, (1, 1), (1, 1), (fw - 1, 0, fh - 1, 0), False, 1.0)
            check(y[:, -1:, -1:, -8:], plain[:, -1:, -1:, -8:], 1e-2)
        del y
        for up, down, u, d in ((2, 2, SMOOTH, SMOOTH), (1, 1, SMOOTH, None)):  # the tiled kernel and the general one
            pad = (11, 10, 11, 10) if up == 2 else (11, 0, 11, 0)
            plain = reference.filtered_lrelu(corner.double(), u, d, bias.double(), up, down, pad, 1.0, 0.2, None)
            y = filtered_lrelu(x, u, d, bias, up=up, down=down, padding=pad, gain=1.0)
            check(y[:, -1:, -1:, -8:], plain[:, -1:, -1:, -8:], 1e-2)
    finally:
        shim.spg_shim_last_blocks(ctypes.c_int64(0))
