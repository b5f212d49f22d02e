"""Checkpoints: what a run needs to continue, bit for bit.

One safetensors file each, named by nimg: all tensors under `part/name`, everything else as JSON in the file's header,
and a checksum over both. Written to a temporary name, flushed to disk and renamed, so that a file with the right name
is a whole one; nothing in it can run code.
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
    """A file that is not a whole checkpoint; the message says why."""


def write(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write one checkpoint atomically; on any failure nothing is left under `path` that was not there before.

    Args:
        tensors: any device; stored in their dtype.
        state: what JSON can hold; floats keep every bit.

    Raises:
        OSError: for example when the disk is full.
    """
    host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(state)
    meta = {"format": str(FORMAT), "state": text, "blake2b": tensor_file.digest(host, text)}
    path.parent.mkdir(exist_ok=True)  # but no folder of a run that was moved away
    with files.whole(path, sync=True) as file:
        tensor_file.write(file, host, meta)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and state of one checkpoint, verified.

    Raises:
        BadCheckpointError: truncated, altered, of another format, or no checkpoint at all.
        RunError: the file cannot be read now, which says nothing of what is in it.
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
        state = parse_json(meta["state"], "its state", "", most=tensor_file.MOST_HEADER, finite=False)
        if not isinstance(state, dict):
            raise UsageError("its state is no table")
    except UsageError as error:
        raise BadCheckpointError(f"{path}: {str(error).removesuffix(': ')}") from None
    return tensors, state


def path_for(folder: Path, nimg: int) -> Path:
    return folder / f"{nimg:012d}{SUFFIX}"


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first: what has the name of one, which only `read` can tell more of."""
    named = [p for p in folder.glob("*" + SUFFIX) if re.fullmatch("[0-9]{1,18}", p.stem)]
    return sorted(named, key=lambda p: (int(p.stem), p.name), reverse=True)


def newest_good(folder: Path) -> tuple[Path | None, dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """The newest checkpoint that reads well: (path, tensors, state, what was wrong with newer ones).

    Without any checkpoint, the path is None. Bad ones are put aside as NAME.bad, so that they never count as one of
    those to keep.

    Raises:
        UsageError: if there are checkpoints, but none that is whole; RunError as `read`.
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
    """Delete all but the newest `keep` checkpoints, and leftovers of interrupted writes."""
    for path in found(folder)[keep:]:
        with contextlib.suppress(OSError):
            path.unlink()
    files.sweep(folder)


class Writer:
    """Writes checkpoints in a thread of its own, one at a time: training waits for the copy alone."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.copies: dict[str, torch.Tensor] = {}  # kept: fresh memory takes longer to get than to fill
        self.thread: threading.Thread | None = None
        self.result: tuple[int, str] | None = None

    def start(self, nimg: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Copy, and begin to write the checkpoint of `nimg`; waits for the one before, if that is still being written.
        On return tensors and state may change."""
        self.wait()
        self.copies = {name: _copied(t, self.copies.get(name)) for name, t in tensors.items()}
        state = json.loads(json.dumps(state))
        self.thread = threading.Thread(target=self._write, args=(nimg, state), name="checkpoint")
        self.thread.start()

    def _write(self, nimg: int, state: Mapping[str, Any]) -> None:
        try:
            write(path_for(self.folder, nimg), self.copies, state)
            rotate(self.folder, self.keep)
            self.result = nimg, ""
        except Exception as error:  # whatever it is, outcome() hands it over
            self.result = nimg, str(error) or type(error).__name__

    def is_writing(self) -> bool:
        return bool(self.thread and self.thread.is_alive())

    def wait(self) -> None:
        if self.thread:
            self.thread.join()
            self.thread = None

    def outcome(self, *, wait: bool) -> tuple[int, str] | None:
        """What became of the checkpoint that was started last, told once: its nimg, and "" or why it could not be
        written. None if there is nothing to tell, or (unless told to wait) nothing yet."""
        if wait:
            self.wait()
        elif self.is_writing():
            return None
        result, self.result = self.result, None
        return result


def _copied(t: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    """The tensor on the host, contiguous, in memory of its own: `memory`, where that fits."""
    if memory is None or memory.shape != t.shape or memory.dtype != t.dtype:
        memory = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
    return memory.copy_(t.detach())


def flatten(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def part_of(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {k[len(part) + 1 :]: t for k, t in tensors.items() if k.startswith(part + "/")}
