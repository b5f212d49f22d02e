"""What the page was opened with: snapshots and runs, by number and file name. Nothing else can be asked for."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint.names import BEST, is_run, of_training, order_of
from stylegan_pg.checkpoint.snapshot import load_snapshot, read_description
from stylegan_pg.errors import UsageError
from stylegan_pg.explorer.faces import Faces
from stylegan_pg.untrusted import printable

MOST_BYTES = 2 << 30  # of generators that stay loaded; the one in use always does
MOST_FILES = 4096  # snapshots of one run that are listed


class NotFoundError(Exception):
    """There is no such source, snapshot or file."""


@dataclass(frozen=True)
class Snapshot:
    """name: the file's. nimg: by its name, None if that does not tell. best: whether metrics chose it."""

    name: str
    nimg: int | None
    best: bool
    path: Path


@dataclass(frozen=True)
class Source:
    """A snapshot, or the folder of a run or of snapshots. name: what the page calls it."""

    name: str
    path: Path

    @property
    def is_run(self) -> bool:
        """Whether there may be a status and logs."""
        return (self.path / "config.yaml").is_file()

    def snapshots(self) -> list[Snapshot]:
        """The snapshots that exist now, in the order of training."""
        if not self.path.is_dir():
            return [Snapshot(self.path.name, nimg_of(self.path), False, self.path)] if self.path.is_file() else []
        folder = self.path / "snapshots" if (self.path / "snapshots").is_dir() else self.path
        root = self.path.resolve()
        link, files = folder / BEST, of_training(folder)
        best = nimg_of(link.resolve()) if link.exists() else None
        found: dict[int, Snapshot] = {}
        for path in files[-MOST_FILES:]:
            nimg = nimg_of(path)
            # A link could lead out of the folder. A best snapshot may exist under two names.
            if nimg is None or not path.resolve().is_relative_to(root) or not path.is_file():
                continue
            if nimg not in found or found[nimg].name.startswith("best"):
                found[nimg] = Snapshot(path.name, nimg, nimg == best, path)
        if not found and link.is_file() and link.resolve().is_relative_to(root):
            return [Snapshot(link.name, None, True, link)]
        return [found[nimg] for nimg in sorted(found)]


def nimg_of(path: Path) -> int | None:
    """The nimg that a file's name tells."""
    order = order_of(path)
    return None if order is None else 1000 * order[0] + order[2]


class Library:
    """The sources, and the generators that were used last. It is used by one thread at a time, except for `sources`."""

    def __init__(self, paths: Sequence[Path], device: torch.device | str, direction_files: Sequence[Path] = ()):
        """
        Raises:
            UsageError: a path is neither a snapshot nor a run.
        """
        self.device, self.direction_files = device, tuple(direction_files)
        self.sources = [Source(name, path) for name, path in zip(_names(paths), paths, strict=True)]
        for path in paths:
            if not path.exists():
                raise UsageError(f"{printable(path)}: no such file or folder; give a snapshot or a run's folder")
            if path.is_dir() and not is_run(path):
                raise UsageError(f"{printable(path)} is neither a snapshot nor a run: give RUN, or RUN/snapshots/FILE")
            if not path.is_dir():
                read_description(path)  # the weights are read when they are needed
        self.outdated: Callable[[], bool] = lambda: False  # see Faces
        self._loaded: OrderedDict[Any, tuple[Faces, int]] = OrderedDict()

    def source(self, number: Any) -> Source:
        """Raises NotFoundError if there is no source of this number."""
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(self.sources):
            raise NotFoundError("there is no such source")
        return self.sources[number]

    def faces(self, number: Any, name: Any) -> Faces:
        """The generator of a snapshot, loaded if it is not; it remains loaded while the memory suffices.

        Raises:
            NotFoundError: there is no such snapshot (any more). UsageError: the file cannot be used.
        """
        source = self.source(number)
        chosen = next((s for s in source.snapshots() if s.name == name), None)
        if chosen is None:
            raise NotFoundError(f"{source.name} has no snapshot {printable(name, 80)}: it may have been deleted")
        try:
            status = chosen.path.stat()
        except OSError:
            raise NotFoundError(f"{chosen.name} has been deleted") from None
        key = (str(chosen.path.resolve()), status.st_mtime_ns, status.st_size)
        if key not in self._loaded:
            faces = Faces(load_snapshot(chosen.path, self.device), self.direction_files, self.outdated)
            self._loaded[key] = faces, sum(t.numel() * t.element_size() for t in faces.G.state_dict().values())
            while len(self._loaded) > 1 and sum(size for _, size in self._loaded.values()) > MOST_BYTES:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._loaded[key][0]


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each path: the last part of it, and as many before it as no other path has."""
    parts = [path.absolute().parts for path in paths]
    names = []
    for i, own in enumerate(parts):
        others = parts[:i] + parts[i + 1 :]
        lengths = range(1, len(own) + 1)
        enough = next((n for n in lengths if all(other[-n:] != own[-n:] for other in others)), None)
        name = "/".join(own[-enough:]) if enough else f"{'/'.join(own[-2:])} ({i + 1})"
        names.append(printable(re.sub(r"\.safetensors(?= \(\d+\)$|$)", "", name), 120))
    return names
