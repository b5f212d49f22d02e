"""Mutants of the CUDA kernels: the checks of test_shim.py detect each of them, and no fault in the real kernels."""

import shutil
from pathlib import Path

import harness
import pytest
from shimmed import UNITS, compile_unit, find_fault, link

from stylegan_pg.ops import recipes

pytestmark = pytest.mark.slow

BACKWARD = "bias_act_backward.cuh"

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
    "single columns where packs do not fit": (
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
    "bias_act: clamp ignored in the slope": ("bias_act.cuh", "fabs(y) > clamp ? A(0) : dz", "dz"),
    "bias_act: scale of another sample": (
        "bias_act.cuh",
        "load_values<N>(factor, scale + n * p.scale_stride + column)",
        "load_values<N>(factor, scale + column)",
    ),
    "filtered: no barrier after the inputs": (
        "filtered_lrelu.cuh",
        "    __syncthreads();\n\n#pragma unroll 1\n    for (int channel",
        "#pragma unroll 1\n    for (int channel",
    ),
    "filtered: no barrier before the next channel": (
        "filtered_lrelu.cuh",
        "      __syncthreads();  // before the next channel",
        "      //",
    ),
    "filtered: no barrier before the next tile": (
        "filtered_lrelu.cuh",
        "    __syncthreads();  // all threads must be done before the next tile overwrites the outputs",
        "    //",
    ),
    "filtered: no barrier between the directions": (
        "filtered_lrelu.cuh",
        "        __syncthreads();\n        for (int i = thread; i < S::kOutH * S::kOutW;",
        "        for (int i = thread; i < S::kOutH * S::kOutW;",
    ),
    "filtered: a barrier that some threads miss": (
        "filtered_lrelu.cuh",
        "        if (oy >= p.out_h || ox >= p.out_w) continue;\n        T* at",
        "        if (oy >= p.out_h || ox >= p.out_w) continue;\n        __syncthreads();\n        T* at",
    ),
    "filtered: row bound off by one": (
        "filtered_lrelu.cuh",
        "const bool row_inside = iy >= 0 && iy < p.h;",
        "const bool row_inside = iy >= 0 && iy <= p.h;",
    ),
    "filtered: column bound off by one": (
        "filtered_lrelu.cuh",
        "row_inside && ix + j >= 0 && ix + j < p.w;",
        "row_inside && ix + j >= -1 && ix + j < p.w;",
    ),
    "filtered: pixels not bounded": (
        "filtered_lrelu.cuh",
        "const bool inside = iy >= 0 && iy < p.h && ix >= 0 && ix < p.w;",
        "const bool inside = iy >= 0 && iy < p.h && ix >= 0;",
    ),
    "filtered: a bias in the padding": (
        "filtered_lrelu.cuh",
        "inside ? load(values.v[j]) + shift : 0.0f);",
        "inside ? load(values.v[j]) + shift : shift);",
    ),
    "filtered: bias of another channel": ("filtered_lrelu.cuh", "bias[chunk * V + j]", "bias[j]"),
    "filtered: wrong phase along x": (
        "filtered_lrelu.cuh",
        "if ((r + k) % UP == 0) sums.v[r]",
        "if ((r + k) % UP == UP - 1) sums.v[r]",
    ),
    "filtered: wrong phase along y": (
        "filtered_lrelu.cuh",
        "if ((r + k) % UP == 0) z[r]",
        "if ((r + k) % UP == UP - 1) z[r]",
    ),
    "filtered: wrong phase of a 2-D filter": (
        "filtered_lrelu.cuh",
        "const int kx = (UP - column % UP) % UP;",
        "const int kx = column % UP;",
    ),
    "filtered: the shift of the taps is ignored": ("filtered_lrelu.cu", "p.x1[k + p.shift_x]", "p.x1[k]"),
    "filtered: the shift of 2-D taps is ignored": (
        "filtered_lrelu.cuh",
        "const int ky = i / S::kTaps1 - p.shift_y,",
        "const int ky = i / S::kTaps1,",
    ),
    "filtered: orientation of stage 1": (
        "filtered_lrelu.cu",
        "taps1[p.correlate ? k : p.kw1 - 1 - k]",
        "taps1[!p.correlate ? k : p.kw1 - 1 - k]",
    ),
    "filtered: orientation of stage 2": (
        "filtered_lrelu.cu",
        "taps2[p.correlate ? k : p.kw2 - 1 - k]",
        "taps2[!p.correlate ? k : p.kw2 - 1 - k]",
    ),
    "filtered: orientation of a 2-D filter": (
        "filtered_lrelu.cuh",
        "inside ? p.f2[p.correlate ? k :",
        "inside ? p.f2[!p.correlate ? k :",
    ),
    "filtered: slopes of rows that are no multiple of 4": (
        "filtered_lrelu.cuh",
        "codes >>= 2 * (m - group * 4);",
        "codes >>= 0;",
    ),
    "filtered: slopes of the next rows are not read": (
        "filtered_lrelu.cuh",
        "if (m != group * 4 && group + 1 >= 0",
        "if (m == group * 4 && group + 1 >= 0",
    ),
    "filtered: clamp ignored in the slopes": ("filtered_lrelu.cuh", "y > clamp || y < -clamp ? 2 :", "y > clamp ? 2 :"),
    "filtered: slopes of another plane": (
        "filtered_lrelu.cuh",
        "LAST ? image * p.c + chunk * V + channel : image;",
        "LAST ? image * p.c + channel : image;",
    ),
    "filtered: the last slopes are not recorded": (
        "filtered_lrelu.cuh",
        "const int own_y = tile_y + 1 == p.tiles_y ? p.mid_h : (oy0 + S::kOutH) * DOWN;",
        "const int own_y = (oy0 + S::kOutH - 1) * DOWN;",
    ),
    "filtered: slopes recorded behind the end": (
        "filtered_lrelu.cuh",
        "? p.mid_h : (oy0 + S::kOutH) * DOWN;",
        "? p.mid_h + 4 : (oy0 + S::kOutH) * DOWN;",
    ),
    "filtered: second row of a pair": (
        "filtered_lrelu.cuh",
        "second += p.y2[q >= DOWN ? q - DOWN : 0] * v",
        "second += p.y2[q] * v",
    ),
    "filtered: tile one input short": (
        "filtered_lrelu.cuh",
        "kInW = (kMidW + kTaps1 - 2) / UP + 1,",
        "kInW = (kMidW + kTaps1 - 2) / UP - 1,",
    ),
    "filtered: outputs not bounded": ("filtered_lrelu.cuh", "if (ox + j < p.out_w) at[j]", "at[j]"),
    "filtered: packs where rows do not fit": (
        "filtered_lrelu.cu",
        "p.packed_out = p.out_w % V == 0 &&",
        "p.packed_out =",
    ),
    "filtered: channels that are not whole packs": ("filtered_lrelu.cu", "(p.c % kFull<T> == 0 && aligned", "(aligned"),
    "filtered: general kernel, no bound": ("filtered_lrelu.cuh", "kx < p.kw1 && ix < p.w;", "kx < p.kw1;"),
    "filtered: general kernel, orientation": (
        "filtered_lrelu.cuh",
        "sum += p.separable2 ? A(p.f2[p.correlate ? ky",
        "sum += p.separable2 ? A(p.f2[!p.correlate ? ky",
    ),
    "filtered: general kernel, no barrier": (
        "filtered_lrelu.cuh",
        "    __syncthreads();\n    for (int i = threadIdx.x; i < p.tile * p.tile;",
        "    for (int i = threadIdx.x; i < p.tile * p.tile;",
    ),
    "filtered: general kernel, tiles too large": (
        "filtered_lrelu.cu",
        "while (p.tile < 32 && (2",
        "while (p.tile < 32 || (2",
    ),
    "bias_act: values in packs that are not aligned": (
        "bias_act.cu",
        "if (p.columns % V == 0 && aligned(p.x)",
        "if (p.columns % V == 0 && aligned(p.out)",
    ),
    "backward: sums over two rows": (BACKWARD, "if (lanes < blockDim.x) value", "if (lanes <= blockDim.x) value"),
    "backward: a warp is left out": (BACKWARD, "warp < warps; warp++", "warp + 1 < warps; warp++"),
    "backward: no barrier before sums of rows": (
        BACKWARD,
        "  __syncthreads();\n  const int warps",
        "  const int warps",
    ),
    "backward: no barrier before sums of columns": (
        BACKWARD,
        "  __syncthreads();\n#pragma unroll 1\n  for (int column",
        "  for (int column",
    ),
    "backward: no barrier after sums of columns": (BACKWARD, "  __syncthreads();  // all threads must be done", "  //"),
    "backward: a shuffle that some threads miss": (
        BACKWARD,
        "if (along) add_over_row(row_sums, row_of_tile",
        "if (along && row < p.rows) add_over_row(row_sums, row_of_tile",
    ),
    "backward: columns not bounded": (BACKWARD, "column < width && column < columns", "column < width"),
    "backward: rows of a tile not bounded": (
        BACKWARD,
        "const int rows = p.rows - first_row < tile_rows ? p.rows - first_row : tile_rows;",
        "const int rows = tile_rows;",
    ),
    "backward: no bound": (BACKWARD, "if (row < p.rows && column < p.columns) {", "if (column < p.columns) {"),
    "backward: dx not scaled": (BACKWARD, "store(&dx.v[i], dz * by)", "store(&dx.v[i], dz)"),
    "backward: products of the wrong values": (
        BACKWARD,
        "product += dz * value;\n        column_s",
        "product += dz * by;\n        column_s",
    ),
    "backward: products of columns": (BACKWARD, "column_products[i] += dz * value", "column_products[i] += dz"),
    "backward: noise of another sample": (BACKWARD, "noise ? noise + n * p.noise_stride : nullptr", "noise"),
    "backward: a step of one thread": (BACKWARD, "column += blockDim.x * N;", "column += N;"),
    "backward: sums not reset": (BACKWARD, "    sum = product = 0;\n", ""),
    "sums of tiles: no barrier": (BACKWARD, "    __syncthreads();\n    if (lane >= half)", "    if (lane >= half)"),
    "sums of tiles: no bound": (BACKWARD, "if (lane == 0 && i < job.count)", "if (lane == 0)"),
    "sums of tiles: a tile twice": (BACKWARD, "int64_t part = lane; part", "int64_t part = lane / 2; part"),
    "sums of tiles: samples left out": ("bias_act_backward.cu", "over_pixels * q.n, q.c)", "over_pixels, q.c)"),
    "backward: the last tile is missing": (
        "bias_act_backward.cu",
        "divided = blocks(divided, t.steps);",
        "divided = std::max<int64_t>(1, divided / t.steps);",
    ),
    "backward: more rows than places": (
        "bias_act_backward.cu",
        "std::min(kMostSteps, kRowSums / (t.y * std::max(1, t.x / kWarp)))",
        "kMostSteps",
    ),
    "backward: packs that are not aligned": (
        "bias_act_backward.cu",
        "if (p.columns % V == 0 && aligned(p.x) && aligned(p.g) && aligned(p.out) &&",
        "if (p.columns % V == 0 &&",
    ),
}


def test_the_real_kernels_have_no_faults(shim):
    assert find_fault(shim) == ""


@pytest.fixture(scope="module")
def real_objects(tmp_path_factory) -> dict[str, Path]:
    """Return the object files of the real kernels, which are linked with a mutated one."""
    folder = tmp_path_factory.mktemp("real_objects")
    return {name: compile_unit(recipes.kernels_folder(), name, folder, "-O0") for name in UNITS}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_detected(tmp_path, real_objects, name):
    file, old, new = MUTANTS[name]
    folder = tmp_path / "kernels"
    shutil.copytree(recipes.kernels_folder(), folder, ignore=shutil.ignore_patterns("prebuilt"))
    source = folder / "cuda" / file
    text = source.read_text()
    assert text.count(old) == 1, f"{text.count(old)} places to mutate"
    source.write_text(text.replace(old, new))
    mutated = file.partition(".")[0]
    objects = real_objects | {mutated: compile_unit(folder, mutated, tmp_path, "-O0")}
    link(tmp_path / "shim.so", list(objects.values()))
    fault = faults_in_separate_process(tmp_path, mutated)
    print(f"{name:42} {fault}")
    assert fault
    assert not fault.startswith("error")  # an error of this test: the kernel did not run


def faults_in_separate_process(folder: Path, mutated: str) -> str:
    """Run `find_fault` in a separate process, because a mutated kernel may crash."""
    script = folder / "apart.py"
    code = f"import sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r}); import shimmed; "
    code += f"lib = shimmed.load_library(Path(sys.argv[1])); print('FAULT', shimmed.find_fault(lib, ({mutated!r},)))"
    script.write_text(code)
    process = harness.start([str(folder / "shim.so")], script=script)
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        return f"crash, exit code {process.returncode}" if process.returncode < 0 else f"error: {output[-300:]}"
    return output.partition("FAULT")[2].strip()
