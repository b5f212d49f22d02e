"""The disk cache of statistics of real images: one safetensors file per key, named by a hash of the key."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from stylegan_pg import files
from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.files import cache_folder

VERSION = 2  # must grow when the computation of statistics changes


def path_of(key: str) -> Path:
    """Return the path of the file for a key."""
    digest = hashlib.sha256(f"{VERSION} {key}".encode()).hexdigest()
    return cache_folder() / "metrics" / f"{digest[:32]}.safetensors"


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor_file.as_bytes(tensors[name].contiguous()))
    return digest.hexdigest()


def load(key: str) -> dict[str, torch.Tensor] | None:
    """Return the tensors that were saved under this key, or None if there are none.

    Raises:
        ValueError: if the file is damaged or belongs to another key.
    """
    path = path_of(key)
    if not path.is_file():
        return None
    try:
        with tensor_file.opened(path) as file:
            facts, tensors = file.metadata, file.read()
    except (OSError, tensor_file.BadFileError) as error:
        raise ValueError(f"{path}: {error}") from None
    if facts.get("key") != key or facts.get("digest") != _digest(tensors):
        raise ValueError(f"{path}: its checksum or key does not match its contents")
    return tensors


def save(key: str, tensors: dict[str, torch.Tensor]) -> None:
    """Save tensors under this key.

    Raises:
        OSError: if the file cannot be written.
    """
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        tensor_file.write(file, tensors, {"key": key, "digest": _digest(tensors)})
