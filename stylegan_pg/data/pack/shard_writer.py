"""Writing groups of shards: under temporary names, then renamed, then committed by the group's manifest."""

import contextlib
import hashlib
import json
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stylegan_pg.data.datasets.index import FORMAT, resolution_folder
from stylegan_pg.data.pack.pyramid import Recipe, Result
from stylegan_pg.data.pack.sources import File


class Row(NamedTuple):
    """The outcome for one picture of SOURCE."""

    path: str
    version: str  # of its content, see version_of
    digest: str  # of the bytes that were read; empty if they could not be
    label: int  # -1: none
    reason: str  # why it was left out; empty if it was not
    gone: bool  # it had been listed, and could not be found
    decided: str = ""  # about it, that its owner may not expect


class Manifest(NamedTuple):
    """The content of a committed group; `first` is the ordinal of its first sample."""

    name: str
    first: int
    rows: list[Row]
    index_sha256: dict[str, str]  # of each resolution's shard
    upscaled: int

    @property
    def packed(self) -> list[str]:
        return [row.path for row in self.rows if not row.reason]

    @staticmethod
    def read(text: bytes) -> "Manifest":
        """Parse a manifest. Raises KeyError, TypeError or ValueError if it is invalid."""
        content = json.loads(text)
        rows = [Row(*row) for row in content["rows"]]
        found = Manifest(content["name"], content["first"], rows, dict(content["index_sha256"]), content["upscaled"])
        kinds = {(*map(type, row),) for row in rows} | {(str, str, str, int, str, bool, str)}
        if len(kinds) > 1 or list(map(type, (found.name, found.first, found.upscaled))) != [str, int, int]:
            raise ValueError("a row has another form")
        return found

    def written(self) -> bytes:
        """The manifest as one line of JSON."""
        return json.dumps(self._asdict()).encode()


def version_of(picture: File) -> str:
    return f"{picture.size} {picture.stamp}"


class _Tar:
    """A shard being written under a temporary name; every header field is fixed so that equal data is equal bytes."""

    def __init__(self, path: Path):
        path.parent.mkdir(exist_ok=True)
        self.path, self.temporary = path, _temporary(path)
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115 - closed by commit or discard
        self.samples: list[list[Any]] = []

    def add(self, key: str, suffix: str, image: bytes, label: int | None) -> None:
        offset = self._member(f"{key}.{suffix}", image)
        if label is not None:
            self._member(f"{key}.cls", str(label).encode())
        self.samples.append([key, offset, len(image), label, zlib.crc32(image)])

    def _member(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)  # owner and time are 0 unless set
        info.size = len(data)
        self.file.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.file.tell()
        self.file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def commit(self) -> str:
        """Rename the tar and its index to their final names; returns the SHA-256 of the index."""
        self.file.write(bytes(2 * tarfile.BLOCKSIZE))
        self.file.write(bytes(-self.file.tell() % tarfile.RECORDSIZE))
        size = self.file.tell()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        rows = ",\n".join(json.dumps(sample) for sample in self.samples)
        head = json.dumps({"format": FORMAT, "tar": self.path.name, "tar_bytes": size})
        index = f'{head[:-1]}, "samples": [\n{rows}\n]}}\n'.encode()
        write_whole(self.path.with_suffix(".index.json"), index)
        return hashlib.sha256(index).hexdigest()

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses
            self.file.close()
        self.temporary.unlink(missing_ok=True)


class Group:
    """Consecutive samples that are being written into one shard at each resolution."""

    def __init__(self, out: Path, name: str, first: int, recipe: Recipe):
        self.out, self.name, self.first, self.recipe = out, name, first, recipe
        self.tars: dict[int, _Tar] = {}
        self.rows: list[Row] = []
        self.count = self.upscaled = 0

    @property
    def bytes(self) -> int:
        return self.tars[self.recipe.resolution].file.tell() if self.tars else 0

    def add(self, picture: File, label: int, result: Result) -> None:
        """Add a picture with its class number (-1 for none) and its encoded levels."""
        version, decided = version_of(picture), "; ".join(result.decided)
        self.rows.append(Row(picture.path, version, result.digest, label, result.reason, result.gone, decided))
        if not result.images:
            return
        if not self.tars:
            folders = {r: self.out / resolution_folder(r) for r in self.recipe.resolutions}
            for resolution, folder in folders.items():
                self.tars[resolution] = _Tar(folder / f"{self.name}.tar")
        key = f"{self.first + self.count:08d}"
        for (resolution, tar), image in zip(self.tars.items(), result.images, strict=True):
            tar.add(key, self.recipe.format_at(resolution), image, None if label < 0 else label)
        self.count += 1
        self.upscaled += result.upscaled

    def commit(self, books: Path) -> Manifest:
        """Rename the shards to their final names, then write the manifest, which commits the group."""
        committed = {str(resolution): tar.commit() for resolution, tar in self.tars.items()}
        manifest = Manifest(self.name, self.first, self.rows, committed, self.upscaled)
        write_whole(books / f"{self.name}.json", manifest.written())
        return manifest

    def discard(self) -> None:
        for tar in self.tars.values():
            tar.discard()


def committed_groups(out: Path, books: Path) -> list[Manifest]:
    """The manifests whose shards all exist, in the order of their names."""
    found = []
    for file in sorted(books.glob("[0-9]*.json"), key=lambda file: (len(file.name), file.name)):
        with contextlib.suppress(KeyError, TypeError, ValueError):  # of an older version: its group is made again
            manifest = Manifest.read(file.read_bytes())
            if all(_is_whole(out, manifest.name, *shard) for shard in manifest.index_sha256.items()):
                found.append(manifest)
    return found


def _is_whole(out: Path, name: str, resolution: str, sha256: str) -> bool:
    tar = out / resolution_folder(int(resolution)) / f"{name}.tar"
    index = tar.with_suffix(".index.json")
    if not (tar.exists() and index.exists()):
        return False
    data = index.read_bytes()
    return hashlib.sha256(data).hexdigest() == sha256 and json.loads(data)["tar_bytes"] == tar.stat().st_size


def clean(out: Path, books: Path, names: set[str]) -> None:
    """Remove temporary files and files of other groups than these; only files with our naming scheme are touched."""
    ours = re.compile(r"(\d{5,})(\.tar|(\.index)?\.json)(\.tmp)?")
    for file in [*books.glob("*"), *out.glob("r[0-9][0-9][0-9][0-9]/*")]:
        match = ours.fullmatch(file.name)
        if match and (match[4] or match[1] not in names):
            file.unlink()
    for file in out.glob("*.json.tmp"):
        file.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also Ctrl-C: it is raised again
        temporary.unlink(missing_ok=True)
        raise
