"""Valid files of every format that is read, made hostile: `python tests/campaigns/hostile.py [FORMAT ...] [--cases N]`.

By default 100,000 cases of each format in hostile_formats.FORMATS. Each case mutates a valid file and reads it as the
program does, in a process that is watched. A case is a fault if it

    ends in anything but a result or one of the package's own errors (a traceback, a signal, a MemoryError),
    takes more than 10 seconds of computing, or a minute in all, or needs more than 2 GiB beyond what it began with,
    starts a program, or opens a file for writing outside its own folder and the user's cache.

Faults are printed with the command that repeats them; the exit code is 1 if there is one. Case N of a format follows
from --seed and N alone. CI runs a small sample (tests/test_hostile.py).
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOM = 2 << 30  # bytes
COMPUTING, WAITING = 10, 60  # seconds
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "os.startfile")


class Guard:
    """Records attempts of this process to start programs or to write files, from the first case on."""

    def __init__(self, base: Path):
        self.base, self.seen, self.armed = os.path.realpath(base), [], False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in PROGRAMS:
            self.seen.append(f"{event} {given[0]!r}")
        if event == "open" and isinstance(given[0], str | bytes | os.PathLike) and (given[2] or 0) & WRITING:
            path = os.path.realpath(os.fsdecode(given[0]))
            if path not in (os.devnull, self.base) and not path.startswith(
                self.base + os.sep
            ):  # O_TMPFILE names a folder
                self.seen.append(f"wrote {path}")


def limit_memory() -> None:
    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + ROOM, data + ROOM))


def run_one(read: Any, allowed: tuple[type[BaseException], ...], name: str, seed: int, n: int, guard: Guard) -> str:
    """Return the outcome of a case: "accepted", "refused", or a description of the fault."""
    from stylegan_pg.untrusted import readable

    folder = Path(guard.base, f"case-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    marker = folder / "marker"
    guard.seen.clear()
    dice, outcome = random.Random(f"{name} {seed} {n}"), "accepted"
    signal.setitimer(signal.ITIMER_PROF, COMPUTING)
    signal.setitimer(signal.ITIMER_REAL, WAITING)
    guard.armed = True
    try:
        read(dice, folder, str(marker))
    except allowed as error:
        outcome = "refused"
        text = readable(error)  # the form in which the command line prints it
        if not text.strip() or text.count("\n") > 20 or len(text) > 10_000:
            outcome = f"a message that nobody can read: {text[:300]!r}"
    except BaseException as error:  # any other exception is a fault, which the campaign looks for
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        outcome = f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
        if os.environ.get("HOSTILE_TRACE"):
            traceback.print_exc()
    finally:
        guard.armed = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if guard.seen:
        outcome = f"it acted: {guard.seen[0]}"
    if marker.exists():
        outcome = "something was run: the marker is there"
    return outcome


def worker(name: str, seed: int, cases: range, base: Path, out: int) -> None:
    """Run cases, and report each before and after, so that the parent knows which case ended this process."""
    import mutations
    from hostile_formats import ALLOWED, FORMATS

    read = FORMATS[name](base)
    mutations.OFF = True
    read(
        random.Random(0), Path(tempfile.mkdtemp(dir=base)), "marker"
    )  # the unmodified file must be accepted; otherwise the cases would prove nothing
    mutations.OFF = False
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    if not os.environ.get("HOSTILE_TRACE"):
        os.dup2(null, 2)
    guard = Guard(base)
    limit_memory()
    for n in cases:
        os.write(out, f"{n} begins\n".encode())
        outcome = run_one(read, ALLOWED, name, seed, n, guard)
        os.write(out, f"{n} {outcome!r}\n".encode())
    os._exit(0)


def campaign(name: str, seed: int, cases: range, base: Path) -> Counter[str]:
    """Run all cases of one share. If a process dies, another one continues with the next case."""
    found: Counter[str] = Counter()
    while len(cases):
        source, out = os.pipe()
        child = os.fork()
        if not child:
            os.close(source)
            try:
                worker(name, seed, cases, base, out)
            except BaseException:
                traceback.print_exc()
            os._exit(70)
        os.close(out)
        current, begun, buffer = None, 0.0, b""
        while True:
            ready, _, _ = select.select([source], [], [], 1.0)
            if not ready:
                if current is not None and time.monotonic() - begun > 2 * WAITING:
                    os.kill(child, signal.SIGKILL)
                continue
            data = os.read(source, 1 << 16)
            if not data:
                break
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                number, _, rest = line.decode().partition(" ")
                if rest == "begins":
                    current, begun = int(number), time.monotonic()
                else:
                    tell(found, name, seed, int(number), rest.strip("'\""))
                    current, cases = None, cases[cases.index(int(number)) + 1 :]
        os.close(source)
        _, status = os.waitpid(child, 0)
        if current is None:
            if status:
                raise SystemExit(f"{name}: the process failed with status {status} outside of a case")
            break
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        reason = {int(signal.SIGPROF): "hangs", int(signal.SIGALRM): "waits"}.get(number, f"died of signal {number}")
        tell(found, name, seed, current, reason)
        cases = cases[cases.index(current) + 1 :]
    return found


def tell(found: Counter[str], name: str, seed: int, n: int, outcome: str) -> None:
    known = outcome if outcome in ("accepted", "refused") else "faults"
    found[known] += 1
    if known == "faults":
        print(f"{name} {n}: {outcome}\n    python {sys.argv[0]} {name} --seed {seed} --only {n}", flush=True)


def main() -> int:
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
    sys.dont_write_bytecode = True
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="this case alone, with its traceback")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        os.environ |= {"TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        tempfile.tempdir = folder
        from hostile_formats import FORMATS, take_kernels

        take_kernels(Path(folder, "cache"))
        unknown = set(given.formats) - FORMATS.keys()
        if unknown:
            parser.error(f"unknown formats {', '.join(unknown)}; known are {', '.join(FORMATS)}")
        if given.only is not None:
            os.environ["HOSTILE_TRACE"] = "1"
        total = 0
        for name in given.formats or FORMATS:
            begin = time.monotonic()
            cases = range(given.cases) if given.only is None else range(given.only, given.only + 1)
            found = campaign(name, given.seed, cases, Path(folder))
            total += found["faults"]
            print(
                f"{name:14} {len(cases)} cases, refused {found['refused']}, accepted {found['accepted']}, "
                f"faults {found['faults']}, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
