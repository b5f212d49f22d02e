"""The CUDA kernels without a GPU: g++ compiles the same code as nvcc, through kernels/shim/cuda.h. The results are
compared with the reference and checked for races and out-of-bounds accesses, and mutants show that these checks find
faults."""

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import harness
import pytest
import torch

from stylegan_pg.errors import RunError
from stylegan_pg.ops import ACTIVATIONS, bias_act, build, calls, native, recipes, reference, setup_filter, upfirdn2d

pytestmark = pytest.mark.slow
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
MARGIN = 256  # poisoned elements on both sides of every buffer


UNITS = ("bias_act", "upfirdn2d")  # of translation


def compiled(source: Path, out: Path, optimise: str = "-O1") -> ctypes.CDLL:
    linked(out, [unit(source, name, out.parent, optimise) for name in UNITS])
    return loaded(out)


def unit(source: Path, name: str, folder: Path, optimise: str) -> Path:
    """Compile an object file of one of the units in a folder."""
    command = [str(recipes.cxx()), "-x", "c++", "-DSPG_SHIM", optimise, "-std=c++17", "-fPIC", "-Wno-unknown-pragmas"]
    done = subprocess.run(
        [*command, "-c", "-o", str(folder / f"{name}.o"), str(source / "cuda" / f"{name}.cu")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / f"{name}.o"


def linked(out: Path, objects: list[Path]) -> None:
    subprocess.run([str(recipes.cxx()), "-shared", "-o", str(out), *map(str, objects)], check=True)


def loaded(library: Path) -> ctypes.CDLL:
    return calls.Kernels("cuda", ctypes.CDLL(str(library))).lib


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> ctypes.CDLL:
    if recipes.cxx() is None:
        pytest.skip("no C++ compiler")
    return compiled(recipes.kernels_folder(), tmp_path_factory.mktemp("shim") / "shim.so")


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
    scale = max(float(expected.double().abs().max()), 1e-30)
    error = float((actual.double() - expected.double()).abs().max()) / scale
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


# --- the operators on device code -------------------------------------------------------------------------------------


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

    def tail(x, bias, scale, noise, act):
        return bias_act(x, bias, scale=scale, noise=noise, act=act, clamp=1.1)

    for act in ("lrelu", "swish"):
        tail_of = functools.partial(tail, act=act)
        assert torch.autograd.gradcheck(tail_of, inputs)
        assert torch.autograd.gradgradcheck(tail_of, inputs)
    bare = bias_act(random(7, 5), random(5), act="relu")
    check(bare, (random(7, 5) + random(5)).relu() * 2**0.5, 1e-6)


def test_the_factors_of_a_filter_are_computed_once(on_device_code, monkeypatch):
    """Reading a filter's values synchronises with the GPU. They are read again if the filter changes."""
    seen = []
    find = calls.separable_factors
    monkeypatch.setattr(calls, "factors", lambda *a: seen.append(a) or find(*a))
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
        for f in (setup_filter([1, 3, 3, 1]), random(3, 4, seed=2)):  # the fast kernel and the general one
            fh, fw = f.shape
            y = upfirdn2d(x, f, padding=(fw - 1, 0, fh - 1, 0))
            plain = reference.upfirdn2d(corner.double(), f, (1, 1), (1, 1), (fw - 1, 0, fh - 1, 0), False, 1.0)
            check(y[:, -1:, -1:, -8:], plain[:, -1:, -1:, -8:], 1e-2)
    finally:
        shim.spg_shim_last_blocks(ctypes.c_int64(0))


# --- is it watched closely enough? ------------------------------------------------------------------------------------

# name -> (file, the replaced line or expression, its replacement)
MUTANTS = {
    "no barrier after the tile is filled": (
        "upfirdn2d.cuh",
        "    __syncthreads();\n\n    const int ox",
        "    const int ox",
    ),
    "no barrier before the next plane": (
        "upfirdn2d.cuh",
        "    __syncthreads();  // all threads must be done",
        "    //",
    ),
    "a barrier that some threads miss": (
        "upfirdn2d.cuh",
        "    if (ox < p.out_w && oy < p.out_h) {\n",
        "    if (ox < p.out_w && oy < p.out_h) {\n      __syncthreads();\n",
    ),
    "row bound off by one": ("upfirdn2d.cuh", "iy >= 0 && iy < p.h;", "iy >= 0 && iy <= p.h;"),
    "column bound off by one": (
        "upfirdn2d.cuh",
        "row_inside && ix >= 0 && ix < p.w)",
        "row_inside && ix >= 0 && ix <= p.w)",
    ),
    "lower bound off by one": ("upfirdn2d.cuh", "iy >= 0 && iy < p.h;", "iy >= -1 && iy < p.h;"),
    "single columns: bound off by one": (
        "upfirdn2d.cuh",
        "ix + j >= 0 && ix + j < p.w)",
        "ix + j >= 0 && ix + j <= p.w)",
    ),
    "single columns: no guard for the last": ("upfirdn2d.cuh", "if (ox + j >= p.out_w) break;", ""),
    "single columns where packs fit not": (
        "upfirdn2d.cu",
        "p.w % V == 0 && p.out_w % V == 0 &&",
        "p.out_w % V == 0 &&",
    ),
    "swapped index": ("upfirdn2d.cuh", "(row + m) * S::kInW + column + j", "(column + j) * S::kInW + row + m"),
    "wrong filter phase along x": (
        "upfirdn2d.cuh",
        "if ((j * DOWN + k) % UP == 0) along",
        "if ((j * DOWN + k) % UP == UP - 1) along",
    ),
    "wrong filter phase along y": (
        "upfirdn2d.cuh",
        "if ((r * DOWN + k) % UP == 0 && (r * DOWN + k) / UP == m)",
        "if ((r * DOWN + k) % UP == UP - 1 && (r * DOWN + k) / UP == m)",
    ),
    "factors exchanged": ("upfirdn2d.cuh", "sums[r][j] += p.fy[k]", "sums[r][j] += p.fx[k]"),
    "no guard for the last rows": ("upfirdn2d.cuh", "        if (oy + r >= p.out_h) break;\n", ""),
    "no guard for the last columns": ("upfirdn2d.cuh", "if (ox < p.out_w && oy < p.out_h) {", "if (oy < p.out_h) {"),
    "tile one row short": (
        "upfirdn2d.cuh",
        "kInH = ((kOutH - 1) * DOWN + 3) / UP + 1;",
        "kInH = ((kOutH - 1) * DOWN + 3) / UP;",
    ),
    "packs one short": ("upfirdn2d.cuh", "+ 1 + V - 2) / V + 1;", "+ 1 + V - 2) / V;"),
    "pack of the first column rounded up": ("upfirdn2d.cuh", "-((V - 1 - x0) / V)", "-((-x0) / V)"),
    "general kernel: wrong orientation": ("upfirdn2d.cuh", "p.correlate ? tap", "!p.correlate ? tap"),
    "general kernel: no bound": ("upfirdn2d.cuh", "kx < p.kw && ix < p.w;", "kx < p.kw;"),
    "channels_last: no bound": (
        "upfirdn2d.cuh",
        "if (iy + m < 0 || iy + m >= p.h) continue;",
        "if (iy + m < 0) continue;",
    ),
    "channels_last: phase": ("upfirdn2d.cuh", "(ox * DOWN - p.left + odd_x) / UP", "(ox * DOWN - p.left) / UP"),
    "channels_last: taps of the other parity": (
        "upfirdn2d.cuh",
        "y0 = odd_y ? p.fy[1] : p.fy[0]",
        "y0 = odd_y ? p.fy[0] : p.fy[1]",
    ),
    "channels_last: no guard": ("upfirdn2d.cuh", "if (ox >= p.out_w || oy >= p.out_h) return;", ""),
    "channels_last: pair of the wrong column": (
        "upfirdn2d.cuh",
        "const int column = ix + pair + k;",
        "const int column = ix + k;",
    ),
    "bias of the wrong channel": (
        "bias_act.cuh",
        "load_values<N>(shift, bias + column)",
        "load_values<N>(shift, bias)",
    ),
    "bias_act: no bound": (
        "bias_act.cuh",
        "row >= p.rows || column >= p.columns",
        "row >= p.rows || column >= p.columns + N",
    ),
    "bias_act: rows not bounded": ("bias_act.cuh", "row >= p.rows || column", "row > p.rows || column"),
    "bias_act: clamp ignored in the slope": ("bias_act.cuh", "y > clamp || y < -clamp ? A(0) : dz", "dz"),
    "bias_act: scale of another sample": (
        "bias_act.cuh",
        "load_values<N>(factor, scale + n * p.scale_stride + column)",
        "load_values<N>(factor, scale + column)",
    ),
    "bias_act: values in packs that are not aligned": (
        "bias_act.cu",
        "if (p.columns % V == 0 && aligned(p.x)",
        "if (p.columns % V == 0 && aligned(p.out)",
    ),
}


def caught(lib, units: tuple[str, ...] = UNITS) -> str:
    """Describe the faults of a library's units, or return "" if none is found."""
    try:
        if "bias_act" in units:
            for layout in LAYOUTS:
                check_bias_act(lib, "lrelu", torch.float32, layout)
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
        return str(error).splitlines()[0] or "assertion"
    return ""


def test_the_real_kernels_have_no_faults(shim):
    assert caught(shim) == ""


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    """Return the object files of the real kernels, which are linked with a mutated one."""
    folder = tmp_path_factory.mktemp("sound")
    return {name: unit(recipes.kernels_folder(), name, folder, "-O0") for name in UNITS}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(tmp_path, sound, name):
    file, old, new = MUTANTS[name]
    folder = tmp_path / "kernels"
    shutil.copytree(recipes.kernels_folder(), folder, ignore=shutil.ignore_patterns("prebuilt"))
    source = folder / "cuda" / file
    text = source.read_text()
    assert text.count(old) == 1, f"{text.count(old)} places to spoil"
    source.write_text(text.replace(old, new))
    spoiled = file.partition(".")[0]
    objects = sound | {spoiled: unit(folder, spoiled, tmp_path, "-O0")}
    linked(tmp_path / "shim.so", list(objects.values()))
    how = caught_apart(tmp_path, spoiled)
    print(f"{name:42} {how}")
    assert how
    assert not how.startswith("error")  # an error of this test: the kernel did not run


def caught_apart(folder: Path, spoiled: str) -> str:
    """Run `caught` in a separate process, because a mutated kernel may crash."""
    script = folder / "apart.py"
    code = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_shim; "
    )
    code += f"lib = test_shim.loaded(Path(sys.argv[1])); print('CAUGHT', test_shim.caught(lib, ({spoiled!r},)))"
    script.write_text(code)
    process = harness.start([str(folder / "shim.so")], script=script)
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        return f"crash, exit code {process.returncode}" if process.returncode < 0 else f"error: {output[-300:]}"
    return output.partition("CAUGHT")[2].strip()
