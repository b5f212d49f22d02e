"""Files of torch.save and plain pickles, read into inert records without torch.load.

torch.save has two formats. The older one is a row of pickles (a magic number, a version, facts about the machine, the
object, the keys of its storages), followed by the bytes of each storage. It also occurs inside of plain pickles: there
torch pickles each storage as a call of `_load_from_bytes` with such a file as its argument. The newer format is a zip
of `data.pkl` and one member for each storage; torch never compresses them, so a compressed member is refused and no
zip can unpack to more than its size.

Nothing is copied: storages are views of the file's bytes until `materialize` makes a tensor.
"""

from __future__ import annotations

import gc
import math
import struct
from collections.abc import Callable
from typing import Any

import torch

from stylegan_pg.checkpoint.tensor_file import as_bytes
from stylegan_pg.interchange.inert import Storage, StorageType, Tensor
from stylegan_pg.interchange.names import names
from stylegan_pg.interchange.pickles import Budget, Interpreter, Refused, Table
from stylegan_pg.untrusted import printable

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the older format
LEGACY_START = b"\x8a\x0a" + MAGIC.to_bytes(10, "little")  # behind the protocol: the magic number as a pickle
MOST_MEMBERS = 100_000
_LOCAL, _ENTRY, _END, _LOCATOR, _END64 = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"


def read(data: memoryview) -> Any:
    """The object in a pickle, or in a file of torch.save in either format, as inert records.

    Raises:
        Refused: the file is damaged, too large, or refers to anything that model files do not need.
    """
    collects = gc.isenabled()
    gc.disable()  # a hostile file can make a million containers, which would be looked through again and again
    try:
        return _read(data, Budget(encoded=len(data)))
    finally:
        if collects:
            gc.enable()


def _read(data: memoryview, budget: Budget) -> Any:
    def nested(payload: Any) -> Any:
        if not isinstance(payload, bytes | memoryview):
            raise Refused("holds a storage that is no bytes")
        budget.take("operations", 100)  # for what is done besides those of its pickles
        return _saved(memoryview(payload), budget, inner)

    inner = names(budget, None)  # there is no third level
    if _is_saved(data):
        return _saved(data, budget, inner)
    machine = Interpreter(data, 0, names(budget, nested), budget)
    found = machine.run()
    if machine.at != len(data):
        raise Refused(f"is damaged: {len(data) - machine.at} bytes follow its pickle")
    return found


def _is_saved(data: memoryview) -> bool:
    start = bytes(data[:16])
    return start.startswith(_LOCAL) or start[2:].startswith(LEGACY_START)


def _saved(data: memoryview, budget: Budget, table: Table) -> Any:
    if bytes(data[:4]) == _LOCAL:
        return _zip(data, budget, table)
    if not _is_saved(data):
        raise Refused("holds a storage that torch.save did not write")
    return _legacy(data, budget, table)


# ---------------------------------------------------------------------------------------------------- persistent ids


def _storages(kept: dict[str, Storage], find: Callable[[str, int], memoryview | None]) -> Callable[[Any], Storage]:
    """A function from the persistent ids of torch.save, ("storage", class, key, device, count), to storages.

    Args:
        kept: {key: Storage}, to be filled.
        find: (key, number of bytes) -> the bytes, if they are known.
    """

    def of(given: Any) -> Storage:
        if type(given) is not tuple or len(given) not in (5, 6) or given[0] != "storage":
            raise Refused("refers to something other than storages outside of its pickle")
        kind, key, _, count = given[1:5]
        if not isinstance(kind, StorageType) or type(key) is not str or type(count) is not int or count < 0:
            raise Refused("describes a storage in a way that torch does not")
        if len(given) == 6 and given[5] is not None:
            raise Refused("holds a storage that is a part of another one, as torch wrote before version 0.4")
        if key not in kept:
            kept[key] = Storage(kind.dtype, count, find(key, count * kind.dtype.itemsize))
        if kept[key].dtype != kind.dtype or kept[key].count != count:
            raise Refused(f"describes the storage {printable(key, 40)} in two ways")
        return kept[key]

    return of


# ---------------------------------------------------------------------------------------------------- the older format


def _legacy(data: memoryview, budget: Budget, table: Table) -> Any:
    kept: dict[str, Storage] = {}
    at, parts = 0, []
    for place in range(5):
        machine = Interpreter(data, at, table, budget, _storages(kept, lambda *_: None) if place == 3 else None)
        parts.append(machine.run())
        at = machine.at
    magic, version, facts, found, keys = parts
    if magic != MAGIC or version != VERSION:
        raise Refused("is of another format of torch.save than the known ones")
    if type(facts) is not dict or facts.get("little_endian") is not True:
        raise Refused("was written on a machine with another order of bytes")
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != kept.keys():
        raise Refused("is damaged: its list of storages is not that of its tensors")
    for key in keys:
        storage = kept[key]
        if storage.data is not None:
            raise Refused(f"is damaged: it stores {printable(key, 40)} twice")
        if len(data) - at < 8:
            raise Refused("is cut off: a storage is missing")
        (count,) = struct.unpack("<q", data[at : at + 8])
        end = at + 8 + storage.count * storage.dtype.itemsize
        if count not in (storage.count, end - at - 8):  # the second for storages without a type
            raise Refused(f"is damaged: a storage of {storage.count} numbers is stored with {count}")
        if end > len(data):
            raise Refused(f"is cut off: it ends before the {storage.count} numbers of a storage")
        storage.data, at = data[at + 8 : end], end
    if at != len(data):
        raise Refused(f"is damaged: {len(data) - at} bytes follow its storages")
    return found


# ---------------------------------------------------------------------------------------------------- the newer format


def _zip(data: memoryview, budget: Budget, table: Table) -> Any:
    members = _members(data, budget)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refused("is a zip, but not one of torch.save: it has no data.pkl, or several")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in members:
        raise Refused("is TorchScript, a program and not weights")
    order = bytes(members.get(f"{folder}byteorder", memoryview(b"little"))[:8])
    if order != b"little":
        raise Refused("was written on a machine with another order of bytes")

    def find(key: str, size: int) -> memoryview:
        there = members.get(f"{folder}data/{key}")
        if there is None or len(there) != size:
            has = "no bytes" if there is None else f"{len(there)} bytes"
            raise Refused(f"has {has} for the storage {printable(key, 40)}, where {size} are declared")
        return there

    inner = members[pickles[0]]
    machine = Interpreter(inner, 0, table, budget, _storages({}, find))
    found = machine.run()
    if machine.at != len(inner):
        raise Refused("is damaged: bytes follow its pickle")
    return found


def _members(data: memoryview, budget: Budget) -> dict[str, memoryview]:
    """The members of a zip by name, as views of its bytes.

    Raises:
        Refused: the zip is damaged, a member is compressed or encrypted, or there are too many.
    """
    begin, size, count = _directory(data)
    if count > min(MOST_MEMBERS, size // 46):
        raise Refused(f"is a zip whose directory announces {count} members")
    budget.take("operations", count)
    found: dict[str, memoryview] = {}
    at, end = begin, begin + size
    for _ in range(count):
        if end - at < 46 or bytes(data[at : at + 4]) != _ENTRY:
            raise Refused("is a damaged zip: its directory ends early")
        flags, method = struct.unpack("<HH", data[at + 8 : at + 12])
        packed, unpacked, n_name, n_extra, n_comment = struct.unpack("<IIHHH", data[at + 20 : at + 34])
        (local,) = struct.unpack("<I", data[at + 42 : at + 46])
        name = str(data[at + 46 : at + 46 + n_name], "utf-8", "replace")
        extra = bytes(data[at + 46 + n_name : at + 46 + n_name + n_extra])
        unpacked, packed, local = _large(extra, unpacked, packed, local)
        at += 46 + n_name + n_extra + n_comment
        if method or packed != unpacked or flags & 1:
            raise Refused(
                f"is a zip with the compressed or encrypted member {printable(name, 80)} of {unpacked} bytes; "
                "torch.save compresses nothing"
            )
        if name in found:
            raise Refused(f"is a zip with two members {printable(name, 80)}")
        found[name] = _content(data, local, unpacked, name)
    return found


def _directory(data: memoryview) -> tuple[int, int, int]:
    """(place, bytes, entries) of a zip's directory."""
    tail_at = max(0, len(data) - (1 << 16) - 22)
    tail = bytes(data[tail_at:])
    place = tail.rfind(_END)
    if place < 0 or len(tail) - place < 22:
        raise Refused("is cut off or damaged: as a zip it has no directory")
    count, size, begin = struct.unpack("<HII", tail[place + 10 : place + 20])
    at = tail_at + place - 20
    if at >= 0 and bytes(data[at : at + 4]) == _LOCATOR:
        (at64,) = struct.unpack("<Q", data[at + 8 : at + 16])
        if at64 + 56 > len(data) or bytes(data[at64 : at64 + 4]) != _END64:
            raise Refused("is a damaged zip: its end points outside of it")
        count, size, begin = struct.unpack("<QQQ", data[at64 + 32 : at64 + 56])
    if begin + size > len(data):
        raise Refused("is a damaged zip: its directory lies outside of it")
    return begin, size, count


def _large(extra: bytes, *sizes: int) -> list[int]:
    """Replace sizes that do not fit into 32 bits by those in the extra field of zip64."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            more = [extra[4 + i : 12 + i] for i in range(0, length, 8)]
            values = iter(struct.unpack("<Q", piece)[0] for piece in more if len(piece) == 8)
            return [next(values, s) if s == 0xFFFFFFFF else s for s in sizes]
        extra = extra[4 + length :]
    return list(sizes)


def _content(data: memoryview, local: int, size: int, name: str) -> memoryview:
    if local + 30 > len(data) or bytes(data[local : local + 4]) != _LOCAL:
        raise Refused(f"is a damaged zip: {printable(name, 80)} is not where its directory says")
    n_name, n_extra = struct.unpack("<HH", data[local + 26 : local + 30])
    begin = local + 30 + n_name + n_extra
    if begin + size > len(data):
        raise Refused(f"is a damaged zip: {printable(name, 80)} of {size} bytes is longer than the file")
    return data[begin : begin + size]


# ---------------------------------------------------------------------------------------------------- tensors


def materialize(t: Tensor, named: str) -> torch.Tensor:
    """A tensor in newly allocated memory, of the storage's dtype, contiguous.

    Raises:
        Refused: it declares more numbers than the file holds for it, or some of them lie outside.
    """
    count, held = math.prod(t.shape), t.storage.count
    shown = f"the tensor {printable(named, 80)} of shape {list(t.shape)}"
    if t.storage.data is None:
        raise Refused(f"has no numbers for {shown}")
    if count > held:
        raise Refused(f"declares {shown}, for which it holds {held} numbers")
    if not count:
        return torch.empty(t.shape, dtype=t.storage.dtype)
    last = t.offset + sum((n - 1) * s for n, s in zip(t.shape, t.stride, strict=True))
    if last >= held:
        raise Refused(f"declares {shown}, which lies outside of its {held} numbers")
    width = t.storage.dtype.itemsize
    span = torch.empty(last + 1 - t.offset, dtype=t.storage.dtype)
    as_bytes(span)[:] = t.storage.data[t.offset * width : (last + 1) * width]
    if t.storage.dtype == torch.bool:  # other bytes than 0 and 1 are no booleans
        span = span.view(torch.uint8) != 0
    made = span.as_strided(t.shape, t.stride)
    # `contiguous` would keep any strides along sizes of 1.
    return torch.empty(t.shape, dtype=span.dtype).copy_(made) if t.stride != _dense(t.shape) else made


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
