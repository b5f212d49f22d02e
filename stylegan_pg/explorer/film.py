"""Videos that the page asks for: from face to face, or one face through the snapshots of a run."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from stylegan_pg.editing.video_file import VideoFile
from stylegan_pg.errors import UsageError
from stylegan_pg.explorer.face import Face, parse_face
from stylegan_pg.explorer.faces import Faces, eased
from stylegan_pg.images import over_white, to_pil
from stylegan_pg.untrusted import is_number

MOST_FRAMES = 3600
MOST_FACES = 64
MOST_BYTES = 1 << 30  # of frames that a WebP keeps until its end
FORMATS = {"mp4": "video/mp4", "webp": "image/webp"}


@dataclass(frozen=True)
class Film:
    """What a video shows. seconds: from each face to the next one; of a film through snapshots, of the whole. kind:
    faces, or training."""

    faces: tuple[Face, ...]
    seconds: float = 2.0
    fps: int = 30
    loop: bool = True
    format: str = "mp4"
    kind: str = "faces"


def parse_film(content: Any) -> Film:
    """A Film from a JSON object with the same names.

    Raises:
        UsageError: a name is unknown, a value has another type or range, or the film would be too long.
    """
    if not isinstance(content, dict) or content.keys() - Film.__dataclass_fields__.keys():
        raise UsageError("film is no JSON object of faces, seconds, fps, loop, format and kind")
    kind, faces = content.get("kind", "faces"), content.get("faces")
    if kind not in ("faces", "training"):
        raise UsageError("film.kind is faces or training")
    fewest = 2 if kind == "faces" else 1
    if not isinstance(faces, list) or not fewest <= len(faces) <= MOST_FACES:
        raise UsageError(f"a film needs {fewest} to {MOST_FACES} faces")
    seconds, fps = content.get("seconds", 2.0), content.get("fps", 30)
    if not is_number(seconds, 0.1, 600) or not is_number(fps, 1, 60) or int(fps) != fps:
        raise UsageError("film.seconds is a number from 0.1 to 600, film.fps a whole number from 1 to 60")
    if content.get("format", "mp4") not in FORMATS or not isinstance(content.get("loop", True), bool):
        raise UsageError(f"film.format is one of {', '.join(FORMATS)}, film.loop true or false")
    film = Film(**{**content, "faces": tuple(map(parse_face, faces)), "seconds": float(seconds), "fps": int(fps)})
    if frame_count(film) > MOST_FRAMES:
        raise UsageError(f"this film would have {frame_count(film)} frames, more than {MOST_FRAMES}: shorten it")
    return film


def frame_count(film: Film) -> int:
    """The number of frames. A loop ends one frame before its first one, so that it continues without a pause."""
    each = max(1, round(film.seconds * film.fps))
    if film.kind == "training":
        return each
    return each * len(film.faces) if film.loop else each * (len(film.faces) - 1) + 1


def face_frames(faces: Faces, film: Film, batch: int) -> Iterator[torch.Tensor]:
    """The frames of a film from face to face, uint8 [n, C, H, W]: the way between two faces begins and ends slowly, and
    the noise is that of the first face."""
    codes = [faces.code(face) for face in film.faces]
    codes = [*codes, codes[0]] if film.loop else codes
    first, each = film.faces[0], max(1, round(film.seconds * film.fps))
    for k, (a, b) in enumerate(itertools.pairwise(codes)):
        steps = [eased(i / each) for i in range(each)]
        if not film.loop and k == len(codes) - 2:
            steps.append(1.0)
        for i in range(0, len(steps), batch):
            yield faces.images(faces.interpolated(a, b, steps[i : i + batch]), first.noise, first.noise_seed)


def newest_of(load: Callable[[str], Faces], names: Sequence[str]) -> Faces:
    """The last generator that can be loaded. Raises what loading the last one raises if there is none."""
    for name in reversed(names[1:]):
        with contextlib.suppress(Exception):
            return load(name)
    return load(names[0])


def training_frames(
    load: Callable[[str], Faces], names: Sequence[str], film: Film, size: tuple[int, int], channels: int
) -> Iterator[torch.Tensor]:
    """The frames of a film of one face through the snapshots `names`, uint8 [1, C, *size]. Smaller pictures are
    enlarged. A snapshot that has been deleted or cannot be used shows the picture before it, the first one black."""
    face, count = film.faces[0], frame_count(film)
    shown: tuple[int, torch.Tensor] | None = None
    for frame in range(count):
        k = min(frame * len(names) // count, len(names) - 1)
        if shown is None or shown[0] != k:
            try:
                faces = load(names[k])
                picture = faces.picture(_fitting(face))[None]
            except Exception:
                picture = shown[1] if shown is not None else torch.zeros([1, channels, *size], dtype=torch.uint8)
            if picture.shape[1] != channels:
                picture = picture[:, :1].expand(-1, channels, -1, -1)
            if tuple(picture.shape[2:]) != size:
                picture = F.interpolate(picture.float(), size=size, mode="nearest").to(torch.uint8)
            shown = k, picture
        yield shown[1]


def _fitting(face: Face) -> Face:
    """The face without directions, which belong to another snapshot's generator."""
    return Face(**{**vars(face), "directions": {}}) if face.directions else face


class Encoder(Protocol):
    """Takes frames uint8 [N, 3, H, W] and returns a file at the end."""

    def add(self, frames: torch.Tensor) -> None: ...

    def finish(self) -> bytes: ...

    def close(self) -> None:
        """Free what is held, whether or not the file was finished."""


class Mp4:
    """H.264 in an MP4 file. Pictures smaller than 256 pixels are enlarged by a whole number, because players blur
    them."""

    def __init__(self, height: int, width: int, fps: int):
        self.folder = tempfile.TemporaryDirectory(prefix="stylegan-pg-")
        self.path = Path(self.folder.name) / "faces.mp4"  # a file, whose index is moved to its beginning at the end
        scale, options = max(1, 256 // max(height, width)), {"movflags": "faststart"}
        self.file = VideoFile(str(self.path), "mp4", fps, (height, width), scale=scale, options=options)

    def add(self, frames: torch.Tensor) -> None:
        for frame in frames:
            self.file.add(frame)

    def finish(self) -> bytes:
        self.file.finish()
        self.file.close()
        return self.path.read_bytes()

    def close(self) -> None:
        self.file.close()
        self.folder.cleanup()


class WebP:
    """An animated WebP file, with Pillow, which keeps all frames until the end."""

    def __init__(self, height: int, width: int, fps: int, frames: int):
        if frames * height * width * 3 > MOST_BYTES:
            raise UsageError("a WebP of this length and size does not fit into memory: shorten it, or take MP4")
        self.fps, self.frames = fps, []

    def add(self, frames: torch.Tensor) -> None:
        self.frames += [to_pil(frame) for frame in frames]

    def finish(self) -> bytes:
        buffer, (first, *others) = io.BytesIO(), self.frames
        duration = round(1000 / self.fps)
        first.save(buffer, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, quality=85, method=2)
        return buffer.getvalue()

    def close(self) -> None:
        self.frames = []


def has_mp4() -> bool:
    """Whether PyAV is installed and can encode H.264."""
    try:
        import av

        av.CodecContext.create("libx264", "w")
    except Exception:
        return False
    return True


def encoder(film: Film, height: int, width: int) -> Encoder:
    """The encoder of a film's format.

    Raises:
        UsageError: PyAV is not installed, or the film is too large for WebP.
    """
    if film.format == "webp":
        return WebP(height, width, film.fps, frame_count(film))
    if not has_mp4():
        raise UsageError("MP4 needs PyAV: pip install 'stylegan-pg[video]', or choose WebP")
    return Mp4(height, width, film.fps)


class Job:
    """A film in the making; `run` is its work, for Worker.steps. `done` counts frames."""

    def __init__(self, film: Film, frames: Callable[[], tuple[Iterator[torch.Tensor], int, int]]):
        """
        Args:
            frames: called by the worker; gives the frames, and their height and width.
        """
        self.film, self.frames = film, frames
        self.done, self.total = 0, frame_count(film)
        self.problem, self.content, self.cancelled = "", b"", False

    def run(self) -> Iterator[None]:
        try:
            frames, height, width = self.frames()
            with contextlib.closing(encoder(self.film, height, width)) as target:
                for some in frames:
                    if self.cancelled:
                        return
                    target.add(over_white(some) if some.shape[1] != 1 else some.expand(-1, 3, -1, -1))
                    self.done += len(some)
                    yield
                self.content = target.finish()
        except Exception as error:
            self.problem = message(error)


def message(error: BaseException) -> str:
    """A sentence about a fault, for the page."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in text:
        return "there is not enough memory for this: close other programs, or start with a smaller --batch"
    return text if len(text) < 500 else text[:500] + " ..."
