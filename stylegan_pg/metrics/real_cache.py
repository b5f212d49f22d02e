"""What was computed of real images, kept between runs: safetensors files named after all that they depend on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from stylegan_pg import files
from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.files import cache_folder

VERSION = 2  # grows when what is computed changes


def path_of(key: str) -> Path:
    digest = hashlib.sha256(f"{VERSION} {key}".encode()).hexdigest()
    return cache_folder() / "metrics" / f"{digest[:32]}.safetensors"


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor_file.as_bytes(tensors[name].contiguous()))
    return digest.hexdigest()


def load(key: str) -> dict[str, torch.Tensor] | None:
    """What was saved under this key, None where there is nothing.

    Raises:
        ValueError: for an entry that is damaged or another's.
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
        raise ValueError(f"{path}: its contents are not what was written")
    return tensors


def save(key: str, tensors: dict[str, torch.Tensor]) -> None:
    """
    Raises:
        OSError: where it cannot be written.
    """
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(path) as file:
        tensor_file.write(file, tensors, {"key": key, "digest": _digest(tensors)})
