"""The explorer's server, as a browser or an attacker sees it: pictures, videos, runs, refusals."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from exploring import Answer, Site, a_run, explored
from PIL import Image
from snapshots import saved

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.inference.generate import images_of, latents


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_run(tmp_path_factory.mktemp("explored"))


@pytest.fixture(scope="module")
def site(run: Path, conditional: tuple[Any, Path]) -> Iterator[Site]:
    with explored(run, conditional[1], "--port", 0) as site:
        yield site


def pixels(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.content
    with Image.open(io.BytesIO(answer.content)) as image:
        assert answer.headers["content-type"] == f"image/{(image.format or '').lower()}"
        return np.asarray(image)


def made(run: Path, name: str, seed: int, **how: Any) -> np.ndarray:
    """The picture that `sample` makes."""
    G = load_snapshot(run / "snapshots" / name)
    (image,) = images_of(G, latents([seed], G.z_dim), **how)
    return image[0].permute(1, 2, 0).numpy()


def test_sources_and_what_is_said_of_them(site: Site):
    about = site.get("/api/sources").json
    assert [source["name"] for source in about["sources"]] == ["run", "G"]
    assert [source["is_run"] for source in about["sources"]] == [True, False]
    listed = about["sources"][0]["snapshots"]
    assert [one["name"] for one in listed] == [f"{k:06d}kimg.safetensors" for k in (4, 8, 12)]
    assert [one["nimg"] for one in listed] == [4000, 8000, 12000]
    assert [one["best"] for one in listed] == [True, False, False]
    assert "/" not in json.dumps(about).replace("\\/", "")  # no path is told


def test_pictures_of_snapshots(site: Site, run: Path):
    found = []
    for name in ("000004kimg.safetensors", "000012kimg.safetensors"):
        answer = site.post("/api/picture", source=0, snapshot=name, face={"place": {"seed": 3}, "psi": 0.7})
        assert np.array_equal(pixels(answer), made(run, name, 3, psi=0.7))
        assert (answer.headers["x-picture"], answer.headers["x-whole"]) == ("16x16", "1")
        found.append(answer.content)
    assert found[0] != found[1]
    preview = site.post("/api/picture", source=0, snapshot=name, face={"place": {"seed": 3}, "psi": 0.7}, preview=True)
    assert preview.headers["content-type"] == "image/jpeg"
    assert np.abs(pixels(preview).astype(int) - made(run, name, 3, psi=0.7)).mean() < 12
    small = site.post("/api/picture", source=0, snapshot=name, size=8)
    assert pixels(small).shape == (8, 8, 3)


def test_generators_and_directions(site: Site):
    facts = site.post("/api/generator", source=1, snapshot="G.safetensors").json
    assert (facts["classes"], facts["c_dim"], facts["width"]) == (["cat", "dog", "owl"], 3, 16)
    directions = site.post("/api/directions", source=1, snapshot="G.safetensors").json["directions"]
    ask: dict[str, Any] = {"source": 1, "snapshot": "G.safetensors"}
    plain = pixels(site.post("/api/picture", **ask))
    for name in (directions[0]["name"], directions[-1]["name"]):
        moved = pixels(site.post("/api/picture", **ask, face={"directions": {name: 4}}))
        assert not np.array_equal(moved, plain)
    classes = [pixels(site.post("/api/picture", **ask, face={"place": {"c": c}})) for c in range(3)]
    assert not np.array_equal(classes[0], classes[1])
    assert site.post("/api/picture", **ask, face={"place": {"c": 3}}).error.startswith("there is no class or example 3")


def test_a_run_is_described(site: Site):
    found = site.get("/api/runs/0").json
    assert found["status"]["nimg"] == 19500
    assert found["curves"]["loss_g"][0] == [0.0, 1.0]
    assert found["metrics"] == {"swd": [[4.0, 30.5]]}
    assert found["grid"] == {"name": "fakes-000012kimg.png", "nimg": 12000}
    grid = site.get("/api/runs/0/grids/fakes-000012kimg.png")
    assert pixels(grid)[0, 0].tolist() == [255, 0, 0]
    again = site.get(f"/api/runs/0?version={found['version']}").json
    assert "curves" not in again
    assert again["status"]["nimg"] == 19500
    assert site.get("/api/runs/1").status == 404  # a snapshot is no run


def film(site: Site, **how: Any) -> Answer:
    snapshot = how.pop("snapshot", "000012kimg.safetensors")
    asked = site.post("/api/films", source=0, snapshot=snapshot, film=how)
    assert asked.status == 202, asked.content
    path = f"/api/films/{asked.json['film']}"
    end = time.monotonic() + 60
    while not (state := site.get(path).json)["ready"]:
        assert not state["problem"], state
        assert time.monotonic() < end
        time.sleep(0.05)
    assert state["done"] == state["frames"]
    answer = site.get(f"{path}/file")
    assert "attachment" in answer.headers["content-disposition"]
    return answer


def frames(answer: Answer) -> tuple[list[np.ndarray], float]:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(io.BytesIO(answer.content)) as file:
        rate = float(file.streams.video[0].average_rate)
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)], rate


FACES = [{"place": {"seed": seed}} for seed in (1, 2, 3)]


def test_a_looping_video(site: Site, run: Path):
    shown, rate = frames(film(site, faces=FACES, seconds=0.5, fps=20, loop=True))
    assert (len(shown), rate, shown[0].shape) == (30, 20.0, (256, 256, 3))
    for k, seed in enumerate((1, 2, 3)):
        expected = made(run, "000012kimg.safetensors", seed).repeat(16, 0).repeat(16, 1)
        assert np.abs(shown[10 * k].astype(int) - expected).mean() < 14  # colours lose half of their resolution
    steps = [np.abs(a.astype(int) - b).mean() for a, b in zip(shown, [*shown[1:], shown[0]], strict=True)]
    assert steps[-1] < np.mean(steps)  # the last frame precedes the first one as smoothly as any other


def test_a_video_that_does_not_loop_ends_at_the_last_face(site: Site, run: Path):
    shown, _ = frames(film(site, faces=FACES[:2], seconds=0.3, fps=10, loop=False))
    assert len(shown) == 4
    expected = made(run, "000012kimg.safetensors", 2).repeat(16, 0).repeat(16, 1)
    assert np.abs(shown[-1].astype(int) - expected).mean() < 14


def test_a_webp_of_the_training(site: Site, run: Path):
    answer = film(site, faces=FACES[:1], seconds=0.6, fps=10, format="webp", kind="training")
    with Image.open(io.BytesIO(answer.content)) as image:
        assert image.format == "WEBP"
        assert getattr(image, "n_frames", 1) == 3  # Pillow joins equal frames: one of each snapshot
        assert image.size == (16, 16)
        first = np.asarray(image.convert("RGB")).astype(int)
    near, far = (np.abs(first - made(run, f"{k:06d}kimg.safetensors", 1)).mean() for k in (4, 12))
    assert near < min(30, 0.7 * far)


def test_a_cancelled_video_is_gone(site: Site):
    asked = site.post(
        "/api/films", source=0, snapshot="000012kimg.safetensors", film={"faces": FACES, "seconds": 19, "fps": 60}
    )
    path = f"/api/films/{asked.json['film']}"
    assert site.get(f"{path}/file").status == 404
    assert site.request("DELETE", path).status == 200
    assert site.get(path).status == 404
    assert site.post("/api/picture", source=0, snapshot="000004kimg.safetensors").status == 200


PICTURE = {"source": 0, "snapshot": "000004kimg.safetensors"}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("picture", {**PICTURE, "source": 7}, 404, "no such source"),
        ("picture", {**PICTURE, "source": -1}, 404, "no such source"),
        ("picture", {**PICTURE, "source": "0"}, 404, "no such source"),
        ("picture", {**PICTURE, "source": True}, 404, "no such source"),
        ("picture", {**PICTURE, "snapshot": "../config.yaml"}, 404, "has no snapshot"),
        ("picture", {**PICTURE, "snapshot": "/etc/passwd"}, 404, "has no snapshot"),
        ("picture", {**PICTURE, "snapshot": "\0"}, 404, "has no snapshot"),
        ("picture", {**PICTURE, "snapshot": 3}, 400, "snapshot is the name"),
        ("picture", {**PICTURE, "face": {"psi": 1e9}}, 400, "psi is"),
        ("picture", {**PICTURE, "face": {"directions": {"absent": 1}}}, 400, "no direction"),
        ("picture", {**PICTURE, "size": 10**9}, 400, "size is not"),
        ("picture", {**PICTURE, "size": "large"}, 400, "size is not"),
        ("picture", {**PICTURE, "preview": "yes"}, 400, "preview is"),
        ("picture", {**PICTURE, "client": "x" * 1000}, 400, "client and channel"),
        ("picture", {**PICTURE, "client": None}, 400, "client and channel"),
        ("generator", {}, 404, "no such source"),
        ("films", PICTURE, 400, "film is no JSON object"),
        ("films", {**PICTURE, "film": {"faces": FACES[:1]}}, 400, "needs 2 to 64 faces"),
        ("films", {**PICTURE, "film": {"faces": FACES, "seconds": 1e9}}, 400, "film.seconds"),
        ("films", {**PICTURE, "film": {"faces": FACES, "seconds": 500}}, 400, "frames, more than"),
        ("films", {**PICTURE, "film": {"faces": FACES, "fps": 0.5}}, 400, "film.fps"),
        ("films", {**PICTURE, "film": {"faces": FACES, "format": "exe"}}, 400, "film.format"),
        ("films", {**PICTURE, "film": {"faces": FACES, "kind": "spy"}}, 400, "film.kind"),
        ("films", {**PICTURE, "film": {"faces": [3, 4]}}, 400, "face is no JSON object"),
    ],
)
def test_bad_requests_get_one_sentence(site: Site, path, body, status, message):
    answer = site.post(f"/api/{path}", **body)
    assert (answer.status, message in answer.error) == (status, True), answer
    assert "Traceback" not in answer.error


def test_other_kinds_of_bad_requests(site: Site):
    json_type = {"content_type": "application/json"}
    for body, headers, status in (
        (b"{}", {"content_type": "text/plain"}, 415),  # a form of another page could send this
        (b"{", json_type, 400),
        (b"[]", json_type, 400),
        (b'{"a": NaN}', json_type, 400),
        (b"[" * 100_000, json_type, 400),
        (b"\xff\xfe", json_type, 400),
        (b" " * (2 << 20), json_type, 413),
        (b"", json_type, 400),
    ):
        answer = site.request("POST", "/api/picture", body, **headers)
        assert answer.status == status, (body[:20], answer)
        assert "Traceback" not in answer.error
    for method, path, status in (
        ("GET", "/absent", 404),
        ("GET", "/page/absent.js", 404),
        ("GET", "/page/../server.py", 404),
        ("GET", "/page/%2e%2e%2fserver.py", 404),
        ("GET", "/api/picture", 405),
        ("PUT", "/", 405),
        ("GET", "/api/runs/99", 404),
        ("GET", "/api/runs/x", 404),
        ("GET", "/api/runs/0/grids/reals-r0064.png", 404),
        ("GET", "/api/runs/0/grids/%2e%2e%2fconfig.yaml", 404),
        ("GET", "/api/runs/0/grids/..%2f..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/api/films/absent", 404),
        ("DELETE", "/api/films/absent", 404),
    ):
        answer = site.request(method, path)
        assert answer.status == status, (path, answer)
        assert b"Traceback" not in answer.content


def test_only_its_own_names_and_pages_are_answered(site: Site):
    """A page of another site could reach the server under a name of its own, which it lets point to 127.0.0.1."""
    port = site.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"[::1]:{port}", "localhost."):
        assert site.request("GET", "/api/sources", host=host).status == 200, host
    for host in (
        f"evil.example:{port}",
        "localhost.evil.example",
        "8.8.8.8",
        "192.168.0.1",
        "[::",
        "localhost:x",
        "a@localhost",
        "",
    ):
        answer = site.request("GET", "/api/sources", host=host)
        assert answer.status in (400, 403), (host, answer)
    body = json.dumps({"client": "t", **PICTURE}).encode()
    how = {"content_type": "application/json", "host": f"localhost:{port}"}
    assert site.request("POST", "/api/picture", body, **how, origin=f"http://localhost:{port}").status == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{port + 1}", "file://"):
        assert site.request("POST", "/api/picture", body, **how, origin=origin).status == 403, origin
    for path in ("/", "/api/sources", "/absent", "/page/app.js"):
        headers = site.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


def test_snapshots_and_grids_that_lead_out_of_the_run_are_not_served(tmp_path):
    run = a_run(tmp_path, 1)
    _, secret = saved(tmp_path / "secret" / "G.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret" / "private.png")
    (run / "snapshots" / "000099kimg.safetensors").symlink_to(secret)
    (run / "samples" / "fakes-000099kimg.png").symlink_to(tmp_path / "secret" / "private.png")
    (run / "samples" / "fakes-000098kimg.png").write_text("<script>alert(1)</script>")
    with explored(run, "--port", 0) as site:
        assert [one["name"] for one in site.get("/api/sources").json["sources"][0]["snapshots"]] == [
            "000004kimg.safetensors"
        ]
        assert site.post("/api/picture", source=0, snapshot="000099kimg.safetensors").status == 404
        for name in ("fakes-000099kimg.png", "fakes-000098kimg.png"):
            assert site.get(f"/api/runs/0/grids/{name}").status == 404


def test_damaged_and_vanishing_snapshots(tmp_path):
    run = a_run(tmp_path, 3)
    one, two, three = sorted((run / "snapshots").glob("0*.safetensors"))
    two.write_bytes(b"damaged")
    with explored(run, "--port", 0) as site:
        assert site.post("/api/picture", source=0, snapshot=one.name).status == 200
        answer = site.post("/api/picture", source=0, snapshot=two.name)
        assert answer.status == 400
        assert "damaged" in answer.error
        three.unlink()
        assert site.post("/api/picture", source=0, snapshot=three.name).status == 404
        one.write_bytes(saved(tmp_path / "other.safetensors", name="progan")[1].read_bytes())  # a new file of that name
        assert site.post("/api/generator", source=0, snapshot=one.name).json["network"] == "progan"
        shown, _ = frames(film(site, snapshot=one.name, faces=FACES[:1], seconds=1, fps=10, kind="training"))
        assert len(shown) == 10


def test_wrong_use(tmp_path, run: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, message in (
            (["absent"], "absent: no such file or folder"),
            ([tmp_path], "is neither a snapshot nor a run"),
            ([run, "--port", port], f"port {port} of 127.0.0.1 is in use"),
            ([run, "--host", "256.1.1.1"], "--host 256.1.1.1 cannot be used"),
            ([run, "--host", "8.8.8.8"], "--host 8.8.8.8 cannot be used"),
            ([run, "--device", "gpu"], "device 'gpu'"),
            ([run, "--directions", "absent"], "absent: no such file"),
            ([], "Missing argument"),
        ):
            told = harness.command("explore", *arguments, "--no-open", expected=2).stderr
            assert message in told
            assert "Traceback" not in told


def test_the_next_free_port_is_taken_by_default(run: Path):
    with explored(run) as first, explored(run) as second:
        assert first.port != second.port
        assert first.get("/").status == second.get("/").status == 200


def test_a_missing_extra_is_named(run: Path, tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')")
    env = harness.environment() | {"PYTHONPATH": f"{tmp_path}"}
    told = harness.command("explore", run, "--no-open", env=env, expected=2).stderr
    assert "the explorer needs starlette and uvicorn: pip install 'stylegan-pg[ui]'" in told
