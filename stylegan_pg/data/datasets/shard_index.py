"""The indexes of a packed dataset's shards: reading them all, and whether a cached copy of what they say still fits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from stylegan_pg.data.datasets import field_columns
from stylegan_pg.data.datasets.description import columns_of
from stylegan_pg.data.datasets.fields import Field
from stylegan_pg.data.storage import remote
from stylegan_pg.data.storage.index_cache import Arrays
from stylegan_pg.data.storage.retry import TransientFault
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import MAX_JSON_BYTES, parse_json, printable
from stylegan_pg.urls import shown

FETCHERS = 16  # small files of a remote dataset that are read concurrently
START_PATIENCE = 10.0  # seconds for a server to answer at the start
REMEDY = "copy it again from where it was packed, or pack the source again into an empty folder"


@dataclass(frozen=True)
class Shard:
    """One shard's entry in index.json: its name ("00000"), samples, and resolution -> SHA-256 of its index file."""

    name: str
    count: int
    index_sha256: dict[int, str]


def read_at_start(url: str) -> bytes:
    """Read a whole file at the start of a command, with a short patience.

    Raises:
        RunError: a server does not answer. PermanentFault, OSError: unchanged.
    """
    try:
        return remote.read_url(url, patience=START_PATIENCE, max_bytes=MAX_JSON_BYTES)
    except TransientFault as error:
        raise RunError(f"{error}: try again when the server is up") from None


def stamps_of(stems: list[str]) -> np.ndarray:
    """Sizes and modification times of local tars and their indexes, int64 [shards, 4]. Raises UsageError for missing
    files."""
    try:
        files = [os.stat(stem + suffix) for stem in stems for suffix in (".index.json", ".tar")]
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename} is missing: {REMEDY}") from None
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}): mend that, or {REMEDY}") from None
    return np.array([(file.st_size, file.st_mtime_ns) for file in files], np.int64).reshape(len(stems), 4)


def read_shards(
    stems: Sequence[str],
    shards: Sequence[Shard],
    resolution: int,
    label_counts: Sequence[int],
    fields: Mapping[str, Field],
) -> Arrays:
    """The columns of a table, and the lengths and SHA-256 of the tars, from the shards' indexes.

    Raises:
        UsageError: a file is missing, truncated or altered. RunError: a server does not answer.
    """
    parts, further, tar_bytes, tar_sha256 = [], [], [], []
    counts = np.zeros([len(label_counts)], np.int64) if label_counts else None
    with ThreadPoolExecutor(FETCHERS if stems and remote.is_remote(stems[0]) else 1) as pool:
        described = pool.map(_shard, stems, [shard.index_sha256[resolution] for shard in shards])
        for stem, shard, (one, there) in zip(stems, shards, described, strict=True):
            try:
                parts.append(columns_of(one, shard.count, counts))
                further.append(field_columns.arrays_of(one, fields, *parts[-1][:2]) if fields else {})
            except (ValueError, UsageError) as error:
                raise UsageError(f"{shown(stem)}.index.json is damaged ({printable(error)}): {REMEDY}") from None
            if there not in (None, one["tar_bytes"]):
                raise UsageError(f"{stem}.tar has {there} bytes where {one['tar_bytes']} were packed: {REMEDY}")
            tar_bytes.append(one["tar_bytes"])
            tar_sha256.append(one.get("tar_sha256", ""))
    if counts is not None and (wrong := np.flatnonzero(counts != label_counts)).size:
        k = int(wrong[0])
        raise UsageError(
            f"{shown(stems[0])}.index.json and its neighbours have {counts[k]} images of class {k}, index.json says "
            f"{label_counts[k]}: {REMEDY}"
        )
    offset, size, label, crc32 = np.concatenate(parts, axis=1)
    return {name: np.concatenate([arrays[name] for arrays in further]) for name in further[0]} | {
        "offset": offset.copy(),
        "size": size.copy(),
        "label": label.copy(),
        "crc32": crc32.astype(np.uint32),
        "tar_bytes": np.array(tar_bytes, np.int64),
        "tar_sha256": np.array(tar_sha256, "U64"),
    }


def fits(found: Arrays, stamps: np.ndarray, count: int, fields: Mapping[str, Field]) -> bool:
    """Whether cached arrays are complete and belong to the same files."""
    plain = {"offset": np.int64, "size": np.int64, "label": np.int64, "crc32": np.uint32}
    columns = {name: (kind, (count,)) for name, kind in plain.items()} | field_columns.kinds_of(fields, count)
    tars = {"stamps", "tar_bytes", "tar_sha256"}
    return (
        found.keys() == columns.keys() | tars
        and np.array_equal(found["stamps"], stamps)
        and all((found[name].dtype, found[name].shape) == (kind, shape) for name, (kind, shape) in columns.items())
    )


def _shard(stem: str, sha256: str) -> tuple[Any, int | None]:
    """The verified content of a shard's index file, and the length of its tar if that is local."""
    file, tar = shown(f"{stem}.index.json"), f"{stem}.tar"
    try:
        data = read_at_start(f"{stem}.index.json")
        tar_bytes = None if remote.is_remote(stem) else os.stat(tar).st_size
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename} is missing: {REMEDY}") from None
    except PermissionError as error:
        raise UsageError(f"{error.filename} may not be read: change its permissions") from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error}): {REMEDY}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UsageError(f"{file} is not the one that was packed (checksum mismatch): {REMEDY}")
    return parse_json(data, file, REMEDY), tar_bytes
