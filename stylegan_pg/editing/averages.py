"""Generators made by averaging: of any relative width and moment of a run from its stored averages (Karras et al. 2024,
section 3.2), and of several snapshots."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stylegan_pg.checkpoint import averages
from stylegan_pg.checkpoint.averages import Stored
from stylegan_pg.checkpoint.names import POST_HOC, is_run, moment_name
from stylegan_pg.checkpoint.snapshot import read_description, read_snapshot, write_snapshot
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import writing
from stylegan_pg.optim.profiles import Combination, Profile, combine, gamma_of
from stylegan_pg.untrusted import is_number, printable

log = logging.getLogger(__name__)

POOR = 0.1  # residual from which on a fit is reported as poor
# Arguments of generators that no tensor depends on.
_NO_FORM = ("low_precision", "low_precision_at", "low_precision_resolutions", "w_avg_beta")


@dataclass(frozen=True)
class Moment:
    """The stored averages from which those of one moment are made.

    Attributes:
        folder: of the run, or of the files if they lie elsewhere.
        nimg: the moment, in images of the run.
        used: stored averages that began at the same nimg, up to this moment; if nothing was stored then, up to the next
            moment.
    """

    folder: Path
    nimg: int
    used: tuple[Stored, ...]

    @property
    def newest(self) -> Stored:
        return self.used[-1]

    @property
    def alpha(self) -> float:
        """The fade's alpha at this moment, 1 outside of fades. It is 0 where the phase begins, and linear in images."""
        last, alpha = self.newest, float(self.newest.description["alpha"])
        fades = alpha < 1 or last.description["kwargs"].get("fade")
        return min(alpha * (self.nimg - last.phase) / (last.nimg - last.phase), 1.0) if fades else alpha

    def combination(self, width: float) -> Combination:
        """The weights of `used` for a relative width at this moment. Raises UsageError if it is not possible."""
        wanted = Profile(gamma_of(width), self.nimg - self.newest.since)
        return combine([Profile(gamma_of(one.width), one.length) for one in self.used], wanted, self.newest.batch)


@dataclass(frozen=True)
class Made:
    """A generator that was made by averaging: its state dict (on the CPU) and the description of its snapshot."""

    tensors: dict[str, torch.Tensor]
    description: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write it as a snapshot, atomically.

        Raises:
            UsageError, RunError: the file cannot be written.
        """
        check_out(path)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            write_snapshot(path, self.tensors, self.description)


def check_out(path: Path, inputs: Sequence[Path] = ()) -> None:
    """Raise UsageError if a path cannot be that of a new snapshot, before anything is computed."""
    if path.is_dir() or path.suffix != ".safetensors":
        raise UsageError(f"--out {printable(path)}: give the name of a file that ends in .safetensors")
    if path.resolve() in [other.resolve() for other in inputs] or averages.is_stored(path):
        raise UsageError(f"--out {printable(path)} would replace what the average is made of: give another name")
    if path.is_file():
        try:
            read_description(path)
        except UsageError:
            raise UsageError(
                f"--out {printable(path)} is there, and is no snapshot (a checkpoint?): give another name"
            ) from None


# ------------------------------------------------------------------------------------------------- after the fact


def moment_of(run: Path, at: float | None = None, width: float | None = None) -> Moment:
    """Choose the stored averages of a moment.

    Args:
        run: the folder of a run, its folder of averages, or one of its snapshots, which stands for its own moment.
        at: in kimg of the run; a moment at which averages were stored is also meant by up to a batch less. None: that
            of the snapshot, or the newest.
        width: a relative width. Of averages with several starts, those among which it is stored are taken, otherwise
            those that began first.

    Raises:
        UsageError: nothing is stored, or not at such a moment; the message says what is.
    """
    folder, files = _stored_in(run)
    groups = _groups(files)
    if at is not None and not (math.isfinite(at) and 0 < at < 1e12):
        raise UsageError(f"--at {at:g} is not possible: give a moment of the run in kimg")
    nimg = _moment_meant(run, files) if at is None else round(at * 1000)
    groups.sort(key=lambda group: not any(one.width == width and 0 <= one.nimg - nimg < one.batch for one in group))
    for group in groups:
        after = next((one.nimg for one in group if one.nimg >= nimg), None)
        if after is None:
            continue
        chosen = after if after - nimg < group[0].batch else nimg
        if chosen <= group[0].since:
            continue
        used = tuple(one for one in group if one.nimg <= after)
        _check_same_form([one.description for one in used], [one.path for one in used])
        return Moment(folder, chosen, used)
    spans = [f"{group[0].since / 1000:.10g} to {group[-1].nimg / 1000:.10g} kimg" for group in groups]
    raise UsageError(
        f"there are no averages for {nimg / 1000:.10g} kimg in {printable(folder)}: what is stored reaches from "
        f"{', and from '.join(spans)} (averages begin anew with each phase)"
    )


def _moment_meant(run: Path, files: Sequence[Stored]) -> int:
    """The nimg of a snapshot; for a folder, of the newest stored average."""
    if run.is_dir():
        return max(one.nimg for one in files)
    own = read_description(run).get("nimg")
    if not isinstance(own, int) or own < 1:
        raise UsageError(f"{printable(run)} does not say its nimg: give --at KIMG")
    return own


def _stored_in(run: Path) -> tuple[Path, list[Stored]]:
    """(the folder of a run, all its stored averages)."""
    if not run.exists():
        raise UsageError(f"{printable(run)}: no such folder; give the folder of a run")
    folders = [run] if run.is_dir() else list(run.absolute().parents[:2])
    for folder in folders:
        for place in (folder / averages.FOLDER, folder):
            if files := averages.found(place):
                return place.parent if place.name == averages.FOLDER else place, files
    if not any(is_run(folder) or (folder / "config.yaml").is_file() for folder in folders):
        raise UsageError(f"{printable(run)} is no run: give the folder of a run, or one of its snapshots")
    raise UsageError(
        f"{printable(run)} holds no stored averages: a run keeps them if it is trained, or continued, with "
        "ema.profiles=[0.05,0.1]"
    )


def _groups(files: Sequence[Stored]) -> list[list[Stored]]:
    """Averages that began at the same nimg, in the order of nimg; those that began first come first."""
    by_start: dict[int, list[Stored]] = {}
    for one in files:
        by_start.setdefault(one.since, []).append(one)
    return [by_start[since] for since in sorted(by_start)]


def post_hoc(run: Path, width: float, at: float | None = None) -> tuple[Made, Combination]:
    """The average of a relative width at a moment of a run, by least squares from the stored ones.

    Args:
        run, at: as of moment_of.
        width: relative, from 0.001 to 0.288.

    Returns:
        The generator, and how it was made. Its tensors have the dtypes of the stored ones; sums are made in float64.

    Raises:
        UsageError: the width is not possible, or as of moment_of; a file is damaged.
    """
    moment = moment_of(run, at, width)
    combination = moment.combination(width)
    (made,) = make(moment, [width], [combination])
    return made, combination


def make(moment: Moment, widths: Sequence[float], combinations: Sequence[Combination]) -> list[Made]:
    """The averages of several widths at one moment, for which every file is read once."""
    weights = np.stack([combination.weights for combination in combinations])
    sums = [_Sum(moment.newest.buffers) for _ in widths]
    for one, column in zip(moment.used, weights.T, strict=True):
        if not column.any():
            continue
        tensors = _tensors_of(one)
        if name := sums[0].misfit(tensors):
            raise UsageError(f"{printable(one.path)} is of another network than the files before it: {name} differs")
        for total, weight in zip(sums, column.tolist(), strict=True):
            if weight:
                total.add(tensors, weight)
    return [
        Made(total.result(), _description(moment, width, combination))
        for total, width, combination in zip(sums, widths, combinations, strict=True)
    ]


def _tensors_of(one: Stored) -> dict[str, torch.Tensor]:
    try:
        return read_snapshot(one.path)[1]
    except UsageError as error:
        raise UsageError(f"{error}; or move the file out of its folder, and the others are used") from None


def _description(moment: Moment, width: float, combination: Combination) -> dict[str, Any]:
    used = zip(moment.used, combination.weights.tolist(), strict=True)
    made_of = [{"file": one.path.name, "weight": weight} for one, weight in used if weight]
    ema = {"width": width, "since": moment.newest.since, "residual": combination.residual, "made_of": made_of}
    return {**moment.newest.description, "nimg": moment.nimg, "alpha": moment.alpha, "ema": ema}


def remark_on(moment: Moment, width: float, combination: Combination) -> str:
    """A warning about a poor fit, "" if it is good."""
    if combination.residual < POOR:
        return ""
    poor = f"the stored averages fit the profile of width {width:g} poorly (residual {combination.residual:.0%}): "
    if moment.newest.nimg != moment.nimg:
        before = [one.nimg for one in moment.used if one.nimg < moment.nimg]
        near = [f"--at {nimg / 1000:.10g}" for nimg in (*before[-1:], moment.newest.nimg)]
        return f"{poor}nothing was stored at {moment.nimg / 1000:.10g} kimg, take {' or '.join(near)}"
    return (
        f"{poor}take a width nearer to theirs, or a later moment; in another run, a smaller ema.every_kimg or further "
        "ema.profiles"
    )


def path_of(moment: Moment, width: float) -> Path:
    """Where the snapshot of a width is written by default: RUN/snapshots/ema-0.07-000500kimg.safetensors. `sample RUN`
    takes it only where there is no other snapshot."""
    stored = [one for one in moment.used if one.nimg == moment.nimg]
    others = [one.path.name for one in moment.used]
    name = stored[0].path.stem.partition("-")[2] if stored else moment_name(moment.nimg, 1, False, others)
    folder = moment.folder / "snapshots"
    return (folder if folder.is_dir() else moment.folder) / f"{POST_HOC}{width:g}-{name}.safetensors"


class _Sum:
    """A sum of generators' states in float64, with weights whose sum is 1; `buffers` are the names of their buffers.

    Tensors that are not of floating point are those of the state with the largest weight. So are elements of a buffer
    that are above 0 in all states, but not in the sum, which weights below 0 make possible: mean squares, of which
    networks take roots.
    """

    def __init__(self, buffers: Sequence[str] = ()):
        self.buffers = set(buffers)
        self.total: dict[str, torch.Tensor] = {}
        self.heaviest, self.nearest = -math.inf, dict[str, torch.Tensor]()
        self.positive: dict[str, torch.Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def misfit(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """The name of a tensor that is not in both states, or with another shape, "" if there is none."""
        names = self.dtypes.keys() ^ tensors.keys() if self.dtypes else ()
        known = {**self.nearest, **self.total}
        names = [*names, *(name for name, t in tensors.items() if name in known and known[name].shape != t.shape)]
        return printable(min(names), 80) if names else ""

    def add(self, tensors: Mapping[str, torch.Tensor], weight: float) -> None:
        for name, t in tensors.items():
            self.dtypes[name] = t.dtype
            if t.is_floating_point():
                part = t.to(torch.float64) * weight
                self.total[name] = self.total[name].add_(part) if name in self.total else part
            if name in self.buffers and t.is_floating_point():
                self.positive[name] = self.positive.get(name, torch.tensor(True)) & (t > 0)
        if weight > self.heaviest:
            keep = {n: t for n, t in tensors.items() if n in self.buffers or not t.is_floating_point()}
            self.heaviest, self.nearest = weight, keep

    def result(self) -> dict[str, torch.Tensor]:
        """The sum, in the dtypes of the states."""
        found = {}
        for name, dtype in self.dtypes.items():
            if name not in self.total:
                found[name] = self.nearest[name]
                continue
            t = self.total[name]
            if name in self.positive:
                t = torch.where(self.positive[name] & (t <= 0), self.nearest[name].double(), t)
            found[name] = t.to(dtype)
        return found


# ------------------------------------------------------------------------------------------------------ snapshots


def parse_weights(text: str, count: int) -> list[float]:
    """Parse weights such as "1,2,1" for `count` snapshots; they are divided by their sum.

    Raises:
        UsageError: they are not as many numbers of 0 or more, or all are 0.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    possible = len(numbers) == count and all(0 <= number <= 1e9 for number in numbers)
    if not possible or not any(numbers):
        raise UsageError(
            f"--weights {printable(repr(text), 60)} is not possible: give {count} numbers with commas between them, "
            "one for each snapshot, of 0 or more and not all 0"
        )
    return [number / sum(numbers) for number in numbers]


def average(snapshots: Sequence[Path], weights: Sequence[float]) -> Made:
    """The weighted mean of snapshots of equal networks, parameters and floating-point buffers alike, and the fade's
    alpha too. What else the description says is that of the snapshot with the largest weight.

    Args:
        snapshots: files. weights: as many numbers, whose sum is 1.

    Raises:
        UsageError: a file is no snapshot or damaged, or the networks differ.
    """
    descriptions = [read_description(path) for path in snapshots]
    _check_same_form(descriptions, snapshots)
    total, made_of, alpha = _Sum(), [], 0.0
    for path, weight in zip(snapshots, weights, strict=True):
        description, tensors = read_snapshot(path)
        if name := total.misfit(tensors):
            raise UsageError(f"{printable(path)} cannot be averaged with {printable(snapshots[0])}: {name} differs")
        total.add(tensors, weight)
        alpha += weight * _alpha(description, path)
        made_of.append({"file": path.name, "nimg": description.get("nimg"), "weight": weight})
    main = descriptions[int(np.argmax(weights))]
    description = {key: value for key, value in main.items() if key != "ema"}
    return Made(total.result(), {**description, "alpha": min(max(alpha, 0.0), 1.0), "averaged": made_of})


def _alpha(description: Mapping[str, Any], path: Path) -> float:
    alpha = description.get("alpha", 1.0)
    if not is_number(alpha, 0, 1):
        raise UsageError(f"{printable(path)}: its alpha is no number from 0 to 1; take another snapshot of the run's")
    return float(alpha)


def _check_same_form(descriptions: Sequence[Mapping[str, Any]], paths: Sequence[Path]) -> None:
    """Raise UsageError if descriptions are not those of equal networks."""

    def form(description: Mapping[str, Any]) -> dict[str, Any]:
        kwargs = description.get("kwargs")
        facts = {key: value for key, value in kwargs.items() if key not in _NO_FORM} if isinstance(kwargs, dict) else {}
        return {"network": description.get("network"), **facts, "classes": description.get("label_names") or []}

    first = form(descriptions[0])
    for description, path in zip(descriptions, paths, strict=True):
        other = form(description)
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                mine, theirs = (printable(facts.get(key), 60) for facts in (first, other))
                raise UsageError(
                    f"{printable(path)} has another network than {printable(paths[0])}: {printable(key, 40)} is "
                    f"{theirs}, not {mine}; only snapshots of equal networks can be averaged"
                )


def free_path(folder: Path) -> Path:
    """The first of average.safetensors, average-2.safetensors, ... in a folder that does not exist."""
    names: Iterator[str] = (f"average{'' if i == 1 else f'-{i}'}.safetensors" for i in range(1, 1 << 20))
    return next(path for path in map(folder.joinpath, names) if not path.exists())
