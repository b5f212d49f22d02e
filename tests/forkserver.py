"""Starting the command line in separate processes without imports: they are forked from a server that has imported
it.

Importing PyTorch and what is around it takes several times as long as a tiny run, and hundreds of tests start one. What
such a process is given is its own: arguments, environment, folder, output and session; signals and exit codes are those
of any process. Tests of what happens while it starts, or of how it was started, take `harness.start(..., fresh=True)`.

As a program, this file is the server. It gets one message for each process, on the socket that is its standard input: a
JSON object, with the file descriptors of standard output, standard error and a socket that is for this process alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from stylegan_pg.errors import UsageError

IMPORTED = (
    "stylegan_pg.__main__",
    "stylegan_pg.cli.app",
    "stylegan_pg.training.trainer",
    "stylegan_pg.planning.advice",
    "stylegan_pg.data.loader.loader",
    "stylegan_pg.metrics.command",
    "stylegan_pg.inference.sampling",
    "accelerate",
    "accelerate.utils",
    "numpy.random",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "psutil",
)
OF_DEEPSPEED = ("deepspeed", "torch._dynamo", "torch._functorch.aot_autograd", "torch.ao.quantization", "networkx")
# Libraries read these variables when they are imported, so there is a server for each set of values.
AT_IMPORT = ("OMP_", "MKL_", "OPENBLAS_", "KMP_", "TORCH", "DS_", "CUDA_VISIBLE")
AT_START = ("LD_", "PYTHON", "MALLOC", "LC_", "LANG")  # variables that the dynamic loader and the interpreter read
ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # a constant of prctl
LONGEST = 1 << 20  # bytes of one message


class Process:
    """The subset of subprocess.Popen that tests use, for a process of the server."""

    def __init__(self, args: Sequence[str], kept: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None):
        self.args, self.stdin, self.stdout, self.stderr = args, None, stdout, stderr
        self.returncode: int | None = None
        self._kept, self._lock = kept, threading.Lock()
        self.pid = int(self._word())

    def _word(self) -> str:
        """Return the next line that the server has sent for this process."""
        word = b""
        while not word.endswith(b"\n"):
            more = self._kept.recv(1)
            if not more:
                raise RuntimeError("the server of processes has ended")
            word += more
        return word.decode()

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None and select.select([self._kept], [], [], 0)[0]:
                self.returncode = int(self._word())
                self._kept.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0 and self.poll() is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            select.select([self._kept], [], [], left)
            self.poll()
        return self.returncode

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[Any, Any]:
        end = None if timeout is None else time.monotonic() + timeout
        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        if not hasattr(self, "_read"):
            self._read = {id(s): ["", threading.Thread(target=self._all_of, args=[s], daemon=True)] for s in streams}
            for _, thread in self._read.values():
                thread.start()
        for _, thread in self._read.values():
            thread.join(None if end is None else max(end - time.monotonic(), 0))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if end is None else max(end - time.monotonic(), 0))
        return tuple(None if s is None else self._read[id(s)][0] for s in (self.stdout, self.stderr))  # type: ignore

    def _all_of(self, stream: IO[str]) -> None:
        self._read[id(stream)][0] = stream.read()
        stream.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


@functools.lru_cache(maxsize=3)
def _server(pid: int, at_import: frozenset[tuple[str, str]]) -> socket.socket:
    """Return the server of this process for these variables. It ends with this process, or when it is no longer
    referenced."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(AT_IMPORT)} | dict(at_import)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    how = {"stdin": its, "stdout": subprocess.DEVNULL, "env": env | {"PYTHONUNBUFFERED": "1"}, "cwd": ROOT}
    subprocess.Popen([sys.executable, __file__], **how)
    its.close()
    return ours


def _server_for(env: Mapping[str, str]) -> socket.socket:
    return _server(os.getpid(), frozenset((k, v) for k, v in env.items() if k.startswith(AT_IMPORT)))


def can_start(env: Mapping[str, str], **popen: Any) -> bool:
    """Return whether the server can start a process with this environment and these arguments of Popen."""
    mine = os.environ | {"PYTHONUNBUFFERED": "1"}
    names = [name for name in {*env, *mine} if name.startswith(AT_START)]
    known = {"stdout", "stderr", "text", "cwd", "start_new_session"}
    return popen.keys() <= known and all(env.get(name) == mine.get(name) for name in names)


def start(
    args: Sequence[str],
    env: Mapping[str, str],
    *,
    ranks: int = 0,
    script: str = "",
    stdout: Any = None,
    stderr: Any = None,
    text: bool = False,
    cwd: str | os.PathLike | None = None,
    start_new_session: bool = False,
) -> Process:
    """As Popen of the command line, or of a Python program `script`; with `ranks`, of a process that starts so many of
    them and waits, as torchrun does."""
    pipes: list[IO | None] = []
    given: list[int] = []
    with contextlib.ExitStack() as stack:
        for place, where in ((1, stdout), (2, stderr)):
            ours, its = _stream(where, place, given, text)
            pipes.append(ours)
            given.append(its)
            if where in (subprocess.PIPE, subprocess.DEVNULL):
                stack.callback(os.close, its)
        kept, its = socket.socketpair()
        message = {
            "args": list(args),
            "env": dict(env),
            "cwd": os.fspath(cwd or os.getcwd()),
            "session": start_new_session,
            "ranks": ranks,
            "script": script,
        }
        socket.send_fds(_server_for(env), [json.dumps(message).encode()], [*given, its.fileno()])
        its.close()
    return Process(args, kept, *pipes)


def _stream(where: Any, place: int, given: list[int], text: bool) -> tuple[IO | None, int]:
    """Return the reading end of a stream if it is a pipe, and the file descriptor for the process."""
    if where == subprocess.PIPE:
        reading, writing = os.pipe()
        return (open(reading, encoding=None) if text else open(reading, "rb")), writing
    if where == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    if where == subprocess.STDOUT:
        return None, given[0]
    return None, place if where is None else where if isinstance(where, int) else where.fileno()


def serve() -> None:
    """Fork a process for each message, until the client ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    for name in OF_DEEPSPEED if "DS_ACCELERATOR" in os.environ else ():
        importlib.import_module(name)
    with contextlib.suppress(SystemExit, UsageError):  # typer imports modules at its first use
        sys.modules["stylegan_pg.cli.app"].app(["train", "nowhere.yaml"])
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as messages:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        while True:
            data, fds, *_ = socket.recv_fds(messages, LONGEST, 3)
            if not data:
                return
            if os.fork() == 0:
                messages.close()
                _attend(json.loads(data), fds)
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _attend(message: dict[str, Any], fds: list[int]) -> None:
    """Fork the process, and report its number, and at its end its exit code in the form of Popen."""
    tell = fds.pop()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        _become(message, fds)
    for fd in fds:
        os.close(fd)
    with contextlib.suppress(OSError):  # the client has ended
        os.write(tell, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(tell, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(message: dict[str, Any], fds: list[int]) -> None:
    """Run as the requested process, and end in the same way."""
    if message["session"]:
        os.setsid()
    for number, fd in enumerate(fds, 1):
        os.dup2(fd, number)
    for fd in {*fds} - {1, 2}:
        os.close(fd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        errors = "strict" if number == 1 else "backslashreplace"
        stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), errors=errors, write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.chdir(message["cwd"])
    for name in {*os.environ} - {*message["env"]}:
        del os.environ[name]
    os.environ.update(message["env"])
    main = sys.modules["__main__"] = sys.modules[
        "stylegan_pg.__main__"
    ]  # the same state as after `python -m stylegan_pg`
    script = message["script"]
    sys.argv = [script or str(main.__file__), *message["args"]]
    if message["ranks"]:
        _launch(message["ranks"])
    code = 1
    try:
        if script:
            sys.path.insert(0, os.path.dirname(script))
            runpy.run_path(script, run_name="__main__")
        else:
            main.run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _launch(ranks: int) -> None:
    """Continue as each of the ranks. The parent process ends with 0 if all ranks do; otherwise it ends the other ranks
    and ends with 1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(
        WORLD_SIZE=f"{ranks}", LOCAL_WORLD_SIZE=f"{ranks}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}"
    )
    left: set[int] = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank survives if this process is killed
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            return
        left.add(pid)
    signal.signal(signal.SIGTERM, lambda *_: _end(left) or os._exit(1))
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            _end(left)
            os._exit(1)
    os._exit(0)


def _end(pids: set[int]) -> None:
    """End processes as torchrun does: by a request, and by force if that has no effect."""
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + seconds
        while pids and time.monotonic() < end:
            with contextlib.suppress(ChildProcessError):
                pids.discard(os.waitpid(-1, os.WNOHANG)[0])
            time.sleep(0.02)


if __name__ == "__main__":
    serve()
