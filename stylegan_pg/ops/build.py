"""Finding or compiling the kernels: a prebuilt library is preferred, then a cached one, then the compiler is run.

A library has a plain C interface and is loaded with ctypes. It lies in a folder of its own with `meta.json`, which
records its sources, compiler and flags, and its checksum. It is built in a temporary folder and moved into place
atomically, so a killed build leaves nothing that looks complete. Builds on one machine exclude each other by a lock
that the system releases when its owner dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylegan_pg.errors import UsageError
from stylegan_pg.files import cache_folder
from stylegan_pg.ops.recipes import RECIPES, BuildError, Recipe, kernels_folder
from stylegan_pg.untrusted import read_json

LIBRARY = "kernels.so"
LOCK_TIMEOUT = 300.0  # seconds to wait for another builder; then build without the lock, which is safe but double work
BUILD_TIMEOUT = 1800.0


@dataclass(frozen=True)
class Built:
    library: ctypes.CDLL
    path: Path
    origin: str  # prebuilt, cached or compiled


# --------------------------------------------------------------------------------------------------- find and build


def load(kind: str) -> Built:
    """Find or compile the library of `kind` (a key of RECIPES).

    Raises:
        BuildError: with cause, log and remedy.
    """
    recipe = RECIPES[kind]()
    found = find(recipe)
    if found:
        return found
    cache = _cache()
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


def _cache() -> Path:
    try:
        return cache_folder()
    except PermissionError as error:
        raise BuildError(str(error), "", "the kernels are compiled anew once there is such a folder") from None


def find(recipe: Recipe) -> Built | None:
    """An existing library: a prebuilt one ($STYLEGAN_PG_PREBUILT, kernels/prebuilt), or one in the cache."""
    prebuilt = [Path(p) for p in [os.environ.get("STYLEGAN_PG_PREBUILT", "")] if p] + [kernels_folder() / "prebuilt"]
    for folder in prebuilt:
        for candidate in _alike(folder, recipe):
            built = _open(candidate, "prebuilt")
            if built:
                return built
    cache = _cache()
    built = _open(cache / _name(recipe), "cached")
    if built is None and recipe.problem:  # the library was built when there was a compiler
        built = next(filter(None, (_open(c, "cached") for c in _alike(cache, recipe))), None)
    return built


def _name(recipe: Recipe) -> str:
    digest = hashlib.blake2b(json.dumps(recipe.meta, sort_keys=True).encode(), digest_size=12).hexdigest()
    return f"{recipe.meta['kind']}-{digest}"


def _alike(folder: Path, recipe: Recipe) -> Iterator[Path]:
    """Folders of libraries with the same sources and flags, by any compiler, for at least the same GPUs."""
    wanted = {k: v for k, v in recipe.meta.items() if k not in ("compiler", "architectures")}
    for meta_file in sorted(folder.glob(f"{recipe.meta['kind']}-*/meta.json")):
        meta = _read_meta(meta_file.parent)
        if meta and all(meta.get(k) == v for k, v in wanted.items()):
            targets = meta.get("architectures", [])
            if isinstance(targets, list) and set(recipe.meta.get("architectures", [])) <= set(map(str, targets)):
                yield meta_file.parent


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = read_json(folder / "meta.json", "build the kernels again")
    except (OSError, UsageError):
        return None
    return meta if isinstance(meta, dict) else None


def _open(folder: Path, origin: str) -> Built | None:
    """The library in a folder if its checksum is right, as loading a damaged one could crash."""
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
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # another user's file, or a file system without locks
            file = stack.enter_context(open(path, "w"))
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.1)
        yield


def _compile(recipe: Recipe, target: Path) -> None:
    """Run ninja in a temporary folder and move that to `target`; after a failure only the log remains, beside it."""
    kind, log = recipe.meta["kind"], target.with_name(f"{target.name}.log")
    if recipe.problem:
        raise BuildError(recipe.problem[0], "", recipe.problem[1])
    ninja = _ninja()
    if ninja is None:
        raise BuildError("ninja is missing", "", "pip install ninja")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=target.parent))
    except OSError as error:
        raise _unwritable(target.parent, error) from None
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
        if target.exists():  # damaged, or built by a process that did not wait for the lock any longer
            shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # if another process was faster, its library is equivalent
            temporary.rename(target)
    except OSError as error:
        raise _unwritable(target.parent, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> BuildError:
    return BuildError(f"{folder} cannot be written: {error}", "", "set STYLEGAN_PG_CACHE")


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


REMEDIES = {  # part of the compiler's output -> what to do
    "No space left": "make room, or set STYLEGAN_PG_CACHE to a folder on another disk",
    "unsupported GNU version": "set CXX to an older g++ that this CUDA toolkit supports",
    "unsupported clang version": "set CXX to an older compiler that this CUDA toolkit supports",
    "Unsupported gpu architecture": "install a newer CUDA toolkit, or set TORCH_CUDA_ARCH_LIST",
    "cuda_": "install the whole CUDA toolkit (the headers are missing), or set CUDA_HOME to one",
    "unrecognized command": "install a newer compiler (g++ 9 or clang++ 10), or set CXX",
    "unknown argument": "install a newer compiler (g++ 9 or clang++ 10), or set CXX",
    "fatal error": "install the missing header's package (for the C++ library: apt install g++)",
}


def _remedy(output: str) -> str:
    """The remedy for a failed build, from the compiler's output."""
    complaints = "\n".join(line for line in output.splitlines() if "error" in line.lower() or "No space" in line)
    otherwise = "read the log; STYLEGAN_PG_KERNELS=reference runs without kernels"
    return next((remedy for sign, remedy in REMEDIES.items() if sign in complaints), otherwise)
