"""WebDataset tars that other programs wrote, which have no index.json.

The headers of a tar are read once. The resulting index is stored in the user's cache (never in the dataset's folder)
under the tar's URL, size, and modification time or ETag. Samples are formed as webdataset does: consecutive files with
the same key, which ends at the first dot of a name (sample_names.py describes the exception). Each sample needs one
picture (jpg, jpeg, png, webp). A `cls` member (a number or a name) or `label` in a `json` member is its class; classes
are numbered as when packing. Other members are ignored.

Pictures may have any size. At each resolution the largest central part with the aspect ratio of the base is scaled down
(decode.py). A picture smaller than the resolution is refused when it is read. Palettes, 16 bits, CMYK and other numbers
of channels are converted to the dataset's channels as packing does. Orientation flags, and the colour profiles of grey,
RGB and RGBA pictures, are ignored, as by other readers of such tars; packing applies them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat as modes
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from stylegan_pg.data.datasets.class_numbers import as_labels, number_classes
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.members import PICTURES, names_of, samples_of
from stylegan_pg.data.datasets.sample_names import Names
from stylegan_pg.data.datasets.shard_index import FETCHERS, START_PATIENCE, Shard
from stylegan_pg.data.datasets.table import SampleTable, Tar
from stylegan_pg.data.images.decode import BadPicture, header, size_at
from stylegan_pg.data.storage import remote, shard_cache, shard_reader
from stylegan_pg.data.storage.byte_stream import CHUNK
from stylegan_pg.data.storage.index_cache import Arrays, cached
from stylegan_pg.data.storage.patterns import expand
from stylegan_pg.data.storage.retry import TransientFault, retrying
from stylegan_pg.data.storage.shard_cache import CacheFull
from stylegan_pg.data.storage.tars import Member, content_of, members_of
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import open_regular, printable
from stylegan_pg.urls import shown

PROBES = 16  # pictures that tell sizes and channels
LARGEST = 4096  # resolution
PIECE = 64 << 20  # bytes of a tar that the cache has no room for, fetched at a time
MANY = 100  # tars


@dataclass(frozen=True, kw_only=True)
class ForeignIndex(DatasetIndex):
    """Foreign tars as a dataset: the same samples at every resolution."""

    tars: tuple[Tar, ...] = field(repr=False)
    columns: Arrays = field(repr=False, compare=False)

    def table(self, resolution: int) -> SampleTable:
        """As DatasetIndex.table. Raises UsageError for a resolution higher than the pictures'."""
        if resolution not in self.resolutions:
            height, width = self.size_at(resolution)
            raise UsageError(
                f"{self.path}: its pictures are smaller than {height}x{width} (rows x columns): choose a resolution of "
                f"at most {max(self.resolutions)}"
            )
        return SampleTable(
            tars=list(self.tars),
            shard=np.repeat(np.arange(len(self.tars), dtype=np.int32), [shard.count for shard in self.shards]),
            offset=self.columns["offset"],
            size=self.columns["size"],
            label=self.columns["label"],
            crc32=np.zeros([self.count], np.uint32),
            resolution=resolution,
            channels=self.channels,
            base=self.base,
        )

    def source_of(self, ordinal: int) -> str:
        keys = _unpacked(self.columns["keys"])
        return keys[ordinal] if 0 <= ordinal < self.count else ""


def load_foreign(url: str, base: tuple[int, int]) -> ForeignIndex:
    """Open foreign tars as a dataset.

    Args:
        url: see opening.load_index.
        base: rows and columns at resolution 4, to whose aspect ratio pictures are cropped.

    Raises:
        UsageError: tars are missing, truncated, compressed or not tars, or samples have no picture.
        RunError: a server does not answer.
    """
    urls = expand(url)
    patience = shard_cache.patience(min(START_PATIENCE, shard_cache.settings().patience))
    with patience, ThreadPoolExecutor(FETCHERS if any(map(remote.is_remote, urls)) else 1) as pool:
        stats = list(pool.map(_stat, urls))
        key = "\n".join(_version(one, stat) for one, stat in zip(urls, stats, strict=True))
        columns = cached(f"foreign\n{key}", lambda: _read_all(pool, urls, stats))
    names, probes = _unpacked(columns["names"]), columns["probes"].tolist()
    identity = hashlib.sha256(f"foreign {base[0]}x{base[1]}".encode())
    for name in ("offset", "size", "label", "keys", "names", "counts", "tar_bytes"):
        identity.update(hashlib.sha256(columns[name].tobytes()).digest())
    sizes = [4 << k for k in range((LARGEST // 4).bit_length())]
    fitting = [r for r in sizes for h, w, _ in probes if size_at(r, base)[0] <= h and size_at(r, base)[1] <= w]
    return ForeignIndex(
        path=shown(url),
        count=len(columns["label"]),
        resolutions=tuple(sorted(set(fitting))),
        channels=Counter(channels for _, _, channels in probes).most_common(1)[0][0],
        label_names=tuple(names),
        identity=identity.hexdigest(),
        shards=tuple(Shard(f"{i:05d}", n, {}) for i, n in enumerate(columns["counts"].tolist())),
        base=base,
        tars=tuple(
            Tar(one, stat.size, tag=stat.tag if remote.is_remote(one) else "", foreign=True)
            for one, stat in zip(urls, stats, strict=True)
        ),
        notes=tuple(_unpacked(columns["notes"])),
        columns=columns,
    )


def _stat(url: str) -> remote.Stat:
    try:
        if not remote.is_remote(url) and not modes.S_ISREG(os.stat(remote.file_path(url)).st_mode):
            raise UsageError(f"{printable(url)} is no file: give tars, or a folder of tars alone")
        return retrying(shard_cache.settings().patience, lambda: remote.stat_url(url, shard_cache.settings().patience))
    except TransientFault as error:
        raise RunError(f"{error}: try again when the server is up") from None
    except FileNotFoundError:
        raise UsageError(f"{printable(url)}: no such tar; check the path") from None
    except OSError as error:
        raise UsageError(f"{shown(url)} cannot be read: {error}") from None


def _version(url: str, stat: remote.Stat) -> str:
    """The key of a tar in the index cache. Paths are made absolute, so that a relative path is not ambiguous."""
    return f"{url if remote.is_remote(url) else os.path.abspath(url)} {stat.size} {stat.tag}"


def _packed(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def _unpacked(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())


# ---------------------------------------------------------------------------------------------------- reading tars


def _read_all(pool: ThreadPoolExecutor, urls: list[str], stats: list[remote.Stat]) -> Arrays:
    """The columns of a dataset. Those of each tar are cached, too, so that reading many tars can be continued."""
    if len(urls) >= MANY:
        print(f"reading the headers of {len(urls)} tars, this once", file=sys.stderr)

    def read(url: str, stat: remote.Stat, last_dot: bool = False) -> Arrays:
        return cached(f"tar {last_dot} {_version(url, stat)}", lambda: _read_one(url, stat, last_dot))

    tars = list(pool.map(read, urls, stats))
    notes = [_unpacked(tar["note"]) for tar in tars]
    if any(note and tar["last_dot"] for note, tar in zip(notes, tars, strict=True)):  # then that holds for all
        tars = [
            read(url, stat, last_dot=True) if note and not tar["last_dot"] else tar
            for url, stat, tar, note in zip(urls, stats, tars, notes, strict=True)
        ]
        notes = [note if tar["last_dot"] else "" for note, tar in zip(notes, tars, strict=True)]
    notes = [f"{shown(url)}: {note}" for url, note in zip(urls, notes, strict=True) if note][:1]
    if odd := sum(int(tar["odd"]) for tar in tars):
        notes.append(
            f"{odd} samples have a label in their .json that is neither a number nor a name: they are without a class"
        )
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    keys, labels = ([one for tar in tars for one in _unpacked(tar[name])] for name in ("keys", "labels"))
    counts = [len(tar["offset"]) for tar in tars]
    if not keys:
        raise UsageError(f"{shown(urls[0])} holds no pictures ({', '.join(PICTURES)}): check the path")
    bare = [i for i, label in enumerate(labels) if label is None]
    if bare and any(int(tar["cls"]) for tar in tars):
        tar = int(np.repeat(np.arange(len(urls)), counts)[bare[0]])
        raise UsageError(
            f"{shown(urls[tar])}: {keys[bare[0]]} has no label (.cls), which others have: a member is missing; "
            "write the tar again"
        )
    origin = shown(urls[0])
    numbers, names = number_classes(as_labels(labels, origin, mixed_are_names=True), origin)
    probes = [tar["probe"] for tar in tars if len(tar["probe"])]
    if not probes:
        why = next(
            f"{shown(one)}: {_unpacked(tar['why'])[0]}"
            for one, tar in zip(urls, tars, strict=True)
            if len(tar["offset"])
        )
        raise UsageError(f"none of the first pictures of the tars can be read ({why}): check them")
    return {
        "offset": np.concatenate([tar["offset"] for tar in tars]),
        "size": np.concatenate([tar["size"] for tar in tars]),
        "label": np.array(numbers, np.int64),
        "keys": _packed(keys),
        "names": _packed(names),
        "notes": _packed(notes),
        "counts": np.array(counts, np.int64),
        "tar_bytes": np.array([int(tar["tar_bytes"]) for tar in tars], np.int64),
        "probes": np.stack(probes[:: -(-len(probes) // PROBES)]),
    }


def _read_one(url: str, stat: remote.Stat, last_dot: bool) -> Arrays:
    """The columns of one tar, with keys as its own names suggest, or ending at the last dot.

    An invalid tar from the shard cache is fetched once more, because the copy may be truncated if its size was unknown.
    """
    named, known = shown(url), {"size": stat.size, "tag": stat.tag}
    try:
        try:
            return _read_whole(url, named, known, last_dot)
        except UsageError:
            if not remote.is_remote(url):
                raise
            shard_reader.report_damage(url, **known)
            return _read_whole(url, named, known, last_dot)
    except TransientFault as error:
        raise RunError(f"{error}: try again when the server is up") from None
    except OSError as error:
        raise UsageError(f"{named} cannot be read: {error}") from None


def _read_whole(url: str, named: str, known: dict[str, Any], last_dot: bool) -> Arrays:
    with _opened(url, known) as file:
        members = members_of(file, named)
        names = Names(True, "") if last_dot else names_of(members, named)
        samples = list(samples_of(file, members, names, named))
        probe, why = _probe(file, [sample.picture for sample in samples[:PROBES]])
        return {
            "offset": np.array([sample.picture.offset for sample in samples], np.int64),
            "size": np.array([sample.picture.size for sample in samples], np.int64),
            "keys": _packed([sample.key for sample in samples]),
            "labels": _packed([sample.label for sample in samples]),
            "cls": np.array(any(sample.has_cls for sample in samples)),
            "odd": np.array(sum(sample.is_odd for sample in samples)),
            "tar_bytes": np.array(os.fstat(file.fileno()).st_size),
            "probe": np.array(probe, np.int64),
            "last_dot": np.array(names.last_dot),
            "note": _packed(names.note),
            "why": _packed([why]),
        }


def _opened(url: str, known: dict[str, Any]) -> IO[bytes]:
    """A whole tar as an open file: from the shard cache, or a temporary file if the cache has no room for it."""
    try:
        return open_regular(shard_reader.local_path(url, **known))
    except CacheFull:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
        try:
            _fill(file, url)
        except BaseException:
            file.close()
            raise
        return file


def _fill(file: IO[bytes], url: str) -> None:
    """Copy the content of a URL to a file. It may take half of the free disk space, as a server or a command may send
    data for ever."""
    patience, room = shard_cache.settings().patience, shutil.disk_usage(tempfile.gettempdir()).free // 2

    def write(data: bytes) -> None:
        file.write(data)
        if file.tell() > room:
            raise UsageError(
                f"{shown(url)} has more than {room >> 20} MiB, half of what is free in {tempfile.gettempdir()}: make "
                "room there, or raise data.cache_gib, so that it fits into the cache"
            )

    def print_all() -> None:
        file.seek(0)
        file.truncate()
        with remote.open_url(url) as stream:
            while data := stream.read1(CHUNK):
                write(data)

    if url.startswith("pipe:"):  # reading in pieces would run the command again for each of them
        retrying(patience, print_all)
    else:
        while data := remote.read_url(url, file.tell(), file.tell() + PIECE, patience):
            write(data)
    file.seek(0)  # this also flushes the buffer


def _probe(file: IO[bytes], pictures: list[Member]) -> tuple[list[int], str]:
    """Height, width and channels of the first readable picture; if there is none, the fault of the first picture."""
    why = ""
    for picture in pictures:
        try:
            return list(header(content_of(file, picture))[:3]), ""
        except BadPicture as error:
            why = why or f"{printable(picture.name)} {error}"
    return [], why
