"""The progress of a run: TensorBoard's files and the progress line of a terminal."""

import fcntl
import os
import pty
import re
import struct
import termios

import harness
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.distributed


def test_tensorboard_agrees_with_the_files(tiny_data, tmp_path):
    """For a run that was stopped and continued, each step occurs once, with the numbers of stats.jsonl."""
    run = tmp_path / "run"
    common = {"output__trackers": "tensorboard", "metrics__every_kimg": 0.064, "metrics__images": 16}
    for total in (0.048, "null"):
        harness.finish(
            harness.start(harness.arguments(run, tiny_data, **(common | {"train__total_kimg": total}))), timeout=400
        )
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    stats = harness.stats(run)
    for name in ("loss_g", "loss_d", "r1_penalty", "alpha", "resolution", "lr_g"):
        logged = {e.step: e.value for e in board.Scalars(name)}
        written = {s["nimg"]: s[name] for s in stats if name in s}
        assert len(written) > 2, name
        assert len(board.Scalars(name)) == len(logged)
        assert logged == pytest.approx(written), name
    assert {"img_per_sec", "memory_mib"} <= set(board.Tags()["scalars"])
    assert any(tag.startswith("metrics/swd") for tag in board.Tags()["scalars"])
    for grid in board.Images("fakes"):
        path = run / "samples" / f"fakes-{grid.step:09d}img.png"
        (tmp_path / "logged.png").write_bytes(grid.encoded_image_string)
        np.testing.assert_array_equal(Image.open(tmp_path / "logged.png"), Image.open(path))
    assert len(board.Images("fakes")) == len(list((run / "samples").glob("fakes-*.png")))
    assert "reals" in board.Tags()["images"]


def test_the_progress_line_of_a_terminal(tiny_data, tmp_path):
    """nimg, phase, alpha, losses, speed, remaining time and memory in one line that is overwritten."""
    args = harness.arguments(tmp_path / "run", tiny_data)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = harness.start(args, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # Linux reports this when the last writer has closed it
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait(timeout=60) == 0
    lines = re.split(r"[\r\n]+", shown.decode())
    bars = [line for line in lines if "img/s" in line or "s/img" in line]
    assert len(bars) > 3
    last = bars[-1]
    total = harness.newest(tmp_path / "run")[1]["nimg"]
    assert re.search(rf"100%.* {total}(\.0)?/{total}(\.0)? \[\d\d:\d\d<\d\d:\d\d", last), last
    assert re.search(r"16x16.* alpha 1\.00  loss_g \d\.\d{3}  loss_d \d\.\d{3}  \d+ MiB", last), last
    assert any(re.search(r"alpha 0\.\d\d", bar) for bar in bars)  # the fade was shown
    # Lasting lines are not printed in the middle of a progress line.
    assert any(line.startswith("0.0 kimg: 8x8") for line in lines)
