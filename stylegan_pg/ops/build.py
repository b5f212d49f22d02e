"""Finding or compiling the kernels. A prebuilt library is preferred, then a cached one; otherwise the compiler runs.

A library has a plain C interface and is loaded with ctypes. Each library has its own folder with a file `meta.json`,
which records the sources, the compiler, the flags and a checksum. A library is built in a temporary folder, which is
then renamed atomically, so a killed build leaves no incomplete library. A file lock prevents concurrent builds on one
machine; the system releases it when its owner dies.
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
LOCK_TIMEOUT = 300.0  # seconds to wait for another builder; afterwards this process builds as well, which is safe
BUILD_TIMEOUT = 1800.0  # seconds


@dataclass(frozen=True)
class Built:
    """A loaded library of kernels, its path, and its origin: "prebuilt", "cached" or "compiled"."""

    library: ctypes.CDLL
    path: Path
    origin: str


# --------------------------------------------------------------------------------------------------- find and build


def load(kind: str) -> Built:
    """Find or compile the library for `kind`, a key of RECIPES.

    Raises:
        BuildError: if it cannot be built. The error has a cause, a log and a remedy.
    """
    recipe = RECIPES[kind]()
    found = find(recipe)
    if found:
        return found
    cache = _cache_folder()
    target = cache / _folder_name(recipe)
    with _lock(cache / f"{target.name}.lock"):
        found = _load_folder(target, "cached")  # another process may have built it while this one waited
        if found:
            return found
        _compile(recipe, target)
    found = _load_folder(target, "compiled")
    if found is None:
        raise BuildError(f"{target} cannot be loaded although it was just built", str(target / "build.log"), "retry")
    return found


def _cache_folder() -> Path:
    try:
        return cache_folder()
    except PermissionError as error:
        raise BuildError(str(error), "", "the kernels are compiled once this folder exists") from None


def find(recipe: Recipe) -> Built | None:
    """Return an existing library: a prebuilt one ($STYLEGAN_PG_PREBUILT, kernels/prebuilt) or a cached one, or None."""
    prebuilt = [Path(p) for p in [os.environ.get("STYLEGAN_PG_PREBUILT", "")] if p] + [kernels_folder() / "prebuilt"]
    for folder in prebuilt:
        for candidate in _compatible_folders(folder, recipe):
            built = _load_folder(candidate, "prebuilt")
            if built:
                return built
    cache = _cache_folder()
    built = _load_folder(cache / _folder_name(recipe), "cached")
    if built is None and recipe.problem:  # the cached library may have been built by a compiler that is now missing
        built = next(filter(None, (_load_folder(c, "cached") for c in _compatible_folders(cache, recipe))), None)
    return built


def _folder_name(recipe: Recipe) -> str:
    digest = hashlib.blake2b(json.dumps(recipe.meta, sort_keys=True).encode(), digest_size=12).hexdigest()
    return f"{recipe.meta['kind']}-{digest}"


def _compatible_folders(folder: Path, recipe: Recipe) -> Iterator[Path]:
    """Yield folders of libraries with the same sources and flags, built by any compiler, for at least the same GPU
    architectures."""
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


def _load_folder(folder: Path, origin: str) -> Built | None:
    """Load the library in a folder. Return None if its checksum is wrong, because loading a damaged library could crash
    the process."""
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
        with contextlib.suppress(OSError):  # the file may belong to another user, or the file system has no locks
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
    """Run ninja in a temporary folder and rename the folder to `target`. After a failure only the log remains; it is
    written beside `target`."""
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
            output, code = f"the build did not finish within {BUILD_TIMEOUT} s", 1
        except OSError as error:
            output, code = f"{ninja}: {error}", 1
        if code:
            log.write_text(output, "utf-8")
            reason = next((line.strip() for line in output.splitlines() if "error" in line.lower()), "see the log")
            raise BuildError(f"compiling the {kind} kernels failed: {reason[:300]}", str(log), _remedy(output))
        checksum = hashlib.blake2b((temporary / LIBRARY).read_bytes()).hexdigest()
        (temporary / "build.log").write_text(output, "utf-8")
        (temporary / "meta.json").write_text(json.dumps(recipe.meta | {"checksum": checksum}, indent=1), "utf-8")
        if _load_folder(temporary, "compiled") is None:
            raise BuildError(f"the {kind} kernels were built but cannot be loaded", "", "check CXX and its libraries")
        if target.exists():  # it is damaged, or was built by a process that no longer waited for the lock
            shutil.rmtree(target, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have been faster; its library is equivalent
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
    "No space left": "free disk space, or set STYLEGAN_PG_CACHE to a folder on another disk",
    "unsupported GNU version": "set CXX to an older g++ that this CUDA toolkit supports",
    "unsupported clang version": "set CXX to an older compiler that this CUDA toolkit supports",
    "Unsupported gpu architecture": "install a newer CUDA toolkit, or set TORCH_CUDA_ARCH_LIST",
    "cuda_": "install the whole CUDA toolkit (the headers are missing), or set CUDA_HOME to one",
    "unrecognized command": "install a newer compiler (g++ 9 or clang++ 10), or set CXX",
    "unknown argument": "install a newer compiler (g++ 9 or clang++ 10), or set CXX",
    "fatal error": "install the missing header's package (for the C++ library: apt install g++)",
}


def _remedy(output: str) -> str:
    """Return the remedy for a failed build, given the compiler's output."""
    complaints = "\n".join(line for line in output.splitlines() if "error" in line.lower() or "No space" in line)
    otherwise = "read the log; STYLEGAN_PG_KERNELS=reference runs without kernels"
    return next((remedy for sign, remedy in REMEDIES.items() if sign in complaints), otherwise)
