"""The entry point of `python -m stylegan_pg` and of the console script. It turns exceptions into messages and exit
codes."""

from __future__ import annotations

import signal
import sys

if sys.argv[1:2] == ["train"]:  # signals stay pending until their handlers are installed (stopping.py)
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
    """Run the command line. Exit codes are 0 (success), 1 (an error), 2 (wrong input or usage) and 75 (training was
    stopped and can be continued)."""
    code = FAULT  # of unexpected exceptions, which show a traceback
    if sys.argv[1:2] == ["train"]:  # training handles requests to stop, and continues without a console
        stopping.listen()
        console.tolerate("stderr", *([] if "--dry-run" in sys.argv else ["stdout"]))  # a dry run is only its output
    else:
        console.tolerate("stderr")
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from stylegan_pg.cli import app

        processors.choose_waiting(_BEGIN)  # before PyTorch is imported
        with logs.to_console():
            app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else DONE if end.code is None else FAULT
    except UsageError as error:
        code = _failed(error, USAGE)
    except RunError as error:
        code = _failed(error, FAULT)
    except MemoryError as error:
        details = str(error) or "nothing was left"
        code = _failed(RunError(f"there is not enough memory for this ({details}): free some, or ask for less"), FAULT)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            code = _failed(RunError(f"{error}: {TOO_MANY_OPEN}"), FAULT)
        elif error.errno == errno.ENOSPC:  # the disk of the output is full
            code = _failed(RunError(f"the output cannot be written: {error}"), FAULT)
        else:
            raise
    finally:
        status = launcher.leave(code)
    sys.exit(status)


def run() -> None:
    """Run the command line and end the process, see `_end`."""
    try:
        main()
    except SystemExit as end:
        stays = launcher.is_alone() and _watched()
        if "torch" in sys.modules and isinstance(end.code, int) and not stays:
            _end(end.code)
        raise


def _watched() -> bool:
    """Return whether a profiler, a debugger or an interactive session needs the interpreter's normal exit."""
    monitoring = getattr(sys, "monitoring", None)
    tools = monitoring and any(monitoring.get_tool(i) for i in range(6))
    return bool(sys.getprofile() or sys.gettrace() or tools or sys.flags.inspect or os.environ.get("LD_PRELOAD"))


def _end(status: int) -> None:
    """Exit like sys.exit, but without finalising the interpreter. With PyTorch, finalisation takes half a second, and
    remaining threads of a process group can abort a rank that has finished, after which launchers would restart all
    ranks."""
    alone = launcher.is_alone()
    if alone:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, like the interpreter
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:  # the reader has closed the pipe
            pass
        except (OSError, ValueError) as error:
            if alone and status == DONE:  # the output is lost
                status = FAULT
                with contextlib.suppress(OSError):  # the message cannot be written either
                    os.write(2, f"error: the output cannot be written: {error}\n".encode())
    with contextlib.suppress(OSError, AttributeError, TypeError):  # systems on which libc is not found like this
        ctypes.CDLL(None).fflush(None)  # output of C libraries
    os._exit(status)


def _failed(error: Exception, code: int) -> int:
    """Print the error's message on every rank, and return the exit code."""
    print(f"error: {readable(error)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
