"""Writing groups of shards: under temporary names, then renamed, then committed by the group's manifest."""

import contextlib
import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from stylegan_pg.data.datasets.fields import Field, member_suffix
from stylegan_pg.data.datasets.index import FORMAT, WITH_FIELDS, resolution_folder
from stylegan_pg.data.datasets.label_vectors import Vector, shortest
from stylegan_pg.data.pack.pyramid import PackOptions
from stylegan_pg.data.pack.sample_encoder import Result
from stylegan_pg.data.pack.samples import SourceSample
from stylegan_pg.errors import RunError

MAX_NUMBERS = 1 << 22  # of further fields in the index of a shard, after which another shard is begun


class Row(NamedTuple):
    """The outcome for one picture of SOURCE."""

    path: str
    version: str  # of the content of its files, see samples.py
    digest: str  # of the content that was read; empty if it could not be
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


class ShardFile:
    """A shard being written under a temporary name by webdataset's writer, with an owner, a mode and a time that are
    always the same, so that equal data is equal bytes."""

    def __init__(self, path: Path, fields: Mapping[str, Field]):
        try:
            from webdataset.writer import TarWriter  # imported late: it imports torch, which other commands do not need
        except ImportError as error:  # also where there is no memory for torch's libraries
            raise RunError(
                f"webdataset, which writes the shards, cannot be loaded ({error}): give the process more memory, or "
                "install stylegan-pg again"
            ) from error
        path.parent.mkdir(exist_ok=True)
        self.path, self.temporary, self.fields = path, _temporary(path), fields
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115 - closed by commit or discard
        self.writer = TarWriter(self.file, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False)
        self.samples: list[list[Any]] = []
        self.further: dict[str, list[list[float] | list[int]]] = {name: [] for name in fields}

    @property
    def length(self) -> int:
        """The bytes of the tar up to now."""
        return self.writer.tarstream.offset

    def add(
        self,
        key: str,
        suffix: str,
        image: bytes,
        label: int | None,
        further: Mapping[str, bytes],
        vectors: Mapping[str, Vector],
    ) -> None:
        """Add a sample: its picture, its class (None: it has none), the members of its further fields (an empty one is
        left out), and the numbers of its vectors."""
        offset = self.member(key, suffix, image)
        if label is not None:
            self.member(key, "cls", str(label).encode())
        self.samples.append([key, offset, len(image), label, zlib.crc32(image)])
        for name, field in self.fields.items():
            data = further[name]
            place = self.member(key, member_suffix(name, field, suffix), data) if data else 0
            if field.kind == "vector":
                self.further[name].append([shortest(value) for value in vectors[name]])
            else:
                self.further[name].append([place, len(data), zlib.crc32(data)])

    def member(self, key: str, suffix: str, data: bytes) -> int:
        """Write one member, of the sample that was added last, and return the offset of its content. One at a time,
        because the writer sorts those of a sample by their suffixes."""
        self.writer.write({"__key__": key, suffix: data})
        return self.length - len(data) - -len(data) % tarfile.BLOCKSIZE

    def commit(self) -> str:
        """Rename the tar and its index to their final names; returns the SHA-256 of the index."""
        self.writer.close()
        size = self.file.tell()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        index = self._index(size).encode()
        write_whole(self.path.with_suffix(".index.json"), index)
        return hashlib.sha256(index).hexdigest()

    def _index(self, size: int) -> str:
        version = WITH_FIELDS if self.fields else FORMAT
        head = json.dumps({"format": version, "tar": self.path.name, "tar_bytes": size})
        parts = [f'"samples": {_lines(self.samples)}']
        if self.fields:
            named = ",\n".join(f"{json.dumps(name)}: {_lines(rows)}" for name, rows in self.further.items())
            parts.append(f'"fields": {{\n{named}\n}}')
        return f"{head[:-1]}, {', '.join(parts)}}}\n"

    def discard(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # closing flushes, which a full disk refuses
            self.writer.tarstream.fileobj.close()  # its buffer; otherwise it would be written when it is collected
        with contextlib.suppress(OSError):
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def _lines(rows: list[Any]) -> str:
    """A list in JSON with one entry a line."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"


class Group:
    """Consecutive samples that are being written into one shard at each resolution."""

    def __init__(self, out: Path, name: str, first: int, recipe: PackOptions, fields: Mapping[str, Field]):
        self.out, self.name, self.first, self.recipe, self.fields = out, name, first, recipe, fields
        self.tars: dict[int, ShardFile] = {}
        self.rows: list[Row] = []
        self.count = self.upscaled = 0
        self.numbers = sum(field.size or 3 for field in fields.values())  # of a sample's further fields, in an index

    @property
    def is_full(self) -> bool:
        """Whether the shard is as large as it should be, or its index as large as is read quickly."""
        size = self.tars[self.recipe.resolution].length if self.tars else 0
        return size >= self.recipe.shard_size or self.count * self.numbers >= MAX_NUMBERS

    def add(self, sample: SourceSample, result: Result) -> None:
        """Add a sample with its encoded levels."""
        decided, label = "; ".join(result.decided), sample.label
        self.rows.append(Row(sample.path, sample.version, result.digest, label, result.reason, result.gone, decided))
        if not result.images:
            return
        if not self.tars:
            folders = {r: self.out / resolution_folder(r) for r in self.recipe.resolutions}
            for resolution, folder in folders.items():
                self.tars[resolution] = ShardFile(folder / f"{self.name}.tar", self.fields)
        key = f"{self.first + self.count:08d}"
        for level, ((resolution, tar), image) in enumerate(zip(self.tars.items(), result.images, strict=True)):
            further = {name: result.further[name][level] for name in self.fields}
            suffix = self.recipe.format_at(resolution)
            tar.add(key, suffix, image, None if label < 0 else label, further, dict(sample.vectors))
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
            if all(is_whole(out, manifest.name, *shard) for shard in manifest.index_sha256.items()):
                found.append(manifest)
    return found


def is_whole(out: Path, name: str, resolution: str, sha256: str) -> bool:
    """Whether a shard's index has this SHA-256, and its tar the length that the index says."""
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
