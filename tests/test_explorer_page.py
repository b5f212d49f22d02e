"""The explorer's page in a headless Chromium."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import harness
import numpy as np
import pytest
from exploring import Site, a_run, explored
from PIL import Image
from snapshots import saved

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, conditional: tuple[Any, Path]) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("pages")
    _, wide = saved(folder / "progan.safetensors", name="progan")
    with explored(a_run(folder, 3), conditional[1], wide, "--port", 0) as site:
        yield site


class Visit:
    """A page, of which everything that it asks for or complains about is recorded."""

    def __init__(self, page: Any, site: Site):
        self.page, self.site = page, site
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)

    def open(self, fragment: str = "") -> None:
        self.page.goto(self.site.url + fragment)
        self.settled()

    def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript. (Playwright's wait_for_function needs `eval`, which the page's policy
        forbids.)"""
        end = time.monotonic() + WAIT_MS / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, (condition, self.complaints, self.page.locator("body").inner_text())
            self.page.wait_for_timeout(30)

    def settled(self) -> None:
        """Wait until the whole picture of the newest state is shown."""
        self.until("document.body.dataset.wanted && document.body.dataset.shown === document.body.dataset.wanted")
        self.until("document.getElementById('picture').complete")

    def pixels(self, image: str = "picture") -> np.ndarray:
        """The pixels of an image element, as the browser has decoded them."""
        drawn = self.page.evaluate(
            """async (id) => {
                const img = document.getElementById(id);
                await img.decode();
                const canvas = document.createElement('canvas');
                [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
                const ink = canvas.getContext('2d');
                ink.drawImage(img, 0, 0);
                const { data } = ink.getImageData(0, 0, canvas.width, canvas.height);
                return [canvas.height, canvas.width, Array.from(data)];
            }""",
            image,
        )
        height, width, values = drawn
        return np.array(values, dtype=np.uint8).reshape(height, width, 4)

    def slide(self, label: str, value: float) -> None:
        """Move a slider as a user does, with an event for it."""
        self.page.get_by_role("slider", name=label, exact=True).evaluate(
            "(s, v) => { s.value = v; s.dispatchEvent(new Event('input', {bubbles: true})); }", value
        )
        self.settled()

    def state(self) -> dict[str, Any]:
        """What the address remembers."""
        self.page.wait_for_timeout(400)
        return json.loads(unquote(self.page.url.partition("#")[2]))


@contextlib.contextmanager
def visit(browser: Any, site: Site, **how: Any) -> Iterator[Visit]:
    context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **how})
    try:
        visit = Visit(context.new_page(), site)
        yield visit
        assert visit.complaints == []
        assert visit.requests
        foreign = [url for url in visit.requests if not url.startswith((site.url, f"blob:{site.url}"))]
        assert foreign == []
    finally:
        context.close()


def expected(site: Site, snapshot: str, source: int = 0, **face: Any) -> np.ndarray:
    answer = site.post("/api/picture", source=source, snapshot=snapshot, face=face)
    with Image.open(io.BytesIO(answer.content)) as image:
        return np.asarray(image.convert("RGBA"))


NEWEST = "000012kimg.safetensors"


def test_the_page_opens_and_sliders_change_the_picture(browser, site):
    with visit(browser, site) as v:
        v.open()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, psi=0.7))
        v.slide("Truncation ψ", 0.2)
        assert np.array_equal(v.pixels(), expected(site, NEWEST, psi=0.2))
        v.slide("Cutoff", 2)
        assert np.array_equal(v.pixels(), expected(site, NEWEST, psi=0.2, cutoff=2))
        v.page.get_by_role("spinbutton", name="Seed").first.fill("77")
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, place={"seed": 77}, psi=0.2, cutoff=2))
        v.page.get_by_role("combobox", name="Noise").select_option("none")
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, place={"seed": 77}, psi=0.2, cutoff=2, noise="none"))
        v.page.get_by_role("button", name="Reset").click()
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, place={"seed": 77}, psi=0.7))
        text = v.page.locator("#caption").inner_text()
        assert text == "Seed 77"
        assert "seed 77" in v.page.locator("#picture").get_attribute("alt").lower()


def test_faces_are_mixed_by_layers(browser, site):
    with visit(browser, site) as v:
        v.open()
        pair: dict[str, Any] = {"place": {"seed": 0}, "psi": 0.7, "other": {"seed": 1}}
        v.page.get_by_role("button", name="Coarse").click()
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, **pair, layers=[0, 1]))
        v.page.get_by_role("group", name="Layers that take").get_by_role("button").nth(3).click()
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, **pair, layers=[0, 1, 3]))
        v.slide("Amount", 0.4)
        assert np.array_equal(v.pixels(), expected(site, NEWEST, **pair, layers=[0, 1, 3], amount=0.4))
        v.page.get_by_role("button", name="Swap").click()
        v.settled()
        swapped = {**pair, "place": {"seed": 1}, "other": {"seed": 0}}
        assert np.array_equal(v.pixels(), expected(site, NEWEST, **swapped, layers=[0, 1, 3], amount=0.4))
        v.page.locator("#frame").press("m")
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, place={"seed": 1}, psi=0.7))


def test_arrow_keys_walk(browser, site):
    with visit(browser, site) as v:
        v.open()
        v.page.keyboard.press("ArrowRight")
        v.settled()
        place = v.state()["place"]
        assert place["seed"] == 0
        assert 0 < place["right"] < 0.5
        assert place["up"] == 0
        assert np.array_equal(v.pixels(), expected(site, NEWEST, place=place, psi=0.7))
        v.page.keyboard.down("Shift")
        v.page.keyboard.down("ArrowUp")
        v.until("parseInt(document.getElementById('caption').textContent.slice(5)) >= 1000")
        v.page.keyboard.up("ArrowUp")
        v.page.keyboard.up("Shift")
        v.settled()
        walked = v.state()["place"]
        assert walked["seed"] % 1000 == 0
        assert walked["right"] == place["right"]
        v.page.get_by_role("slider", name="Truncation ψ").focus()
        v.page.keyboard.press("ArrowRight")  # which moves the slider, not the face
        v.settled()
        assert v.state()["place"] == walked
        assert v.state()["psi"] == pytest.approx(0.71)
        box = v.page.locator("#frame").bounding_box()
        v.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        v.page.mouse.down()
        v.page.mouse.move(box["x"] + box["width"] / 2 + 60, box["y"] + box["height"] / 2, steps=5)
        v.page.mouse.up()
        v.settled()
        moved = v.state()["place"]
        assert moved["seed"] + moved["right"] == pytest.approx(
            walked["seed"] + walked["right"] - 60 / box["width"], abs=0.01
        )


def test_directions_have_sliders(browser, site):
    with visit(browser, site) as v:
        v.open()
        v.page.locator("#directions-card summary").click()
        v.slide("PCA 2", 2.5)
        assert np.array_equal(v.pixels(), expected(site, NEWEST, psi=0.7, directions={"pca2": 2.5}))
        v.page.get_by_role("combobox", name="Change").select_option("coarse")
        v.slide("Weights 1", -3)
        face = {"psi": 0.7, "directions": {"pca2": 2.5, "weights1": -3}, "direction_layers": [0, 1]}
        assert np.array_equal(v.pixels(), expected(site, NEWEST, **face))
        v.state()
        v.page.reload()  # the address knows the face
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, **face))
        v.page.locator("#directions-card summary").click()
        v.page.get_by_role("button", name="All to zero").click()
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, NEWEST, psi=0.7))


def test_one_slider_goes_through_the_training(browser, site):
    with visit(browser, site) as v:
        v.open()
        for k, name in enumerate(("000004kimg", "000008kimg", "000012kimg")):
            v.slide("Training", k)
            v.until(f"document.getElementById('facts').textContent.includes('{4 * (k + 1)} kimg')")
            v.settled()
            assert np.array_equal(v.pixels(), expected(site, f"{name}.safetensors", psi=0.7))
        v.page.get_by_role("button", name="▶").click()
        v.until("document.getElementById('moment').value === '0'")
        v.until("document.getElementById('moment').value === '2'")


def test_other_generators(browser, site):
    with visit(browser, site) as v:
        v.open()
        v.page.get_by_role("combobox", name="Generator").select_option(label="G")
        v.page.get_by_role("combobox", name="Class").first.wait_for()
        v.page.get_by_role("combobox", name="Class").first.select_option(label="owl")
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, "G.safetensors", 1, place={"c": 2}, psi=0.7))
        assert "owl" in v.page.locator("#caption").inner_text()
        assert not v.page.locator("#run").is_visible()
        v.page.get_by_role("combobox", name="Generator").select_option(label="progan")
        v.until("document.getElementById('facts').textContent.startsWith('progan')")
        v.settled()
        assert np.array_equal(v.pixels(), expected(site, "progan.safetensors", 2))
        assert v.page.get_by_role("slider", name="Truncation ψ").count() == 0
        v.slide("Amount", 0.5)
        assert np.array_equal(v.pixels(), expected(site, "progan.safetensors", 2, other={"seed": 1}, amount=0.5))


def milliseconds(path: Path) -> int:
    """The length of an animated picture, in which equal frames that follow each other are one."""
    with Image.open(path) as image:
        lengths = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            image.load()
            lengths.append(image.info["duration"])
    return sum(lengths)


def test_kept_faces_and_a_video_of_them(browser, site):
    with visit(browser, site) as v:
        v.open()
        first = v.pixels()
        v.page.keyboard.press("k")
        v.page.keyboard.press("r")
        v.settled()
        v.page.get_by_role("button", name="Keep").click()
        v.page.locator("#film-card summary").click()
        v.page.get_by_role("combobox", name="Format").select_option("webp")
        v.page.get_by_label("Seconds, number").fill("0.5")
        v.page.get_by_role("button", name="Make video").click()
        with v.page.expect_download() as download:
            v.page.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == "faces.webp"
        assert milliseconds(download.value.path()) == 30 * round(1000 / 30)
        v.page.get_by_role("button", name="Kept face").first.click()
        v.settled()
        assert np.array_equal(v.pixels(), first)
        with v.page.expect_download() as download:
            v.page.get_by_role("button", name="Save PNG").click()
        assert download.value.suggested_filename == "seed000000.png"
        with Image.open(download.value.path()) as image:
            assert np.array_equal(np.asarray(image.convert("RGBA")), first)


def test_dark_and_narrow(browser, site):
    with visit(browser, site, color_scheme="dark", viewport={"width": 360, "height": 740}) as v:
        v.open()
        assert v.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground = v.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert max(map(int, re.findall(r"\d+", ground)[:3])) < 60
        v.page.mouse.wheel(0, 1500)
        v.page.wait_for_timeout(200)
        box = v.page.locator("#frame").bounding_box()
        assert box["y"] == pytest.approx(0, abs=8)  # the picture remains in view
        assert box["height"] < 0.5 * 740
        v.page.get_by_role("button", name="Auto").click()
        ground = v.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert min(map(int, re.findall(r"\d+", ground)[:3])) > 200


def test_every_control_has_a_name(browser, site):
    with visit(browser, site) as v:
        v.open()
        for summary in v.page.locator("summary").all():
            if summary.is_visible():
                summary.evaluate("(s) => (s.parentElement.open = true)")
        v.page.get_by_role("slider", name="PCA 1", exact=True).wait_for()
        nameless = v.page.evaluate(
            """() => [...document.querySelectorAll('button, input, select, canvas, [role]')]
                .filter((e) => e.checkVisibility() && !e.labels?.length && !e.ariaLabel && !e.textContent.trim())
                .map((e) => e.outerHTML)"""
        )
        assert nameless == []
        assert v.page.evaluate("[...document.images].filter((i) => !i.hasAttribute('alt')).length") == 0


def curve_points(v: Visit) -> int:
    """The number of points of the losses that the page has."""
    return v.page.evaluate("+document.querySelector('.chart canvas').dataset.points")


@pytest.mark.slow
def test_a_run_in_progress_shows_moving_curves_and_its_first_snapshot(browser, tiny_data, tmp_path):
    run = tmp_path / "run"
    changes = {"output__snapshot_kimg": 0.5, "output__grid_kimg": 0.25, "output__tick_kimg": 0.032}
    changes |= {"growth__stable_kimg_at": "{16: 500}", "checkpoint__every_kimg": 10}
    training = harness.start(harness.arguments(run, tiny_data, **changes))
    try:
        while harness.lines_of(run) < 3:
            assert training.poll() is None, training.communicate()[0]
        with explored(run, "--port", 0) as site, visit(browser, site) as v:
            v.page.goto(site.url)
            v.until("document.getElementById('run-state').textContent === 'training'")
            v.until("+document.querySelector('.chart canvas').dataset.points > 0")
            before, text = curve_points(v), v.page.locator("#run-text").inner_text()
            drawn = v.page.locator(".chart canvas").first.screenshot()
            v.until(f"+document.querySelector('.chart canvas').dataset.points > {before}")
            assert v.page.locator(".chart canvas").first.screenshot() != drawn
            assert re.fullmatch(r"[\d.]+ of [\d.]+ kimg · \d+x\d+ .* · .* images/s · .* to go.*", text), text
            v.until("document.getElementById('grid-picture').naturalWidth > 0")
            v.page.wait_for_selector("#picture[src]")  # with the first snapshot
            v.settled()
            seen = v.page.locator("#facts").inner_text()
            v.until(f"document.getElementById('facts').textContent !== {json.dumps(seen)}")
    finally:
        training.kill()
        training.communicate()


def test_the_page_says_when_the_explorer_has_ended_or_a_snapshot_has_gone(browser, tmp_path):
    run = a_run(tmp_path, 2)
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(explored(run, "--port", 0))
        context = browser.new_context()
        stack.callback(context.close)
        v = Visit(context.new_page(), site)
        v.open()
        (run / "snapshots" / "000008kimg.safetensors").unlink()
        v.page.keyboard.press("r")
        v.until("document.getElementById('facts').textContent.includes(' 4 kimg')")
        v.settled()
        site.process.terminate()
        site.process.wait(30)
        v.page.keyboard.press("r")
        v.page.get_by_role("alert").wait_for()
        assert "does not answer" in v.page.get_by_role("alert").inner_text()
