"""Parts of the explorer by themselves: the worker's order, growing logs, names of sources, allowed hosts."""

from __future__ import annotations

import json
import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path

import pytest
from exploring import a_run
from snapshots import saved

from stylegan_pg.errors import UsageError
from stylegan_pg.explorer import library as library_module
from stylegan_pg.explorer.command import bound, url_of
from stylegan_pg.explorer.film import Film, frame_count
from stylegan_pg.explorer.guard import Guard, allowed_names, host_name
from stylegan_pg.explorer.library import Library
from stylegan_pg.explorer.progress import POINTS, Progress, Tail
from stylegan_pg.explorer.worker import BusyError, SupersededError, Worker


class Held:
    """A worker that is busy until `release`."""

    def __init__(self) -> None:
        self.worker, self.begun, self.may_end = Worker(), threading.Event(), threading.Event()
        self.first = self.worker.ask("busy", self._wait)
        assert self.begun.wait(10)

    def _wait(self) -> str:
        self.begun.set()
        self.may_end.wait(10)
        return "free"


def test_the_newest_request_of_a_key_wins():
    held, order = Held(), []
    a1 = held.worker.ask("a", lambda: order.append("a1"))
    b = held.worker.ask("b", lambda: order.append("b"))
    a2 = held.worker.ask("a", lambda: order.append("a2"))
    with pytest.raises(SupersededError):
        a1.result(1)
    held.may_end.set()
    a2.result(10)
    b.result(10)
    assert order == ["a2", "b"]
    assert held.first.result() == "free"
    held.worker.close()


def test_a_request_learns_that_a_newer_one_waits():
    held = Held()
    assert not held.worker.outdated()
    held.worker.ask("other", lambda: 1)
    assert not held.worker.outdated()
    newer = held.worker.ask("busy", lambda: held.worker.outdated())
    assert held.worker.outdated()
    held.may_end.set()
    assert newer.result(10) is False
    held.worker.close()
    assert held.worker.outdated()


def test_a_fault_is_the_answer_and_the_worker_goes_on():
    worker = Worker()
    with pytest.raises(ZeroDivisionError):
        worker.ask("a", lambda: 1 // 0).result(10)
    assert worker.ask("a", lambda: 1).result(10) == 1
    worker.close()
    with pytest.raises(BusyError):
        worker.ask("a", lambda: 1)


def test_too_many_requests_are_refused_and_a_close_ends_those_that_wait():
    held = Held()
    waiting = [held.worker.ask(f"{i}", lambda: 1) for i in range(256)]
    with pytest.raises(BusyError):
        held.worker.ask("one more", lambda: 1)
    newer = held.worker.ask("255", lambda: 2)  # takes the place of another one
    threading.Timer(0.2, held.may_end.set).start()
    held.worker.close()
    for future in (waiting[0], newer):
        with pytest.raises(CancelledError):
            future.result(1)


def test_pictures_come_between_the_steps_of_videos():
    """Steps of long work alternate with requests, and both come to their end."""
    held, order, done = Held(), [], Future()

    def work(name):
        for i in range(3):
            order.append(f"{name}{i}")
            yield
        if name == "y":
            done.set_result(None)

    def broken():
        yield
        raise ValueError("a fault of one task")

    held.worker.steps(broken())
    held.worker.steps(work("x"))
    held.worker.steps(work("y"))
    picture = held.worker.ask("picture", lambda: order.append("picture"))
    held.may_end.set()
    picture.result(10)
    done.result(10)
    assert [name for name in order if name != "picture"] == ["x0", "y0", "x1", "y1", "x2", "y2"]
    assert order.index("picture") <= 1  # a step that had waited for long may have come first
    held.worker.close()


def row(nimg: int, **numbers: object) -> str:
    return json.dumps({"nimg": nimg, **numbers}) + "\n"


def test_logs_are_read_as_they_grow(tmp_path):
    path = tmp_path / "stats.jsonl"
    tail = Tail(path)
    tail.read()
    assert (tail.curves(), tail.version) == ({}, "")
    path.write_text(row(1000, loss=1.5, phase="8x8") + row(2000, loss=2)[:-5])
    tail.read()
    before = tail.version
    assert tail.curves() == {"loss": [[1.0, 1.5]]}  # without the incomplete line
    with open(path, "a") as file:
        file.write(row(2000, loss=2)[-5:] + row(3000, loss=3))
    tail.read()
    assert tail.curves() == {"loss": [[1.0, 1.5], [2.0, 2.0], [3.0, 3.0]]}
    assert tail.version != before
    replaced = tmp_path / "new"  # by a run that continues from a checkpoint
    replaced.write_text(row(1000, loss=1.5) + row(2000, loss=7) + row(2500, loss=7) + row(3500, loss=7))
    replaced.replace(path)
    tail.read()
    assert tail.curves()["loss"] == [[1.0, 1.5], [2.0, 7.0], [2.5, 7.0], [3.5, 7.0]]
    path.unlink()
    tail.read()
    assert tail.curves() == {}


def test_logs_with_anything_in_them(tmp_path, monkeypatch):
    path = tmp_path / "stats.jsonl"
    bad = [
        "\xff\x00",
        "[]",
        "{}",
        "3",
        '{"nimg": true, "loss": 1}',
        '{"nimg": -1, "loss": 1}',
        '{"nimg": 1e9, "loss": 1}',
    ]
    bad += ["[" * 100_000, row(1, loss="x", a=None, b=[1], c=True, d=1e300), '{"nimg": 1, "loss": NaN}']
    bad += [json.dumps({"nimg": 1, "x" * 101: 1.0})]
    path.write_text("\n".join(bad) + "\n" + row(5000, loss=1.0))
    tail = Tail(path)
    tail.read()
    assert tail.curves() == {"loss": [[5.0, 1.0]]}
    monkeypatch.setattr("stylegan_pg.explorer.progress.CHUNK", 64)
    path.write_text("y" * 1000 + "\n" + row(5000, loss=1.0) + "z" * 500 + "\n" + row(6000, loss=2.0))
    tail = Tail(path)
    tail.read()
    assert tail.curves() == {"loss": [[5.0, 1.0], [6.0, 2.0]]}


def test_long_curves_are_thinned_to_means(tmp_path):
    path = tmp_path / "stats.jsonl"
    path.write_text("".join(row(1000 * i, loss=i % 2) for i in range(10 * POINTS)))
    tail = Tail(path)
    tail.read()
    points = tail.curves()["loss"]
    assert len(points) == POINTS
    assert points[0] == [4.5, 0.5]


def test_a_run_whose_files_are_damaged_is_described_all_the_same(tmp_path):
    run = a_run(tmp_path, 1)
    (run / "status.json").write_text("{")
    library = Library([run], "cpu")
    assert Progress(library.sources[0]).read()["status"]["nimg"] == 19500
    (run / "config.yaml").write_text("resolution: none\n")
    found = Progress(library.sources[0]).read()
    assert found["status"]["state"] == "unknown"
    assert "resolution" in found["status"]["problem"]
    assert found["curves"]["loss_g"]


def test_sources_get_short_names_that_differ(tmp_path):
    paths = [a_run(tmp_path / name, 1) for name in ("a", "b")]
    _, file = saved(tmp_path / "faces.safetensors")
    assert [s.name for s in Library([*paths, file], "cpu").sources] == ["a/run", "b/run", "faces"]
    assert next(s.name for s in Library([file, file], "cpu").sources).endswith("faces (1)")
    assert [s.name for s in Library([paths[0] / "snapshots"], "cpu").sources] == ["snapshots"]
    with pytest.raises(UsageError, match="neither a snapshot nor a run"):
        Library([tmp_path], "cpu")


def test_generators_leave_when_the_memory_is_full(tmp_path, monkeypatch):
    run = a_run(tmp_path, 3)
    library = Library([run], "cpu")
    names = [s.name for s in library.sources[0].snapshots()]
    first = library.faces(0, names[0])
    assert library.faces(0, names[0]) is first
    size = sum(t.numel() * t.element_size() for t in first.G.state_dict().values())
    monkeypatch.setattr(library_module, "MOST_BYTES", 2 * size)
    second = library.faces(0, names[1])
    assert library.faces(0, names[0]) is first
    library.faces(0, names[2])
    assert library.faces(0, names[0]) is first
    assert library.faces(0, names[1]) is not second  # the one that was not used for the longest time has left


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:80", "localhost"),
        ("LocalHost", "localhost"),
        ("a.example.", "a.example"),
        ("[::1]:80", "::1"),
        ("[::1]", "::1"),
        ("127.0.0.1:x", None),
        ("[::1", None),
        ("[::1]80", None),
        (":80", None),
        ("", None),
    ],
)
def test_host_headers(header, name):
    assert host_name(header) == name


def test_names_of_a_server_that_others_may_reach():
    private = Guard(lambda *_: None, *allowed_names("127.0.0.1", ["Proxy.example"]))  # type: ignore[arg-type, return-value]
    public = Guard(lambda *_: None, *allowed_names("0.0.0.0"))  # type: ignore[arg-type, return-value]
    named = Guard(lambda *_: None, *allowed_names("machine.example"))  # type: ignore[arg-type, return-value]
    assert private.allows("proxy.example:443")
    assert not private.allows("10.1.2.3")
    assert public.allows("10.1.2.3:8765")  # a numeric address is no name that somebody else could redirect
    assert public.allows("localhost:8765")
    assert not public.allows("evil.example")
    assert named.allows("machine.example:1")


def test_ports(monkeypatch):
    monkeypatch.setattr("stylegan_pg.explorer.command.TRIED_PORTS", 1)
    with bound("127.0.0.1", None) as first, bound("127.0.0.1", None) as second:
        assert url_of(first) != url_of(second)
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is in use"):
            bound("127.0.0.1", port)


def test_lengths_of_films():
    faces = (None, None, None)
    for how, count in (
        ({"loop": True}, 180),
        ({"loop": False}, 121),
        ({"seconds": 0.1, "fps": 1}, 3),
        ({"kind": "training", "seconds": 5.0}, 150),
    ):
        assert frame_count(Film(faces, **how)) == count  # type: ignore[arg-type]


def test_the_page_names_no_other_place():
    folder = Path(library_module.__file__).parent / "page"
    for path in folder.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, path
        assert "https:" not in text, path
        assert "innerHTML" not in text, path
