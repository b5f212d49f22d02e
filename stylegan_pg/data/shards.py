"""Writing groups of shards: temporary names, then final ones, then the manifest that commits the group."""

import contextlib
import hashlib
import json
import os
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from stylegan_pg.data.index import FORMAT, resolution_folder
from stylegan_pg.data.picture import Recipe, Result


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
        """Give the tar and its index their names; returns the SHA-256 of the index."""
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
    """Consecutive samples on their way into one shard at each resolution."""

    def __init__(self, out: Path, number: int, first: int, recipe: Recipe):
        self.out, self.name, self.first, self.recipe = out, f"{number:05d}", first, recipe
        self.tars: dict[int, _Tar] = {}
        self.sources: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.upscaled = 0

    @property
    def bytes(self) -> int:
        return self.tars[self.recipe.resolution].file.tell() if self.tars else 0

    def add(self, path: str, label: int | None, result: Result) -> None:
        if not result.images:
            self.unreadable.append((path, result.reason))
            return
        if not self.tars:
            folders = {r: self.out / resolution_folder(r) for r in self.recipe.resolutions}
            for resolution, folder in folders.items():
                self.tars[resolution] = _Tar(folder / f"{self.name}.tar")
        key = f"{self.first + len(self.sources):08d}"
        for (resolution, tar), image in zip(self.tars.items(), result.images, strict=True):
            tar.add(key, self.recipe.format_at(resolution), image, label)
        self.sources.append(path)
        self.upscaled += result.upscaled

    def commit(self, books: Path, following: int) -> dict[str, Any]:
        """Name the shards, then write the manifest, which is what counts; `following` is the next picture's place."""
        manifest = {
            "name": self.name,
            "following": following,
            "index_sha256": {str(resolution): tar.commit() for resolution, tar in self.tars.items()},
            "sources": self.sources,
            "unreadable": self.unreadable,
            "upscaled": self.upscaled,
        }
        write_whole(books / f"{self.name}.json", json.dumps(manifest).encode())
        return manifest

    def discard(self) -> None:
        for tar in self.tars.values():
            tar.discard()


def committed_groups(out: Path, books: Path) -> list[dict[str, Any]]:
    """The manifests, from the first, whose shards are all there."""
    manifests = []
    while (file := books / f"{len(manifests):05d}.json").exists():
        manifest = json.loads(file.read_bytes())
        for resolution, sha256 in manifest["index_sha256"].items():
            tar = out / resolution_folder(int(resolution)) / f"{manifest['name']}.tar"
            index = tar.with_suffix(".index.json")
            if not (tar.exists() and index.exists()):
                return manifests
            data = index.read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256 or json.loads(data)["tar_bytes"] != tar.stat().st_size:
                return manifests
        manifests.append(manifest)
    return manifests


def clean(out: Path, books: Path, names: set[str]) -> None:
    """Remove what an interrupted packing left beyond the committed groups: files of our own naming only."""
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
    """Write a whole file or, if interrupted, none."""
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
