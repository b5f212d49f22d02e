"""What was computed of real images, kept between runs: safetensors files named after all that they depend on."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from stylegan_pg.ops.build import cache_folder

VERSION = 2  # grows when what is computed changes


def path_of(key: str) -> Path:
    digest = hashlib.sha256(f"{VERSION} {key}".encode()).hexdigest()
    return cache_folder() / "metrics" / f"{digest[:32]}.safetensors"


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
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
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from None
    if facts.get("key") != key or facts.get("digest") != _digest(tensors):
        raise ValueError(f"{path}: its contents are not what was written")
    return tensors


def save(key: str, tensors: dict[str, torch.Tensor]) -> None:
    """
    Raises:
        OSError: where it cannot be written.
    """
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, temporary, {"key": key, "digest": _digest(tensors)})
        temporary.replace(path)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)
