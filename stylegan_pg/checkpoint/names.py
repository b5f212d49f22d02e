"""Names of the files in a run's folder: how nimg is written in them, and which snapshot a folder stands for.

Files are named by kimg, `000010kimg`, if they belong to the first step at or beyond so many thousand images. Others
have the remaining images in their name, too: `000010kimg400img`. A run whose intervals are not whole kimg names all its
files by images, `000010400img`. The names of one run sort in the order of nimg.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

BEST = "best.safetensors"
POST_HOC = "ema-"  # begins the names of snapshots that `stylegan-pg ema` makes
_MOMENT = re.compile(r"(?<!\d)(?:(?P<kimg>\d{6,})kimg(?:(?P<rest>\d{3})img)?|(?P<img>\d{9,})img)$", re.ASCII)
_COARSE = 10_000  # images, from which on messages show tenths of a kimg


def kimg(nimg: int) -> str:
    """nimg in kimg for messages, with one decimal, or three below 10,000 images."""
    return f"{nimg / 1000:.1f}" if nimg >= _COARSE or nimg % 100 == 0 else f"{nimg / 1000:.3f}"


def moment_name(nimg: int, batch: int, whole_kimg: bool, others: Iterable[str]) -> str:
    """The part of a file's name that says at which nimg it was written.

    Args:
        nimg: images shown after the step.
        batch: images of that step.
        whole_kimg: whether such files are due at whole kimg.
        others: names of files that already exist; if any is named by kimg, so is this one.
    """
    if not whole_kimg and not any("kimg" in other for other in others):
        return f"{nimg:09d}img"
    first = whole_kimg and nimg % 1000 < batch
    return f"{nimg // 1000:06d}kimg" + ("" if first else f"{nimg % 1000:03d}img")


def order_of(path: Path) -> tuple[int, int, int] | None:
    """A key that sorts the files of one run by nimg; None if the name contains no nimg."""
    found = _MOMENT.search(path.stem)
    if found is None:
        return None
    if found["img"]:
        return int(found["img"]) // 1000, 0, int(found["img"]) % 1000
    return int(found["kimg"]), 1, int(found["rest"] or 0)


def in_order(paths: Iterable[Path]) -> list[Path]:
    """The paths whose names contain an nimg, in the order of nimg."""
    keyed = [(key, path.name, path) for path in paths if (key := order_of(path)) and not path.name.startswith(".")]
    return [path for _, _, path in sorted(keyed)]


def of_training(folder: Path) -> list[Path]:
    """The snapshots in a folder in the order of nimg. Those that `stylegan-pg ema` made afterwards are left out, unless
    there are no others."""
    ordered = in_order(p for p in folder.glob("*.safetensors") if p.is_file())
    return [p for p in ordered if not p.name.startswith(POST_HOC)] or ordered


def is_run(path: Path) -> bool:
    """Whether a folder is the folder of a run, or its folder of snapshots."""
    marks = (path / "config.yaml").is_file() or (path / "snapshots").is_dir()
    return marks or (path.is_dir() and bool(in_order(path.glob("*.safetensors"))))


def config_of(path: Path) -> Path | None:
    """The path of the configuration (config.yaml) of the run that a folder or a snapshot belongs to, or None."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    return None


def meant_snapshot(path: Path) -> tuple[Path, str]:
    """Resolve a path to a snapshot: the file itself; for a run's folder, its best snapshot by metrics, else its newest.

    Returns:
        The snapshot, and a sentence that says which one was taken, "" if the path is a file.

    Raises:
        UsageError: for a folder without snapshots.
    """
    if not path.is_dir():
        return path, ""
    folder = path / "snapshots" if (path / "snapshots").is_dir() else path
    ordered = of_training(folder)
    best = folder / BEST
    if best.is_file():
        target = folder / best.readlink().name if best.is_symlink() else best
        chosen, word = target if target.is_file() else best, "best"
    elif ordered:
        chosen, word = ordered[-1], "newest"
    elif is_run(path):
        raise UsageError(
            f"{printable(path)} has no snapshot in {printable(folder)} yet: train on (output.snapshot_kimg says when "
            "they are written), or give a snapshot, RUN/snapshots/*.safetensors"
        )
    else:
        raise UsageError(
            f"{printable(path)} is a folder without snapshots: give a run's folder, or one of its snapshots"
        )
    plain = [p for p in ordered if not p.name.startswith("best")]
    other = f" (the newest is {printable(plain[-1].name)})" if word == "best" and plain else ""
    return chosen, f"{printable(path)}: its {word} snapshot is taken, {printable(chosen)}{other}"
