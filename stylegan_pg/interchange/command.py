"""The command `import`: what a model file holds, and a snapshot of its generator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.checkpoint.snapshot import save_snapshot
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.interchange import importing, own
from stylegan_pg.interchange.public import Network
from stylegan_pg.untrusted import parse_json, printable

SUFFIX = ".safetensors"


def import_file(path: Path, out: Path | None, part: str = "G_ema") -> Iterator[str]:
    """Read a model file and write a snapshot of one of its generators.

    Args:
        path: a file that `importing.read` knows, or a checkpoint of a run of this package.
        out: the snapshot, or a folder for it; by default beside the file, or in RUN/snapshots for a checkpoint. A file
            that is there already is kept, unless it is a snapshot of the same file.
        part: "G_ema" or "G".

    Yields:
        Lines that say what was found and written.

    Raises:
        UsageError: the file is none that is read, or `out` exists. RunError: it cannot be written.
    """
    if part not in ("G_ema", "G"):
        raise UsageError(f"--part {printable(repr(part), 40)} is no generator: G_ema or G")
    try:
        foreign = not path.is_file() or importing.is_foreign(path)
    except OSError as error:
        raise RunError(f"{printable(path)} cannot be read: {printable(error)}") from None
    if foreign:
        file = importing.read(path)
        yield from _told(file)
        G, description = file.generator(part)
    else:
        G, description, lines = own.generator(path, part)
        yield from lines
    target = _target(path, out, part, description)
    try:
        save_snapshot(target, G, description)
    except OSError as error:
        raise RunError(f"{printable(target)} cannot be written: {printable(error)}") from None
    yield f"snapshot of {part}: {printable(target)}"
    if foreign:
        yield f"note: {importing.LICENCE}"


def _target(path: Path, out: Path | None, part: str, description: dict[str, Any]) -> Path:
    name = path.stem + ("" if part == "G_ema" else f"-{part}")
    if path.suffix == SUFFIX:
        name += "-snapshot"
    snapshots = path.parent.parent / "snapshots"
    if out is None and path.parent.name == "checkpoints" and snapshots.is_dir():
        out = snapshots
    target = path.with_name(name + SUFFIX) if out is None else out / (name + SUFFIX) if out.is_dir() else out
    if not target.parent.is_dir():
        raise UsageError(f"--out: there is no folder {printable(target.parent)}")
    if target.suffix != SUFFIX:
        raise UsageError(f"--out {printable(target)} must end in {SUFFIX}, as it will be a snapshot")
    if target.exists() and not _same(target, description):
        raise UsageError(f"{printable(target)} exists already: give another file as --out, or move it away")
    return target


def _same(target: Path, description: dict[str, Any]) -> bool:
    """Whether a file is a snapshot of the same part of the same file, which may be written again."""
    try:
        with tensor_file.opened(target) as file:
            stored = parse_json(file.metadata.get("stylegan_pg", ""), "", "", finite=False).get("imported")
    except (tensor_file.BadFileError, OSError, UsageError, AttributeError):
        return False
    ours = description.get("imported")
    if not isinstance(stored, dict) or not isinstance(ours, dict):
        return False
    return all(stored.get(key) == ours.get(key) for key in ("sha256", "part"))


def _told(file: importing.ModelFile) -> Iterator[str]:
    found = file.found
    yield f"{printable(file.path.name)}: {file.kind}, {file.size / 1e6:.1f} MB, sha256 {file.sha256}"
    for part, net in found.parts.items():
        yield f"{part}: {_described(net)}"
    if found.nimg:
        yield f"images shown: {found.nimg}"
    if found.augment_p is not None:
        yield f"augmentation probability: {found.augment_p:g}"
    if found.data:
        shown = ", ".join(f"{name}={value}" for name, value in found.data.items())
        yield f"trained on: {printable(shown)}"


def _described(net: Network) -> str:
    count = sum(math.prod(t.shape) for t in net.tensors.values())
    names = ("img_resolution", "img_channels", "z_dim", "w_dim", "c_dim")
    sizes = ", ".join(f"{name} {printable(net.kwargs[name], 20)}" for name in names if name in net.kwargs)
    return f"{net.shown or 'tensors'}, {len(net.tensors)} tensors of {count} numbers" + (f"; {sizes}" if sizes else "")
