"""The files of a run's folder by their names: what a moment is called, and which snapshot a folder stands for.

A moment is a number of images shown, nimg. Files are named in thousands of them, `000010kimg`, where only one moment
can have that name: that of the first step at or beyond 10,000 images. Any other one tells the rest, too:
`000010kimg400img`. A run whose intervals are no whole kimg names all of its files in images, `000010400img`. Sorted by
name, the files of a run are in the order of their moments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

BEST = "best.safetensors"
_MOMENT = re.compile(r"(?<!\d)(?:(?P<kimg>\d{6,})kimg(?:(?P<rest>\d{3})img)?|(?P<img>\d{9,})img)$", re.ASCII)
_COARSE = 10_000  # images, from which on a tenth of a kimg is exact enough for people


def kimg(nimg: int) -> str:
    """nimg in thousands, for messages: with one digit behind the point, or three where there are few images."""
    return f"{nimg / 1000:.1f}" if nimg >= _COARSE or nimg % 100 == 0 else f"{nimg / 1000:.3f}"


def moment_name(nimg: int, batch: int, whole_kimg: bool, others: Iterable[str]) -> str:
    """The moment after a step of `batch` images that ended at nimg, as part of a file's name.

    Args:
        whole_kimg: whether such files are due at whole kimg.
        others: names of files that are already there; if some are named in kimg, so is this one.
    """
    if not whole_kimg and not any("kimg" in other for other in others):
        return f"{nimg:09d}img"
    first = whole_kimg and nimg % 1000 < batch
    return f"{nimg // 1000:06d}kimg" + ("" if first else f"{nimg % 1000:03d}img")


def order_of(path: Path) -> tuple[int, int, int] | None:
    """What files of one run are sorted by to be in the order of their moments; None if the name tells none."""
    found = _MOMENT.search(path.stem)
    if found is None:
        return None
    if found["img"]:
        return int(found["img"]) // 1000, 0, int(found["img"]) % 1000
    return int(found["kimg"]), 1, int(found["rest"] or 0)


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Those whose names tell a moment, the latest one last."""
    keyed = [(key, path.name, path) for path in paths if (key := order_of(path)) and not path.name.startswith(".")]
    return [path for _, _, path in sorted(keyed)]


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run, or of a run's snapshots."""
    marks = (path / "config.yaml").is_file() or (path / "snapshots").is_dir()
    return marks or (path.is_dir() and bool(in_order(path.glob("*.safetensors"))))


def config_of(path: Path) -> Path | None:
    """The configuration of the run that a folder or a snapshot belongs to, or None."""
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    return None


def meant_snapshot(path: Path) -> tuple[Path, str]:
    """The snapshot that a path stands for: itself, or of a run's folder the best one by its metrics, else the newest;
    and a sentence that says which one was taken, empty where the path says so itself.

    Raises:
        UsageError: for a folder without snapshots.
    """
    if not path.is_dir():
        return path, ""
    folder = path / "snapshots" if (path / "snapshots").is_dir() else path
    ordered = in_order(p for p in folder.glob("*.safetensors") if p.is_file())
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
