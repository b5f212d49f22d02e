"""Servers for the tests, as real processes: one for HTTP that can be told to misbehave, and moto's for S3.

Run as a script it is the HTTP server: `serving.py ROOT PORT LOG FAULTS`. Of every request it writes a line of JSON to
LOG, and FAULTS (a JSON file, read at each request) says what goes wrong: `status` answers with that, `truncate` sends
only that many bytes, `rate` limits bytes per second, `garble` flips a bit in the middle, `swap` sends another body;
`match` restricts it to paths that contain a text, `times` to that many requests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """An HTTP server for a folder; `kill` and `start` again keep its address and its log."""

    def __init__(self, root: Path, books: Path, **faults: Any):
        books.mkdir(parents=True, exist_ok=True)
        self.root, self.port = root, free_port()
        self.log, self.faults = books / "requests.jsonl", books / "faults.json"
        self.process: subprocess.Popen[bytes] | None = None
        self.misbehave(**faults)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        args = [str(self.root), str(self.port), str(self.log), str(self.faults)]
        self.process = subprocess.Popen([sys.executable, "-S", __file__, *args])
        end = time.time() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert time.time() < end, "the server does not start"
            time.sleep(0.02)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def misbehave(self, **faults: Any) -> None:
        temporary = self.faults.with_suffix(".tmp")
        temporary.write_text(json.dumps(faults))
        os.replace(temporary, self.faults)

    def requests(self, match: str = ".tar", method: str = "GET") -> list[dict[str, Any]]:
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if match in line["path"] and line["method"] == method]


@contextlib.contextmanager
def http(root: Path, books: Path, **faults: Any) -> Iterator[Server]:
    server = Server(root, books, **faults)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def s3() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Yield the endpoint of an S3 server that accepts any credentials, and its process."""
    port = free_port()
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint, end = f"http://127.0.0.1:{port}", time.time() + 60
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{endpoint}/moto-api/data.json", timeout=5).close()
                break
            assert process.poll() is None, "moto's server ended"
            assert time.time() < end, "moto's server does not start"
            time.sleep(0.1)
        yield endpoint, process
    finally:
        process.kill()
        process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root, log, faults = Path(), Path(), Path()
    used: dict[str, int] = {}
    lock = threading.Lock()

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def note(self, **facts: Any) -> None:
        line = {"method": self.command, "path": self.path, "range": self.headers.get("Range"), **facts}
        with self.lock, open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def fault(self) -> dict[str, Any]:
        text = self.faults.read_text()
        fault = json.loads(text)
        if fault.get("match", "") not in self.path:
            return {}
        with self.lock:
            self.used[text] = self.used.get(text, 0) + 1
            return fault if self.used[text] <= fault.get("times", 1 << 60) else {}

    def answer(self, body: bool) -> None:
        fault = self.fault()
        path = self.root / self.path.split("?")[0].lstrip("/")
        status = fault.get("status") or (200 if path.is_file() else 404)
        if status != 200:
            self.note(status=status)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = bytearray(path.read_bytes())
        if "garble" in fault:
            data[len(data) // 2] ^= 1
        if "swap" in fault:
            data = bytearray(fault["swap"].encode())
        size, first, last = len(data), 0, len(data)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span and not fault.get("no_ranges"):
            status, first = 206, int(span[1])
            last = min(int(span[2]) + 1, size) if span[2] else size
            if first >= size:
                self.note(status=416)
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        part = bytes(data[first:last])
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last - 1}/{size}")
        self.end_headers()
        part = part[: fault["truncate"]] if "truncate" in fault else part
        self.note(status=status)  # it is logged before the client can continue
        sent = 0
        with contextlib.suppress(ConnectionError):
            step = max(fault["rate"] // 20, 1) if "rate" in fault else len(part)
            while body and sent < len(part):
                sent += self.wfile.write(part[sent : sent + step])
                if "rate" in fault:
                    time.sleep(0.05)
        if "truncate" in fault:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


if __name__ == "__main__":
    _Handler.root, _Handler.log, _Handler.faults = Path(sys.argv[1]), Path(sys.argv[3]), Path(sys.argv[4])
    ThreadingHTTPServer.allow_reuse_address = True
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), _Handler).serve_forever()
