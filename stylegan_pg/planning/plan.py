"""The predicted cost of a run: its phases with images, FLOPs, memory and hours, as a table and a figure.

Hours are FLOPs divided by the speed of the devices at an assumed utilisation. They do not include communication
between devices; scaling.py has a table of the time that it adds to a step.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from stylegan_pg import files
from stylegan_pg.config import Config
from stylegan_pg.config.plain import to_yaml
from stylegan_pg.config.schedule import Phase, deal, learning_rate, phases, shortfall, size_at
from stylegan_pg.data.conditions import CLASS, condition_field, condition_size
from stylegan_pg.data.datasets.mixture import load_dataset
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.planning import averages, scaling, schedules
from stylegan_pg.planning.advice import of_configuration, of_data
from stylegan_pg.planning.cost import Cost, Meter, cost_of
from stylegan_pg.urls import runs_command


@dataclass(frozen=True)
class Machine:
    devices: int = 1
    flops: float = 4e14  # peak FLOPs per second of a device, at the precision of the networks
    utilisation: float = 0.3  # share of the peak that a training step reaches

    def __post_init__(self):
        for value, option in ((self.devices, "--devices"), (self.flops, "--device-flops")):
            if not 0 < value < math.inf:
                raise UsageError(f"{option} {value:g} is not possible: it must be above 0 and finite")
        if not 0 < self.utilisation <= 1:
            raise UsageError(f"--utilisation {self.utilisation:g} is not possible: it must be above 0, at most 1")

    @property
    def flops_per_hour(self) -> float:
        """FLOPs per hour of one device at the assumed utilisation."""
        return self.flops * self.utilisation * 3600


@dataclass(frozen=True)
class PlanRow:
    """A phase and its cost."""

    phase: Phase
    cost: Cost
    share: int  # images of a batch on the device that has most
    micro: int  # images of its largest micro-batch
    hours: float

    @property
    def images(self) -> int:
        return self.phase.end - self.phase.start

    @property
    def flops(self) -> float:
        return self.cost.flops_per_image * self.images

    @property
    def bytes(self) -> float:
        """Memory of a device in bytes."""
        return self.cost.fixed_bytes + self.cost.bytes_per_image * self.micro


@dataclass(frozen=True)
class Plan:
    rows: list[PlanRow]
    full: Cost  # cost of a stable phase at full resolution
    machine: Machine
    config: Config

    def rates(self, phase: Phase, parts: int = 1) -> list[tuple[float, float, float]]:
        """(images, learning rate of G, that of D) at the begin of a phase, at its last step, and between them, so that
        there are `parts` parts of it."""
        last = phase.end - phase.batch
        places = [phase.start + (last - phase.start) * i / parts for i in range(parts + 1)]
        r = phase.resolution
        return [(n, learning_rate(self.config, "G", r, n), learning_rate(self.config, "D", r, n)) for n in places]

    @property
    def images(self) -> int:
        return sum(row.images for row in self.rows)

    @property
    def flops(self) -> float:
        return sum(row.flops for row in self.rows)

    @property
    def hours(self) -> float:
        return sum(row.hours for row in self.rows)

    @property
    def full_hours(self) -> float:
        """Hours that as many images at full resolution would take, in the last phase's batches."""
        last = self.rows[-1]
        steps = self.images / last.phase.batch
        return steps * last.share * self.full.flops_per_image / self.machine.flops_per_hour

    @property
    def saved(self) -> float:
        """Share of the FLOPs that is saved in comparison with as many images at full resolution."""
        return 1 - self.flops / (self.images * self.full.flops_per_image)


def make_plan(config: Config, machine: Machine, channels: int = 3, classes: int = 0) -> Plan:
    """The predicted cost of a run on images [channels, H, W].

    Raises:
        UsageError: if the configuration has no phases.
    """
    meter, rows = Meter(), []
    for phase in phases(config):
        cost = cost_of(config, phase, channels, classes, meter)
        share = max(map(len, deal(phase.batch, phase.mbstd_group, machine.devices)))
        passes = math.ceil(share / phase.micro_batch) if phase.micro_batch else 1
        micro = max(map(len, deal(share, phase.mbstd_group, min(passes, share // phase.mbstd_group))))
        steps = (phase.end - phase.start) // phase.batch
        hours = (
            steps * share * cost.flops_per_image / machine.flops_per_hour
        )  # the device with most images is the slowest
        rows.append(PlanRow(phase, cost, share, micro, hours))
    last = rows[-1].phase
    if last.resolution == config.resolution and not last.fade:
        return Plan(rows, rows[-1].cost, machine, config)
    size = size_at(config.resolution, config.model.base)
    last = dataclasses.replace(last, resolution=config.resolution, size=size, fade=False)
    return Plan(rows, cost_of(config, last, channels, classes, meter), machine, config)


def _dataset(config: Config) -> tuple[int, int, str, list[str]]:
    """(channels, classes, description of the dataset, notes that training would log at its start). Without a dataset at
    data.url, RGB without labels is assumed."""
    notes = [note for note in (shortfall(config), *of_configuration(config)) if note]
    if any(runs_command(url) for url in (config.data.url, *config.data.mixture, *config.data.unpaired.values())):
        about = "the output of a command (pipe:), which is not run for a description; RGB without labels is assumed"
        return 3, 0, about, notes
    try:
        index = load_dataset(config)
    except (UsageError, RunError) as error:
        return 3, 0, f"not there yet ({error}); RGB without labels is assumed below", notes
    field = condition_field(index, config.data.condition) if config.data.conditional else ""
    classes = condition_size(index, field) if field else 0
    about = f"{index.count} images, resolutions {', '.join(map(str, index.resolutions))}, {index.channels} channels"
    about += f", {classes} classes" if field == CLASS else f", conditions of length {classes}" if field else ""
    return index.channels, classes, about, [*notes, *of_data(config, index)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def table(plan: Plan) -> str:
    """The phases as lines of text, and their totals."""
    head = "phase kimg batch micro lr(G/D) G-params D-params GFLOPs/img EFLOPs memory hours until"
    lines: list[list[str]] = [[*head.split()]]
    until = 0.0
    for row in plan.rows:
        p, cost = row.phase, row.cost
        ends = [rates for _, *rates in plan.rates(p)]
        until += row.hours
        lines.append(
            [
                str(p),
                f"{p.start / 1000:.9g}-{p.end / 1000:.9g}",
                str(p.batch),
                str(row.micro),
                "/".join(f"{a:g}" if a == b else f"{a:g}>{b:g}" for a, b in zip(*ends, strict=True)),
                f"{cost.g_parameters:,}",
                f"{cost.d_parameters:,}",
                f"{cost.flops_per_image / 1e9:.2f}",
                f"{row.flops / 1e18:.3g}",
                f"{row.bytes / 2**30:.2f} GiB",
                f"{row.hours:.3g}",
                f"{until:.4g}",
            ]
        )
    m = plan.machine
    devices = "1 device" if m.devices == 1 else f"{m.devices} devices"
    notes = [
        f"{plan.images / 1000:g} kimg, {plan.flops:.4g} FLOPs: {plan.hours:.4g} hours ({plan.hours / 24:.3g} days) on "
        f"{devices} of {m.flops:.3g} FLOPs per second, if {m.utilisation:.0%} of that is used.",
        f"{plan.saved:.1%} of the FLOPs are saved in comparison with as many images at full resolution.",
        "GFLOPs/img is the whole training step per real image. Memory is that of a device with micro-batches of "
        "`micro` images, without the allocator's overhead.",
    ]
    idle = [row for row in plan.rows if row.share * m.devices > row.phase.batch]
    if idle:
        worst = max(idle, key=lambda row: row.share * m.devices / row.phase.batch)
        used = worst.phase.batch / (worst.share * m.devices)
        p = worst.phase
        notes.append(
            "Batches are divided among devices in whole groups of model.mbstd_group images: in "
            f"{len(idle)} of {len(plan.rows)} phases some devices wait for others. In {p}, a batch of {p.batch} in "
            f"groups of {p.mbstd_group} uses {used:.0%} of {devices}; larger batches would use more."
        )
    if kept := averages.cost(plan.config, ((row.phase, row.cost.g_parameters) for row in plan.rows)):
        notes.append(f"{kept}.")
    return "\n".join([*_aligned(lines), "", *notes])


def describe(config: Config, machine: Machine | None = None) -> str:
    """The resolved configuration, the dataset, the table of phases, and notes, as text."""
    channels, classes, about, notes = _dataset(config)
    plan = make_plan(config, machine or Machine(), channels, classes)
    text = [to_yaml(config), f"dataset: {about}", "", table(plan), *changes(config), *_as_lines(notes)]
    return "\n".join(text)


def changes(config: Config) -> list[str]:
    """The table of the numbers that change during the run, and a line of those that do not, behind an empty line."""
    same = schedules.constant(config)
    return ["", *_aligned(schedules.rows(config)), *([f"numbers that do not change: {same}"] if same else [])]


def _as_lines(notes: Sequence[str]) -> list[str]:
    return [f"note: {note}" for note in notes]


def across(config: Config, plan: Plan, link: scaling.Link, host: float) -> str:
    """The time of a step of the most expensive phase on 8 to 1,024 devices, as text."""
    row, m = max(plan.rows, key=lambda row: row.flops), plan.machine
    worlds = sorted({m.devices, *scaling.WORLDS})
    steps = [scaling.step(config, row.phase, row.cost, n, m.flops * m.utilisation, link, host) for n in worlds]
    return "\n".join(scaling.table(steps, row.phase, link))


def report(
    config: Config,
    machine: Machine,
    out: Path | None = None,
    link: scaling.Link | None = None,
    host: float = scaling.HOST,
    figure: Path | None = None,
) -> str:
    """The table of phases, that of the numbers that change, the times of a step by number of devices, and notes, as
    text. With `out` a figure of the phases is written, too, and with `figure` one of these numbers, as PNGs. `host`:
    seconds in which a host starts one operation.

    Raises:
        UsageError: if the figure cannot be written, or a number is not possible.
    """
    if not 0 <= host < 1:
        raise UsageError(f"--host-us {1e6 * host:g} is not possible: it must be at least 0 and below a million")
    for path, option in ((out, "--out"), (figure, "--figure")):
        if path is not None:
            _check_writable(path, option)  # before the slow part
    channels, classes, about, notes = _dataset(config)
    plan = make_plan(config, machine, channels, classes)
    if out is not None:
        draw(plan, out, Path(config.run).name)
    if figure is not None:
        try:
            schedules.draw(config, figure)
        except OSError as error:
            raise UsageError(f"--figure {figure}: cannot be written: {error.strerror or error}") from None
    steps = across(config, plan, link or scaling.Link(), host)
    pictures = [f"picture: {path}" for path in (out, figure) if path]
    text = [f"dataset: {about}", "", table(plan), *changes(config), "", steps, *pictures, *_as_lines(notes)]
    return "\n".join(text)


def _check_writable(out: Path, option: str) -> None:
    if out.suffix.lower() != ".png":
        raise UsageError(f"{option} {out}: the picture is a PNG: give a name that ends in .png")
    if not os.path.isdir(out.parent):
        raise UsageError(f"{option} {out}: there is no folder {out.parent}: make it first")
    if os.path.isdir(out) or not os.access(out.parent, os.W_OK):
        raise UsageError(f"{option} {out}: cannot be written: give another name")


def draw(plan: Plan, out: Path, title: str = "") -> None:
    """Draw resolution and alpha, batch and learning rates, and hours over the images shown, as a PNG.

    Raises:
        UsageError: if the file cannot be written.
    """
    figure = Figure(figsize=(10, 9), layout="constrained")
    growth, steps, time = figure.subplots(3, 1, sharex=True)
    figure.suptitle(f"{title}: {plan.images / 1000:,.0f} kimg, {plan.flops:.3g} FLOPs, {plan.hours:,.3g} hours")
    phases_ = [row.phase for row in plan.rows]
    edges = [p.start / 1000 for p in phases_] + [phases_[-1].end / 1000]
    for axes in (growth, steps, time):
        axes.grid(alpha=0.3)
        for p in phases_:
            if p.fade:
                axes.axvspan(p.start / 1000, p.end / 1000, color="tab:orange", alpha=0.12, lw=0)

    # Within a fade the line rises with alpha from the old resolution to the new one.
    shown = [(n / 1000, math.log2(p.resolution) - 1 + p.alpha(n)) for p in phases_ for n in (p.start, p.end)]
    growth.plot(*zip(*shown, strict=True), color="tab:blue")
    ticks = sorted({p.resolution for p in phases_} | {phases_[0].resolution // 2 if phases_[0].fade else 0} - {0})
    growth.set_yticks([math.log2(r) for r in ticks], [f"{r}" for r in ticks])
    growth.set_ylabel("resolution (orange: fades)")

    steps.stairs([p.batch for p in phases_], edges, color="tab:blue", lw=1.5, baseline=None)
    steps.set_yscale("log", base=2)
    steps.set_ylim(min(p.batch for p in phases_) / 1.5, max(p.batch for p in phases_) * 1.5)
    steps.yaxis.set_major_formatter("{x:g}")
    steps.set_ylabel("images per step", color="tab:blue")
    rates = steps.twinx()
    lines = [point for p in phases_ for point in plan.rates(p, parts=64)]
    kimg = [n / 1000 for n, _, _ in lines]
    rates.plot(kimg, [g for _, g, _ in lines], color="tab:green", label="G")
    rates.plot(kimg, [d for _, _, d in lines], color="tab:red", ls="--", label="D")
    rates.set_ylim(0, 1.15 * max(max(g, d) for _, g, d in lines))
    rates.set_ylabel("learning rate")
    rates.legend(loc="center right")

    until = [0.0, *itertools.accumulate(row.hours for row in plan.rows)]
    time.plot(edges, until, color="tab:blue", label="this schedule")
    time.plot([0, edges[-1]], [0, plan.full_hours], color="grey", ls="--", label="full resolution all along")
    time.set_ylabel("hours")
    time.set_xlabel("images shown (kimg)")
    time.legend(loc="upper left")
    time.set_xlim(0, edges[-1])
    m = plan.machine
    time.set_title(
        f"{m.devices} x {m.flops:.3g} FLOP/s, {m.utilisation:.0%} used; {plan.saved:.1%} of the FLOPs saved",
        fontsize=10,
    )
    try:
        with files.atomic_write(out) as file:
            figure.savefig(file, format="png", dpi=100)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None
