"""The table of all samples of one resolution, and reading single samples from the tars."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from stylegan_pg.data.datasets.arrays import BadArray, read_array
from stylegan_pg.data.datasets.fields import CAPTION, Field, Members
from stylegan_pg.data.datasets.json_members import caption_in, json_content
from stylegan_pg.data.images.decode import SQUARE, BadPicture, decode, decode_mask, decode_to_fit, size_at
from stylegan_pg.data.storage import shard_cache, shard_reader
from stylegan_pg.data.storage.remote import is_remote
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.urls import shown

KINDS = ("checksum", "decode", "size", "channels", "truncated")  # of what makes a sample bad


class CorruptSample(Exception):  # noqa: N818 - it names the thing, and callers treat it as an event to be counted
    """The bytes of a sample are wrong: `shard` ("r0064/00003.tar"), `ordinal`, `reason`, and `kind`, one of KINDS."""

    def __init__(self, shard: str, ordinal: int, reason: str, kind: str = "decode"):
        super().__init__(shard, ordinal, reason, kind)  # these args are what pickling across processes carries
        self.shard, self.ordinal, self.reason, self.kind = shard, ordinal, reason, kind

    def __str__(self) -> str:
        return f"sample {self.ordinal} in {self.shard}: {self.reason}"


class Tar(NamedTuple):
    """A shard: its path or URL; if known, its length in bytes, its SHA-256 (hexadecimal), and a tag (ETag or
    modification time) that changes with its content.

    `foreign`: it was not packed by this program; it has no checksums of samples, and pictures of any size.
    `json_caption`: its captions are entries of json members (json_members.py).
    """

    path: str
    bytes: int | None = None
    sha256: str = ""
    tag: str = ""
    foreign: bool = False
    json_caption: bool = False


@dataclass(frozen=True)
class SampleTable:
    """The samples of one resolution: tars, and arrays with one element for each sample.

    shard int32 (index into `tars`), offset and size int64 (bytes of the image within the tar), label int64 (class,
    -1 for none), crc32 uint32 (0 in foreign tars). A table holds no open files, so it can be pickled and used after a
    fork.

    `fields` says what further fields there are. A vector's values are in `vectors`, float32 [samples, size]; the
    position of any other field's values in `members`.
    """

    tars: list[Tar]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray
    resolution: int
    channels: int
    base: tuple[int, int] = SQUARE
    fields: Mapping[str, Field] = field(default_factory=dict)
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    members: Mapping[str, Members] = field(default_factory=dict)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every picture."""
        return size_at(self.resolution, self.base)

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def dtype(self) -> type[np.generic]:
        return np.uint8

    @functools.cached_property
    def paths(self) -> list[str]:
        """The tars' paths and URLs."""
        return [tar.path for tar in self.tars]

    def read(self, i: int) -> bytes:
        """The encoded picture of sample i (0 <= i < count); a remote tar is first fetched into the shard cache.

        Raises:
            CorruptSample: the bytes are not the packed ones.
            OSError: the file cannot be read at the moment; another call opens it again.
        """
        return self._read(i, int(self.offset[i]), int(self.size[i]), int(self.crc32[i]))

    def _read(self, i: int, offset: int, size: int, crc32: int) -> bytes:
        tar = self.tars[self.shard[i]]
        data = shard_reader.read(tar.path, offset, size, size=tar.bytes, sha256=tar.sha256 or None, tag=tar.tag)
        if len(data) != size:
            raise self._corrupt(i, f"the tar ends {size - len(data)} bytes too early", "truncated")
        if not tar.foreign and zlib.crc32(data) != crc32:
            raise self._corrupt(i, "checksum mismatch", "checksum")
        return data

    def image(self, i: int, out: np.ndarray | None = None) -> np.ndarray:
        """The picture of sample i, uint8 [channels, *image_size], always the same bytes. Raises as `read`.

        It is written to `out` ([*image_size, channels], C-contiguous) if given.
        """
        return self._decoded(i, self.read(i), self.channels, out)

    def _decoded(self, i: int, data: bytes, channels: int, out: np.ndarray | None, what: str = "") -> np.ndarray:
        to_pixels = decode_to_fit if self.tars[self.shard[i]].foreign else decode
        try:
            return to_pixels(data, self.image_size, channels, out)
        except BadPicture as error:
            raise self._corrupt(i, f"{what}{error}", error.kind) from error
        except MemoryError as error:
            raise RunError(
                f"there is not enough memory to decode {self.place_of(i)}: give the process more, or take fewer "
                "data.workers"
            ) from error

    def value(self, name: str, i: int, out: np.ndarray | None = None) -> np.ndarray | str:
        """The value of a further field of sample i, as datasets/fields.py describes it. Raises as `read`.

        A picture or mask is written to `out` ([*image_size, channels], C-contiguous) if given.
        """
        described = self.fields[name]
        if described.kind == "vector":
            return self.vectors[name][i]
        place = self.members[name]
        if described.kind == "text" and not place.size[i]:
            return ""
        data = self._read(i, int(place.offset[i]), int(place.size[i]), int(place.crc32[i]))
        if described.kind == "image":
            return self._decoded(i, data, described.channels, out, f"its {name}: ")
        if described.kind == "mask":
            return self._mask(i, name, data, out)
        if described.kind == "array":
            return self._array(i, name, data)
        if name == CAPTION and self.tars[self.shard[i]].json_caption:
            return self._json_caption(i, data)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise self._corrupt(i, f"its {name} is no text in UTF-8", "decode") from None

    def _json_caption(self, i: int, data: bytes) -> str:
        try:
            return caption_in(json_content(data, "its json", "write the tar again"))
        except UsageError as error:
            raise self._corrupt(i, str(error), "decode") from None

    def _mask(self, i: int, name: str, data: bytes, out: np.ndarray | None) -> np.ndarray:
        try:
            return decode_mask(data, self.image_size, out)
        except BadPicture as error:
            raise self._corrupt(i, f"its {name}: {error}", error.kind) from error

    def _array(self, i: int, name: str, data: bytes) -> np.ndarray:
        wanted = self.fields[name]
        try:
            found = read_array(data)
        except BadArray as error:
            raise self._corrupt(i, f"its {name} {error}", "decode") from None
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            there, asked = f"{found.dtype} {list(found.shape)}", f"{wanted.dtype} {list(wanted.shape)}"
            raise self._corrupt(i, f"its {name} is {there}, not {asked}", "size")
        return found

    def report_damage(self, i: int) -> None:
        """Report that sample i is corrupt: the next `read` fetches a remote tar again, unless the cached copy is known
        to equal the source."""
        tar = self.tars[self.shard[i]]
        shard_reader.report_damage(tar.path, size=tar.bytes, sha256=tar.sha256 or None, tag=tar.tag)

    def remote_shards(self) -> dict[int, shard_cache.RemoteShard]:
        """The tars that are read through the shard cache, by their index in `tars`."""
        found = enumerate(self.tars)
        return {
            i: shard_cache.RemoteShard(t.path, t.bytes, t.sha256 or None, t.tag) for i, t in found if is_remote(t.path)
        }

    def place_of(self, i: int) -> str:
        """The position of sample i as a text for messages."""
        return f"sample {i} in {self._shard_of(i)}"

    def _shard_of(self, i: int) -> str:
        return "/".join(PurePosixPath(shown(self.tars[self.shard[i]].path)).parts[-2:])

    def _corrupt(self, i: int, reason: str, kind: str) -> CorruptSample:
        return CorruptSample(self._shard_of(i), int(i), reason, kind)


def join(tables: Sequence[SampleTable], labels: Sequence[np.ndarray]) -> SampleTable:
    """Concatenate tables of the same resolution, channels and base, with new labels. Fields that are equally described
    in all of them stay."""
    fields = {n: f for n, f in tables[0].fields.items() if all(table.fields.get(n) == f for table in tables)}
    firsts = np.cumsum([0, *(len(table.tars) for table in tables[:-1])])
    return SampleTable(
        tars=[tar for table in tables for tar in table.tars],
        shard=np.concatenate([t.shard + first for t, first in zip(tables, firsts, strict=True)]).astype(np.int32),
        offset=np.concatenate([table.offset for table in tables]),
        size=np.concatenate([table.size for table in tables]),
        label=np.concatenate(list(labels)),
        crc32=np.concatenate([table.crc32 for table in tables]),
        resolution=tables[0].resolution,
        channels=tables[0].channels,
        base=tables[0].base,
        fields=fields,
        vectors={n: np.concatenate([t.vectors[n] for t in tables]) for n, f in fields.items() if f.kind == "vector"},
        members={
            n: Members(*map(np.concatenate, zip(*(t.members[n] for t in tables), strict=True)))
            for n, f in fields.items()
            if f.kind != "vector"
        },
    )
