"""WebDataset tars that something else wrote, without an index of ours.

Their headers are read once, and what they say is kept in the user's cache (never in the dataset's folder) under each
tar's URL, size, and time or ETag. Members are samples as webdataset reads them: consecutive files with the same path up
to the name's first dot. Each needs one picture (jpg, jpeg, png, webp); `cls` (a number or a name) and `label` in a
`json` are classes, numbered as when packing. Everything else is left alone.

Pictures may have any size: at each resolution the largest central part that has the shape of the base is made smaller
(decode.py). Smaller ones, and those with another number of channels than most, are refused one by one as they are
read. Orientations and colour profiles are ignored, as in other readers of such tars; packing applies them.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from braceexpand import braceexpand

from stylegan_pg.data import cache, remote
from stylegan_pg.data.decode import BadPicture, header, size_at
from stylegan_pg.data.index import FETCHERS, DatasetIndex, Shard
from stylegan_pg.data.kept import Arrays, kept
from stylegan_pg.data.patience import Passing
from stylegan_pg.data.sources import number_classes
from stylegan_pg.data.table import SampleTable, Tar
from stylegan_pg.errors import RunError, UsageError

PICTURES = ("jpg", "jpeg", "png", "webp")
PROBES = 16  # pictures that tell sizes and channels
LARGEST = 4096  # resolution
MANY = 100  # tars
LABEL_BYTES = 1 << 20  # of a json with a label
_META = re.compile(r"__[^/]*__($|/)")  # as webdataset


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class _Sample(NamedTuple):
    key: str
    picture: _Member
    label: int | str | None
    has_cls: bool


@dataclass(frozen=True, kw_only=True)
class ForeignIndex(DatasetIndex):
    """Foreign tars as a dataset: the same samples at every resolution."""

    tars: tuple[Tar, ...] = field(repr=False)
    columns: Arrays = field(repr=False, compare=False)

    def table(self, resolution: int) -> SampleTable:
        """Raises UsageError for a resolution that the pictures do not have."""
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


def expand(url: str) -> list[str]:
    """The tars behind a URL: a folder's in the order of their names, a glob pattern's, a brace pattern's, or one; "::"
    separates several. Raises UsageError where there are none."""
    found: list[str] = []
    for part in url.split("::"):
        try:
            each = list(braceexpand(part))
        except ValueError as error:
            raise UsageError(f"{part} is no brace pattern ({error}): write it as 'shard-{{000..099}}.tar'") from None
        for one in each:
            local = not remote.is_remote(one) and "://" not in one.removeprefix("file://")
            path = one.removeprefix("file://")
            if local and os.path.isdir(path):
                found += sorted(glob.glob(f"{glob.escape(path)}/*.tar"))
            elif local and "*" in path:
                found += sorted(glob.glob(path))
            else:
                found.append(path if local else one)
    if not found:
        raise UsageError(f"{url}: no tar there; check the path")
    if len(set(found)) < len(found):
        twice = next(tar for tar, n in Counter(found).items() if n > 1)
        raise UsageError(f"{url} names {remote.shown(twice)} twice: name each tar once")
    return found


def load_foreign(url: str, base: tuple[int, int]) -> ForeignIndex:
    """The dataset of foreign tars at `url`, cropped to `base`.

    Raises:
        UsageError: tars that are missing, truncated, compressed or no tars, samples without a picture or, where others
            have them, without labels.
        RunError: a server does not answer.
    """
    urls = expand(url)
    with ThreadPoolExecutor(FETCHERS if any(map(remote.is_remote, urls)) else 1) as pool:
        stats = list(pool.map(_stat, urls))
        key = "\n".join(f"{one} {stat.size} {stat.tag}" for one, stat in zip(urls, stats, strict=True))
        columns = kept(f"foreign\n{key}", lambda: _read_all(pool, urls, stats))
    names, probes = _unpacked(columns["names"]), columns["probes"].tolist()
    identity = hashlib.sha256(f"foreign {base[0]}x{base[1]}".encode())
    for name in ("offset", "size", "label", "keys", "names", "counts", "tar_bytes"):
        identity.update(hashlib.sha256(columns[name].tobytes()).digest())
    sizes = [4 << k for k in range((LARGEST // 4).bit_length())]
    fitting = [r for r in sizes for h, w, _ in probes if size_at(r, base)[0] <= h and size_at(r, base)[1] <= w]
    return ForeignIndex(
        path=remote.shown(url),
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
        columns=columns,
    )


def _stat(url: str) -> remote.Stat:
    try:
        return remote.stat_url(url)
    except Passing as error:
        raise RunError(f"{error}: try again when the server is up") from None
    except FileNotFoundError:
        raise UsageError(f"{url}: no such tar; check the path") from None
    except OSError as error:
        raise UsageError(f"{remote.shown(url)} cannot be read: {error}") from None


def _packed(content: list[Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def _unpacked(array: np.ndarray) -> list[Any]:
    return json.loads(array.tobytes())


# ---------------------------------------------------------------------------------------------------- reading tars


def _read_all(pool: ThreadPoolExecutor, urls: list[str], stats: list[remote.Stat]) -> Arrays:
    """The columns of a dataset. Those of its tars are kept too: an interrupted reading of many goes on there."""
    if len(urls) >= MANY:
        print(f"reading the headers of {len(urls)} tars, this once", file=sys.stderr)

    def read(url: str, stat: remote.Stat) -> Arrays:
        return kept(f"tar {url} {stat.size} {stat.tag}", lambda: _read_one(url, stat))

    tars = list(pool.map(read, urls, stats))
    keys, labels = ([one for tar in tars for one in _unpacked(tar[name])] for name in ("keys", "labels"))
    counts = [len(tar["offset"]) for tar in tars]
    if not keys:
        raise UsageError(f"{remote.shown(urls[0])} holds no pictures ({', '.join(PICTURES)}): check the path")
    bare = [i for i, label in enumerate(labels) if label is None]
    if bare and any(int(tar["cls"]) for tar in tars):
        tar = int(np.repeat(np.arange(len(urls)), counts)[bare[0]])
        raise UsageError(
            f"{remote.shown(urls[tar])}: {keys[bare[0]]} has no label (.cls), which others have: a member is missing; "
            "write the tar again"
        )
    if {type(label) for label in labels} == {int, str}:  # names, some of which are numbers
        labels = list(map(str, labels))
    numbers, names = ([-1] * len(keys), []) if bare else number_classes(labels, remote.shown(urls[0]))
    probes = [tar["probe"] for tar in tars if len(tar["probe"])]
    if not probes:
        raise UsageError(f"{remote.shown(urls[0])}: none of the first pictures of the tars can be read: check them")
    return {
        "offset": np.concatenate([tar["offset"] for tar in tars]),
        "size": np.concatenate([tar["size"] for tar in tars]),
        "label": np.array(numbers, np.int64),
        "keys": _packed(keys),
        "names": _packed(names),
        "counts": np.array(counts, np.int64),
        "tar_bytes": np.array([int(tar["tar_bytes"]) for tar in tars], np.int64),
        "probes": np.stack(probes[:: -(-len(probes) // PROBES)]),
    }


def _read_one(url: str, stat: remote.Stat) -> Arrays:
    """What one tar holds."""
    named = remote.shown(url)
    try:
        with open(cache.local_path(url, stat.size, tag=stat.tag), "rb") as file:
            samples = list(_samples(file, named))
            probe = next(filter(len, (_probe(file, sample.picture) for sample in samples[:PROBES])), [])
            return {
                "offset": np.array([sample.picture.offset for sample in samples], np.int64),
                "size": np.array([sample.picture.size for sample in samples], np.int64),
                "keys": _packed([sample.key for sample in samples]),
                "labels": _packed([sample.label for sample in samples]),
                "cls": np.array(any(sample.has_cls for sample in samples)),
                "tar_bytes": np.array(os.fstat(file.fileno()).st_size),
                "probe": np.array(probe, np.int64),
            }
    except Passing as error:
        raise RunError(f"{error}: try again when the server is up") from None
    except OSError as error:
        raise UsageError(f"{named} cannot be read: {error}") from None


def _samples(file: BinaryIO, named: str) -> Iterator[_Sample]:
    """The samples of a tar, members grouped as webdataset groups them.

    Raises:
        UsageError: a sample without a picture or with two, and as _members.
    """
    members = ((_split(member.name), member) for member in _members(file, named))
    for key, group in itertools.groupby(((*split, member) for split, member in members if split), lambda m: m[0]):
        found = [(suffix.lower(), member) for _, suffix, member in group]
        files = dict(found)
        pictures = [member for suffix, member in found if suffix in PICTURES]
        if len(pictures) != 1:
            raise UsageError(
                f"{named}: sample {key} has {'no picture' if not pictures else 'several pictures'} "
                f"({', '.join(files)}): each sample needs one {' or '.join(PICTURES)}; write the tar again"
            )
        label = None
        if "cls" in files:
            text = _content(file, files["cls"]).decode("utf-8", "replace").strip()
            label = int(text) if re.fullmatch(r"-?\d{1,18}", text) else text
        elif "json" in files and files["json"].size <= LABEL_BYTES:
            label = _json_label(_content(file, files["json"]), f"{named}: {key}.json")
        yield _Sample(key, pictures[0], label, "cls" in files)


def _split(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member, split at the first dot of its name; None for what is no part of a sample."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)  # webdataset's own
    return None if match is None or _META.match(name) else (match[1], match[2])


def _json_label(data: bytes, named: str) -> int | str | None:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise UsageError(f"{named} is not JSON ({error}): write the tar again") from None
    label = content.get("label") if isinstance(content, dict) else None
    return label if isinstance(label, int | str) and not isinstance(label, bool) else None


def _members(file: BinaryIO, named: str) -> Iterator[_Member]:
    """The regular files of a tar (ustar, GNU, pax), in order.

    Raises:
        UsageError: no tar, or one that is damaged or ends too early.
    """
    end, size = 0, os.fstat(file.fileno()).st_size
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * member.isreg()
                last = member.name
                if end > size:
                    break
                if member.issparse():
                    raise UsageError(f"{named}: {member.name} is a sparse file: write the tar without --sparse")
                if member.isreg():
                    yield _Member(member.name, member.offset_data, member.size)
    except tarfile.TarError as error:
        if not last:
            raise UsageError(
                f"{named} is no uncompressed tar ({error}): unpack .tar.gz and the like first, or fetch it again"
            ) from None
        end = size + 1
    # tarfile takes the end of the file, and anything that is no header, for the end of the tar.
    mark = os.pread(file.fileno(), tarfile.BLOCKSIZE, end)
    if end > size or len(mark) < tarfile.BLOCKSIZE:
        raise UsageError(f"{named} is truncated after {last or 'its beginning'}: fetch it again, or write it again")
    if any(mark):
        raise UsageError(f"{named} is damaged after {last}, at byte {end}: fetch it again, or write it again")


def _content(file: BinaryIO, member: _Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset)


def _probe(file: BinaryIO, picture: _Member) -> list[int]:
    """Height, width and channels of a picture, nothing where it cannot be read."""
    try:
        return [*header(_content(file, picture))]
    except BadPicture:
        return []
