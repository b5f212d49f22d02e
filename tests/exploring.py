"""The explorer in a process of its own, and requests to it, for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> str:
        return self.json["error"]


class Site(NamedTuple):
    """The address of a running explorer."""

    port: int
    process: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request as it is; underscores in the names of headers stand for hyphens."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, path: str, **body: Any) -> Answer:
        return self.request(
            "POST", path, json.dumps({"client": "test", **body}).encode(), content_type="application/json"
        )


@contextlib.contextmanager
def explored(*arguments: object) -> Iterator[Site]:
    """Run `stylegan-pg explore` for the block, and check afterwards that it ends on SIGINT without a traceback."""
    process = harness.start(["explore", *map(str, arguments), "--no-open", "--device", "cpu"])
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+:(\d+)/", line)
    if not found:
        raise AssertionError(line + harness.finish(process, 2))
    try:
        yield Site(int(found[1]), process)
    finally:
        process.send_signal(signal.SIGINT)
        output = harness.finish(process, timeout=30)
        assert "Traceback" not in output, output


def a_run(folder: Path, snapshots: int = 3, **how: Any) -> Path:
    """A folder like that of a finished run, with a few snapshots, logs and a grid."""
    from PIL import Image
    from snapshots import built

    from stylegan_pg.checkpoint.snapshot import save_snapshot
    from stylegan_pg.config.loading import load_config
    from stylegan_pg.config.plain import to_yaml

    run = folder / "run"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load_config("demo", [f"run={run}"])))
    for i in range(snapshots):
        G, description = built(**how)
        for name, tensor in G.state_dict().items():
            if "torgb" in name and name.endswith("bias"):
                tensor += 0.3 * i  # so that all differ
        path = run / "snapshots" / f"{4 * (i + 1):06d}kimg.safetensors"
        save_snapshot(path, G, {**description, "nimg": 4000 * (i + 1)})
    if snapshots:
        (run / "snapshots" / "best.safetensors").symlink_to(f"{4:06d}kimg.safetensors")
    rows = [
        {"nimg": 500 * i, "phase": "8x8 stable", "loss_g": 1 / (i + 1), "loss_d": 2.0, "img_per_sec": 9.0}
        for i in range(40)
    ]
    (run / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "metrics.jsonl").write_text('{"nimg": 4000, "seconds": 3.0, "swd": 30.5}\n')
    Image.new("RGB", (64, 64), "teal").save(run / "samples" / "fakes-000004kimg.png")
    Image.new("RGB", (64, 64), "red").save(run / "samples" / "fakes-000012kimg.png")
    Image.new("RGB", (64, 64), "black").save(run / "samples" / "reals-r0064.png")
    return run
