"""Kernels at the sizes of real networks: non-temporal stores, large indices, and speed."""

import itertools
import os
import subprocess
import sys
import timeit

import pytest
import torch
from kernel_cases import FILTERS, LAYOUTS, OPS, close, numbers, tail

from stylegan_pg.ops import bias_act, calls, native, reference, upfirdn2d

PAST = 4 * 2**20  # results of at least this number of bytes are written with non-temporal stores
# Sizes near that limit, with rows and pixels that fill whole cache lines, do not, or are shorter than one.
SHAPES = [(1, 16, 256, 256), (1, 33, 181, 181), (2, 5, 331, 337), (1, 1, 1030, 1029), (70, 64, 16, 16)]


def past(x: torch.Tensor, shrinks: int, layout: torch.memory_format) -> torch.Tensor:
    """Repeat x until the result, which is `shrinks` times smaller, is written with non-temporal stores."""
    times = -(-PAST * shrinks // x.nbytes) if x.nbytes <= PAST * shrinks else 1
    return x.repeat(times + 1, 1, 1, 1).contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_upfirdn2d_with_non_temporal_stores(shape, layout, dtype):
    """All values are written, at the boundaries of cache lines, in overlapping ends, and as seen from other threads."""
    x = numbers(*shape, dtype=torch.float32).to(dtype)
    for up, down, padding in ((2, 1, (2, 1, 2, 1)), (1, 2, (1, 1, 1, 1)), (1, 1, (2, 1, 1, 2))):
        given = past(x, 1 if down == 1 else 5, layout)
        y = upfirdn2d(given, FILTERS["1331"], up=up, down=down, padding=padding)
        assert y.nbytes > PAST
        expected = reference.upfirdn2d(given.float(), FILTERS["1331"], (up, up), (down, down), padding, False, 1.0)
        close(y.float(), expected, 1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bias_act_with_non_temporal_stores(shape, layout, dtype):
    """The same for bias_act and its backward pass."""
    acc, tolerance = (torch.float32, 2e-6 if dtype == torch.float32 else 2**-8)
    if dtype == torch.float64:
        acc, tolerance = dtype, 1e-12
    x = past(numbers(*shape).to(dtype), 1, layout)
    assert x.nbytes > PAST
    how = tail("bias scale noise", x.shape, acc) | {"x": x}
    for kind in (("bias",), ("bias", "scale", "noise")):
        given = {k: how[k] for k in ("x", *kind)}
        ours, plain = ({k: t.detach().clone().requires_grad_(True) for k, t in given.items()} for _ in range(2))
        plain["x"] = x.to(acc).requires_grad_(True)
        arguments = [plain.get(k) for k in ("x", "bias", "scale", "noise")]
        y = OPS.bias_act(*(ours.get(k) for k in ("x", "bias", "scale", "noise")), "lrelu", 1.3, 1.1, 1)
        expected = reference.bias_act(*arguments, "lrelu", 1.3, 1.1, 1)  # type: ignore[arg-type]  # x is given
        close(y.to(acc), expected, tolerance)
        dy = numbers(*x.shape, seed=4).to(dtype)
        got = torch.autograd.grad(y, list(ours.values()), dy)
        for a, b in zip(got, torch.autograd.grad(expected, list(plain.values()), dy.to(acc)), strict=True):
            close(a.to(acc), b, 100 * tolerance)


def test_lack_of_memory_for_sums_is_a_known_error():
    """The process survives, whichever allocation fails."""
    code = """if True:
        import resource, torch
        from stylegan_pg.optim.optimizer_step import out_of_memory
        from stylegan_pg.ops import calls, native
        torch.set_num_threads(1)
        x = torch.randn(1, 256, 16, 4096).bfloat16().permute(0, 3, 1, 2)
        tail = calls.BiasAct(native.compiled(x), x, torch.zeros(4096), None, None, "lrelu", 1.0, None, 1)
        torch.randn(8, 8) @ torch.randn(8, 8)
        told = set()
        for mib in range(0, 160, 4):
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (mib << 20), resource.RLIM_INFINITY))
            try:
                tail.backward(x, (True, True, False))
                told.add("done")
            except RuntimeError as error:
                assert out_of_memory(error), error
                told.add("sums" if "sums" in str(error) else "result")
        print(*sorted(told))
    """
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert {"done", "sums"} <= set(told.stdout.split()), told.stderr


def test_lack_of_memory_within_a_task_is_a_known_error():
    """The fused leaky ReLU allocates rows on each thread."""
    code = """if True:
        import resource, torch
        from stylegan_pg.optim.optimizer_step import out_of_memory
        from stylegan_pg.ops import filtered_lrelu
        torch.set_num_threads(1)
        x, taps = torch.randn(1, 1, 8, 900), torch.rand(48, 48)
        def run():
            return filtered_lrelu(x, taps, taps, up=4, down=4, padding=50)
        expected, told = run(), set()
        for kib in range(0, 6000, 50):
            size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + (kib << 10), resource.RLIM_INFINITY))
            try:
                told.add("done" if torch.equal(run(), expected) else "wrong")
            except RuntimeError as error:
                assert out_of_memory(error), error
                told.add("known")
        print(*sorted(told))
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}  # memory that is freed is given back
    env = os.environ | at_once
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=env)
    assert told.stdout.split() == ["done", "known"], told.stdout + told.stderr


def test_sums_of_many_numbers_are_exact():
    """The gradient of a bias is a sum over a whole batch. Only the final result may be rounded to float32."""
    x = torch.ones(4, 8, 512, 512)
    dy = (1 + numbers(4, 8, 512, 512, dtype=torch.float32) * 1e-3).contiguous()
    for layout in LAYOUTS:
        bias = torch.zeros(8, requires_grad=True)
        y = bias_act(x.contiguous(memory_format=layout), bias, act="linear")
        (db,) = torch.autograd.grad(y, [bias], dy.contiguous(memory_format=layout))
        close(db, dy.double().sum(dim=[0, 2, 3]).float(), 3e-7)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(layout):
    """A 32-bit index would have overflowed before the end of the tensors."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 10e9:
        pytest.skip("needs 10 GB of free memory")
    size = (3, 24, 5488, 5488)
    x = torch.zeros(size, dtype=torch.bfloat16)
    if layout == torch.channels_last:
        x = torch.zeros(3, 5488, 5488, 24, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    corner = x[-1:, :, -16:, -16:].copy_(numbers(1, 24, 16, 16)).double()
    f, bias = FILTERS["1331"], numbers(24, dtype=torch.float32)
    y = upfirdn2d(x, f, padding=(3, 0, 3, 0))
    close(
        y[-1:, :, -16:, -16:].double(), reference.upfirdn2d(corner, f, (1, 1), (1, 1), (3, 0, 3, 0), False, 1.0), 1e-2
    )
    del y
    y = bias_act(x, bias, act="lrelu", gain=1.0)
    expected = reference.bias_act(corner, bias.double(), None, None, "lrelu", 1.0, None, 1)
    close(y[-1:, :, -16:, -16:].double(), expected, 1e-2)


@pytest.mark.skipif(native.choose("cpu").built is None, reason="no compiled kernels here")
@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
def test_all_loops_are_vectorised(act):
    """A single conditional load can prevent a compiler from vectorising a loop, which then silently takes 20 times as
    long. The best of many calls should take 2 to 5 times as long as copying numbers of 32 bits or more; the limit is
    12."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x32 = numbers(1, 64, 64, 64, dtype=torch.float32)

    def best(function) -> float:
        return min(timeit.repeat(function, number=1, repeat=50))

    try:
        for layout, dtype in itertools.product(LAYOUTS, (torch.float32, torch.bfloat16, torch.float64)):
            x = x32.to(dtype).contiguous(memory_format=layout)
            copying = best(x32.clone) if dtype == torch.bfloat16 else best(x.clone)
            kernels, acc = native.compiled(x), torch.float64 if dtype == torch.float64 else torch.float32
            assert kernels
            for noise in (None, numbers(1, 1, 64, 64, dtype=acc)):
                tail_ = calls.BiasAct(kernels, x, numbers(64, dtype=acc), None, noise, act, 2**0.5, 256.0, 1)
                passes = {
                    "value": lambda t=tail_: t.elementwise(0),
                    "slope": lambda t=tail_, x=x: t.elementwise(1, x),
                    "backward": lambda t=tail_, x=x, n=noise is not None: t.backward(x, (True, False, n)),
                }
                for name, function in passes.items():
                    assert best(function) < 12 * copying, (name, layout, dtype)
    finally:
        torch.set_num_threads(threads)
