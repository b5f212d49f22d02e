"""`python -m stylegan_pg`, and the console script: the command line, and what its faults look like."""

from __future__ import annotations

import signal
import sys

if sys.argv[1:2] == ["train"]:  # requests to stop wait until there is somebody to heed them (stopping.py)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP})

import atexit
import contextlib
import ctypes
import errno
import io
import os
import threading

from stylegan_pg import processors
from stylegan_pg.distributed import launcher, stopping
from stylegan_pg.errors import DONE, FAULT, USAGE, RunError, UsageError
from stylegan_pg.files import TOO_MANY_OPEN
from stylegan_pg.monitoring import console, logs
from stylegan_pg.untrusted import readable

_BEGIN = processors.snapshot()


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a fault, 2 bad input or usage, 75 stopped, to be continued."""
    code = FAULT  # of a bug, which shows its traceback
    if sys.argv[1:2] == ["train"]:  # which is asked to stop, and goes on without a console
        stopping.listen()
        console.tolerate("stderr", *([] if "--dry-run" in sys.argv else ["stdout"]))  # which a description is for
    else:
        console.tolerate("stderr")
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from stylegan_pg.cli import app

        processors.choose_waiting(_BEGIN)  # while PyTorch is not imported yet
        with logs.to_console():
            app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else DONE if end.code is None else FAULT
    except UsageError as error:
        code = _failed(error, USAGE)
    except RunError as error:
        code = _failed(error, FAULT)
    except MemoryError as error:
        room = str(error) or "nothing was left"
        code = _failed(RunError(f"there is not enough memory for this ({room}): free some, or ask for less"), FAULT)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            code = _failed(RunError(f"{error}: {TOO_MANY_OPEN}"), FAULT)
        elif error.errno == errno.ENOSPC:  # where the output goes
            code = _failed(RunError(f"the output cannot be written: {error}"), FAULT)
        else:
            raise
    finally:
        status = launcher.leave(code)
    sys.exit(status)


def run() -> None:
    """The same as a process's last word."""
    try:
        main()
    except SystemExit as end:
        stays = launcher.is_alone() and _watched()
        if "torch" in sys.modules and isinstance(end.code, int) and not stays:
            _end(end.code)
        raise


def _watched() -> bool:
    """Whether a profiler or the like is here, which tells what it saw in the end, or somebody who goes on asking."""
    monitoring = getattr(sys, "monitoring", None)
    tools = monitoring and any(monitoring.get_tool(i) for i in range(6))
    return bool(sys.getprofile() or sys.gettrace() or tools or sys.flags.inspect or os.environ.get("LD_PRELOAD"))


def _end(status: int) -> None:
    """As sys.exit, without taking the interpreter apart: with PyTorch in it that takes half a second, and threads that
    a process group leaves behind can abort a rank that has done all it had to, and launchers would start all of them
    again."""
    alone = launcher.is_alone()
    if alone:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:  # nobody listens any more
            pass
        except (OSError, ValueError) as error:
            if alone and status == DONE:  # what was asked for is lost
                status = FAULT
                with contextlib.suppress(OSError):  # nowhere to say so either
                    os.write(2, f"error: the output cannot be written: {error}\n".encode())
    with contextlib.suppress(OSError, AttributeError, TypeError):  # a system where C's library is not found like that
        ctypes.CDLL(None).fflush(None)  # what libraries print by themselves
    os._exit(status)


def _failed(error: Exception, code: int) -> int:
    """Show an error's message, whatever the rank, and return the exit code."""
    print(f"error: {readable(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
