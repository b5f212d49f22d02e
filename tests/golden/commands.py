"""Run commands of the package as a user would, without importing it, many of them for the price of one start.

python tests/golden/commands.py < LIST

LIST is a JSON list of [arguments, folder, output]; each command runs in its folder, what it prints goes to the file
`output`, and the exit codes are printed as a JSON list. A command runs in a copy of this process, which has imported
PyTorch already and executes the package as `python -m` does.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

# This is set before PyTorch is imported, because with other vector instructions, float32 draws differ slightly.
os.environ |= {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"}

PACKAGE = "stylegan_pg"
# Large libraries that the commands import.
LIBRARIES = ("torch", "torch._dynamo", "accelerate", "omegaconf", "typer", "matplotlib.figure", "torchvision")
SECONDS = 900  # the time limit of one command; DeepSpeed compiles a helper at its first run


class CommandError(Exception):
    """A command failed. The message contains its output."""


def import_libraries() -> None:
    """Import the libraries that the forked copies of this process would otherwise import themselves."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is deleted at the end. Unlike tempfile.TemporaryDirectory, it is not deleted by forked copies of
    this process, which run the interpreter's exit handlers."""
    folder = Path(tempfile.mkdtemp()).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def forked(arguments: Sequence[str], folder: Path, output: Path) -> int:
    """Run `python -m stylegan_pg` with these arguments in a forked copy of this process. Return the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.chdir(folder)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.argv = [PACKAGE, *arguments]
        runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def started(arguments: Sequence[str], folder: Path, output: Path, ranks: int = 0) -> int:
    """Run `python -m stylegan_pg` in a new interpreter, or in `ranks` interpreters under torchrun. Return the exit
    code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    command = [sys.executable, *launcher, "-m", PACKAGE, *arguments]
    with output.open("a") as file:
        return subprocess.run(command, cwd=folder, stdout=file, stderr=file, timeout=SECONDS).returncode


def call(arguments: Sequence[str], folder: Path, output: Path, *, fresh: bool = False, ranks: int = 0) -> None:
    """Run one command. Raises CommandError if it fails."""
    how = partial(started, ranks=ranks) if fresh or ranks else forked
    if code := how(arguments, folder, output):
        raise CommandError(f"{PACKAGE} {' '.join(arguments)}: exit code {code}\n{output.read_text()[-4000:]}")


if __name__ == "__main__":
    import_libraries()
    print(json.dumps([forked(arguments, Path(folder), Path(out)) for arguments, folder, out in json.load(sys.stdin)]))
