"""Helpers for the tests of the CUDA kernels without a GPU: compiling the kernels with kernels/shim/cuda.h, running them
on guarded memory, and finding their faults."""

import ctypes
import itertools
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_cases
import torch

from stylegan_pg.ops import calls, recipes, reference

DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}

LAYOUTS = [torch.contiguous_format, torch.channels_last]

MARGIN = 256  # poisoned elements on both sides of every buffer

UNITS = ("bias_act", "bias_act_backward", "upfirdn2d", "filtered_lrelu")  # translation units


def compile_library(source: Path, out: Path, optimise: str = "-O1") -> ctypes.CDLL:
    with ThreadPoolExecutor() as compilers:
        link(out, list(compilers.map(lambda name: compile_unit(source, name, out.parent, optimise), UNITS)))
    return load_library(out)


def compile_unit(source: Path, name: str, folder: Path, optimise: str) -> Path:
    """Compile an object file of one of the units in a folder."""
    command = [str(recipes.cxx()), "-x", "c++", "-DSPG_SHIM", optimise, "-std=c++17", "-fPIC", "-Wno-unknown-pragmas"]
    done = subprocess.run(
        [*command, "-c", "-o", str(folder / f"{name}.o"), str(source / "cuda" / f"{name}.cu")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / f"{name}.o"


def link(out: Path, objects: list[Path]) -> None:
    subprocess.run([str(recipes.cxx()), "-shared", "-o", str(out), *map(str, objects)], check=True)


def load_library(library: Path) -> ctypes.CDLL:
    return calls.Kernels("cuda", ctypes.CDLL(str(library))).lib


class Guarded:
    """A tensor between poisoned margins: reading a margin gives NaN, and writing into a margin is detected."""

    def __init__(self, t: torch.Tensor, poison: float = float("nan"), offset: int = 0):
        layout = reference.layout_of(t)
        t = t.contiguous(memory_format=layout)
        self.begin = MARGIN + offset  # odd, so that no pack is aligned
        self.buffer, self.poison = torch.full([t.numel() + 2 * MARGIN + offset], poison, dtype=t.dtype), poison
        flat = t.permute(0, 2, 3, 1).reshape(-1) if layout == torch.channels_last else t.reshape(-1)
        self.buffer[self.begin : self.begin + t.numel()] = flat
        self.shape, self.layout, self.count = t.shape, layout, t.numel()

    @property
    def address(self) -> int:
        return self.buffer.data_ptr() + self.begin * self.buffer.element_size()

    def value(self) -> torch.Tensor:
        assert (self.buffer[: self.begin] == self.poison).all(), "written before the beginning"
        assert (self.buffer[self.begin + self.count :] == self.poison).all(), "written behind the end"
        flat = self.buffer[self.begin : self.begin + self.count]
        if self.layout == torch.channels_last:
            n, c, h, w = self.shape
            return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return flat.reshape(self.shape)


def report(lib: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(4096)
    lib.spg_shim_report(text, 4096)
    return text.value.decode()


def run_upfirdn2d(lib, x, f, up, down, padding, flip, gain, order=0, offset=0):
    lib.spg_shim_order(order, 1)
    h = (x.shape[2] * up[1] + padding[2] + padding[3] - f.shape[0]) // down[1] + 1
    w = (x.shape[3] * up[0] + padding[0] + padding[1] - f.shape[1]) // down[0] + 1
    layout = reference.layout_of(x)
    empty = torch.zeros(x.shape[0], x.shape[1], h, w, dtype=x.dtype).contiguous(memory_format=layout)
    source, out = Guarded(x, offset=offset), Guarded(empty, poison=77)
    out.layout = layout
    taps, f_ = calls.separable_factors(f, flip, gain), Guarded(f.reshape(1, 1, *f.shape))
    code = lib.spg_upfirdn2d_cuda(
        0, None, calls.DTYPES[x.dtype], source.address, out.address, f_.address,
        (ctypes.c_float * 8)(*taps) if taps else None, *x.shape, h, w, *up, *down, padding[0], padding[2],
        *f.shape, layout == torch.channels_last, flip, gain,
    )  # fmt: skip
    assert code == 0
    return out.value()


def check(actual, expected, tolerance):
    assert not actual.isnan().any(), "poison was read"
    scale = max(float(expected.detach().double().abs().max()), 1e-30)
    error = float((actual.detach().double() - expected.detach().double()).abs().max()) / scale
    assert error <= tolerance, f"{error:.2e} of the largest magnitude"


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


LOPSIDED = torch.outer(torch.tensor([1.0, 2, 3, 5]), torch.tensor([2.0, -1, 4, 3])) / 50

CASES = [  # up, down, padding
    ((2, 2), (1, 1), (2, 1, 2, 1)),
    ((2, 2), (1, 1), (-2, 3, 4, 0)),
    ((2, 2), (1, 1), (1, 2, 2, 1)),
    ((1, 1), (2, 2), (1, 1, 1, 1)),
    ((1, 1), (2, 2), (3, 2, -1, 4)),
    ((1, 1), (1, 1), (2, 1, 2, 1)),
    ((1, 1), (1, 1), (-1, 4, 7, -3)),
    ((3, 1), (1, 2), (2, 3, 4, 5)),
    ((2, 2), (2, 2), (2, 1, 2, 1)),
    ((1, 1), (1, 1), (1, 2, 1, 2)),  # the first column is the last of its pack
    ((2, 2), (1, 1), (2, 2, 2, 2)),  # an odd number of outputs
    ((1, 1), (1, 1), (1, 1, 1, 1)),  # whole packs from 17 and 9 columns
]


def check_bias_act(shim, act, dtype, layout):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in ((2, 8, 4, 6), (1, 3, 5, 7), (2, 16, 1, 1)):
        x, g, h = (random(*shape, dtype=dtype, seed=s).contiguous(memory_format=layout) for s in (0, 1, 2))
        n, c, *size = shape
        bias, scale, noise = (
            random(c, dtype=acc, seed=3),
            random(n, c, dtype=acc, seed=4),
            random(n, 1, *size, dtype=acc),
        )
        pixels = reference.is_channels_last(x)
        for clamp in (None, 0.8):
            for order, given in ((0, ()), (1, (g,)), (2, (g, h))):
                shim.spg_shim_order(order, 5)
                buffers = [Guarded(t, offset=int(clamp is not None)) for t in (x, *given)]
                addresses = [b.address for b in buffers] + [None] * (2 - order)
                out = Guarded(x, poison=77)
                code = shim.spg_bias_act_cuda(
                    0, None, calls.DTYPES[dtype], calls.ACTS[act], order, *addresses, out.address,
                    n, c, size[0] * size[1], pixels, bias.data_ptr(), scale.data_ptr(), c,
                    noise.data_ptr(), size[0] * size[1], 1.3, -1.0 if clamp is None else clamp,
                )  # fmt: skip
                assert code == 0
                z = x.double() * scale.double()[:, :, None, None] + noise.double() + bias.double()[:, None, None]
                expected = reference.bias_act(z, None, None, None, act, 1.3, None, 1)
                if order:
                    expected_slope = reference.DERIVATIVES[act][order - 1](z) * 1.3
                    for t in given:
                        expected_slope = expected_slope * t.double()
                    if clamp is not None:
                        near = (expected.abs() - clamp).abs() < 1e-3  # rounding may change the result here
                        expected_slope = expected_slope.masked_fill(expected.abs() > clamp, 0)
                        expected_slope = torch.where(near, out.value().double(), expected_slope)
                    expected = expected_slope
                elif clamp is not None:
                    expected = expected.clamp(-clamp, clamp)
                check(out.value(), expected, 4 * DTYPES[dtype])
    text = report(shim)
    assert text == "", text.splitlines()[0]


def run_backward(lib, act, x, dy, given, wanted, clamp, order=0, offset=0):
    """Run the backward pass of bias_act with gain 1.3. `given` holds bias, scale and noise. Return dx and the gradients
    that are wanted, in the accumulating format."""
    lib.spg_shim_order(order, 5)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    n, c, h, w = x.shape
    _, scale, noise = given
    strides = [0 if t is None or len(t) == 1 else t[0].numel() for t in (scale, noise)]
    inputs = [Guarded(t, offset=offset) for t in (dy, x)]
    inputs += [None if t is None else Guarded(t) for t in given]
    addresses = [None if t is None else t.address for t in inputs]
    dx = Guarded(x, poison=77, offset=offset)
    sums = [Guarded(t.to(acc), poison=77) if want else None for t, want in zip(given, wanted, strict=True)]
    count, how = ctypes.c_int64(), (n, c, h * w, reference.is_channels_last(x))
    dtype = calls.DTYPES[x.dtype]
    code = lib.spg_bias_act_backward_workspace_cuda(dtype, *wanted, *how, *strides, ctypes.addressof(count))
    assert code == 0
    room = Guarded(torch.full([count.value], float("nan"), dtype=acc), poison=77)
    code = lib.spg_bias_act_backward_cuda(
        0, None, dtype, calls.ACTS[act], *addresses[:2], dx.address, *(t and t.address for t in sums), room.address,
        *how, addresses[2], addresses[3], strides[0], addresses[4], strides[1], 1.3, -1.0 if clamp is None else clamp,
    )  # fmt: skip
    assert code == 0
    room.value()
    return [dx.value(), *(t.value() for t in sums if t is not None)]


BACKWARD = {  # which of bias, scale and noise there are, and of which a gradient is wanted
    "bias": ("bias", [True, False, False]),
    "all": ("bias scale noise", [True, True, True]),
    "shared": ("bias scale noise shared", [True, True, True]),
    "scale": ("scale", [False, True, False]),
    "noise": ("noise", [False, False, True]),
    "bias of all": ("bias scale noise", [True, False, False]),
    "none": ("bias scale noise", [False, False, False]),
    "two": ("bias scale noise", [True, False, True]),
}
# In both layouts: rows within a warp, of several warps, and of several tiles; numbers of columns that are not whole
# packs; several steps.
BACKWARD_SHAPES = [
    (2, 8, 4, 6),
    (1, 3, 5, 7),
    (2, 16, 1, 1),
    (3, 7, 16, 33),
    (1, 4, 37, 40),
    (2, 7, 36, 64),
    (1, 264, 3, 5),
    (1, 1032, 1, 3),
]


def check_backward(lib, act, dtype, layout, shapes=tuple(BACKWARD_SHAPES), kinds=tuple(BACKWARD)):
    """Compare the backward pass with the reference's in double precision, in the three orders of threads."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for number, (shape, kind) in enumerate(itertools.product(shapes, kinds)):
        names, wanted = BACKWARD[kind]
        how = kernel_cases.tail(names, shape)
        x = how.pop("x").to(dtype).contiguous(memory_format=layout)
        dy = random(*shape, dtype=dtype, seed=4).contiguous(memory_format=layout)
        given = [None if t is None else t.to(acc) for t in how.values()]
        clamp = None if number % 2 else 0.9
        exact = [t if t is None else t.detach().double().requires_grad_() for t in (x, *given)]
        y = reference.bias_act(*exact, act, 1.3, clamp, 1)
        if clamp is not None:  # rounding may change the derivative where the clamp begins
            dy.masked_fill_((y.detach().abs() - clamp).abs() < 1e-4, 0)
        found = run_backward(lib, act, x, dy, given, wanted, clamp, number % 3, number // 2 % 2)
        needed = [t for t, want in zip(exact, [True, *wanted], strict=True) if t is not None and want]
        for i, (a, b) in enumerate(zip(found, torch.autograd.grad(y, needed, dy.double()), strict=True)):
            check(a, b, 4 * DTYPES[dtype] if i == 0 else 3e-6 if acc == torch.float32 else 1e-13)
    text = report(lib)
    assert text == "", text.splitlines()[0]


SMOOTH = torch.tensor([1.0, -2, 3, 9, 14, 20, 17, 8, 5, -3, 1, 2]) / 60
LONG = random(24, seed=8) / 4
UNEVEN = random(11, 12, seed=9) / 10
FILTERED = {  # up, down, up filter, down filter, padding, shape, dtype, channels_last, clamp, offset
    "2 2": (2, 2, SMOOTH, SMOOTH, (10, 9, 9, 10), (1, 2, 19, 36), torch.float32, False, None, 0),
    "2 2 odd, cropped": (2, 2, SMOOTH[:7], SMOOTH[:5], (-3, 12, 11, -2), (2, 3, 17, 37), torch.float16, False, 0.7, 1),
    "2 2 packs": (2, 2, SMOOTH, UNEVEN, (10, 11, 8, 9), (1, 2, 18, 40), torch.bfloat16, False, 0.9, 0),
    "2 2 pixels": (2, 2, SMOOTH, UNEVEN, (9, 10, 11, 9), (1, 16, 17, 19), torch.float16, True, 0.8, 0),
    "2 2 six channels": (2, 2, SMOOTH, SMOOTH, (9, 10, 11, 9), (1, 6, 9, 10), torch.float16, True, 0.8, 0),
    "4 2": (4, 2, LONG, SMOOTH, (18, 16, 15, 17), (1, 3, 11, 20), torch.float32, False, 1.1, 0),
    "4 2 uneven": (4, 2, UNEVEN, SMOOTH, (9, 11, 8, 10), (1, 2, 9, 21), torch.float16, False, 0.9, 0),
    "4 2 pixels": (4, 2, LONG, UNEVEN, (16, 17, 18, 15), (2, 8, 9, 11), torch.float32, True, None, 0),
    "2 4": (2, 4, UNEVEN, LONG, (20, 21, 19, 22), (1, 2, 30, 33), torch.float32, False, 0.5, 0),
    "2 4 pixels": (2, 4, SMOOTH, LONG, (21, 20, 19, 18), (1, 8, 20, 24), torch.float16, True, 0.6, 0),
    "1 2 double": (1, 2, LONG, UNEVEN, (12, 13, 11, 14), (2, 3, 23, 25), torch.float64, False, 0.9, 0),
    "4 1 pixels": (4, 1, UNEVEN, SMOOTH, (9, 8, 7, 6), (1, 3, 11, 9), torch.float32, True, None, 0),
    "4 4": (4, 4, LONG.repeat(2), LONG.repeat(2), (40, 41, 39, 38), (1, 2, 13, 12), torch.float32, False, 1.0, 0),
}


def run_filtered(lib, mode, x, slopes, bias, stages, activation, order=0, offset=0):
    """Run the kernel on guarded memory. Return the result, and the slopes if they were recorded."""
    lib.spg_shim_order(order, 1)
    layout = reference.layout_of(x)
    source = Guarded(x, offset=offset)
    out = Guarded(torch.zeros(*x.shape[:2], *stages.out, dtype=x.dtype).contiguous(memory_format=layout), 77, offset)
    out.layout = layout
    held = None
    if mode:
        shape = calls.slopes_shape(x.shape, stages.mid, layout == torch.channels_last)
        held = Guarded(torch.full(shape, 255, dtype=torch.uint8) if slopes is None else slopes, poison=170)
    bias_ = None if bias is None else Guarded(bias.reshape(1, -1, 1, 1))
    filters = [Guarded(f.reshape(1, 1, -1, f.shape[-1])) for f in (stages.first, stages.second)]
    taps = [(ctypes.c_float * len(f))(*f.tolist()) if f.ndim == 1 else None for f in (stages.first, stages.second)]
    sizes = [k for f in (stages.first, stages.second) for k in (f.shape[0], f.shape[-1], f.ndim == 1)]
    gain, slope, clamp = activation
    code = lib.spg_filtered_lrelu_cuda(
        0, None, calls.DTYPES[x.dtype], mode, source.address, out.address, held and held.address,
        bias_ and bias_.address, *taps, *(f.address for f in filters), *x.shape, *stages.mid, *stages.out,
        *stages.offsets, stages.up, stages.down, *sizes, layout == torch.channels_last, stages.correlate,
        *stages.gains, gain, slope, -1.0 if clamp is None else clamp,
    )  # fmt: skip
    assert code == 0
    return out.value(), None if held is None else held.value()


def check_filtered(lib, name, order=0):
    """Compare a case of FILTERED with the reference: the value, and the gradient by the recorded slopes."""
    up, down, u, d, padding, shape, dtype, last, clamp, offset = FILTERED[name]
    layout = LAYOUTS[int(last)]
    x, acc = random(*shape, dtype=dtype).contiguous(memory_format=layout), calls.sums_of(dtype)
    bias = random(shape[1], dtype=acc, seed=1)
    left, right, top, bottom = padding
    (uh, uw), (dh, dw) = calls.taps(u), calls.taps(d)
    mid = shape[2] * up + top + bottom - uh + 1, shape[3] * up + left + right - uw + 1
    out = (mid[0] - dh) // down + 1, (mid[1] - dw) // down + 1
    stages = calls.Stages(u, d, up, down, [left, top, 0, 0], mid, out, (float(up * up), 1.0), False)
    exact = x.double().requires_grad_(True)
    expected = reference.filtered_lrelu(exact, u, d, bias.double(), up, down, padding, 1.3, 0.3, clamp)
    y, slopes = run_filtered(lib, 1, x, None, bias, stages, (1.3, 0.3, clamp), order, offset)
    assert slopes is not None
    check(y, expected.detach(), 4 * DTYPES[dtype])
    assert torch.equal(run_filtered(lib, 0, x, None, bias, stages, (1.3, 0.3, clamp), order, offset)[0], y)
    used = shape[0] * shape[1] * ((mid[0] + 3) // 4) * mid[1]
    flat = slopes.flatten()
    assert (flat[used:] == 255).all(), "slopes were recorded behind their end"
    codes = torch.stack([flat[:used] >> shift & 3 for shift in (0, 2, 4, 6)])
    assert codes.max() < 3, "some slopes were not recorded"
    dy = random(*y.shape, dtype=dtype, seed=2).contiguous(memory_format=layout)
    (wanted,) = torch.autograd.grad(expected, exact, dy.double())
    dx, _ = run_filtered(lib, 2, dy, slopes, None, stages.transposed(shape[2:]), (1.3, 0.3, None), order, offset)
    check(dx, wanted, 4 * DTYPES[dtype])
    text = report(lib)
    assert text == "", text.splitlines()[0]


def find_fault(lib, units: tuple[str, ...] = UNITS) -> str:
    """Describe the faults of a library's units, or return "" if none is found."""
    try:
        if "bias_act" in units:
            for layout in LAYOUTS:
                check_bias_act(lib, "lrelu", torch.float32, layout)
        if "bias_act_backward" in units:
            for layout in LAYOUTS:
                check_backward(lib, "lrelu", torch.float32, layout, kinds=("bias", "all", "shared"))
        if "filtered_lrelu" in units:
            for i, name in enumerate(FILTERED):
                check_filtered(lib, name, i % 3)
        if "upfirdn2d" not in units:
            return ""
        for up, down, padding in (CASES[0], CASES[3], CASES[5], *CASES[-3:-1]):
            for dtype, layout in (
                (torch.float32, LAYOUTS[0]),
                (torch.float16, LAYOUTS[0]),
                (torch.float16, LAYOUTS[1]),
            ):
                x = random(2, 8, 17, 24 if up[0] == 1 else 28 if dtype == torch.float32 else 24, dtype=dtype)
                x = x.contiguous(memory_format=layout)
                if down[0] == 2:
                    x = random(2, 8, 17, 32, dtype=dtype).contiguous(memory_format=layout)
                for f in (LOPSIDED, random(3, 5, seed=8)):
                    y = run_upfirdn2d(lib, x, f, up, down, padding, False, 1.5, order=2)
                    text = report(lib)
                    if text:
                        return text.splitlines()[0]
                    check(y, reference.upfirdn2d(x.double(), f, up, down, padding, False, 1.5), DTYPES[dtype])
        wide = random(1, 1, 9, 136, dtype=torch.float16)  # more than a whole tile
        for x, case in ((wide, CASES[-3]), (wide[..., :17].contiguous(), CASES[-1])):
            y = run_upfirdn2d(lib, x, LOPSIDED, *case, False, 1.5)
            text = report(lib)
            if text:
                return text.splitlines()[0]
            check(y, reference.upfirdn2d(x.double(), LOPSIDED, *case, False, 1.5), DTYPES[torch.float16])
    except AssertionError as error:
        return (str(error).splitlines() or ["a failed assertion"])[0]
    return ""
