"""3x3 convolutions with fewer products (kernels/cpu/conv3x3.cpp), and their use in layers."""

import ctypes
import itertools
import platform
import subprocess
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import LAYOUTS, OPS, close, numbers
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import stylegan_pg.planning.cost  # noqa: F401  # which tells the FLOP counter of the operators
from stylegan_pg.networks import layers
from stylegan_pg.ops import calls, conv3x3, conv3x3_is_faster, native, pool, recipes

needs_kernels = pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
MODES: list[dict[str, Any]] = [{"transposed": t, "stride": s} for t in (False, True) for s in (1, 2)]
NAMES = ["same", "down", "turned", "up"]
# Sizes around the 4 and 8 outputs of a tile, and channels around packs of 16 and panels of 32.
SHAPES = [
    (2, 5, 4, 6, 7),
    (1, 17, 33, 9, 4),
    (3, 1, 1, 3, 3),
    (1, 48, 96, 40, 41),
    (2, 32, 16, 3, 65),
    (5, 16, 32, 8, 16),
]


def definition(x, weight, transposed: bool, stride: int):
    padding = 1 if stride == 1 else 0
    if transposed:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=stride, padding=padding)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def operands(shape, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    n, ins, outs, h, w = shape
    weight = numbers(outs, ins, 3, 3, seed=1, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    return numbers(n, ins, h, w, dtype=dtype).requires_grad_(True), weight.requires_grad_(True)


@pytest.mark.parametrize("how", MODES, ids=NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(implementation, shape, how):
    """Images and weights may have any layout, and weights may be views."""
    for dtype, of_pictures, of_weights in (
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 2e-5, 2e-5),
        (torch.bfloat16, 2**-8, 3e-5),  # results are rounded at the end, gradients of weights are not
    ):
        x, weight = operands(shape, dtype)
        exact = [t.detach().double().requires_grad_(True) for t in (x, weight)]
        expected = definition(exact[0], exact[1], **how)
        dy = numbers(*expected.shape, seed=2, dtype=dtype)
        wanted = torch.autograd.grad(expected, exact, dy.double())
        for layout, of_weight in itertools.product(LAYOUTS, ("plain", "channels_last", "transposed", "part")):
            a = x.detach().contiguous(memory_format=layout).requires_grad_(True)
            b = weight.detach()
            if of_weight == "channels_last":
                b = b.contiguous(memory_format=torch.channels_last)
            elif of_weight == "transposed":
                b = b.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
            elif of_weight == "part":
                b = F.pad(b, (1, 2, 3, 1, 1, 0))[:, 1:, 3:-1, 1:-2]
            b = b.requires_grad_(True)
            y = conv3x3(a, b, **how)
            assert y.is_contiguous(memory_format=torch.channels_last)
            dx, dw = torch.autograd.grad(y, [a, b], dy)
            assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, weight.dtype)
            for got, want, tolerance in (
                (y, expected, of_pictures),
                (dx, wanted[0], of_pictures),
                (dw, wanted[1], of_weights),
            ):
                close(got.double(), want, tolerance)


@pytest.mark.parametrize("how", MODES, ids=NAMES)
def test_first_and_second_derivatives(implementation, how):
    x, weight = operands((2, 3, 4, 6, 7), torch.float64)
    assert gradcheck(lambda *given: conv3x3(*given, **how), (x, weight))
    assert gradgradcheck(lambda *given: conv3x3(*given, **how), (x, weight))


@pytest.mark.parametrize("swapped", [False, True])
def test_opcheck(implementation, swapped):
    for transposed, stride, dtype in itertools.product((False, True), (1, 2), (torch.float64, torch.bfloat16)):
        x, weight = operands((2, 3, 4, 7, 9), dtype)
        if swapped:
            weight = weight.detach().transpose(0, 1).contiguous().requires_grad_(True)
        size = [7, 9] if stride == 1 else [15, 19] if transposed else [3, 4]
        torch.library.opcheck(OPS.conv3x3, (x, weight, swapped, transposed, stride, size))
    for dtype, (stride, size) in itertools.product((torch.float64, torch.bfloat16), ((1, (7, 9)), (2, (3, 4)))):
        x, dy = (numbers(2, c, *s, dtype=dtype).requires_grad_(True) for c, s in ((3, (7, 9)), (4, size)))
        torch.library.opcheck(OPS.conv3x3_weight, (x, dy, swapped, stride))


@pytest.mark.parametrize("how", MODES, ids=NAMES)
@pytest.mark.parametrize("empty", [0, 1, 2])
def test_empty_dimensions(implementation, empty, how):
    """There may be no images, no inputs (whose sum is 0) or no outputs."""
    shape = [2, 3, 4, 5, 6]
    shape[empty] = 0
    x, weight = operands(shape, torch.bfloat16)
    y = conv3x3(x, weight, **how)
    assert y.shape[:2] == (shape[0], shape[2])
    dx, dw = torch.autograd.grad(y, [x, weight], torch.ones_like(y))
    for t, like in ((y, y), (dx, x), (dw, weight)):
        assert t.shape == like.shape
        assert not t.count_nonzero()


def test_wrong_shapes():
    x, weight = operands((1, 3, 4, 8, 8), torch.bfloat16)
    with pytest.raises(ValueError, match=r"weights \[3, 4, 3, 3\] are not \[O, I, 3, 3\] for x \[1, 3, 8, 8\]"):
        conv3x3(x, weight.transpose(0, 1))
    with pytest.raises(ValueError, match="stride must be 1 or 2, not 3"):
        conv3x3(x, weight, stride=3)
    with pytest.raises(ValueError, match=r"\[2, 8\] is smaller than the kernel"):
        conv3x3(x[:, :, :2], weight, stride=2)
    with pytest.raises(ValueError, match="x is on cpu, the weights on meta"):
        conv3x3(x, weight.to("meta"))


@needs_kernels
@pytest.mark.parametrize("how", MODES, ids=NAMES)
def test_memory_is_written_before_it_is_read(monkeypatch, how):
    """The result does not depend on the previous contents of the working memory, which is large enough for each thread
    and is not exceeded."""
    plain, guards = pool.empty, []

    def poisoned(shape, like, layout, dtype=None):
        if dtype != torch.uint8:
            return plain(shape, like, layout, dtype).fill_(float("nan"))
        whole = torch.full([shape[0] + 128], 255, dtype=torch.uint8)  # floats with these bytes are NaN
        guards.append((whole, shape[0]))
        return whole[64:-64]

    monkeypatch.setattr(pool, "empty", poisoned)
    threads = torch.get_num_threads()
    try:
        for shape, dtype, count in itertools.product(SHAPES, (torch.float64, torch.bfloat16), (1, 3, 50)):
            torch.set_num_threads(count)
            x, weight = operands(shape, dtype)
            y = conv3x3(x, weight, **how)
            for t in (y, *torch.autograd.grad(y, [x, weight], torch.ones_like(y))):
                assert t.isfinite().all()
    finally:
        torch.set_num_threads(threads)
    assert guards
    for whole, size in guards:
        assert (whole[:64] == 255).all()
        assert (whole[64 + size :] == 255).all()


@needs_kernels
@pytest.mark.parametrize("how", MODES, ids=NAMES)
def test_results_do_not_depend_on_threads_or_other_images(how):
    x, weight = operands((3, 48, 80, 37, 50), torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 60):
            torch.set_num_threads(count)
            y = conv3x3(x, weight, **how)
            results.append((y, *torch.autograd.grad(y, [x, weight], torch.ones_like(y))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(conv3x3(x[1:2], weight, **how), results[0][0][1:2])


@needs_kernels
def test_dispatcher_and_direct_call_give_the_same_bits(monkeypatch):
    """The FLOPs that the dispatcher counts are those of direct convolution."""
    x, weight = operands((2, 16, 24, 9, 12), torch.bfloat16)
    for how in MODES:
        y = conv3x3(x, weight, **how)
        first = torch.autograd.grad(y.float().square().sum(), [x, weight])
        counters = []
        for function in (conv3x3, lambda a, b, **how: definition(a, b.bfloat16(), **how)):
            with FlopCounterMode(display=False) as counter:
                z = function(x, weight, **how)
                gradients = torch.autograd.grad(z.float().square().sum(), [x, weight])
            counters.append(counter.get_total_flops())
            if function is conv3x3:
                for a, b in zip((y, *first), (z, *gradients), strict=True):
                    assert torch.equal(a, b)
        assert counters[0] == counters[1] > 0


@needs_kernels
def test_operators_called_by_name():
    """Without the public function, other dtypes are converted, and an unsupported stride is refused."""
    x, weight = (t.detach() for t in operands((2, 8, 8, 9, 9), torch.bfloat16))
    how = (False, False, 1, [9, 9])
    expected = OPS.conv3x3(x, weight.bfloat16().float(), *how)
    assert torch.equal(OPS.conv3x3(x, weight.bfloat16(), *how), expected)
    assert torch.equal(OPS.conv3x3_weight(x, expected.float(), False, 1), OPS.conv3x3_weight(x, expected, False, 1))
    for call in (
        lambda: OPS.conv3x3(x, weight, False, False, 3, [3, 3]),
        lambda: OPS.conv3x3_weight(x, x[:, :, :3, :3], False, 3),
    ):
        with pytest.raises(ValueError, match="the stride must be 1 or 2, not 3"):
            call()


def test_autocast_does_not_round_sums(implementation):
    x, weight = operands((1, 16, 8, 12, 12), torch.float32)
    expected = conv3x3(x, weight)
    wanted = torch.autograd.grad(expected.square().sum(), weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y = conv3x3(x, weight)
        close(y, expected, 1e-6)
        close(torch.autograd.grad(y.square().sum(), weight)[0], wanted, 1e-6)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_vectors_of_other_processors(monkeypatch, tmp_path, processor):
    """Vectors of 16 and 32 bytes, with and without fused multiply-add, give the same results as vectors of 64 bytes."""
    if processor == "x86-64-v4" and "avx512vl" not in recipes._cpuinfo().get("flags", ""):
        pytest.skip("this processor has no AVX-512")
    if processor == "x86-64-v3" and "avx2" not in recipes._cpuinfo().get("flags", ""):
        pytest.skip("this processor has no AVX2")
    recipe, library = recipes.cpu_recipe(), tmp_path / "conv3x3.so"
    if recipe.problem:
        pytest.skip(recipe.problem[0])
    (source,) = (s for s in recipe.sources if s.name == "conv3x3.cpp")
    flags = [f for f in recipe.compile if f not in ("-c", "$in", "-o", "$out", "-march=native")]
    link = [f for f in recipe.link if f.startswith(("-L", "-l", "-Wl"))]
    command = [*flags, f"-march={processor}", "-shared", str(source)]
    done = subprocess.run([*command, "-o", str(library), *link], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = object.__new__(calls.Kernels)
    object.__setattr__(kernels, "kind", "cpu")
    object.__setattr__(kernels, "functions", {})
    for name in ("conv3x3", "conv3x3_weight", "conv3x3_workspace"):
        kernels.functions[name] = getattr(ctypes.CDLL(str(library)), f"spg_{name}_cpu")
        kernels.functions[name].argtypes = calls.SIGNATURES["cpu"][name]
    monkeypatch.setattr(native, "compiled", lambda x: kernels)
    for shape, how in itertools.product(SHAPES, MODES):
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.bfloat16, 2**-8)):
            x, weight = operands(shape, dtype)
            exact = [t.detach().double().requires_grad_(True) for t in (x, weight)]
            y, expected = conv3x3(x, weight, **how), definition(exact[0], exact[1], **how)
            dy = numbers(*expected.shape, seed=2, dtype=dtype)
            close(y.double(), expected, tolerance)
            wanted = torch.autograd.grad(expected, exact, dy.double())
            for got, want in zip(torch.autograd.grad(y, [x, weight], dy), wanted, strict=True):
                close(got.double(), want, tolerance)


@needs_kernels
def test_when_conv3x3_is_used():
    """The decision depends on the size of one image, so that it is the same for any batch, and is negative for unknown
    sizes."""
    last: Any = {"memory_format": torch.channels_last}
    weight = torch.randn(32, 32, 3, 3)
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({}, [5, 32, 32]),
        ({"stride": 2}, [5, 129, 129]),
        ({"stride": 2, "transposed": True}, [5, 64, 64]),
    ]
    for how, (n, h, w) in cases:
        x = torch.zeros(n, 32, h, w, dtype=torch.bfloat16).contiguous(**last)
        assert conv3x3_is_faster(x, weight, **how)
        assert conv3x3_is_faster(x[:1], weight, **how)
        assert not conv3x3_is_faster(x[:, :, : h // 3].contiguous(**last), weight, **how)
        assert not conv3x3_is_faster(x.contiguous(), weight, **how)
        assert not conv3x3_is_faster(x, weight[:, :, :1, :1], **how)
        assert not conv3x3_is_faster(x, weight[:8], **how)
        assert not conv3x3_is_faster(x.float(), weight, **how)
        assert not conv3x3_is_faster(x.to("meta"), weight, **how)


@needs_kernels
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("size", [96, 6])
def test_layers_use_it_when_it_is_faster(monkeypatch, up, down, size):
    """On a CPU without bf16 instructions, weights and their gradients are float32, and values and both derivatives are
    accurate to the precision of bf16. It is not used in float32, or if the processor has bf16 instructions."""
    called, plain = [], calls.conv3x3
    monkeypatch.setattr(calls, "conv3x3", lambda *how: called.append(how) or plain(*how))
    x = numbers(2, 32, size, size).float().contiguous(memory_format=torch.channels_last)
    weight, f = numbers(48, 32, 3, 3, seed=1).float(), layers.low_pass([1, 3, 3, 1])

    def everything(dtype: torch.dtype) -> list[torch.Tensor]:
        a, b = x.to(dtype).requires_grad_(True), weight.clone().requires_grad_(True)
        y = layers.resampling_conv2d(a, b, f, up=up, down=down)
        assert y.dtype == dtype
        first = torch.autograd.grad(y.float().square().sum(), [a, b], create_graph=True)
        return [y, *first, *torch.autograd.grad(first[0].float().square().sum(), [a, b])]

    monkeypatch.setattr(layers, "MULTIPLIES_BF16", True)
    exact = everything(torch.float32)
    everything(torch.bfloat16)
    monkeypatch.setattr(layers, "MULTIPLIES_BF16", False)
    everything(torch.float32)
    assert not called
    for value, wanted in zip(everything(torch.bfloat16), exact, strict=True):
        close(value.float(), wanted.detach(), 0.03)
    assert bool(called) == (size == 96)
    torch.compile(layers.resampling_conv2d, backend="aot_eager")(x.bfloat16(), weight, f, up=up, down=down)
    if up == down == 1:  # a size is a constant to what is traced
        traced: Any = torch.jit.trace(layers.resampling_conv2d, (x.bfloat16(), weight, f), check_trace=False)
        assert traced(x.bfloat16()[:, :, :5], weight, f).shape == (2, 48, 5, size)
