"""What is written about a projection: pairs of pictures, a figure of its progress, and a video of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylegan_pg import files
from stylegan_pg.editing.video_file import VideoFile
from stylegan_pg.images import over_white, to_uint8
from stylegan_pg.untrusted import printable

SHOWN = 4  # pictures whose progress the figure shows
MOMENTS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75)  # shares of the steps at which it does
MOST_NAMED = 12  # curves that are named
MOST_FRAMES = 300  # of a video
SMALLEST_FRAME = 256  # rows of a video's frames, to which smaller pictures are enlarged


class Progress:
    """Gathers what the figure of a projection shows, in the first batch of pictures and over all of them."""

    def __init__(self, steps: int):
        self.moments = sorted({min(int(share * steps), steps - 1) for share in MOMENTS})
        self.targets: torch.Tensor | None = None
        self.names: list[str] = []
        self.films: list[tuple[str, torch.Tensor]] = []  # a title, and uint8 [n, C, H, W]
        self.curves: list[torch.Tensor] = []

    def begin(self, targets: torch.Tensor) -> None:
        """Show the progress of these pictures, uint8 [n, C, H, W], unless others came before."""
        if self.targets is None:
            self.targets = targets[:SHOWN]

    def step(self, step: int, images: torch.Tensor) -> None:
        """images: [n, C, H, W] in about [-1, 1]."""
        if not self.curves and step in self.moments:
            self.films.append((f"step {step}", to_uint8(images[:SHOWN]).cpu()))

    def end(self, names: Sequence[str], curves: torch.Tensor, images: torch.Tensor) -> None:
        """names: of n pictures. curves: their distances, [steps, n]. images: the results, uint8 [n, C, H, W]."""
        if not self.curves:
            self.films.append(("result", images[:SHOWN]))
        self.names += names
        self.curves.append(curves)

    def draw(self, path: Path) -> None:
        """Write the figure as a PNG file: the distance over the steps, and below it pictures at some of them.

        Raises:
            OSError: the file cannot be written.
        """
        from matplotlib.figure import Figure  # it is slow to import

        assert self.targets is not None
        films = [("target", self.targets), *self.films]
        rows = len(self.targets)
        figure = Figure(figsize=(1.5 * len(films) + 1, 3.5 + 1.6 * rows), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[3.5, 1.6 * rows])
        above, below = parts
        axes, place = above.subplots(), 0
        for curves in self.curves:
            for values in curves.t():
                label = printable(self.names[place], 40) if len(self.names) <= MOST_NAMED else None
                (line,) = axes.plot(values.tolist(), linewidth=1)
                if label:
                    line.set_label(label.lstrip("_") or label)
                place += 1
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("distance")
        axes.grid(alpha=0.3)
        if len(self.names) <= MOST_NAMED:
            for text in axes.legend(fontsize=7).get_texts():
                text.set_parse_math(False)
        grid = below.subplots(rows, len(films), squeeze=False)
        for column, (title, images) in enumerate(films):
            for row in range(rows):
                one = grid[row][column]
                one.imshow(
                    np.moveaxis(over_white(images[row : row + 1])[0].numpy(), 0, 2), cmap="gray", vmin=0, vmax=255
                )
                one.set_xticks([])
                one.set_yticks([])
                if row == 0:
                    one.set_title(title, fontsize=9)
        with files.atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=100)


class Video:
    """Videos of the progress, one MP4 file for each picture: the target beside what the generator makes at a step.

    A context manager. The files appear when it ends without an exception.
    """

    def __init__(self, paths: Sequence[Path], targets: torch.Tensor, steps: int, fps: int):
        """targets: uint8 [n, C, H, W]."""
        self.targets, self.every, self.fps, self.last = targets, -(-steps // MOST_FRAMES), fps, steps - 1
        self.paths, self.stack = paths, contextlib.ExitStack()
        self.open: list[VideoFile] = []

    def __enter__(self) -> Video:
        height, width = self.targets.shape[2:]
        with contextlib.ExitStack() as stack:
            for path in self.paths:
                file = stack.enter_context(files.atomic_write(path))
                video = VideoFile(file, "mp4", self.fps, (height, 2 * width), scale=-(-SMALLEST_FRAME // height))
                self.open.append(stack.enter_context(contextlib.closing(video)))
            self.stack = stack.pop_all()
        return self

    def step(self, step: int, images: torch.Tensor) -> None:
        """images: [n, C, H, W] in about [-1, 1]."""
        if step % self.every == 0 or step == self.last:
            self.show(to_uint8(images).cpu())

    def show(self, images: torch.Tensor) -> None:
        """Append a frame of each picture, uint8 [n, C, H, W]."""
        for video, target, image in zip(self.open, self.targets, images, strict=True):
            video.add(torch.cat([target, image], dim=2))

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is None:
            for video in self.open:
                video.finish()
        self.stack.__exit__(*failure)
