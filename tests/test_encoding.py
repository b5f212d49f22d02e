"""Frames as MP4, WebM, GIF, a folder and a strip, read back."""

import io
import os
import resource
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from PIL import Image

from stylegan_pg.editing import encoding, video_file
from stylegan_pg.errors import RunError, UsageError


def frames(count: int, shape: tuple[int, int, int] = (3, 48, 64)) -> Iterator[torch.Tensor]:
    """A grey level that changes from frame to frame, over a smooth ramp."""
    channels, height, width = shape
    for i in range(count):
        ramp = torch.linspace(60, 180, width).expand(channels, height, width) + 40 * np.sin(2 * np.pi * i / count)
        if channels == 4:
            ramp[3] = 255 * (torch.arange(width) < width // 2)
        yield ramp.round().to(torch.uint8)


def decoded(path: Path) -> tuple[list[np.ndarray], float]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], float(stream.average_rate)


def expected(frame: torch.Tensor) -> np.ndarray:
    """What a video shows: grey as RGB, RGBA over white."""
    array = frame.float()
    if len(array) == 4:
        array = 255 + (array[:3] - 255) * (array[3:] / 255)
    return array.expand(3, -1, -1).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("format", "fps", "shape"),
    [
        ("mp4", 30, (3, 48, 64)),
        ("mp4", 24000 / 1001, (1, 33, 47)),
        ("mp4", 12.5, (4, 16, 16)),
        ("mp4", 60, (3, 8, 10)),
        ("webm", 25, (3, 48, 64)),
        ("webm", 30000 / 1001, (4, 31, 40)),
        ("webm", 60, (1, 16, 15)),
    ],
)
def test_videos_have_the_frames_size_and_rate_that_were_asked_for(tmp_path, format, fps, shape):
    path = tmp_path / f"new/video.{format}"
    to = encoding.target(path, fps=fps)
    assert encoding.write(frames(21, shape), 21, shape[1:], to) == path
    found, rate = decoded(path)
    assert len(found) == 21
    assert rate == pytest.approx(fps, rel=1e-3)
    height, width = shape[1:]
    for image, frame in zip(found, frames(21, shape), strict=True):
        assert image.shape == (height + height % 2, width + width % 2, 3)
        difference = np.abs(image[:height, :width] - expected(frame))
        assert np.median(difference) < 5
        assert np.abs(image[height - 1 :, : width - 2].mean() - expected(frame)[-1, : width - 2].mean()) < 4
    assert os.listdir(tmp_path / "new") == [path.name]


def test_colours_are_kept_and_stated(tmp_path):
    av = pytest.importorskip("av")
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 120, 40]], dtype=torch.uint8)
    images = [colour[:, None, None].expand(3, 32, 32) for colour in colours]
    for format in ("mp4", "webm"):
        path = tmp_path / f"x.{format}"
        encoding.write(images, 4, (32, 32), encoding.target(path))
        found, _ = decoded(path)
        with av.open(str(path)) as container:
            context = container.streams.video[0].codec_context
            assert (context.colorspace, context.color_range) == (video_file.BT709, video_file.LIMITED)
        for image, colour in zip(found, colours, strict=True):
            assert np.abs(image.mean((0, 1)) - colour.numpy()).max() < 6


@pytest.mark.parametrize(("fps", "shape"), [(10, (3, 20, 31)), (30, (1, 16, 16)), (24, (4, 9, 12)), (50, (3, 8, 8))])
def test_gifs_have_every_frame_and_the_whole_time(tmp_path, fps, shape):
    path = tmp_path / "a.gif"
    same = [torch.full(shape, 90, dtype=torch.uint8)] * 3  # equal frames are not joined
    encoding.write([*frames(13, shape), *same], 16, shape[1:], encoding.target(path, fps=fps))
    with Image.open(path) as gif:
        assert (gif.format, gif.n_frames, gif.size) == ("GIF", 16, shape[:0:-1])  # type: ignore[attr-defined]
        assert gif.info["loop"] == 0
        times = []
        for i, frame in enumerate([*frames(13, shape), *same]):
            gif.seek(i)
            times.append(gif.info["duration"])
            assert np.abs(np.asarray(gif.convert("RGB")) - expected(frame)).mean() < 3
        assert abs(sum(times) - 16000 / fps) <= 5
        assert min(times) >= 20


def test_folders_and_strips(tmp_path):
    grey = list(frames(5, (1, 6, 7)))
    folder, strip = tmp_path / "f", tmp_path / "s.png"
    for count in (5, 3):  # the second time with fewer frames
        encoding.write(grey[:count], count, (6, 7), encoding.target(folder, scale=2))
        assert sorted(os.listdir(folder)) == [f"frame{i:06d}.png" for i in range(count)]
    with Image.open(folder / "frame000002.png") as image:
        assert np.array_equal(np.asarray(image), grey[2][0].numpy().repeat(2, 0).repeat(2, 1))
    encoding.write(iter(grey), 5, (6, 7), encoding.target(strip, columns=2))
    with Image.open(strip) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (18, 14)
    assert np.array_equal(pixels[6:12, 7:], grey[3][0].numpy())
    assert not pixels[12:, 7:].any()
    encoding.write(iter(grey), 5, (6, 7), encoding.target(tmp_path / "odd.name", "strip"))
    with Image.open(tmp_path / "odd.name") as image:
        assert image.size == (35, 6)
    assert sorted(os.listdir(tmp_path)) == ["f", "odd.name", "s.png"]


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.gif", "v.png", "v"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RunError("diverged"), OSError(28, "No space left on device")])
def test_an_interruption_leaves_what_was_there(tmp_path, name, fault):
    path = tmp_path / name
    encoding.write(frames(4), 4, (48, 64), encoding.target(path))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def broken() -> Iterator[torch.Tensor]:
        yield from frames(3)
        raise fault

    with pytest.raises((KeyboardInterrupt, RunError)):
        encoding.write(broken(), 4, (48, 64), encoding.target(path))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.gif", "v"])
def test_frames_are_not_kept(tmp_path, name):
    alive: list[weakref.ref] = []

    def counted() -> Iterator[torch.Tensor]:
        for frame in frames(60, (3, 16, 16)):
            copy = frame.clone()
            alive[:] = [ref for ref in alive if ref() is not None]
            assert len(alive) < 4
            alive.append(weakref.ref(copy))
            yield copy
            del copy

    encoding.write(counted(), 60, (16, 16), encoding.target(tmp_path / name))


def test_what_is_not_possible(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("")
    (tmp_path / "file").write_text("")
    for how, message in (
        ({"path": tmp_path / "a.avi"}, r"a.avi: the suffix decides what is written: .mp4, .webm"),
        ({"path": tmp_path / "a", "format": "mkv"}, "format 'mkv' is not possible: mp4, webm, gif, frames, strip"),
        ({"path": tmp_path / "a.mp4", "fps": 0}, "fps=0: mp4 takes 0.1 to 240"),
        ({"path": tmp_path / "a.mp4", "fps": float("nan")}, "fps=nan"),
        ({"path": tmp_path / "a.gif", "fps": 60}, "fps=60: gif takes 0.1 to 50"),
        ({"path": tmp_path / "a.gif", "columns": 3}, "--columns is of a strip"),
        ({"path": tmp_path / "a.gif", "scale": 0}, "a scale from 1 to 64"),
        ({"path": tmp_path / "folder"}, r"holds other files \(mine.txt, ...\)"),
        ({"path": tmp_path / "folder", "format": "gif"}, "is a folder, which gif cannot be written to"),
        ({"path": tmp_path / "file"}, "is a file, which frames cannot be written to"),
    ):
        with pytest.raises(UsageError, match=message):
            encoding.target(**how)
    with pytest.raises(UsageError, match="70000x16 pixels are too large for gif"):
        encoding.write([], 1, (16, 70000), encoding.target(tmp_path / "a.gif"))
    with pytest.raises(UsageError, match="a strip of 1000000 frames"):
        encoding.write([], 1_000_000, (16, 64), encoding.target(tmp_path / "a.png"))
    with pytest.raises(UsageError, match=r"file cannot be written: .*File exists"):
        encoding.write(frames(1), 1, (48, 64), encoding.target(tmp_path / "file" / "a.gif"))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"run `pip install 'stylegan-pg\[video\]'`, or write a GIF"):
        encoding.target(tmp_path / "a.webm")
    assert encoding.write(frames(2), 2, (48, 64), encoding.target(tmp_path / "a.gif")).exists()  # needs no PyAV


@pytest.mark.parametrize("name", ["v.mp4", "v.webm", "v.gif", "v"])
def test_a_full_disk(tmp_path, name):
    """Files are limited to few bytes, which the operating system reports in the middle of the writing."""
    dice = torch.Generator().manual_seed(0)
    noise = [torch.randint(0, 256, (3, 64, 64), generator=dice, dtype=torch.uint8) for _ in range(80)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(RunError, match=f"{name} cannot be written: .*File too large"):
            encoding.write(noise, 80, (64, 64), encoding.target(tmp_path / name))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    left, used, other = (tmp_path / f".{name}.0123456{i}.tmp" for i, name in enumerate(("v", "v", "w")))
    for folder in (left, used, other):
        folder.mkdir()
        (folder / "frame000000.png").write_text("")
    with encoding._locked(used):
        encoding.write(frames(2), 2, (48, 64), encoding.target(tmp_path / "v"))
    assert sorted(os.listdir(tmp_path)) == sorted([used.name, other.name, "v"])


def test_an_interruption_within_a_write_is_not_lost(tmp_path):
    """PyAV drops what is raised in a file's methods, so it must not call them."""

    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            raise KeyboardInterrupt

    path = tmp_path / "v.mp4"
    with Interrupted(path, "w") as file:
        video = video_file.VideoFile(file, "mp4", 10, (32, 32))
        for frame in frames(5, (3, 32, 32)):
            video.add(frame)
        video.finish()
        video.close()
    assert len(decoded(path)[0]) == 5


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_no_half_file(unconditional, tmp_path, sign):
    out = tmp_path / "out" / "v.mp4"
    args = ["video", str(unconditional[1]), "--out", str(out), "--seconds", "10000", "--batch", "4"]
    process = harness.start(args)
    until = time.time() + 120
    while not (out.parent.is_dir() and os.listdir(out.parent)):
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < until
        time.sleep(0.02)
    time.sleep(0.3)  # some frames are encoded meanwhile
    process.send_signal(sign)
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()  # if the signal did not end it
    assert process.returncode != 0
    assert not out.exists()
    harness.command(*args[:4], "--seconds", 0.2, expected=0)
    assert os.listdir(out.parent) == ["v.mp4"]  # and what the killed one left is removed
    assert len(decoded(out)[0]) == 6
