"""The page of `export --to web` in a browser: its pictures are PyTorch's, and nothing leaves the machine."""

import functools
import http.server
import io
import json
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import NAMES, snapshot
from PIL import Image
from snapshots import command
from test_readme import commands

from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.data.classes import one_hot
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.export import web
from stylegan_pg.export.command import export
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import between, latents

TITLE = 'Owls & <script>"x"</script>'


# ------------------------------------------------------------------------------------------------- without a browser


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the page's arithmetic")
@pytest.mark.parametrize("size", [1, 7, 512])
def test_seeds_give_the_latents_of_the_command_sample(size, tmp_path):
    seeds = [0, 1, 12345, 2**31, 2**32 - 1]
    shutil.copy(web.PAGE / "latents.js", tmp_path / "latents.mjs")
    (tmp_path / "main.mjs").write_text(
        "import { latents } from './latents.mjs';\n"
        f"console.log(JSON.stringify({seeds}.map((seed) => Array.from(latents(seed, {size})))));\n"
    )
    done = subprocess.run(["node", tmp_path / "main.mjs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, expected = torch.tensor(json.loads(done.stdout)), latents(seeds, size)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert float((found == expected).float().mean()) > 0.99  # logarithms of two libraries may differ in the last bit


def runtime(folder: Path) -> Path:
    """A folder that looks like the npm package."""
    (folder / "dist").mkdir(parents=True)
    for name in web.FILES:
        (folder / "dist" / name).write_text(f"// {name}")
    return folder


@pytest.mark.slow
def test_a_folder_holds_all_and_its_texts_cannot_become_code(tmp_path):
    pytest.importorskip("onnxruntime")
    path = snapshot(tmp_path / "G.safetensors", "progan", resolution=4, classes=4)
    given = runtime(tmp_path / "package")
    lines = list(export(path, "web", tmp_path / "page", ort_web=given, title=TITLE))
    assert "python -m http.server" in lines[0]
    assert "largest difference from PyTorch" in lines[1]
    names = {str(p.relative_to(tmp_path / "page")) for p in (tmp_path / "page").rglob("*") if p.is_file()}
    expected = {"index.html", "page.css", "page.js", "worker.js", "latents.js", "generator.onnx", "ort/LICENSE"}
    assert names == expected | {f"ort/{name}" for name in web.FILES}
    html = (tmp_path / "page" / "index.html").read_text("utf-8")
    assert html.count("<script") == 2
    assert "{{" not in html
    assert "&lt;script&gt;" in html
    facts = re.search(r'id="facts">(.*?)</script>', html)
    assert facts
    assert json.loads(facts[1])["names"] == NAMES
    assert not re.search(r"(https?:)?//[a-z]", html + (tmp_path / "page" / "page.css").read_text())
    with pytest.raises(UsageError, match="a folder with content"):
        list(export(path, "web", tmp_path / "page", ort_web=given))


def test_the_runtime_is_taken_from_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    given = runtime(tmp_path / "node_modules" / "onnxruntime-web")
    for folder in (given, given / "dist", tmp_path):
        assert web.runtime_files(folder, False).keys() == set(web.FILES)
    with pytest.raises(UsageError, match=f"needs onnxruntime-web {web.VERSION}: give --fetch"):
        web.runtime_files(None, False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="--fetch needs npm"):
        web.runtime_files(None, True)


def test_what_npm_fetches_is_used_by_its_checksum_only(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLEGAN_PG_CACHE", str(tmp_path / "cache"))
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\necho other >onnxruntime-web-{web.VERSION}.tgz\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    with pytest.raises(RunError, match="another checksum"):
        web.runtime_files(None, True)
    assert (tmp_path / "asked").read_text() == f"pack onnxruntime-web@{web.VERSION} --ignore-scripts --silent\n"
    assert not list((tmp_path / "cache").iterdir())
    npm.write_text("#!/bin/sh\necho 'npm error network is down' >&2\nexit 1\n")
    with pytest.raises(RunError, match="npm error network is down"):
        web.runtime_files(None, True)


@pytest.mark.slow
def test_commands_of_the_documents(tmp_path, capsys, monkeypatch):
    """They are run unchanged. A runtime in the cache stands for the one that is fetched."""
    pytest.importorskip("onnxruntime")
    snapshots = tmp_path / "runs" / "ffhq1024" / "snapshots"
    snapshots.mkdir(parents=True)
    snapshot(snapshots / "000005kimg.safetensors", "progan", resolution=4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(web, "runtime_files", lambda given, fetch: dict.fromkeys(web.FILES, b"") if fetch else {})
    said = commands("stylegan-pg export")
    assert len(said) == 2
    for line in said:
        assert command(capsys, monkeypatch, *shlex.split(line)[1:])[0] == 0, line
    assert (tmp_path / "generator.onnx").is_file()
    (serve,) = commands("python -m http.server")
    assert (tmp_path / serve.split()[-1] / "index.html").is_file()


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium, which is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def real_runtime(tmp_path_factory) -> Path:
    """The runtime's files, as npm fetches them."""
    try:
        files = web.runtime_files(None, True)
    except (UsageError, RunError) as error:
        pytest.skip(f"needs onnxruntime-web: {error}")
    folder = tmp_path_factory.mktemp("ort")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Page:
    """The page of a generator, opened in a browser."""

    def __init__(self, browser: Any, folder: Path):
        handler = functools.partial(Quiet, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}/"
        self.page = browser.new_page(viewport={"width": 1100, "height": 820}, accept_downloads=True)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(self.address)
        self.wait()

    def wait(self) -> None:
        self.page.locator("body[data-state=idle]").wait_for(timeout=120_000)

    def set(self, name: str, value: Any) -> None:
        """Give a control a value, as its user would."""
        control = self.page.locator(f"#{name}")
        if name.startswith("class"):
            control.select_option(str(value))
        elif name.startswith("seed"):
            control.fill(str(value))
        else:
            control.evaluate(
                "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }", str(value)
            )
        self.wait()

    def pixels(self, name: str) -> np.ndarray:
        """[H, W, 4] of a canvas."""
        found = self.page.locator(f"#{name}").evaluate(
            "c => [c.height, c.width, Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)]"
        )
        return np.array(found[2], np.uint8).reshape(found[0], found[1], 4)

    def close(self) -> None:
        self.page.close()
        self.server.shutdown()
        self.server.server_close()
        assert self.complaints == []
        assert self.requests
        assert not [url for url in self.requests if not url.startswith((self.address, "blob:", "data:"))]


def same(pixels: np.ndarray, image: torch.Tensor) -> None:
    """Within 1 of 255 of what PyTorch makes, [1, C, H, W]."""
    expected = to_uint8(image)[0].permute(1, 2, 0).numpy().astype(int)
    assert pixels.shape[:2] == expected.shape[:2]
    assert np.abs(pixels[..., : expected.shape[2]].astype(int) - expected).max() <= 1
    assert expected.std() > 5  # there is something to see


@pytest.mark.slow
def test_pictures_are_those_of_pytorch(browser, real_runtime, tmp_path):
    pytest.importorskip("onnxruntime")
    more: dict[str, Any] = {"channel_base": 512, "channel_max": 32, "z_dim": 17}
    path = snapshot(tmp_path / "G.safetensors", resolution=64, classes=4, **more)
    list(export(path, "web", tmp_path / "page", ort_web=real_runtime, title=TITLE))
    G, opened = load_snapshot(path), Page(browser, tmp_path / "page")
    page = opened.page
    c = [one_hot([k], 4) for k in range(4)]
    assert page.title() == TITLE
    assert page.locator("#class-a").inner_text().split("\n") == NAMES
    for name in ("picture", "thumb-a"):
        same(opened.pixels(name), G(latents([0], 17), c[0], psi=0.7))
    same(opened.pixels("thumb-b"), G(latents([1], 17), c[0], psi=0.7))
    opened.set("seed-a", 4294967295)
    opened.set("class-a", 2)
    opened.set("class-b", 3)
    opened.set("psi", 0.5)
    opened.set("layers", 4)
    how: dict[str, Any] = {"psi": 0.5, "cutoff": 4}
    same(opened.pixels("picture"), G(latents([4294967295], 17), c[2], **how))
    opened.set("t", 0.25)
    ends = [G.styles(latents([seed], 17), c[k], **how) for seed, k in ((4294967295, 2), (1, 3))]
    halfway = G.synthesis(torch.lerp(ends[0], ends[1], 0.25))
    same(opened.pixels("picture"), halfway)
    with page.expect_download() as download:
        page.locator("#save").click()
    with Image.open(io.BytesIO(Path(download.value.path()).read_bytes())) as saved:
        assert saved.format == "PNG"
        same(np.asarray(saved), halfway)
    page.locator("#swap").click()
    opened.wait()
    same(opened.pixels("picture"), halfway)
    same(opened.pixels("thumb-a"), G(latents([1], 17), c[3], **how))
    before = opened.pixels("picture")
    page.locator("#random").click()
    opened.wait()
    assert np.abs(before.astype(int) - opened.pixels("picture")).max() > 1
    state = page.url
    assert f"a={page.locator('#seed-a').input_value()}" in state
    after = opened.pixels("picture")
    page.reload()
    opened.wait()
    assert np.abs(after.astype(int) - opened.pixels("picture")).max() <= 1  # the address holds the settings
    opened.close()


@pytest.mark.slow
def test_a_generator_without_w_in_a_narrow_window_light_and_dark(browser, real_runtime, tmp_path):
    pytest.importorskip("onnxruntime")
    path = snapshot(tmp_path / "G.safetensors", "r3gan", resolution=8, channels=1, base=[3, 5])
    list(export(path, "web", tmp_path / "page", ort_web=real_runtime))
    G, opened = load_snapshot(path), Page(browser, tmp_path / "page")
    page = opened.page
    page.set_viewport_size({"width": 360, "height": 740})
    z, to = latents([0], 8), latents([1], 8)
    opened.set("t", 0.5)
    grey = G(between(z[0], to[0], torch.tensor([[0.5]])))
    same(opened.pixels("picture"), grey.expand(-1, 3, -1, -1))
    assert not page.locator("#truncation").is_visible()
    assert not page.locator("#class-a").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colour = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
        assert (brightness < 80) == (scheme == "dark")
    page.locator("#play").click()
    before = page.locator("#t").input_value()
    page.wait_for_timeout(1500)
    page.locator("#play").click()
    opened.wait()
    assert page.locator("#t").input_value() != before
    opened.close()
