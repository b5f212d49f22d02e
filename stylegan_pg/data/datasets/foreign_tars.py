"""What one tar of another program holds: the columns of its samples, read from its headers and its small members."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from typing import IO, Any

import numpy as np

from stylegan_pg.data.datasets.field_columns import described
from stylegan_pg.data.datasets.foreign_fields import PROBES, fields_in
from stylegan_pg.data.datasets.members import names_of, samples_of
from stylegan_pg.data.datasets.sample_names import Names
from stylegan_pg.data.images.decode import BadPicture, header
from stylegan_pg.data.storage import remote, shard_cache, shard_reader
from stylegan_pg.data.storage.byte_stream import CHUNK
from stylegan_pg.data.storage.index_cache import Arrays
from stylegan_pg.data.storage.retry import TransientFault, retrying
from stylegan_pg.data.storage.shard_cache import CacheFull
from stylegan_pg.data.storage.tars import Member, content_of, members_of
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import open_regular, printable
from stylegan_pg.urls import shown

PIECE = 64 << 20  # bytes of a tar that the cache has no room for, fetched at a time


def packed(content: Any) -> np.ndarray:
    """What JSON can hold, as an array; `unpacked` is the inverse."""
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def unpacked(array: np.ndarray) -> Any:
    return json.loads(array.tobytes())


def read_tar(url: str, stat: remote.Stat, last_dot: bool | None) -> Arrays:
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


def _read_whole(url: str, named: str, known: dict[str, Any], last_dot: bool | None) -> Arrays:
    with _opened(url, known) as file:
        members = members_of(file, named)
        names, first = names_of(members) if last_dot is None else (Names(last_dot, ""), "")
        samples = list(samples_of(file, members, names, named))
        probe, why = _probe(file, [sample.picture for sample in samples[:PROBES]])
        fields = fields_in(file, samples)
        return fields.arrays | {
            "fields": packed(described(fields.fields)),
            "left": packed(fields.left),
            "offset": np.array([sample.picture.offset for sample in samples], np.int64),
            "size": np.array([sample.picture.size for sample in samples], np.int64),
            "keys": packed([sample.key for sample in samples]),
            "labels": packed([sample.label for sample in samples]),
            "cls": np.array(any(sample.has_cls for sample in samples)),
            "lists": packed([sample.listed for sample in samples]),
            "odd": np.array(sum(sample.is_odd for sample in samples)),
            "json_caption": np.array(fields.json_caption),
            "tar_bytes": np.array(os.fstat(file.fileno()).st_size),
            "probe": np.array(probe, np.int64),
            "last_dot": np.array(names.last_dot),
            "first": packed(first),
            "note": packed(names.note),
            "why": packed([why]),
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

    if remote.is_printed(url):  # reading in pieces would run the command again for each of them
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
