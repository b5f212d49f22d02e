"""Reading packed datasets: `index.json`, the shards' own indexes, and single samples out of the tars.

A packed dataset is a folder that `stylegan-pg pack` wrote:

    index.json          what the dataset is; written last, so its presence means the dataset is complete
    sources.json        list of the pictures' paths within SOURCE, one a line; the place in it is the sample's ordinal
    report.json         what packing left out, and why
    r0004/00000.tar     WebDataset tar: KEY.png|jpg|webp and, with labels, KEY.cls
    r0004/00000.index.json   {"format", "tar", "tar_bytes", "samples": [[key, offset, size, label or null, crc32], ...]}
    r0008/ ...

Every resolution has the same shard boundaries and the same order: ordinal i is the same picture at all of them, which
is what lets a run grow. Offsets and checksums make each sample readable and verifiable by itself, at random.

At resolution r a picture has base[0] r / 4 rows and base[1] r / 4 columns; index.json says the base, and where it says
none it is 4x4: pictures are r x r.
"""

import functools
import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from PIL import Image

from stylegan_pg.errors import UsageError

if TYPE_CHECKING:
    from stylegan_pg.config import Config  # takes its time, which every process that packs would spend

FORMAT = 1
SQUARE = (4, 4)  # the base of r x r pictures
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow mode
_DEFINING = ("format", "count", "resolutions", "channels", "labels", "shards")


class CorruptSample(Exception):  # noqa: N818 - it names the thing, and callers treat it as an event to be counted
    """A sample whose bytes are not what was packed: `shard` ("r0064/00003.tar"), `ordinal`, `reason`."""

    def __init__(self, shard: str, ordinal: int, reason: str):
        super().__init__(shard, ordinal, reason)  # these args are what pickling across processes carries
        self.shard, self.ordinal, self.reason = shard, ordinal, reason

    def __str__(self) -> str:
        return f"sample {self.ordinal} in {self.shard}: {self.reason}"


@dataclass(frozen=True)
class Shard:
    """One shard's entry in index.json: its name ("00000"), samples, and resolution -> SHA-256 of its index file."""

    name: str
    count: int
    index_sha256: dict[int, str]


@dataclass(frozen=True)
class DatasetIndex:
    """What a packed dataset is. `label_names` is empty when unlabelled; `identity` is the same for the same data;
    `base` is (rows, columns) at resolution 4."""

    path: str
    count: int
    resolutions: tuple[int, ...]
    channels: int
    label_names: tuple[str, ...]
    identity: str
    shards: tuple[Shard, ...] = field(repr=False)
    base: tuple[int, int] = SQUARE

    def size_at(self, resolution: int) -> tuple[int, int]:
        """(height, width) of the pictures at one resolution, in pixels."""
        return size_at(resolution, self.base)

    def table(self, resolution: int) -> "SampleTable":
        """Where every sample of one resolution lies.

        Checks the shard indexes against their checksums and the tars against their sizes (the tars' bytes are
        verified sample by sample as they are read). Raises UsageError for a resolution that was not packed and for a
        missing, truncated or altered file, by name.
        """
        if resolution not in self.resolutions:
            raise UsageError(
                f"{self.path} has no resolution {resolution}, only {', '.join(map(str, self.resolutions))}: "
                "choose one of these, or pack the source again with a wider --resolution/--lowest range"
            )
        folder = os.path.join(self.path, resolution_folder(resolution))
        tars = [os.path.join(folder, f"{shard.name}.tar") for shard in self.shards]
        rows: list[tuple[int, int, int, int, int]] = []
        for number, (shard, tar) in enumerate(zip(self.shards, tars, strict=True)):
            samples = _shard_samples(tar, shard.index_sha256[resolution], shard.count)
            rows += [(number, o, s, -1 if label is None else label, crc) for _key, o, s, label, crc in samples]
        columns = np.array(rows, dtype=np.int64).reshape(-1, 5).T
        return SampleTable(
            paths=tars,
            shard=columns[0].astype(np.int32),
            offset=columns[1].copy(),
            size=columns[2].copy(),
            label=columns[3].copy(),
            crc32=columns[4].astype(np.uint32),
            resolution=resolution,
            channels=self.channels,
            base=self.base,
        )

    def source_of(self, ordinal: int) -> str:
        """The path within SOURCE of the picture that a sample was; "" where sources.json is gone."""
        try:
            return json.loads(Path(self.path, "sources.json").read_text("utf-8"))[ordinal]
        except (OSError, ValueError, IndexError):
            return ""


@dataclass(frozen=True)
class SampleTable:
    """The samples of one resolution: tar paths, and arrays of [count] rows, one a sample.

    shard int32 (index into `paths`), offset and size int64 (bytes of the image within the tar), label int64 (class,
    -1 for none), crc32 uint32. Holds no open files itself, so it can be pickled and survives a fork.
    """

    paths: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray
    resolution: int
    channels: int
    base: tuple[int, int] = SQUARE

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every picture."""
        return size_at(self.resolution, self.base)

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def dtype(self) -> type[np.generic]:
        return np.uint8

    def read(self, i: int) -> bytes:
        """The encoded bytes of sample i (0 <= i < count).

        Raises CorruptSample when they are not the packed ones, OSError when the file cannot be read just now: a
        repeated call opens the file afresh.
        """
        path, size = self.paths[self.shard[i]], int(self.size[i])
        try:
            data = _pread(_open(path).fd, size, int(self.offset[i]))
        except OSError:
            _open.cache_clear()  # a stale handle (NFS) would fail for ever
            raise
        if len(data) != size:
            raise self._corrupt(i, f"the tar ends {size - len(data)} bytes too early")
        if zlib.crc32(data) != self.crc32[i]:
            raise self._corrupt(i, "checksum mismatch")
        return data

    def image(self, i: int) -> np.ndarray:
        """Sample i decoded: uint8 [channels, *image_size], the same bytes every time. Raises as `read`."""
        data = self.read(i)
        try:
            return decode(data, self.image_size, self.channels)
        except ValueError as error:
            raise self._corrupt(i, str(error)) from error

    def _corrupt(self, i: int, reason: str) -> CorruptSample:
        shard = "/".join(Path(self.paths[self.shard[i]]).parts[-2:])
        return CorruptSample(shard, int(i), reason)


def load_index(url: str) -> DatasetIndex:
    """The index of the packed dataset at `url`: its folder, or the index.json in it; `points:NAME` is made up.

    Raises UsageError where there is no such folder, no complete dataset in it, or an index.json that is damaged,
    edited or of another format version.
    """
    url = str(url).removeprefix("file://")
    if url.startswith("points:"):
        from stylegan_pg.data.points import load_points  # which needs the classes above

        return load_points(url)
    if "://" in url:
        raise UsageError(f"{url}: packed datasets are read from the file system; mount or copy it, and give its path")
    path = Path(url)
    if path.name == "index.json":
        path = path.parent
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; give the folder that `stylegan-pg pack SOURCE OUT` wrote (OUT)")
    try:
        text = (path / "index.json").read_text("utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"{path} has no index.json: it is not a packed dataset, or its packing was interrupted: "
            "run stylegan-pg pack again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path / 'index.json'} cannot be read: {error}") from error
    return _parse(path, text)


def identity_of(description: dict[str, Any]) -> str:
    """SHA-256 (hex) of what defines the data in an index.json: not the source's name, nor how it was asked for.

    The shard indexes' checksums stand for the samples: their order, labels, and the checksum of each one's bytes.
    """
    defining = {key: description[key] for key in _DEFINING}
    if (base := _base(description)) != SQUARE:  # square datasets are what they were before there were others
        defining["base"] = base
    canonical = json.dumps(defining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _base(description: dict[str, Any]) -> tuple[int, int]:
    rows, columns = map(int, description.get("base", SQUARE))
    if min(rows, columns) < 1:
        raise ValueError(f"its base is {rows}x{columns}")
    return rows, columns


def size_at(resolution: int, base: Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels at a resolution, for a base of (rows, columns) at resolution 4.

    As schedule.size_at, which comes with the configuration and so takes its time to import.
    """
    return base[0] * resolution // 4, base[1] * resolution // 4


def check_base(index: DatasetIndex, config: "Config") -> None:
    """Whether the networks of a configuration make pictures of the shape that a dataset has.

    Raises:
        UsageError: naming both shapes, and the remedy.
    """
    wanted = tuple(config.model.base)
    if wanted != index.base:
        there, asked = (f"{rows}x{columns}" for rows, columns in (index.base, wanted))
        height, width = index.size_at(config.resolution)
        raise UsageError(
            f"model.base={list(wanted)} does not fit {index.path}, whose base is {there} ({height} rows and {width} "
            f"columns at resolution {config.resolution}): set model.base=[{index.base[0]},{index.base[1]}], or pack "
            f"the pictures again with --base {asked}"
        )


def resolution_folder(resolution: int) -> str:
    """The folder of one resolution within a packed dataset: 64 -> "r0064"."""
    return f"r{resolution:04d}"


def decode(data: bytes, size: tuple[int, int], channels: int) -> np.ndarray:
    """Encoded JPEG, PNG or WebP -> uint8 [channels, *size], size = (height, width); strict, deterministic to the byte.

    Raises ValueError for bytes that do not decode cleanly, and for another size or another number of channels.
    """
    pixels = _decode_jpeg(data, channels) if data[:3] == b"\xff\xd8\xff" else _decode_other(data, channels)
    if pixels.shape[:2] != size:
        (height, width), (rows, columns) = pixels.shape[:2], size
        raise ValueError(f"is {height}x{width}, not {rows}x{columns} (rows x columns)")
    return np.ascontiguousarray(pixels.reshape(*size, channels).transpose(2, 0, 1))


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W, channels]. Strict mode raises for garbled data that other decoders pass silently."""
    coded = simplejpeg.decode_jpeg_header(data)[2].upper()
    if channels != (1 if coded == "GRAY" else 3):
        raise ValueError(f"its colour space is {coded}, which does not give {channels} channels")
    return simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB", strict=True)


def _decode_other(data: bytes, channels: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, channels] of a PNG or WebP."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as picture:
            picture.load()
            # WebP knows no grey, and drops an alpha that is opaque everywhere.
            if picture.format == "WEBP" and channels != 3:
                picture = picture.convert(MODES[channels])
    except MemoryError:
        raise
    except Exception as error:  # broken data makes Pillow raise nearly anything
        raise ValueError(f"does not decode: {error}") from error
    if picture.mode != MODES[channels]:
        raise ValueError(f"its mode is {picture.mode}, not {MODES[channels]}")
    return np.asarray(picture)


def _parse(path: Path, text: str) -> DatasetIndex:
    file = path / "index.json"
    remedy = "restore it, or pack the source again into an empty folder"
    try:
        data = json.loads(text)
        version = data["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} is damaged or not an index of a packed dataset ({error}): {remedy}") from error
    if version != FORMAT:
        raise UsageError(f"{file} has format version {version}, this program reads {FORMAT}: update one, or pack again")
    try:
        if identity_of(data) != data["identity"]:
            raise ValueError("its identity does not match its contents")
        index = DatasetIndex(
            path=str(path),
            count=int(data["count"]),
            resolutions=tuple(map(int, data["resolutions"])),
            channels=int(data["channels"]),
            label_names=tuple(data["labels"]["names"]) if data["labels"] else (),
            identity=data["identity"],
            shards=tuple(
                Shard(s["name"], int(s["count"]), {int(r): h for r, h in s["index_sha256"].items()})
                for s in data["shards"]
            ),
            base=_base(data),
        )
        if sum(shard.count for shard in index.shards) != index.count:
            raise ValueError("the shards' counts do not add up")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is damaged ({error!r}): {remedy}") from error
    return index


def _shard_samples(tar: str, sha256: str, count: int) -> list[list[Any]]:
    """The rows of one shard's index file, after checking it and the length of its tar."""
    file = tar.removesuffix(".tar") + ".index.json"
    remedy = "copy it again from where it was packed, or pack the source again into an empty folder"
    try:
        data = Path(file).read_bytes()
        tar_bytes = os.stat(tar).st_size
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename} is missing: {remedy}") from None
    except PermissionError as error:
        raise UsageError(f"{error.filename} may not be read: change its permissions") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error}): {remedy}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(f"{file} is not the one that was packed (checksum mismatch): {remedy}")
    shard = json.loads(data)
    if tar_bytes != shard["tar_bytes"]:
        raise UsageError(f"{tar} has {tar_bytes} bytes where {shard['tar_bytes']} were packed: {remedy}")
    if len(shard["samples"]) != count:
        raise UsageError(f"{file} lists {len(shard['samples'])} samples, index.json says {count}: {remedy}")
    return shard["samples"]


class _File:
    """A file descriptor that closes when the last user lets go, so that eviction from the cache is thread-safe."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


# One cache per process. A fork shares the descriptors harmlessly: pread leaves the file position alone.
_open = functools.lru_cache(maxsize=64)(_File)


def _pread(fd: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file (one pread may return less than asked)."""
    data = os.pread(fd, size, offset)
    while len(data) < size and (more := os.pread(fd, size - len(data), offset + len(data))):
        data += more
    return data
