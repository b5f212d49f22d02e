"""WebDataset tars that other programs wrote, which have no index.json.

The headers of a tar are read once. The resulting index is stored in the user's cache (never in the dataset's folder)
under the tar's URL, size, and modification time or ETag. Samples are formed as webdataset does: consecutive files with
the same key, which ends at the first dot of a name (sample_names.py describes the exception). Each sample needs one
picture (jpg, jpeg, png, webp). A `cls` member (a number or a name) or `label` in a `json` member is its class; classes
are numbered as when packing. A `label` that is a list is a vector (foreign_labels.py). Further pictures, texts (txt),
arrays (npy) and the caption in a `json` member become further fields (foreign_fields.py). Other members are ignored.

Pictures may have any size. At each resolution the largest central part with the aspect ratio of the base is scaled down
(decode.py). A picture smaller than the resolution is refused when it is read. Palettes, 16 bits, CMYK and other numbers
of channels are converted to the dataset's channels as packing does. Orientation flags, and the colour profiles of grey,
RGB and RGBA pictures, are ignored, as by other readers of such tars; packing applies them.
"""

from __future__ import annotations

import hashlib
import os
import stat as modes
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from stylegan_pg.data.datasets.field_columns import described as described_fields
from stylegan_pg.data.datasets.field_columns import fields_from, members_in, vectors_in
from stylegan_pg.data.datasets.foreign_fields import PROBES, joined_columns, united
from stylegan_pg.data.datasets.foreign_labels import classes_of, vectors_of
from stylegan_pg.data.datasets.foreign_tars import packed, read_tar, unpacked
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.data.datasets.members import PICTURES
from stylegan_pg.data.datasets.shard_index import FETCHERS, START_PATIENCE, Shard
from stylegan_pg.data.datasets.table import SampleTable, Tar
from stylegan_pg.data.images.decode import size_at
from stylegan_pg.data.storage import remote, shard_cache
from stylegan_pg.data.storage.index_cache import Arrays, cached
from stylegan_pg.data.storage.patterns import expand
from stylegan_pg.data.storage.retry import TransientFault, retrying
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import printable
from stylegan_pg.urls import shown

LARGEST = 4096  # resolution
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
            fields=self.fields,
            vectors=vectors_in(self.columns, self.fields),
            members=members_in(self.columns, self.fields),
        )

    def source_of(self, ordinal: int) -> str:
        keys = unpacked(self.columns["keys"])
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
    names, probes = unpacked(columns["names"]), columns["probes"].tolist()
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
            Tar(
                one, stat.size, tag=stat.tag if remote.is_remote(one) else "", foreign=True, json_caption=bool(captions)
            )
            for one, stat, captions in zip(urls, stats, columns["json_caption"], strict=True)
        ),
        notes=tuple(unpacked(columns["notes"])),
        fields=fields_from(described) if (described := unpacked(columns["fields"])) else {},
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


def _read_all(pool: ThreadPoolExecutor, urls: list[str], stats: list[remote.Stat]) -> Arrays:
    """The columns of a dataset. Those of each tar are cached, too, so that reading many tars can be continued."""
    if len(urls) >= MANY:
        print(f"reading the headers of {len(urls)} tars, this once", file=sys.stderr)
    tars, notes = _alike(pool, urls, stats)
    notes = [f"{shown(url)}: {note}" for url, note in zip(urls, notes, strict=True) if note][:1]
    if odd := sum(int(tar["odd"]) for tar in tars):
        notes.append(
            f"{odd} samples have a label in their .json that is no number, name or list: they are without a class"
        )
    whole = [tar for tar in tars if len(tar["offset"])]
    fields = united([unpacked(tar["fields"]) for tar in whole], [unpacked(tar["left"]) for tar in whole])
    vectors = vectors_of(urls, tars, fields.fields)
    notes += [vectors.note] if vectors.note else []
    if fields.left:
        notes.append(f"members that are not alike in all samples, and are no fields: {', '.join(fields.left)}")
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    keys = [one for tar in tars for one in unpacked(tar["keys"])]
    counts = [len(tar["offset"]) for tar in tars]
    if not keys:
        raise UsageError(f"{shown(urls[0])} holds no pictures ({', '.join(PICTURES)}): check the path")
    numbers, names = classes_of(urls, tars, keys)
    probes = [tar["probe"] for tar in tars if len(tar["probe"])]
    if not probes:
        why = next(
            f"{shown(one)}: {unpacked(tar['why'])[0]}"
            for one, tar in zip(urls, tars, strict=True)
            if len(tar["offset"])
        )
        raise UsageError(f"none of the first pictures of the tars can be read ({why}): check them")
    return (
        joined_columns(fields.fields, whole)
        | vectors.arrays
        | {
            "fields": packed(described_fields(fields.fields | vectors.fields)),
            "json_caption": np.array([bool(tar["json_caption"]) for tar in tars]),
            "offset": np.concatenate([tar["offset"] for tar in tars]),
            "size": np.concatenate([tar["size"] for tar in tars]),
            "label": np.array(numbers, np.int64),
            "keys": packed(keys),
            "names": packed(names),
            "notes": packed(notes),
            "counts": np.array(counts, np.int64),
            "tar_bytes": np.array([int(tar["tar_bytes"]) for tar in tars], np.int64),
            "probes": np.stack(probes[:: -(-len(probes) // PROBES)]),
        }
    )


def _alike(pool: ThreadPoolExecutor, urls: list[str], stats: list[remote.Stat]) -> tuple[list[Arrays], list[str]]:
    """The columns of each tar, with keys that end at the same dot in all of them, and notes about that.

    Raises:
        UsageError: samples have several pictures, and not the same one comes first in all tars; as read_tar.
    """

    def read(url: str, stat: remote.Stat, last_dot: bool | None = None) -> Arrays:
        return cached(f"tar {last_dot} {_version(url, stat)}", lambda: read_tar(url, stat, last_dot))

    tars = list(pool.map(read, urls, stats))
    notes = [unpacked(tar["note"]) for tar in tars]
    firsts = {first: url for url, tar in zip(urls, tars, strict=True) if (first := unpacked(tar["first"]))}
    if len(firsts) > 1:
        (one, here), (other, there), *_ = firsts.items()
        raise UsageError(
            f"samples have several pictures, the first of which is {printable(one)} in {shown(here)} and "
            f"{printable(other)} in {shown(there)}: write tars with the same members"
        )
    is_odd = [bool(note and tar["last_dot"]) for note, tar in zip(notes, tars, strict=True)]
    if any(is_odd):  # then what the others need holds for all
        last_dot = not firsts
        tars = [
            read(url, stat, last_dot) if note and bool(tar["last_dot"]) != last_dot else tar
            for url, stat, tar, note in zip(urls, stats, tars, notes, strict=True)
        ]
        notes = [
            note if bool(tar["last_dot"]) == odd else "" for note, tar, odd in zip(notes, tars, is_odd, strict=True)
        ]
    return tars, notes
