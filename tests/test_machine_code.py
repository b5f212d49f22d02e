"""What nvcc makes of the CUDA kernels, for A100, H100 and B200: every instantiation without local memory or spills, and
without atomic operations, whose order would change sums; small enough for three quarters of a multiprocessor's threads
(the backward pass, which holds sums, for fewer); the fast paths with 128-bit accesses and few instructions.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from stylegan_pg.ops import recipes

ARCHITECTURES = ("80", "90", "100")
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor, on all three architectures
SHARED = {"80": 164 << 10, "90": 228 << 10, "100": 228 << 10}
BLOCK = {
    "upfirdn2d_any": 256,
    "upfirdn2d_planes": 128,
    "upfirdn2d_pixels": 128,
    "bias_act_kernel": 256,
    "bias_act_backward_kernel": 256,
    "bias_act_sums": 256,
    "filtered_lrelu_tiles": 256,
    "filtered_lrelu_any": 256,
}


def tool(name: str) -> str | None:
    """Return the path of a CUDA binary tool, from the toolkit or from triton."""
    spec = find_spec("triton")
    beside = [
        str(Path(p) / "backends" / "nvidia" / "bin" / name) for p in (spec and spec.submodule_search_locations) or ()
    ]
    return next(filter(None, map(shutil.which, [name, *beside])), None)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(recipes.nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.skipif(tool("cuobjdump") is None or tool("nvdisasm") is None, reason="no cuobjdump and nvdisasm"),
]


@dataclass
class Kernel:
    name: str  # upfirdn2d_planes, ...
    arguments: tuple[str, ...]  # template arguments
    registers: int
    stack: int
    shared: int
    local: int
    code: list[tuple[int, bool, str, str]]  # address, whether under a condition, operation, operands

    def count(self, operation: str, *parts: str) -> int:
        return sum(
            op.split(".")[0] == operation and all(p in op.split(".") for p in parts) for _, _, op, _ in self.code
        )

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>"


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory) -> tuple[str, list[Kernel]]:
    """All kernels, as compiled for one architecture with the flags of the build."""
    folder, found = tmp_path_factory.mktemp("cubin"), []
    dump = str(tool("cuobjdump"))
    recipe = recipes.cuda_recipe()
    flags = [f for f in recipe.meta["flags"] if not f.startswith("-Xcompiler")]
    for source in recipe.sources:
        cubin = folder / f"{source.stem}.cubin"
        output_of(recipe.compile[0], *flags, f"-arch=sm_{request.param}", "-cubin", "-o", str(cubin), str(source))
        usage = output_of(dump, "-res-usage", str(cubin))
        for mangled, text in re.findall(
            r"Function : (\S+)(.*?)\n\s*\.\.\.\.\.", output_of(dump, "-sass", str(cubin)), re.S
        ):
            readable = output_of("c++filt", mangled).replace("__nv_", "").replace("spg::", "")
            parts = re.fullmatch(r"(?:void )?(\w+)<(.*)>\(.*\)", readable.strip())
            assert parts, f"not a template's instantiation: {readable}"
            name, arguments = parts.groups()
            numbers = re.search(rf"Function {mangled}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
            assert numbers, f"no resource usage of {name}"
            lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", text)
            code = [(int(a, 16), bool(p), op, rest) for a, p, op, rest in lines if op != "NOP"]
            registers, stack, shared, local = map(int, numbers.groups())
            found.append(Kernel(name, tuple(arguments.split(", ")), registers, stack, shared, local, code))
    return request.param, found


def test_all_instantiations_exist(kernels):
    """There are 6 kernels in several formats, so the following tests cannot miss one."""
    _, found = kernels
    counts = {name: sum(k.name == name for k in found) for name in BLOCK}
    # any: 4 formats. planes: 3 formats, 3 operations, with packs and without. pixels: 3 formats, 3 operations.
    # bias_act: 4 formats and 2 layouts, each straight (value and slope, with packs and without) and curved (3 orders).
    # backward: 4 formats and 2 layouts, for the bias alone or all gradients, each straight (with packs and without) and
    # curved. sums: 2 formats. filtered_lrelu: tiles in 3 formats, 3 pairs of factors and 2 layouts; any in 4 formats.
    assert counts == {
        "upfirdn2d_any": 4,
        "upfirdn2d_planes": 18,
        "upfirdn2d_pixels": 9,
        "bias_act_kernel": 56,
        "bias_act_backward_kernel": 48,
        "bias_act_sums": 2,
        "filtered_lrelu_tiles": 18,
        "filtered_lrelu_any": 4,
    }


def test_no_local_memory_and_no_spills(kernels):
    for kernel in kernels[1]:
        used = (kernel.stack, kernel.local, kernel.count("LDL"), kernel.count("STL"))
        assert used == (0, 0, 0, 0), f"{kernel}: stack, local, loads, stores {used}"


def test_there_are_no_atomic_operations(kernels):
    for kernel in kernels[1]:
        assert not any(kernel.count(operation) for operation in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG")), str(kernel)


def share_of_threads(kernel: Kernel) -> float:
    """Return the share of a multiprocessor's threads for which there must be registers and shared memory."""
    if kernel.name.startswith("filtered_lrelu"):
        # It keeps whole tiles in shared memory, and several values of each thread in registers, so that arithmetic
        # limits its speed. For it, fewer threads suffice to hide the latency of memory.
        return 0.375
    if kernel.name != "bias_act_backward_kernel":
        return 0.75
    number, _, columns, *all_sums_in_channels_last = kernel.arguments
    if columns == "8" and all_sums_in_channels_last == ["true", "true"]:
        return 0.375
    return 0.5 if columns != "1" or number == "double" else 0.75


def test_enough_threads_fit(kernels):
    architecture, found = kernels
    for kernel in found:
        threads = BLOCK[kernel.name]
        by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * threads)
        by_shared = SHARED[architecture] // (kernel.shared + 1024) if kernel.shared else 32
        blocks = min(by_registers, by_shared, THREADS // threads)
        occupancy, wanted = blocks * threads / THREADS, share_of_threads(kernel)
        assert occupancy >= wanted, f"{kernel}: {kernel.registers} registers, {kernel.shared} bytes shared: {occupancy}"


def fast(found: list[Kernel]) -> list[Kernel]:
    """Return the kernels that access whole packs."""
    planes = [k for k in found if k.name == "upfirdn2d_planes" and k.arguments[3] == "true"]
    straight = [
        k for k in found if k.name == "bias_act_kernel" and k.arguments[1] == "Straight" and k.arguments[3] != "1"
    ]
    return [*planes, *(k for k in found if k.name == "upfirdn2d_pixels"), *straight, *fast_backward(found)]


def fast_backward(found: list[Kernel]) -> list[Kernel]:
    return [k for k in found if k.name == "bias_act_backward_kernel" and k.arguments[2] != "1"]


def test_fast_paths_use_128_bit_accesses(kernels):
    """This holds for all stores except those of sums, and for all loads except a bias, scale or noise value that a
    thread's pack shares."""
    chosen = fast(kernels[1])
    assert len(chosen) == 9 + 9 + 16 + 16
    for kernel in chosen:
        loads, wide = kernel.count("LDG"), kernel.count("LDG", "128")
        if kernel.name == "bias_act_backward_kernel":
            assert kernel.count("STG", "128") == 1, str(kernel)
            shared_by_pack = 1 if kernel.arguments[3] == "true" else 2
        else:
            assert kernel.count("STG") == kernel.count("STG", "128") > 0, str(kernel)
            shared_by_pack = 0 if kernel.name != "bias_act_kernel" else 1 if kernel.arguments[4] == "true" else 2
        assert wide > 0, str(kernel)
        assert loads - wide == shared_by_pack, f"{kernel}: {loads - wide} narrow loads"


def test_filtered_lrelu_reads_and_writes_packs(kernels):
    """Whole packs of images are loaded and stored with 128 bits. Other accesses are to biases, 2-D filters, slopes, and
    rows that are not whole packs."""
    tiles = [k for k in kernels[1] if k.name == "filtered_lrelu_tiles"]
    assert len(tiles) == 18
    for kernel in tiles:
        last = kernel.arguments[3] == "true"
        assert kernel.count("LDG", "128") >= 1, str(kernel)
        assert kernel.count("STG", "128") >= 1, str(kernel)
        narrow = [op for _, _, op, _ in kernel.code if op.split(".")[0] == "STG" and "128" not in op.split(".")]
        assert not last or all("U8" in op.split(".") for op in narrow), f"{kernel}: {narrow}"


def test_the_filters_of_filtered_lrelu_are_constants(kernels):
    """The taps of separable filters are operands of multiplications, at known places in constant memory, and need no
    loads."""
    for kernel in kernels[1]:
        if kernel.name == "filtered_lrelu_tiles":
            up, down = int(kernel.arguments[1]), int(kernel.arguments[2])
            products = [rest for _, _, op, rest in kernel.code if op.split(".")[0] in ("FFMA", "FMUL")]
            separable = 2 * 4 * 7 + 2 * 6 * down + 6 * down  # in both directions of both stages
            assert len(products) >= separable, f"{kernel} ({up}): {len(products)} products"


def instructions(kernel: Kernel, trips: int = 1) -> int:
    """Return the number of instructions of a thread on the longest path from the first instruction to an EXIT that
    follows only forward branches, so that loops count once. The shortest loop counts `trips` times."""
    index = {address: i for i, (address, *_) in enumerate(kernel.code)}
    longest, loops = [0] * (len(kernel.code) + 1), []
    for i in reversed(range(len(kernel.code))):
        _, condition, op, operands = kernel.code[i]
        base, after = op.split(".")[0], [i + 1]
        if base == "CALL":  # a call of common code, which does not return
            to = index.get(int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16), len(kernel.code))
            after = [i + 1, *([to] if to > i else [])]
        elif base == "BRA":
            (target,) = re.findall(r"0x([0-9a-f]+)", operands)[-1:]
            to = index.get(int(target, 16), len(kernel.code))
            unconditional = not condition and not re.search(r"U?P\d", operands)
            after = ([] if unconditional else [i + 1]) + ([to] if to > i else [])
            loops += [i + 1 - to] if to < i else []
        elif base in ("EXIT", "RET"):
            after = [i + 1] if condition else []
        longest[i] = 1 + max((longest[j] for j in after), default=0)
    return longest[0] + (trips - 1) * min(loops, default=0)


def instructions_of_a_step(kernel: Kernel) -> int:
    """Return the number of instructions of the loop with the 128-bit loads, on all its paths together."""
    index, found = {address: i for i, (address, *_) in enumerate(kernel.code)}, []
    for i, (address, _, op, operands) in enumerate(kernel.code):
        target = int((re.findall(r"0x([0-9a-f]+)", operands) or ["0"])[-1], 16)
        if op.split(".")[0] == "BRA" and target < address:
            body = kernel.code[index[target] : i + 1]
            if sum(op.startswith("LDG") and "128" in op for _, _, op, _ in body) >= 2:
                found.append(len(body))
    assert len(found) == 1, f"{kernel}: {len(found)} loops with loads of packs"
    return found[0]


# Half precision on sm_80, instructions per output: published kernels (2-byte loads) take about 73, 213, 113 and 56-99,
# a prototype with 16-byte loads 38, 135 and 58.
LIMITS = {"2, 1": 38, "1, 2": 135, "1, 1": 58}


def test_instructions_per_output(kernels, record_property):
    architecture, found = kernels
    if architecture != "80":
        pytest.skip("the anchors are of sm_80")
    for kernel in fast(found):
        if kernel.arguments[0] != "__half":
            continue
        if kernel.name == "bias_act_kernel":
            per_output, limit = instructions(kernel) / 8, 56
        elif kernel.name == "bias_act_backward_kernel":
            per_output, limit = instructions_of_a_step(kernel) / 8, 40
        else:
            operation = ", ".join(kernel.arguments[1:3])
            up, down = int(kernel.arguments[1]), int(kernel.arguments[2])
            # planes: the loop that fills the tile, if any, has 5 iterations. pixels: 4 / up rows of the filter.
            planes = kernel.name == "upfirdn2d_planes"
            rounds = (5 if down == 2 else 1) if planes else 4 // up
            per_output = instructions(kernel, rounds) / (8 if down == 2 or not planes else 16)
            limit = LIMITS[operation] if planes else 113
        print(f"{kernel!s:50} {per_output:6.1f} instructions per output, limit {limit}")
        assert per_output < limit, f"{kernel}: {per_output}"
