"""Checkpoints: the whole state of a run, from which it continues bit for bit.

A checkpoint is one safetensors file, named by nimg. It holds all tensors under `part/name`, everything else as JSON in
its header, and a checksum over both. It is written under a temporary name, flushed to disk and renamed, so a file with
a checkpoint's name is complete. Loading it runs no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stylegan_pg import files
from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.untrusted import parse_json

FORMAT = 1
SUFFIX = ".safetensors"


class BadCheckpointError(Exception):
    """A file is not a complete checkpoint; the message says why."""


def write(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write one checkpoint atomically; after a failure `path` is unchanged.

    Args:
        path: of the checkpoint; its folder must exist.
        tensors: on any device; they are stored in their dtype.
        state: anything that JSON can hold; floats are stored without loss.

    Raises:
        OSError: for example when the disk is full.
    """
    host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(state)
    meta = {"format": str(FORMAT), "state": text, "blake2b": tensor_file.digest(host, text)}
    with files.atomic_write(path, sync=True) as file:
        tensor_file.write(file, host, meta)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and verify one checkpoint -> (tensors on the CPU, state).

    Raises:
        BadCheckpointError: the file is truncated, altered, of another format, or not a checkpoint.
        RunError: the file cannot be read at the moment; it may be good.
    """
    try:
        with tensor_file.opened(path) as file:
            meta, tensors = file.metadata, {}
            if meta.get("format") == str(FORMAT):
                tensors = file.read()
    except tensor_file.BadFileError as error:
        raise BadCheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: {error}; nothing was changed: see to the file system and run the same command "
            "again, or move the file away to continue from an earlier one"
        ) from None
    if meta.get("format") != str(FORMAT) or "state" not in meta:
        raise BadCheckpointError(f"{path}: not a checkpoint of this format ({FORMAT})")
    if tensor_file.digest(tensors, meta["state"]) != meta.get("blake2b"):
        raise BadCheckpointError(f"{path}: the checksum does not match, the file was damaged")
    try:
        state = parse_json(meta["state"], "its state", "", max_bytes=tensor_file.MOST_HEADER, finite=False)
        if not isinstance(state, dict):
            raise UsageError("its state is no table")
    except UsageError as error:
        raise BadCheckpointError(f"{path}: {str(error).removesuffix(': ')}") from None
    return tensors, state


def path_for(folder: Path, nimg: int) -> Path:
    return folder / f"{nimg:012d}{SUFFIX}"


def found(folder: Path) -> list[Path]:
    """The files in a folder that are named like checkpoints, newest first; they are not verified."""
    named = [p for p in folder.glob("*" + SUFFIX) if re.fullmatch("[0-9]{1,18}", p.stem)]
    return sorted(named, key=lambda p: (int(p.stem), p.name), reverse=True)


def newest_good(folder: Path) -> tuple[Path | None, dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """Find the newest checkpoint that can be read -> (path, tensors, state, problems with newer ones).

    The path is None if there is no checkpoint. Bad ones are renamed to NAME.bad, so that rotation never counts them.

    Raises:
        UsageError: there are checkpoints, but none is good. RunError: as `read`.
    """
    problems: list[str] = []
    bad: list[Path] = []
    for path in found(folder):
        try:
            tensors, state = read(path)
        except BadCheckpointError as error:
            problems.append(str(error))
            bad.append(path)
            continue
        for other in bad:
            with contextlib.suppress(OSError):
                other.rename(other.with_name(other.name + ".bad"))
        return path, tensors, state, problems
    if problems:
        raise UsageError(
            "none of the checkpoints can be read: " + "; ".join(problems) + "; restore one of them, or add "
            "--restart, which moves all outputs of the run aside and begins anew"
        )
    return None, {}, {}, []


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and the leftovers of interrupted writes."""
    for path in found(folder)[keep:]:
        with contextlib.suppress(OSError):
            path.unlink()
    files.remove_leftovers(folder)


class Writer:
    """Writes checkpoints in a background thread, one at a time; training only waits for the copy to host memory."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.copies: dict[str, torch.Tensor] = {}  # reused: allocating new memory takes longer than copying
        self.thread: threading.Thread | None = None
        self.result: tuple[int, str] | None = None

    def start(self, nimg: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Copy the state and start to write the checkpoint of `nimg`, after waiting for the previous write.

        On return the caller may change tensors and state.
        """
        self.wait()
        try:
            # Not in the thread, because by the time it runs, the run's folder may have been moved away.
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            self.result = nimg, str(error)
            return
        self.copies = {name: _copied(t, self.copies.get(name)) for name, t in tensors.items()}
        state = json.loads(json.dumps(state))
        self.thread = threading.Thread(target=self._write, args=(nimg, state), name="checkpoint")
        self.thread.start()

    def _write(self, nimg: int, state: Mapping[str, Any]) -> None:
        try:
            write(path_for(self.folder, nimg), self.copies, state)
            rotate(self.folder, self.keep)
            self.result = nimg, ""
        except Exception as error:  # outcome() reports it to the main thread
            self.result = nimg, str(error) or type(error).__name__

    def is_writing(self) -> bool:
        return bool(self.thread and self.thread.is_alive())

    def wait(self) -> None:
        if self.thread:
            self.thread.join()
            self.thread = None

    def outcome(self, *, wait: bool) -> tuple[int, str] | None:
        """The result of the last write, returned once: (nimg, "" or the reason why it failed).

        None if there is no new result, which without `wait` includes a write that is still going on.
        """
        if wait:
            self.wait()
        elif self.is_writing():
            return None
        result, self.result = self.result, None
        return result


def _copied(t: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    """A contiguous copy of a tensor in host memory; `memory` is reused if its shape and dtype fit."""
    if memory is None or memory.shape != t.shape or memory.dtype != t.dtype:
        memory = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
    return memory.copy_(t.detach())


def flatten(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """{part: {name: tensor}} -> {"part/name": tensor}."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def part_of(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, {name: tensor}; the inverse of `flatten`."""
    return {k[len(part) + 1 :]: t for k, t in tensors.items() if k.startswith(part + "/")}
