"""Reading packed datasets: `index.json`, the shards' own indexes, and single samples out of the tars.

A packed dataset is a folder that `stylegan-pg pack` wrote:

    index.json          what the dataset is; written last, so its presence means the dataset is complete
    sources.json        list of the pictures' paths within SOURCE, one a line; the place in it is the sample's ordinal
    report.json         what packing left out, and why
    pictures.json       what a repeated packing compares SOURCE with, see pack/ledger.py
    r0004/00000.tar     WebDataset tar: KEY.png|jpg|webp and, with labels, KEY.cls
    r0004/00000.index.json   {"format", "tar", "tar_bytes", "samples": [[key, offset, size, label or null, crc32], ...]}
    r0008/ ...

A dataset with further fields (fields.py) has format 2. Its index.json describes them under "fields", the tars hold them
as members (KEY.txt, KEY.B.jpg, KEY.labels.npy), and the shards' indexes say where, or hold the values of vectors
(field_columns.py). Others are written in format 1, which earlier versions read as well.

Every resolution has the same shard boundaries and the same order: ordinal i is the same picture at all of them, which
is what lets a run grow. Offsets and checksums make each sample readable and verifiable by itself, at random.

At resolution r a picture has base[0] r / 4 rows and base[1] r / 4 columns; index.json says the base, and where it says
none it is 4x4: pictures are r x r.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from stylegan_pg.data.datasets.description import check_index
from stylegan_pg.data.datasets.field_columns import fields_from, members_in, vectors_in
from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.datasets.sampler import WINDOW, Mixture, Order
from stylegan_pg.data.datasets.shard_index import REMEDY, Shard, fits, read_shards, stamps_of
from stylegan_pg.data.datasets.table import SampleTable, Tar
from stylegan_pg.data.images.decode import SQUARE, size_at
from stylegan_pg.data.storage import remote
from stylegan_pg.data.storage.index_cache import Arrays, cached
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import parse_json, printable
from stylegan_pg.urls import shown

if TYPE_CHECKING:
    from stylegan_pg.config import Config  # for the type checker only: importing it is slow

FORMAT, WITH_FIELDS = 1, 2  # of datasets without and with further fields
_MOST_SOURCES = 1 << 32  # bytes of sources.json
SMALL = 4096  # local indexes of up to so many samples are not cached
_DEFINING = ("format", "count", "resolutions", "channels", "labels", "shards")


@dataclass(frozen=True)
class DatasetIndex:
    """A dataset's description.

    `path` is its name in messages, without secrets; `root` is where it is read from. `label_names` is empty for an
    unlabelled dataset. `identity` is equal for equal data. `base` is (rows, columns) at resolution 4. `notes` are
    sentences about how the data was interpreted. `fields` are those besides the picture and its class. `others` are
    further datasets that are not aligned with this one (data.unpaired), by name; they are part of the identity.
    """

    path: str
    count: int
    resolutions: tuple[int, ...]
    channels: int
    label_names: tuple[str, ...]
    identity: str
    shards: tuple[Shard, ...] = field(repr=False)
    base: tuple[int, int] = SQUARE
    label_counts: tuple[int, ...] = field(default=(), repr=False)
    root: str = field(default="", repr=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
    fields: Mapping[str, Field] = field(default_factory=dict)
    others: Mapping[str, DatasetIndex] = field(default_factory=dict)

    def size_at(self, resolution: int) -> tuple[int, int]:
        """(height, width) of the pictures at one resolution, in pixels."""
        return size_at(resolution, self.base)

    def table(self, resolution: int) -> SampleTable:
        """The positions of all samples of one resolution.

        The shard indexes are verified by their checksums, and local tars by their sizes; the bytes of a sample are
        verified when it is read. The parsed table is cached in the user's cache for as long as the files have the same
        sizes and modification times.

        Raises:
            UsageError: the resolution was not packed, or a file is missing, truncated or altered.
            RunError: a server does not answer.
        """
        if resolution not in self.resolutions:
            raise UsageError(
                f"{self.path} has no resolution {resolution}, only {', '.join(map(str, self.resolutions))}: "
                "choose one of these, or pack the source again with a wider --resolution/--lowest range"
            )
        stems = [f"{self.root}/{resolution_folder(resolution)}/{shard.name}" for shard in self.shards]
        local = not remote.is_remote(self.root)
        stamps = stamps_of(stems) if local else np.zeros([0], np.int64)

        def read() -> Arrays:
            return read_shards(stems, self.shards, resolution, self.label_counts, self.fields) | {"stamps": stamps}

        def is_whole(arrays: Arrays) -> bool:
            return fits(arrays, stamps, self.count, self.fields)

        if local and self.count <= SMALL:
            found = read()
        else:
            place = os.path.abspath(self.root) if local else ""
            found = cached(f"packed {self.identity} {resolution} {place}", read, is_whole)
        return SampleTable(
            tars=[
                Tar(f"{stem}.tar", int(size), str(sha256))
                for stem, size, sha256 in zip(stems, found["tar_bytes"], found["tar_sha256"], strict=True)
            ],
            shard=np.repeat(np.arange(len(stems), dtype=np.int32), [shard.count for shard in self.shards]),
            offset=found["offset"],
            size=found["size"],
            label=found["label"],
            crc32=found["crc32"],
            resolution=resolution,
            channels=self.channels,
            base=self.base,
            fields=self.fields,
            vectors=vectors_in(found, self.fields),
            members=members_in(found, self.fields),
        )

    def order(self, seed: int, window: int = WINDOW) -> Order | Mixture:
        """The order in which a run with this seed and window shows the samples."""
        return Order([shard.count for shard in self.shards], seed, window)

    def sources(self) -> list[str]:
        """The path within SOURCE of each sample's picture; [] if sources.json does not exist.

        Raises:
            UsageError: sources.json is invalid.
        """
        file = f"{self.root}/sources.json"
        try:
            data = remote.read_url(file, max_bytes=_MOST_SOURCES)
        except OSError:  # the file is for information only and may have been removed
            return []
        found = parse_json(data, shown(file), REMEDY, max_bytes=_MOST_SOURCES)
        if not isinstance(found, list) or len(found) != self.count or not all(isinstance(path, str) for path in found):
            raise UsageError(f"{shown(file)} is no list of {self.count} paths, one of each image: {REMEDY}")
        return found

    def source_of(self, ordinal: int) -> str:
        """The path within SOURCE of a sample's picture; "" if sources.json is missing or invalid."""
        try:
            return self.sources()[ordinal]
        except (UsageError, IndexError):
            return ""


def identity_of(description: dict[str, Any]) -> str:
    """SHA-256 (hexadecimal) of the parts of an index.json that define the data, without the source's name and options.

    The samples enter by the checksums of the shard indexes, which hold their order, labels and checksums.
    """
    defining = {key: description[key] for key in _DEFINING}
    if (base := _base(description)) != SQUARE:  # the identity of square datasets is the one of earlier versions
        defining["base"] = base
    if description.get("fields"):  # and so is that of datasets without fields
        defining["fields"] = description["fields"]
    canonical = json.dumps(defining, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _base(description: dict[str, Any]) -> tuple[int, int]:
    rows, columns = description.get("base", SQUARE)
    return rows, columns


def check_base(index: DatasetIndex, config: Config) -> None:
    """Check that a configuration's networks generate pictures of the dataset's shape.

    Raises:
        UsageError: names both shapes and the remedy.
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


def parse_index(path: str, text: str) -> DatasetIndex:
    file = shown(f"{path}/index.json")
    remedy = "restore it, or pack the source again into an empty folder"
    data = parse_json(text, f"{file} is damaged or not an index of a packed dataset: it", remedy)
    if not isinstance(data, dict) or "format" not in data:
        raise UsageError(f"{file} is damaged or not an index of a packed dataset (it says no format): {remedy}")
    if data["format"] not in (FORMAT, WITH_FIELDS) or isinstance(data["format"], bool):
        version = printable(data["format"], 40)
        known = f"{FORMAT} and {WITH_FIELDS}"
        raise UsageError(f"{file} has format version {version}, this program reads {known}: update one, or pack again")
    try:
        if identity_of(data) != data["identity"]:
            raise ValueError("its identity does not match its contents")
        check_index(data)
        fields = fields_from(data.get("fields")) if data["format"] == WITH_FIELDS else {}
        if not fields and "fields" in data:
            raise ValueError(f"it has fields, which format {FORMAT} knows none of")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{file} is damaged ({printable(reason)}): {remedy}") from None
    return DatasetIndex(
        path=shown(path),
        root=path,
        count=data["count"],
        resolutions=tuple(data["resolutions"]),
        channels=data["channels"],
        label_names=tuple(data["labels"]["names"]) if data["labels"] else (),
        label_counts=tuple(data["labels"]["counts"]) if data["labels"] else (),
        identity=data["identity"],
        shards=tuple(
            Shard(s["name"], s["count"], {int(r): h for r, h in s["index_sha256"].items()}) for s in data["shards"]
        ),
        base=_base(data),
        fields=fields,
    )
