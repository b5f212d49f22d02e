"""What `stylegan-pg explore` does: it opens a port, prints its address, and serves the page until Ctrl-C."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from stylegan_pg.checkpoint.snapshot import choose_device
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

FIRST_PORT, TRIED_PORTS = 8765, 20
EXTRA = "the explorer needs starlette and uvicorn: pip install 'stylegan-pg[ui]'"


def bound(host: str, port: int | None) -> socket.socket:
    """A listening socket.

    Args:
        port: 0 for any free one; None for FIRST_PORT or the next free one.

    Raises:
        UsageError: the port is taken or not allowed, or the host is none of this machine's addresses.
    """
    ports = [*range(FIRST_PORT, FIRST_PORT + TRIED_PORTS), 0] if port is None else [port]
    for number in ports:
        try:
            return _listening(host, number)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and number != ports[-1]:
                continue
            raise UsageError(_refusal(host, number, error)) from None
    raise AssertionError("the last port either works or raises")


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
        made.set_inheritable(False)
    except BaseException:
        made.close()
        raise
    return made


def _refusal(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {printable(host)} is in use: give another --port, or none for the next free one"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be opened by this user: give a --port from 1024 to 65535"
    return (
        f"--host {printable(host)} cannot be used ({printable(error)}): give 127.0.0.1, or an address of this machine"
    )


def url_of(listening: socket.socket) -> str:
    """The address of the page."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def has_display() -> bool:
    """Whether a browser with a window can be opened."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def explore(
    paths: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed: Sequence[str] = (),
    open_browser: bool = True,
    device: str = "auto",
    batch: int = 8,
    direction_files: Sequence[Path] = (),
) -> None:
    """Serve the page until the process is told to stop (SIGINT or SIGTERM).

    Args:
        paths: snapshots, and folders of runs.
        host, port: see `bound`.
        allowed: further names under which the server may be addressed, for example behind a proxy.
        open_browser: in this machine's browser, if there is a display.
        batch: images of a video that are made at once.

    Raises:
        UsageError: starlette or uvicorn is not installed; a path, the address or the device cannot be used.
    """
    try:
        import uvicorn

        from stylegan_pg.explorer import guard, server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("uvicorn", "starlette"):
            raise
        raise UsageError(EXTRA) from None
    from stylegan_pg.explorer.library import Library

    for path in direction_files:
        if not path.is_file():
            raise UsageError(f"{printable(path)}: no such file; give a safetensors file of directions")
    library = Library(paths, choose_device(device), direction_files)
    with contextlib.closing(bound(host, port)) as listening:
        explorer = server.Explorer(library, batch)
        app = server.application(explorer, *guard.allowed_names(host, allowed))
        settings = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        print(f"explorer: {url_of(listening)}  (Ctrl-C ends it)", flush=True)
        if open_browser and has_display():
            # In a thread: some browsers' commands do not return before the browser ends.
            threading.Thread(target=webbrowser.open, args=[url_of(listening)], daemon=True).start()
        # uvicorn sends itself the signal that it has stopped for once more, and SIGTERM would end the process at once.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(settings).run(sockets=[listening])
        finally:
            explorer.worker.close()
