"""Helpers for the tests that build kernels: a fast compiler, and programs that use a cache of their own."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import harness

# A program that runs both operators on numbers with exact results, and prints the implementation that was used.
PROBE = """
import torch
from stylegan_pg.ops import bias_act, native, setup_filter, upfirdn2d
x = torch.arange(32.0).reshape(1, 2, 4, 4)
y = upfirdn2d(x, setup_filter([1, 1]), down=2)
assert torch.equal(y[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]])), y
assert bias_act(x, torch.ones(2), act="relu", gain=1.0)[0, 1, 3, 3] == 32
choice = native.choose("cpu")
print(choice.name, choice.built.origin if choice.built else "-", choice.built.path if choice.built else "-")
"""

# A compiler without optimisation, which takes a tenth of the time. It caches its outputs by the command line, which is
# the same for all builders, because they use relative names in folders of their own. COMPILER_SLEEPS slows it down, so
# that a test can kill a builder or start a second one meanwhile.
MEMOIZED = """#!/bin/sh
out=
for word in "$@"; do
    [ "$before" = -o ] && out=$word
    before=$word
done
[ -z "$out" ] && exec {cxx} "$@"
sleep "${{COMPILER_SLEEPS:-0}}"
cached={folder}/$(printf '%s\\n' "$@" | cksum | tr ' ' -)
[ -f "$cached" ] && exec cp "$cached" "$out"
{cxx} "$@" -O0 || exit
cp "$out" "$cached.$$" && mv "$cached.$$" "$cached"
"""


def environment(cache: Path, **changes: str) -> dict[str, str]:
    own = {"STYLEGAN_PG_CACHE": str(cache), "STYLEGAN_PG_KERNELS": "auto", "STYLEGAN_PG_PREBUILT": ""}
    return harness.environment() | own | changes


def probe(cache: Path, *, code: int = 0, **changes: str) -> tuple[list[str], str]:
    """Run PROBE with this cache. Return the printed words and the error output."""
    done = program(PROBE, environment(cache, **changes))
    assert done.returncode == code, done.stderr
    return done.stdout.split(), done.stderr


def program(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a separate process, and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "program.py"
        script.write_text(code)
        return harness.command(script=script, env=env)


def library_in(cache: Path) -> Path:
    (found,) = cache.glob("cpu-*/kernels.so")
    return found


def copy_of(cache: Path, to: Path) -> Path:
    shutil.copytree(cache, to)
    return to


def without_tools(folder: Path, *tools: str) -> str:
    """Return a PATH with the given tools only, and therefore without a compiler."""
    folder.mkdir()
    for name in tools:
        (folder / name).symlink_to(str(shutil.which(name)))
    return str(folder)
