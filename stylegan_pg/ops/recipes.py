"""How the kernels are compiled (compilers, flags, target processors), and the metadata that identifies a library.

The kernels have a plain C interface and need no headers of PyTorch, so a build takes seconds and cannot fail because a
header such as cusparse.h is missing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class BuildError(Exception):
    """An error that occurs if the kernels cannot be built.

    Args:
        cause: The reason.
        log: The path of the compiler's output, or "".
        remedy: What the user can do.
    """

    def __init__(self, cause: str, log: str, remedy: str):
        super().__init__(f"{cause}{f'; log: {log}' if log else ''}; {remedy}")
        self.cause, self.log, self.remedy = cause, log, remedy


def kernels_folder() -> Path:
    """Return the folder of the sources. It is beside the package in a checkout, and inside it in an installation.

    Raises:
        BuildError: if the folder does not exist.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "cpu" / "upfirdn2d.cpp").is_file():
            return folder
    raise BuildError("the kernels' sources are missing", "", "install stylegan_pg again")


@dataclass(frozen=True)
class Recipe:
    """How a library is built.

    Attributes:
        meta: The metadata that identifies the library.
        sources: The source files.
        compile, link: The commands for ninja, with the placeholders $in and $out.
        problem: Why the library cannot be compiled on this machine, and the remedy; None if it can.
    """

    meta: dict[str, Any]
    sources: tuple[Path, ...]
    compile: tuple[str, ...]
    link: tuple[str, ...]
    problem: tuple[str, str] | None = None


def _sources_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _version(*command: str) -> str:
    """Return the output of `command --version`, or "" if the command does not exist or fails."""
    if not command:
        return ""
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def cxx_command() -> tuple[str, ...]:
    """Return the command of the C++ compiler: $CXX, which may include a launcher and options ("ccache g++", "g++
    -m64"), or else the first of c++, g++ and clang++ that exists. The result is empty if there is no compiler."""
    chosen = os.environ.get("CXX")
    if not chosen:
        return tuple(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))[:1]
    with contextlib.suppress(ValueError):  # a quotation mark is missing
        words = [chosen] if shutil.which(chosen) else shlex.split(chosen)
        if words and (program := shutil.which(words[0])):
            return program, *words[1:]
    return ()


def _is_name(word: str) -> bool:
    return not word.startswith("-")


def cxx() -> str | None:
    """Return the path of the C++ compiler itself, without launcher and options."""
    names = list(itertools.takewhile(_is_name, cxx_command()))
    return shutil.which(names[-1]) if names else None


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Return the entries of /proc/cpuinfo for the machine and its first processor. They are empty on systems other than
    Linux."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    return lines


@functools.cache
def processor() -> str:
    """Return a text that identifies the processor, because the result of -march=native depends on it."""
    lines = _cpuinfo()
    named = [lines.get(k, "") for k in ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")]
    return hashlib.blake2b("|".join([platform.machine(), *named]).encode(), digest_size=8).hexdigest()


@functools.cache
def has_bf16_instructions() -> bool:
    """Return whether this processor has instructions for products of bfloat16 numbers, or its features are unknown.
    Without such instructions, PyTorch's convolutions take four times as long in bfloat16 as in float32."""
    features = " ".join(_cpuinfo().get(k, "") for k in ("flags", "Features")).split()
    return not features or any(name in features for name in ("avx512_bf16", "amx_bf16", "bf16"))


def cpu_recipe() -> Recipe:
    """Return the recipe of the CPU kernels, optimised for this processor."""
    folder = kernels_folder()
    lib = Path(torch.__file__).parent / "lib"
    x86 = platform.machine() in ("x86_64", "AMD64")
    # Contraction is off: fused multiply-adds round differently from PyTorch, which can change signs before a leaky
    # ReLU.
    flags = ["-O3", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    flags += ["-march=native", "-mprefer-vector-width=512"] if x86 else ["-mcpu=native"]
    if tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2] if v.isdigit()) < (2, 10):
        include = Path(torch.__file__).parent / "include"
        api = include / "torch" / "csrc" / "api" / "include"
        flags += ["-DSPG_ATEN_PARALLEL", f"-isystem{include}", f"-isystem{api}"]
        flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-fopenmp"]
    compiler = cxx_command()
    options = itertools.dropwhile(_is_name, compiler)  # options in $CXX change the library just as the flags above
    meta = _meta("cpu", folder, ("cpu/*.cpp", "cpu/*.h"), _version(*compiler), [*options, *flags])
    return Recipe(
        meta | {"architecture": processor()},
        tuple(sorted((folder / "cpu").glob("*.cpp"))),
        (*compiler, *flags, "-c", "$in", "-o", "$out"),
        (*compiler, "-shared", "$in", "-o", "$out", f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"),
        _no_cxx(compiler),
    )


def _no_cxx(command: tuple[str, ...]) -> tuple[str, str] | None:
    if _version(*command):
        return None
    wanted = os.environ.get("CXX") or "c++, g++ or clang++"
    return f"no working C++ compiler ({wanted})", "install g++ (apt install g++), or set CXX"


def nvcc() -> str | None:
    """Return the path of the CUDA compiler, or None. It is searched in $CUDA_HOME or $CUDA_PATH if set, otherwise on
    the PATH and in /usr/local/cuda."""
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if chosen:
        return shutil.which(str(Path(chosen) / "bin" / "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def architectures(toolkit: tuple[int, int]) -> list[str]:
    """Return the GPU architectures to compile for: those of $TORCH_CUDA_ARCH_LIST, otherwise those of this machine's
    GPUs, otherwise A100, H100 and (if the toolkit supports it) B200. "9.0" means machine code; "9.0+PTX" adds
    intermediate code that later GPUs can translate.

    Args:
        toolkit: The version of the CUDA toolkit.

    Raises:
        BuildError: if $TORCH_CUDA_ARCH_LIST is invalid.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for entry in given:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {entry!r} is unknown", "", "give numbers, such as 8.0;9.0+PTX")
    if not given and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        given = [f"{major}.{minor}" for major, minor in found]
    elif not given:
        given = ["8.0", "9.0", "10.0+PTX"] if toolkit >= (12, 8) else ["8.0", "9.0+PTX"]
    return sorted({*given, *(entry.removesuffix("+PTX") for entry in given)})


def cuda_recipe() -> Recipe:
    """Return the recipe of the CUDA kernels for the architectures that `architectures` selects.

    Raises:
        BuildError: as `architectures`.
    """
    folder, compiler, host = kernels_folder(), nvcc(), tuple(filter(None, [cxx()]))
    version = _version(*filter(None, [compiler]))
    found = re.search(r"release (\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"]
    targets = architectures(release)
    codes = []
    for entry in targets:
        number = entry.removesuffix("+PTX").replace(".", "")
        kind = "compute" if entry.endswith("+PTX") else "sm"
        codes.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    wanted = torch.version.cuda
    major = (wanted or "").split(".")[0]
    if wanted is None:
        problem = ("this PyTorch was built without CUDA", "install a PyTorch for CUDA")
    elif compiler is None:
        where = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "the PATH or /usr/local/cuda"
        problem = (f"nvcc is missing from {where}", f"install the CUDA toolkit {major}.x, or set CUDA_HOME to it")
    elif not found:
        problem = (f"{compiler} does not run", f"install the CUDA toolkit {major}.x, or set CUDA_HOME to it")
    elif found[1] != major:
        cause = f"{compiler} belongs to CUDA {found[1]}.{found[2]}, PyTorch to CUDA {wanted}"
        problem = (cause, f"set CUDA_HOME to a CUDA toolkit {major}.x, or install a PyTorch for CUDA {found[1]}")
    else:
        problem = _no_cxx(host)
    # The static CUDA runtime shares the device's context with PyTorch's, and loading it requires no other library.
    tool = (compiler or "", f"-ccbin={''.join(host)}")
    return Recipe(
        _meta("cuda", folder, ("cuda/*.cu", "cuda/*.cuh", "cuda/*.h"), f"{version}\n{_version(*host)}", flags)
        | {"architectures": targets},
        tuple(sorted((folder / "cuda").glob("*.cu"))),
        (*tool, *flags, *codes, "-c", "$in", "-o", "$out"),
        (*tool, "-shared", "-cudart=static", "$in", "-o", "$out"),
        problem,
    )


def _meta(kind: str, folder: Path, patterns: tuple[str, ...], compiler: str, flags: list[str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "sources": _sources_hash(folder, patterns),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.implementation.cache_tag,
        "compiler": compiler,
        "flags": flags,
    }


RECIPES = {"cpu": cpu_recipe, "cuda": cuda_recipe}
