"""Requests to stop from outside: signals, the launch script's file, and the end of the launcher.

Until training begins, each of them ends the process immediately, also while it imports libraries or waits for other
ranks. From then on the trainer checks for them after each step.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from stylegan_pg.distributed import launcher
from stylegan_pg.errors import TO_BE_CONTINUED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
LOOK_SEC = 1.0  # seconds between checks whether the parent is alive
LEAVE_SEC = 30.0  # seconds for which a step, or a wait of a rank, may continue after the launcher's death


class _Requests:
    """The requests to this process. A thread listens, as Python's signal handlers do not run while the main thread is
    in a library's code."""

    def __init__(self):
        self.listens = self.asked = False
        self.before: dict[int, Any] = {}  # the handlers that were there, where they are to be put back
        self.reason = ""  # where it was no signal
        self.training = False
        self.give_up: Callable[[], None] = lambda: None
        self.is_writing: Callable[[], bool] = lambda: False

    def listen(self) -> None:
        self.listens = True
        detached = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as nohup has it
        self.ancestors = lineage() if launcher.is_launched(detached) else []
        self.wake, wakes = os.pipe()
        os.set_blocking(wakes, False)
        signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        # Or a signal to a process that is forked from this one, such as a reading worker, would seem to be to this one.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        for number in SIGNALS:
            if number != signal.SIGHUP or not detached:
                signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="stopping", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # where they had to wait for this

    def _on_signal(self, *_: Any) -> None:
        self.asked = True  # nothing but flags: a signal may come at any moment, also within a write
        self.give_up()

    def _watch(self) -> None:
        while self.listens:
            ready, _, _ = select.select([self.wake], [], [], LOOK_SEC)
            came = os.read(self.wake, 64) if ready else b""
            if {*came} & {*SIGNALS} and not self.training:
                self._leave("stopped before training began")
            if self.ancestors and lineage() != self.ancestors:
                gone = f"the process that started this one ({self.ancestors[0]}), or one that had started it, is gone"
                if not self.training:
                    self._leave(gone)
                self.reason, self.asked = gone, True
                self.give_up()
                end = time.monotonic() + LEAVE_SEC
                while time.monotonic() < end or self.is_writing():
                    time.sleep(0.1)
                self._leave(f"{gone}, and the step has not ended for {LEAVE_SEC:g} s since")

    def _leave(self, why: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"{why}; to continue, run the same command again", file=sys.stderr, flush=True)
        os._exit(launcher.leave(TO_BE_CONTINUED))


_requests = _Requests()


def listen() -> None:
    """Start to listen. It must be called by the main thread, before anything else."""
    _requests.listen()


def begin(give_up: Callable[[], None], is_writing: Callable[[], bool]) -> None:
    """Declare that training begins: from now on a request makes `asked` true instead of ending the process. It must be
    called by the main thread.

    Args:
        give_up: called at a request, to end the waits of this process; it must be safe in a signal handler.
        is_writing: whether a checkpoint is being written; a process whose launcher has ended waits for that.
    """
    _requests.give_up, _requests.is_writing, _requests.training = give_up, is_writing, True
    if not _requests.listens:  # `train` was called from Python: see `end`
        _requests.before = {number: signal.getsignal(number) for number in SIGNALS}
        _requests.listen()
    if _requests.asked:
        give_up()


def end() -> None:
    """Training has ended. Where `begin` was the first to listen, signals mean what they did before."""
    if _requests.before:
        signal.set_wakeup_fd(-1)
        for number, handler in _requests.before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _requests.listens = _requests.asked = _requests.training = False
        _requests.reason, _requests.before, _requests.ancestors = "", {}, []


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _requests.asked or launcher.asked_to_stop()


def reason() -> str:
    """The reason of a request that did not come by a signal or the launch script; else ""."""
    return _requests.reason


def lineage(env: Mapping[str, str] = os.environ) -> list[int]:
    """The process ids from this process's parent up to the outermost launch script, all of which must stay alive; only
    the parent if no launch script is among the ancestors."""
    scripts = env.get(launcher.SCRIPTS, "").split()
    pids = [os.getppid()]
    if scripts:
        import psutil

        with contextlib.suppress(psutil.Error, OSError):
            while pids[-1] > 1:
                pids.append(psutil.Process(pids[-1]).ppid())
    last = max((i for i, pid in enumerate(pids) if str(pid) in scripts), default=0)
    return pids[: last + 1]


def be_worker() -> None:
    """Set up a process started by the multiprocessing module: it ignores Ctrl-C, which its parent handles, and ends
    within seconds of its parent. (Workers keep each other's pipes open, so a closed pipe does not show that the parent
    is gone.)"""
    import multiprocessing  # later than the first signal may come

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def look() -> None:
        while parent and os.getppid() == parent.pid:
            time.sleep(LOOK_SEC)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()
