"""Validation of the JSON files of a packed dataset.

Every number and name in them is checked before it is used as a size, an offset or a path. Checksums are not sufficient:
they detect accidental changes only, because whoever writes a dataset writes its checksums, too.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from stylegan_pg.untrusted import printable, whole_number

MOST_IMAGES = 1 << 40
MOST_PICTURE = 1 << 30  # bytes
MOST_TAR = 1 << 50
HEADER = 512  # bytes, before each member of a tar
MOST_SIDE = 1 << 16  # limit of resolutions, and of rows and columns at resolution 4
MOST_CLASSES = 1_000_000


def check_index(data: Any) -> None:
    """Check the parsed content of an index.json.

    Raises:
        ValueError, UsageError: the message says what is wrong.
    """
    whole_number(data.get("count"), 1, MOST_IMAGES, "its count", "an index says how many images there are")
    if data.get("channels") not in (1, 3, 4) or isinstance(data["channels"], bool):
        raise ValueError(f"its channels are {_shown(data.get('channels'))}, not 1, 3 or 4")
    resolutions = _list(data.get("resolutions"), "its resolutions")
    for r in resolutions:
        whole_number(r, 4, MOST_SIDE, "a resolution", "they are powers of two")
        if r & (r - 1):
            raise ValueError(f"its resolution {r} is no power of two")
    if not resolutions or sorted(set(resolutions)) != resolutions:
        raise ValueError(f"its resolutions are {_shown(resolutions)}, not some in rising order")
    base = _list(data.get("base", [4, 4]), "its base")
    if len(base) != 2:
        raise ValueError(f"its base is {_shown(base)}, not rows and columns")
    for side in base:
        whole_number(side, 1, MOST_SIDE, "its base", "it has rows and columns")
    _check_labels(data.get("labels"), data["count"])
    shards = _list(data.get("shards"), "its shards")
    for shard in shards:
        _check_shard(shard, resolutions)
    for what in (lambda s: s["name"], *(lambda s, r=r: s["index_sha256"][str(r)] for r in resolutions)):
        if len({what(shard) for shard in shards}) < len(shards):
            raise ValueError("a shard is there twice")
    if sum(shard["count"] for shard in shards) != data["count"]:
        raise ValueError("the shards' counts do not add up")


def _check_labels(labels: Any, count: int) -> None:
    if labels is None:
        return
    if not isinstance(labels, dict):
        raise ValueError(f"its labels are {_shown(labels)}, no table")
    names, counts = _list(labels.get("names"), "its classes' names"), _list(labels.get("counts"), "its classes' counts")
    if not 1 <= len(names) == len(counts) <= MOST_CLASSES or not all(isinstance(name, str) for name in names):
        raise ValueError(f"its classes are {len(names)} names and {len(counts)} counts, not as many texts as numbers")
    for n in counts:
        whole_number(n, 0, count, "the count of a class", "there are no more images")
    if sum(counts) > count:
        raise ValueError(f"the counts of its classes are {sum(counts)} together, of {count} images")


def _check_shard(shard: Any, resolutions: list[int]) -> None:
    if not isinstance(shard, dict):
        raise ValueError(f"a shard is {_shown(shard)}, no table")
    name, sums = shard.get("name"), shard.get("index_sha256")
    if not isinstance(name, str) or not re.fullmatch("[0-9]{5,12}", name):
        raise ValueError(f"a shard has the name {_shown(name)}, not a number of five digits")
    whole_number(shard.get("count"), 1, MOST_IMAGES, f"the count of shard {name}", "none is empty")
    if not isinstance(sums, dict) or sums.keys() != {str(r) for r in resolutions}:
        raise ValueError(f"shard {name} has no checksum for each resolution, or others")
    if not all(isinstance(s, str) and re.fullmatch("[0-9a-f]{64}", s) for s in sums.values()):
        raise ValueError(f"a checksum of shard {name} is none")


def columns_of(shard: Any, count: int, class_counts: np.ndarray | None) -> np.ndarray:
    """Parse the index of a shard into int64 [4, count]: offset, size, label (-1 for none) and CRC-32 of its samples.

    Args:
        shard: the parsed content of the shard's index file.
        count: the number of samples that index.json states.
        class_counts: [classes], to which the samples of each class are added; None for an unlabelled dataset.

    Raises:
        ValueError, UsageError: the message says what is wrong.
    """
    if not isinstance(shard, dict):
        raise ValueError("it is no table")
    length = whole_number(shard.get("tar_bytes"), 1, MOST_TAR, "its tar_bytes", "a tar has a length")
    if not isinstance(shard.get("tar_sha256", ""), str) or len(shard.get("tar_sha256", "")) not in (0, 64):
        raise ValueError("its tar_sha256 is no checksum")
    samples = _list(shard.get("samples"), "its samples")
    if len(samples) != count:
        raise ValueError(f"it lists {len(samples)} samples, index.json says {count}")
    if {type(s) for s in samples} != {list} or {len(s) for s in samples} != {5}:
        raise ValueError("a sample is not [key, offset, size, label, crc32]")
    keys, *numbers = zip(*samples, strict=True)
    kinds = [{*map(type, column)} for column in numbers]
    if {*map(type, keys)} != {str} or kinds[2] - {int, type(None)} or any(k != {int} for k in kinds[:2] + kinds[3:]):
        raise ValueError("a sample is not a key and four numbers")
    try:
        columns = np.array([[-1 if n is None else n for n in column] for column in numbers], np.int64)
    except OverflowError:
        raise ValueError("a sample has a number beyond all ranges") from None
    offset, size, label, crc = columns
    least = -1 if type(None) in kinds[2] else 0
    classes = 0 if class_counts is None else len(class_counts)
    inside = (offset >= HEADER) & (offset <= length) & (size <= length - offset)
    for what, fits in {
        f"a size that is not from 1 to {MOST_PICTURE} bytes": (size >= 1) & (size <= MOST_PICTURE),
        f"no place within its tar's {length} bytes": inside,
        f"a label that is none of {classes} classes": (label >= least) & (label < max(classes, least + 1)),
        "a crc32 that is none": (crc >= 0) & (crc < 1 << 32),
        "a place that another one has, or before it": np.append(True, offset[1:] >= offset[:-1] + size[:-1]),
    }.items():
        if not fits.all():
            key = samples[int(np.argmin(fits))]
            raise ValueError(f"sample {_shown(key[0])} has {what}: {_shown(key[1:])}")
    if class_counts is not None:
        class_counts += np.bincount(label[label >= 0], minlength=classes)
    elif (label >= 0).any():
        raise ValueError("it has labels, where index.json knows no classes")
    return columns


def _list(value: Any, named: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{named} are {_shown(value)}, no list")
    return value


def _shown(value: Any) -> str:
    return printable(repr(value), 80)
