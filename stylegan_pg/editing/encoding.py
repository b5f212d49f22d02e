"""Writing of frames: MP4 and WebM (PyAV, the extra `video`), GIF, a folder of PNG files, or a strip in one PNG file.

Frames are written while they are generated, so the memory does not grow with their number (except for a strip, which is
one picture). A file or folder gets its name when it is complete; an interruption leaves what had that name before.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from tqdm import tqdm

from stylegan_pg import files
from stylegan_pg.editing.video_file import CODECS, VideoFile, as_rgb, pyav
from stylegan_pg.errors import UsageError
from stylegan_pg.images import save_image, to_pil
from stylegan_pg.inference.generate import writing
from stylegan_pg.inference.sampling import MAX_PIXELS
from stylegan_pg.untrusted import printable

FORMATS = ("mp4", "webm", "gif", "frames", "strip")
SUFFIXES = {".mp4": "mp4", ".webm": "webm", ".gif": "gif", ".png": "strip", "": "frames"}
FASTEST = 240  # frames per second
FASTEST_GIF = 50  # viewers take the delay of 1/100 s, the next shorter one, for 1/10 s
LONGEST_SIDE = {"mp4": 16384, "webm": 65535, "gif": 65535}
_FRAME = re.compile(r"frame\d{6,}\.png")


@dataclass(frozen=True)
class Target:
    """Where frames are written, and how.

    path: Of the file, or of the folder of PNG files.
    format: One of FORMATS.
    fps: Frames per second of a video or a GIF.
    columns: Of a strip; 0 for one row.
    scale: Factor by which pixels are enlarged.
    """

    path: Path
    format: str
    fps: float = 30.0
    columns: int = 0
    scale: int = 1

    @property
    def rate(self) -> Fraction:
        """Frames per second as a fraction with a small denominator."""
        return Fraction(self.fps).limit_denominator(1001)


def target(path: Path, format: str | None = None, *, fps: float = 30.0, columns: int = 0, scale: int = 1) -> Target:
    """Check where and how frames are to be written. Nothing is written yet.

    Args:
        format: One of FORMATS; None decides by the suffix of `path`, where none stands for a folder of frames.

    Raises:
        UsageError: The format or the frame rate is not possible, PyAV is missing, or the folder holds other files.
    """
    if format is None:
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"{printable(path)}: the suffix decides what is written: .mp4, .webm, .gif, .png for a strip, or none "
                "for a folder of frames; or give --format"
            )
        format = SUFFIXES[path.suffix.lower()]
    if format not in FORMATS:
        raise UsageError(f"format {printable(repr(format))} is not possible: {', '.join(FORMATS)}")
    fastest = FASTEST_GIF if format == "gif" else FASTEST
    if not (math.isfinite(fps) and 0.1 <= fps <= fastest):
        raise UsageError(f"fps={fps}: {format} takes 0.1 to {fastest} frames per second")
    if columns and format != "strip":
        raise UsageError("--columns is of a strip: give --format strip or a name that ends with .png")
    if columns < 0 or not 1 <= scale <= 64:
        raise UsageError(f"columns={columns}, scale={scale}: give 0 or more columns, and a scale from 1 to 64")
    if format in CODECS:
        pyav()
    if path.is_dir() != (format == "frames") and path.exists():
        kind = "a file" if format == "frames" else "a folder"
        raise UsageError(f"{printable(path)} is {kind}, which {format} cannot be written to: give another name")
    if format == "frames" and path.is_dir():
        others = [name for name in sorted(os.listdir(path)) if not _FRAME.fullmatch(name)]
        if others:
            raise UsageError(f"{printable(path)} holds other files ({printable(others[0])}, ...): give a new folder")
    return Target(path, format, fps, columns, scale)


def write(
    frames: Iterable[torch.Tensor], count: int, size: tuple[int, int], to: Target, *, progress: bool = False
) -> Path:
    """Write frames as they come; returns the path.

    Args:
        frames: uint8 images [C, H, W] with C = 1, 3 or 4, all of one shape.
        count: Their number.
        size: H and W.
        to: See `target`. In a video, sides of odd length are enlarged by a copy of the last row or column, because the
            colours of its pixels are stored for blocks of 2 x 2. MP4, WebM and GIF show RGBA pictures over white.

    Raises:
        UsageError: The frames are too large for the format, or the path cannot be written to. RunError: the disk is
            full. Whatever `frames` raises.
    """
    height, width = (side * to.scale for side in size)
    if max(height, width) > LONGEST_SIDE.get(to.format, max(height, width)):
        raise UsageError(
            f"frames of {width}x{height} pixels are too large for {to.format}, whose longest side is "
            f"{LONGEST_SIDE[to.format]}: write a folder of frames, or smaller ones"
        )
    columns = min(to.columns or count, count)
    if to.format == "strip" and (-(-count // columns) * height) * (columns * width) > MAX_PIXELS:
        raise UsageError(
            f"a strip of {count} frames of {width}x{height} would have more than {MAX_PIXELS} pixels: give fewer "
            "frames, or write a folder of them"
        )
    folder = to.path.parent
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(
        _enlarged(frames, to.scale), total=count, unit="frame", desc=printable(to.path.name, 40), disable=not progress
    )
    with writing(to.path):
        if to.format == "frames":
            _write_folder(bar, to.path)
            return to.path
        files.remove_leftovers(folder, to.path.name)
        if to.format == "strip":
            save_image(_strip(bar, count, columns, (height, width)), to.path)
            return to.path
        with files.atomic_write(to.path) as file:
            if to.format == "gif":
                _write_gif(bar, file, to.rate)
            else:
                _write_video(bar, file, to, (height, width))
    return to.path


def _enlarged(frames: Iterable[torch.Tensor], scale: int) -> Iterator[torch.Tensor]:
    for frame in frames:
        yield frame if scale == 1 else frame.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def _write_video(frames: Iterable[torch.Tensor], file: BinaryIO, to: Target, size: tuple[int, int]) -> None:
    with contextlib.closing(VideoFile(file, to.format, to.rate, size)) as video:
        for frame in frames:
            video.add(frame)
        video.finish()


def _write_gif(frames: Iterable[torch.Tensor], file: BinaryIO, rate: Fraction) -> None:
    """Write an endless GIF (version 89a), each frame with a palette of its own.

    Pillow's `save` would keep all frames in memory and join equal ones. Delays are whole hundredths of a second, so
    they alternate where the rate asks for others, and their sum is right.
    """
    from PIL import GifImagePlugin

    for number, frame in enumerate(frames):
        picture = to_pil(as_rgb(frame)).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
        if number == 0:
            side = [length.to_bytes(2, "little") for length in picture.size]
            file.write(b"GIF89a" + b"".join(side) + bytes([0x70, 0, 0]))  # no global palette, 8 bits per colour
            file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # without end
        ends = [round(Fraction(100 * n) / rate) for n in (number, number + 1)]
        # `getdata` writes a block with the delay only if it is not 0, which it never is.
        data = GifImagePlugin.getdata(picture, duration=10 * (ends[1] - ends[0]), include_color_table=True)
        file.write(b"".join(data))
    file.write(b";")


def _strip(frames: Iterable[torch.Tensor], count: int, columns: int, size: tuple[int, int]) -> torch.Tensor:
    """uint8 frames [C, H, W] -> [C, rows H, columns W]."""
    (height, width), rest = size, iter(frames)
    first = next(rest)
    picture = first.new_zeros([len(first), -(-count // columns) * height, columns * width])
    for number, frame in enumerate(chain([first], rest)):
        y, x = number // columns * height, number % columns * width
        picture[:, y : y + height, x : x + width] = frame
    return picture


def _write_folder(frames: Iterable[torch.Tensor], path: Path) -> None:
    """Write frame000000.png, ... into a temporary folder beside `path`, and rename it.

    The temporary folder is locked. The operating system releases the lock when the process dies, so one without a lock
    was left by a killed process, and is removed.
    """
    for other in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.tmp"):
        if other.is_dir() and not other.is_symlink():
            with _locked(other) as is_ours:
                if is_ours:
                    shutil.rmtree(other, ignore_errors=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    part.mkdir()
    try:
        with _locked(part):
            for number, frame in enumerate(frames):
                save_image(frame, part / f"frame{number:06d}.png")
            if path.is_dir():  # of an earlier call, see `target`
                before = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
                path.rename(before)
                part.rename(path)
                shutil.rmtree(before)
            else:
                part.rename(path)
    except BaseException:  # KeyboardInterrupt is included; it is raised again
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder within the block; yields whether this was possible, which it is not if another process has."""
    descriptor, is_locked = os.open(folder, os.O_RDONLY), False
    try:
        with contextlib.suppress(OSError):  # also on file systems without locks, where leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        yield is_locked
    finally:
        os.close(descriptor)
