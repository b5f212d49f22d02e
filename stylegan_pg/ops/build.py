"""Compile the kernels once and find them again: prebuilt ones first, then the cache, then the compiler.

The kernels have a plain C interface and need no headers of PyTorch, so a build takes seconds and a binary is loaded
with ctypes. A binary lies in a folder of its own together with `meta.json`, which says what it was made of and holds
its checksum. It is built in a temporary folder and moved into place as a whole, so a killed builder leaves nothing that
looks finished; builders on one machine wait for each other with a lock that the system drops when its owner dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LIBRARY = "kernels.so"
LOCK_TIMEOUT = 300.0  # seconds to wait for another builder; then build without the lock, which is safe but double work
BUILD_TIMEOUT = 1800.0


class BuildError(Exception):
    """Why there are no kernels, where the compiler's output is (or ""), and what to do about it."""

    def __init__(self, cause: str, log: str, remedy: str):
        super().__init__(f"{cause}{f'; log: {log}' if log else ''}; {remedy}")
        self.cause, self.log, self.remedy = cause, log, remedy


@dataclass(frozen=True)
class Built:
    library: ctypes.CDLL
    path: Path
    origin: str  # prebuilt, cached or compiled


def kernels_folder() -> Path:
    """The sources: beside the package in a checkout, inside of it when installed."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "cpu" / "upfirdn2d.cpp").is_file():
            return folder
    raise BuildError("the kernels' sources are missing", "", "install stylegan_pg again")


def cache_folder() -> Path:
    """$STYLEGAN_PG_CACHE, else the user's cache; a private temporary folder where neither can be written."""
    chosen = os.environ.get("STYLEGAN_PG_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in [Path(chosen)] if chosen else [home / "stylegan_pg"]:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder.resolve()
    folder = Path(tempfile.gettempdir()) / f"stylegan_pg-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or folder.is_symlink():
        # Loading a library is running it: never one that somebody else could have put there.
        raise BuildError(f"{folder} could be written by others", "", "set STYLEGAN_PG_CACHE to a folder of your own")
    return folder


# ------------------------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """How one library is made: `meta` identifies it, the commands are ninja's, with $in and $out."""

    meta: dict[str, Any]
    sources: tuple[Path, ...]
    compile: tuple[str, ...]
    link: tuple[str, ...]


def _sources_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _version(program: str) -> str:
    """What `program --version` says, or "" where it does not run."""
    try:
        result = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def cxx() -> str | None:
    """The C++ compiler: $CXX, else the first of c++, g++ and clang++."""
    chosen = os.environ.get("CXX")
    return shutil.which(chosen) if chosen else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@functools.cache
def _cpu() -> str:
    """What -march=native depends on."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    named = [lines.get(k, "") for k in ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")]
    return hashlib.blake2b("|".join([platform.machine(), *named]).encode(), digest_size=8).hexdigest()


def cpu_recipe() -> Recipe:
    """The CPU kernels, for exactly this processor."""
    folder = kernels_folder()
    lib = Path(torch.__file__).parent / "lib"
    x86 = platform.machine() in ("x86_64", "AMD64")
    # No contraction: fused multiply-adds round otherwise than PyTorch does, enough to flip a leaky ReLU here and there.
    flags = ["-O3", "-std=c++17", "-fPIC", "-fopenmp-simd", "-fvisibility=hidden"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    flags += ["-march=native", "-mprefer-vector-width=512"] if x86 else ["-mcpu=native"]
    if tuple(int(v) for v in torch.__version__.split("+")[0].split(".")[:2] if v.isdigit()) < (2, 10):
        include = Path(torch.__file__).parent / "include"
        api = include / "torch" / "csrc" / "api" / "include"
        flags += ["-DSPG_ATEN_PARALLEL", f"-isystem{include}", f"-isystem{api}"]
        flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-fopenmp"]
    compiler = cxx()
    meta = _meta("cpu", _sources_hash(folder, ("cpu/*.cpp", "cpu/*.h")), compiler, flags)
    return Recipe(
        meta | {"architecture": _cpu()},
        tuple(sorted((folder / "cpu").glob("*.cpp"))),
        (compiler or "", *flags, "-c", "$in", "-o", "$out"),
        (compiler or "", "-shared", "$in", "-o", "$out", f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}"),
    )


def _meta(kind: str, sources: str, compiler: str | None, flags: list[str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "sources": sources,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.implementation.cache_tag,
        "compiler": _version(compiler) if compiler else "",
        "flags": flags,
    }


RECIPES = {"cpu": cpu_recipe}

# --------------------------------------------------------------------------------------------------- find and build


def load(kind: str) -> Built:
    """The library of `kind` (a key of RECIPES), compiled if need be.

    Raises:
        BuildError: with cause, log and remedy.
    """
    recipe = RECIPES[kind]()
    found = find(recipe)
    if found:
        return found
    cache = cache_folder()
    target = cache / _name(recipe)
    with _lock(cache / f"{target.name}.lock"):
        found = _open(target, "cached")  # another process may have built it meanwhile
        if found:
            return found
        _compile(recipe, target)
    found = _open(target, "compiled")
    if found is None:
        raise BuildError(f"{target} cannot be loaded although it was just built", str(target / "build.log"), "retry")
    return found


def find(recipe: Recipe) -> Built | None:
    """A finished library: a prebuilt one ($STYLEGAN_PG_PREBUILT, kernels/prebuilt), or one in the cache."""
    prebuilt = [Path(p) for p in [os.environ.get("STYLEGAN_PG_PREBUILT", "")] if p] + [kernels_folder() / "prebuilt"]
    for folder in prebuilt:
        for candidate in _alike(folder, recipe):
            built = _open(candidate, "prebuilt")
            if built:
                return built
    cache = cache_folder()
    built = _open(cache / _name(recipe), "cached")
    if built is None and not recipe.meta["compiler"]:  # made when there was a compiler
        built = next(filter(None, (_open(c, "cached") for c in _alike(cache, recipe))), None)
    return built


def _name(recipe: Recipe) -> str:
    digest = hashlib.blake2b(json.dumps(recipe.meta, sort_keys=True).encode(), digest_size=12).hexdigest()
    return f"{recipe.meta['kind']}-{digest}"


def _alike(folder: Path, recipe: Recipe) -> Iterator[Path]:
    """Folders whose library was made of the same by whatever compiler."""
    for meta_file in sorted(folder.glob(f"{recipe.meta['kind']}-*/meta.json")):
        meta = _read_meta(meta_file.parent)
        if meta and all(meta.get(k) == v for k, v in recipe.meta.items() if k != "compiler"):
            yield meta_file.parent


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def _open(folder: Path, origin: str) -> Built | None:
    """The library in a folder, if it is whole: loading a damaged one could crash."""
    meta, path = _read_meta(folder), folder / LIBRARY
    try:
        if meta is None or hashlib.blake2b(path.read_bytes()).hexdigest() != meta.get("checksum"):
            return None
        return Built(ctypes.CDLL(str(path)), path, origin)
    except OSError:
        return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_TIMEOUT
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield


def _compile(recipe: Recipe, target: Path) -> None:
    """Run ninja in a temporary folder and move it to `target`; on failure only the log stays, beside it."""
    kind, log = recipe.meta["kind"], target.with_name(f"{target.name}.log")
    ninja = _ninja()
    if ninja is None:
        raise BuildError("ninja is missing", "", "pip install ninja")
    if not recipe.meta["compiler"]:
        wanted = os.environ.get("CXX") or "c++, g++ or clang++"
        raise BuildError(f"no working C++ compiler ({wanted})", "", "install g++ (apt install g++), or set CXX")
    temporary = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=target.parent))
    try:
        (temporary / "build.ninja").write_text(_ninja_file(recipe), "utf-8")
        try:
            result = subprocess.run(
                [ninja, "-C", str(temporary)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                timeout=BUILD_TIMEOUT,
            )
            output, code = result.stdout, result.returncode
        except subprocess.TimeoutExpired:
            output, code = f"no end within {BUILD_TIMEOUT} s", 1
        except OSError as error:
            output, code = f"{ninja}: {error}", 1
        if code:
            log.write_text(output, "utf-8")
            reason = next((line.strip() for line in output.splitlines() if "error" in line.lower()), "see the log")
            raise BuildError(f"compiling the {kind} kernels failed: {reason[:300]}", str(log), _remedy(output))
        checksum = hashlib.blake2b((temporary / LIBRARY).read_bytes()).hexdigest()
        (temporary / "build.log").write_text(output, "utf-8")
        (temporary / "meta.json").write_text(json.dumps(recipe.meta | {"checksum": checksum}, indent=1), "utf-8")
        if _open(temporary, "compiled") is None:
            raise BuildError(f"the {kind} kernels were built but cannot be loaded", "", "check CXX and its libraries")
        if target.exists():  # damaged, or made by a builder that had given up waiting for us
            shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # where another got there first, its library is as good
            temporary.rename(target)
    except OSError as error:
        raise BuildError(f"{target.parent} cannot be written: {error}", "", "set STYLEGAN_PG_CACHE") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _ninja() -> str | None:
    with contextlib.suppress(ImportError):
        import ninja

        program = Path(ninja.BIN_DIR) / "ninja"
        if program.is_file():
            return str(program)
    return shutil.which("ninja")


def _ninja_file(recipe: Recipe) -> str:
    def command(words: tuple[str, ...]) -> str:
        return " ".join(w if w in ("$in", "$out") else shlex.quote(w).replace("$", "$$") for w in words)

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    objects = [f"{source.stem}.o" for source in recipe.sources]
    lines = [f"rule compile\n  command = {command(recipe.compile)}", f"rule link\n  command = {command(recipe.link)}"]
    lines += [f"build {o}: compile {path(s)}" for o, s in zip(objects, recipe.sources, strict=True)]
    lines += [f"build {LIBRARY}: link {' '.join(objects)}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def _remedy(output: str) -> str:
    """What to do about a failed build, from what the compiler said."""
    if "No space left" in output:
        return "make room, or set STYLEGAN_PG_CACHE to a folder on another disk"
    if "unrecognized command" in output or "unknown argument" in output or "unsupported" in output:
        return "install a newer compiler (g++ 9 or clang++ 10), or set CXX"
    if "fatal error" in output and ".h" in output:
        return "install the missing header's package (for the C++ library: apt install g++)"
    return "read the log; STYLEGAN_PG_KERNELS=reference runs without kernels"
