"""MP4 and WebM files, which are written frame by frame with PyAV (the extra `video`)."""

from __future__ import annotations

import importlib
import os
from fractions import Fraction
from typing import Any, BinaryIO

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.images import over_white
from stylegan_pg.untrusted import printable

CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "mp4": ("libx264", {"crf": "17", "preset": "medium"}),
    "webm": ("libvpx-vp9", {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}),
}
BT709 = 1  # FFmpeg's number of these primaries, this transfer function and this matrix
LIMITED = 1  # FFmpeg's number of the range 16 to 235 of luma


def pyav() -> Any:
    """The module `av`. Raises UsageError if it is not installed."""
    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise UsageError(
            f"MP4 and WebM files are written by PyAV, which cannot be imported ({printable(error)}): run "
            "`pip install 'stylegan-pg[video]'`, or write a GIF (NAME.gif) or a folder of frames (NAME)"
        ) from None


def as_rgb(frame: torch.Tensor) -> torch.Tensor:
    """uint8 [C, H, W] with C = 1, 3 or 4 -> [3, H, W]; RGBA over white."""
    return over_white(frame[None])[0].expand(3, -1, -1)


def _by_path(file: BinaryIO | str) -> BinaryIO | str:
    """An open file as a path, by which FFmpeg writes it itself. Otherwise it would call `file.write`, and PyAV drops a
    KeyboardInterrupt that is raised in such a call, so that Ctrl-C would now and then do nothing."""
    if isinstance(file, str):
        return file
    path = f"/proc/self/fd/{file.fileno()}"
    return path if os.path.exists(path) else file


class VideoFile:
    """A video in the making: `add` frames, then `finish`; `close` it in any case."""

    def __init__(
        self,
        file: BinaryIO | str,
        format: str,
        rate: Fraction | int,
        size: tuple[int, int],
        *,
        scale: int = 1,
        options: dict[str, str] | None = None,
    ):
        """
        Args:
            file: an open file, or a path.
            format: one of CODECS.
            rate: frames per second.
            size: H and W of the frames. Sides of odd length are enlarged by a copy of the last row or column, because
                the colours of a video's pixels are stored for blocks of 2 x 2.
            scale: a factor by which pixels are enlarged.
            options: of the container, as FFmpeg takes them.

        Raises:
            UsageError: PyAV is not installed.
        """
        self.av, self.rate, self.scale, self.count = pyav(), Fraction(rate), scale, 0
        codec, how = CODECS[format]
        self.container: Any = self.av.open(_by_path(file), "w", format=format, options=options or {})
        stream = self.stream = self.container.add_stream(codec, rate=self.rate, options=how)
        stream.height, stream.width = (side * scale + side * scale % 2 for side in size)
        stream.pix_fmt = "yuv420p"
        # Otherwise players guess the matrix from the size of the picture.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED

    def add(self, frame: torch.Tensor) -> None:
        """Append a frame, uint8 [C, H, W] on the CPU with C = 1, 3 or 4."""
        rgb = as_rgb(frame).repeat_interleave(self.scale, dim=1).repeat_interleave(self.scale, dim=2)
        missing = (0, self.stream.width - rgb.shape[2], 0, self.stream.height - rgb.shape[1])
        if any(missing):
            rgb = torch.nn.functional.pad(rgb[None].float(), missing, mode="replicate")[0].to(torch.uint8)
        picture = self.av.VideoFrame.from_ndarray(rgb.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)
        picture.pts, picture.time_base = self.count, 1 / self.rate
        self.count += 1
        self.container.mux(self.stream.encode(picture))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        self.container.mux(self.stream.encode(None))

    def close(self) -> None:
        self.container.close()
