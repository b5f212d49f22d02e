"""Reading and writing safetensors files without trusting them.

The header is checked against the file before memory is allocated, and a caller can check it against what it expects
before tensors are read. The safetensors library does neither. It also accepts a name that occurs twice, and it maps the
file into memory, where a file that shrinks or fails meanwhile kills the process.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import open_regular, parse_json, printable

MOST_HEADER = 100_000_000  # bytes, the limit of the format
MOST_TENSORS = 1 << 18
MOST_DIMENSIONS = 8
METADATA = "__metadata__"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class BadFileError(Exception):
    """A file is not a complete safetensors file; the message says why, without the file's name."""


class Entry(NamedTuple):
    """A tensor's description in the header; its bytes are [start, end) behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open file: `entries` {name: Entry}, in the order of their bytes, and `metadata` {name: text}."""

    def __init__(self, file: BufferedReader):
        """
        Raises:
            BadFileError: the header is invalid, or does not fit the file.
        """
        self.file = file
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MOST_HEADER):
            raise BadFileError("it is no safetensors file, or cut off")
        self.begin = 8 + length
        try:
            header = parse_json(file.read(length).decode("utf-8"), "its header", "", max_bytes=MOST_HEADER)
        except UnicodeDecodeError:
            raise BadFileError("its header is no text") from None
        except UsageError as error:
            raise BadFileError(str(error).removesuffix(": ")) from None
        self.metadata, entries = _parsed(header)
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
        end = 0
        for name, entry in self.entries.items():
            if entry.start != end:
                raise BadFileError(f"the bytes of {printable(name, 80)} do not follow those of the tensor before")
            end = entry.end
        if size != self.begin + end:
            raise BadFileError(
                f"it has {size} bytes where its header describes {self.begin + end}: cut off, or damaged"
            )

    def read(self) -> dict[str, torch.Tensor]:
        """Read all tensors into newly allocated CPU memory.

        Raises:
            BadFileError: the file ends early.
            OSError: the file cannot be read at the moment, or memory is short.
        """
        self.file.seek(self.begin)
        tensors = {}
        for name, entry in self.entries.items():
            try:
                tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            except RuntimeError:
                raise OSError(errno.ENOMEM, f"no memory for {printable(name, 80)} of {list(entry.shape)}") from None
            if self.file.readinto(as_bytes(tensors[name])) != entry.end - entry.start:
                raise BadFileError("it ends early")
        return tensors


def _parsed(header: Any) -> tuple[dict[str, str], dict[str, Entry]]:
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise BadFileError("its header is no table of tensors, or one of too many")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise BadFileError(f"its {METADATA} is no table of texts")
    return metadata, {name: _entry(name, described) for name, described in header.items()}


def _entry(name: str, described: Any) -> Entry:
    named = f"the tensor {printable(name, 80)}"
    if not isinstance(described, dict) or described.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadFileError(f"{named} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = (described[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise BadFileError(f"{named} is of the dtype {printable(dtype, 40)}: known are {', '.join(_DTYPES)}")
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS or not _sizes(offsets) or len(offsets) != 2:
        raise BadFileError(f"{named} has a shape or offsets that are none")
    start, end = offsets
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - start:
        raise BadFileError(f"{named} of {dtype} {shape} does not fill its {end - start} bytes")
    return Entry(_DTYPES[dtype], tuple(shape), start, end)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file for reading.

    Raises:
        BadFileError: as TensorFile. OSError: the file cannot be read at the moment.
    """
    with open_regular(path) as file:
        yield TensorFile(file)


def as_bytes(t: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return t.reshape(-1).view(torch.uint8).numpy().data


def is_finite(t: torch.Tensor) -> bool:
    """Whether all elements of a floating-point tensor are finite. The sum is a fast test; it may overflow, however."""
    return bool(t.sum().isfinite()) or bool(t.isfinite().all())


def digest(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    """A BLAKE2b checksum (hexadecimal) of CPU tensors with their names, dtypes and shapes, and of a text."""
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=32)
    for name in sorted(tensors):
        t = tensors[name]
        found.update(f"{name}{t.dtype}{list(t.shape)}".encode("utf-8", "surrogatepass"))
        found.update(as_bytes(t.contiguous()))
    return found.hexdigest()


def write(file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors in the safetensors format, one by one.

    The safetensors library would copy all of them first and hold the interpreter lock meanwhile, so that training could
    not continue.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all are aligned
    header: dict[str, Any] = {METADATA: dict(metadata)}
    end = 0
    for name in order:
        t = tensors[name]
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(as_bytes(tensors[name]))


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], named: str, *, partly: bool = False
) -> None:
    """Check that tensors have the names, shapes and dtypes of the expected ones.

    Args:
        tensors: to be checked.
        expected: the tensors that give names, shapes and dtypes.
        named: what the message begins with.
        partly: compare only names that both have.

    Raises:
        ValueError: names the first tensor that is missing, unknown or different.
    """
    if not partly and tensors.keys() != expected.keys():
        missing, more = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        what = f"lacks {missing[0]}" if missing else f"has {printable(more[0], 80)}, which is not known"
        raise ValueError(f"{named} {what}")
    for name in tensors.keys() & expected.keys():
        (shape, dtype), (wanted, kind) = ((list(t.shape), t.dtype) for t in (tensors[name], expected[name]))
        if shape != wanted or dtype != kind:
            raise ValueError(f"{named}: {name} is {dtype} {shape} where {kind} {wanted} is expected")
