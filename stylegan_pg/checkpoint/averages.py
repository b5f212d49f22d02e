"""Stored averages: the files in RUN/averages, from which averages of other widths and moments are made.

A run with ema.profiles stores one file for each relative width at a moment, `width0.05-000500kimg.safetensors`. It is a
snapshot that can be sampled as it is. Its description has a further entry, `ema`: the relative width, nimg at the start
of the phase and of the average, the batch, and the names of the buffers. Averages that began at the same nimg belong
together. They begin with each phase, because the networks change there, and where a width is added to a run.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stylegan_pg.checkpoint.names import kimg
from stylegan_pg.checkpoint.snapshot import read_description
from stylegan_pg.config.schema import NARROWEST, WIDEST
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import finite_number, printable, whole_number

log = logging.getLogger(__name__)

FOLDER = "averages"
_NAME = re.compile(r"width\d[\w.+-]*-\d+(kimg(\d{3}img)?|img)\.safetensors", re.ASCII)
_REMEDY = "move the file out of the folder to go on without it"
_MOST = 1 << 53  # images


@dataclass(frozen=True)
class Stored:
    """A stored average, as its description says."""

    path: Path
    width: float  # relative
    phase: int  # nimg at the start of its phase
    since: int  # nimg at its own start
    nimg: int
    batch: int
    buffers: tuple[str, ...]
    description: Mapping[str, Any]

    @property
    def length(self) -> int:
        """Images from its start on."""
        return self.nimg - self.since


def file_name(width: float, moment: str) -> str:
    """The name of a stored average; `moment` is what names.moment_name gives."""
    return f"width{width:g}-{moment}.safetensors"


def entry(width: float, phase: int, since: int, batch: int, buffers: Sequence[str]) -> dict[str, Any]:
    """The entry `ema` of the description; `phase`: nimg at the start of the phase."""
    return {"width": width, "phase": phase, "since": since, "batch": batch, "buffers": list(buffers)}


def is_stored(path: Path) -> bool:
    """Whether a file is named like a stored average."""
    return re.fullmatch(_NAME, path.name) is not None


def read_entry(path: Path) -> Stored:
    """Read the description of a stored average.

    Raises:
        UsageError: the file is no snapshot, or one without a valid entry `ema`.
    """
    try:
        description = read_description(path)
    except UsageError as error:
        raise UsageError(f"{error}; or {_REMEDY}") from None
    named, ema = printable(path), description.get("ema")
    if not isinstance(ema, dict):
        raise UsageError(f"{named} is a snapshot, but no stored average: {_REMEDY}")
    nimg = whole_number(description.get("nimg"), 1, _MOST, f"{named}: nimg", _REMEDY)
    buffers = ema.get("buffers")
    if not isinstance(buffers, list) or not all(isinstance(name, str) for name in buffers):
        raise UsageError(f"{named}: its buffers are no list of names: {_REMEDY}")
    finite_number(description.get("alpha"), 0, 1, f"{named}: alpha", _REMEDY)
    if not isinstance(description.get("kwargs"), dict):
        raise UsageError(f"{named}: its description has no arguments of a network: {_REMEDY}")
    since = whole_number(ema.get("since"), 0, nimg - 1, f"{named}: since", _REMEDY)
    return Stored(
        path,
        finite_number(ema.get("width"), NARROWEST, WIDEST, f"{named}: width", _REMEDY),
        whole_number(ema.get("phase"), 0, since, f"{named}: phase", _REMEDY),
        since,
        nimg,
        whole_number(ema.get("batch"), 1, 1 << 20, f"{named}: batch", _REMEDY),
        tuple(buffers),
        description,
    )


def found(folder: Path) -> list[Stored]:
    """All stored averages in a folder, in the order of nimg and width. Other files are left out.

    Raises:
        UsageError: as read_entry, for a file with the name of a stored average.
    """
    stored = [read_entry(path) for path in sorted(folder.glob("*.safetensors")) if is_stored(path)]
    return sorted(stored, key=lambda one: (one.nimg, one.width))


def cut_back(folder: Path, nimg: int) -> None:
    """Remove stored averages of later moments, when a run continues at nimg: it makes them again. If it does so with
    another configuration, those of before would not belong to it.

    A file that cannot be read remains; `found` names it.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(UsageError, OSError):
            if is_stored(path) and read_entry(path).nimg > nimg:
                path.unlink()
                log.info(f"removed {path}, as the run goes on from {kimg(nimg)} kimg and makes it again")
