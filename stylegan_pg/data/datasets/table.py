"""The table of all samples of one resolution, and reading single samples from the tars."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from stylegan_pg.data.images.decode import SQUARE, BadPicture, decode, decode_to_fit, size_at
from stylegan_pg.data.storage import shard_cache, shard_reader
from stylegan_pg.data.storage.remote import is_remote
from stylegan_pg.errors import RunError
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
    """

    path: str
    bytes: int | None = None
    sha256: str = ""
    tag: str = ""
    foreign: bool = False


@dataclass(frozen=True)
class SampleTable:
    """The samples of one resolution: tars, and arrays with one element for each sample.

    shard int32 (index into `tars`), offset and size int64 (bytes of the image within the tar), label int64 (class,
    -1 for none), crc32 uint32 (0 in foreign tars). A table holds no open files, so it can be pickled and used after a
    fork.
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
        """The encoded bytes of sample i (0 <= i < count); a remote tar is first fetched into the shard cache.

        Raises:
            CorruptSample: the bytes are not the packed ones.
            OSError: the file cannot be read at the moment; another call opens it again.
        """
        tar, size = self.tars[self.shard[i]], int(self.size[i])
        data = shard_reader.read(
            tar.path, int(self.offset[i]), size, size=tar.bytes, sha256=tar.sha256 or None, tag=tar.tag
        )
        if len(data) != size:
            raise self._corrupt(i, f"the tar ends {size - len(data)} bytes too early", "truncated")
        if not tar.foreign and zlib.crc32(data) != self.crc32[i]:
            raise self._corrupt(i, "checksum mismatch", "checksum")
        return data

    def image(self, i: int, out: np.ndarray | None = None) -> np.ndarray:
        """Sample i decoded, uint8 [channels, *image_size], always the same bytes. Raises as `read`.

        It is written to `out` ([*image_size, channels], C-contiguous) if given.
        """
        data = self.read(i)
        to_pixels = decode_to_fit if self.tars[self.shard[i]].foreign else decode
        try:
            return to_pixels(data, self.image_size, self.channels, out)
        except BadPicture as error:
            raise self._corrupt(i, str(error), error.kind) from error
        except MemoryError as error:
            raise RunError(
                f"there is not enough memory to decode {self.place_of(i)}: give the process more, or take fewer "
                "data.workers"
            ) from error

    def doubt(self, i: int) -> None:
        """Report that sample i is corrupt: the next `read` fetches a remote tar again, unless the cached copy is known
        to equal the source."""
        tar = self.tars[self.shard[i]]
        shard_reader.doubt(tar.path, size=tar.bytes, sha256=tar.sha256 or None, tag=tar.tag)

    def remote_shards(self) -> dict[int, shard_cache.Shard]:
        """The tars that are read through the shard cache, by their index in `tars`."""
        found = enumerate(self.tars)
        return {i: shard_cache.Shard(t.path, t.bytes, t.sha256 or None, t.tag) for i, t in found if is_remote(t.path)}

    def place_of(self, i: int) -> str:
        """The position of sample i as a text for messages."""
        return f"sample {i} in {self._shard_of(i)}"

    def _shard_of(self, i: int) -> str:
        return "/".join(PurePosixPath(shown(self.tars[self.shard[i]].path)).parts[-2:])

    def _corrupt(self, i: int, reason: str, kind: str) -> CorruptSample:
        return CorruptSample(self._shard_of(i), int(i), reason, kind)


def join(tables: Sequence[SampleTable], labels: Sequence[np.ndarray]) -> SampleTable:
    """Concatenate tables of the same resolution, channels and base, with new labels."""
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
    )
