"""The command line: its commands, except those that the other modules of this room define.

Each command imports what it needs inside its function, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from typer.core import TyperGroup

from stylegan_pg import processors
from stylegan_pg.cli import averages, editing, exploring, exporting, importing, projecting, snapshots, tools
from stylegan_pg.version import __version__


class _Home(TyperGroup):
    """A group of commands that replaces a leading `~` of arguments and option values by the home folder. A shell does
    not do this inside of words such as `--out=~/pictures`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if any("~" in arg for arg in args):
            from stylegan_pg.config.nodes import home

            for i, arg in enumerate(args):
                option, equals, value = arg.partition("=") if arg.startswith("--") else ("", "", arg)
                args[i] = option + equals + home(value)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Home,
    name="stylegan-pg",
    help="Train high-resolution GANs: from a folder of pictures to an exported generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(value: bool) -> None:
    if value:
        print(f"stylegan-pg {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def pack(
    source: Annotated[
        list[str],
        typer.Argument(help="Folder (searched recursively) or zip of images; or tars: several, or 'x-{00..07}.tar'."),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the packed dataset.")],
    resolution: Annotated[int, typer.Option(help="Largest resolution, a power of two.")],
    lowest: Annotated[int, typer.Option(help="Smallest resolution of the pyramid.")] = 4,
    format: Annotated[str, typer.Option(help="jpg, png or webp; tiny resolutions are always lossless.")] = "jpg",
    quality: Annotated[int, typer.Option(help="Of jpg and webp, 1 to 100.")] = 95,
    base: Annotated[
        str, typer.Option(help="Rows x columns at resolution 4, such as 4x6 for pictures half as wide again as high.")
    ] = "4x4",
    crop: Annotated[
        str, typer.Option(help="To that shape: center, the central part; pad, with white; none, refuse other shapes.")
    ] = "center",
    filter: Annotated[str, typer.Option(help="Down-sampling filter: lanczos or box.")] = "lanczos",
    labels: Annotated[
        str,
        typer.Option(
            help="auto (dataset.json; .cls or .json files beside the pictures; class folders, below train/ and val/), "
            "folders, none, or a JSON or CSV file."
        ),
    ] = "auto",
    unlabelled: Annotated[
        str,
        typer.Option(help="Pictures without a label where others have one: refuse, skip, or keep (no class)."),
    ] = "refuse",
    captions: Annotated[
        str,
        typer.Option(
            help="none, auto (.txt or .json files beside the pictures), or a JSON or CSV file of path and text."
        ),
    ] = "none",
    pair: Annotated[
        Optional[list[str]],
        typer.Option(
            help="NAME=FOLDER: further pictures with the same paths in FOLDER, whatever their suffixes; NAME:1=FOLDER "
            "for grey ones. Repeat for more."
        ),
    ] = None,
    mask: Annotated[
        Optional[list[str]], typer.Option(help="NAME=FOLDER: masks with the same paths, whose values are kept.")
    ] = None,
    vector: Annotated[
        Optional[list[str]],
        typer.Option(help="NAME=FILE: numbers beside the class, from a CSV whose header names them, or a JSON file."),
    ] = None,
    unpaired: Annotated[
        str, typer.Option(help="Pictures without their pair or mask: refuse, or skip to leave them out.")
    ] = "refuse",
    max_images: Annotated[
        Optional[int], typer.Option(help="Take at most so many pictures, evenly spread over their order.")
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Of the largest resolution's tars.")] = "256MB",
    channels: Annotated[int, typer.Option(help="1 grey, 3 RGB, 4 RGBA.")] = 3,
    max_pixels: Annotated[int, typer.Option(help="Larger pictures are left out (JPEGs: twice that).")] = 89_478_485,
    workers: Annotated[Optional[int], typer.Option(help="Processes; all cores by default.")] = None,
) -> None:
    """Pack pictures into sharded WebDataset tars, one set for every resolution."""
    from stylegan_pg.data.pack.pack import pack as pack_images

    report = pack_images(
        source,
        out,
        resolution=resolution,
        lowest=lowest,
        format=format,
        quality=quality,
        crop=crop,
        base=base,
        filter=filter,
        labels=labels,
        unlabelled=unlabelled,
        captions=captions,
        pair=pair or (),
        mask=mask or (),
        vector=vector or (),
        unpaired=unpaired,
        max_images=max_images,
        shard_size=shard_size,
        channels=channels,
        max_pixels=max_pixels,
        workers=workers,
    )
    print(report.summary())


_CONFIG = typer.Argument(help="A YAML file, the name of a shipped configuration, or a run's folder.")


@app.command(epilog="`stylegan-pg configs` lists the shipped configurations, `stylegan-pg config` all keys.")
def train(
    config: Annotated[str, _CONFIG],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and its cost.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Fail unless there is a checkpoint to continue.")] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Move what the run's folder holds into before-1 (2, ...) in it and begin anew; the same command given "
            "again continues.",
        ),
    ] = False,
) -> None:
    """Train, or continue where the run in the same folder was stopped."""
    from stylegan_pg.config.loading import load_config
    from stylegan_pg.errors import UsageError
    from stylegan_pg.planning.advice import without_effect

    if resume and restart:
        raise UsageError("--resume continues a run, --restart begins it anew: give one of them")
    settings = load_config(config, overrides or [])
    remarks = without_effect(config, overrides or [])
    if dry_run:
        from stylegan_pg.planning.plan import describe

        print(describe(settings))
        for remark in remarks:
            print(f"note: {remark}")
        return
    from stylegan_pg.data.datasets.mixture import load_dataset
    from stylegan_pg.training.run import run

    if processors.reason:
        remarks = [
            *remarks,
            f"{processors.reason}: they sleep while they wait (OMP_WAIT_POLICY=passive)",
        ]
    raise typer.Exit(run(settings, load_dataset(settings), must_resume=resume, restart=restart, remarks=remarks))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print how a run is doing: progress, speed of each rank, stragglers, last checkpoint, faults, time to go."""
    import json

    from stylegan_pg.monitoring.status import collect, render

    facts = collect(run)
    print(json.dumps(facts) if as_json else render(facts))


@app.command()
def configs() -> None:
    """List the shipped configurations."""
    from stylegan_pg.config.loading import shipped_configs

    found = shipped_configs()
    for name, about in found.items():
        print(f"{name:<{max(map(len, found))}}  {about}")


@app.command("config")
def config_keys(
    key: Annotated[
        str, typer.Argument(metavar="[KEY|SECTION]", help="Such as train.batch or train; all by default.")
    ] = "",
) -> None:
    """List the keys of a configuration, with their defaults, kinds and what they are for."""
    from stylegan_pg.config.keys import describe

    for line in describe(key):
        print(line)


@app.command(epilog="`stylegan-pg configs` lists the shipped configurations, `stylegan-pg config` all keys.")
def plan(
    config: Annotated[str, _CONFIG],
    overrides: Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...")] = None,
    devices: Annotated[
        Optional[int], typer.Option(help="That train together, 1 by default; growth.schedule=auto is made for them.")
    ] = None,
    device_flops: Annotated[float, typer.Option(help="A device's peak, FLOPs per second.")] = 4e14,
    utilisation: Annotated[float, typer.Option(help="The share of it that training is assumed to use.")] = 0.3,
    link_gbit: Annotated[float, typer.Option(help="Each device's link to the others, Gbit per second.")] = 100.0,
    host_us: Annotated[
        float, typer.Option(help="Microseconds in which the host starts one operation of a step; 0 leaves it out.")
    ] = 56.0,
    out: Annotated[Optional[Path], typer.Option(help="Draw the plan into this PNG.")] = None,
    figure: Annotated[
        Optional[Path], typer.Option(help="Draw the numbers that change during the run into this PNG.")
    ] = None,
) -> None:
    """Print the phases of a training run with their FLOPs, memory and hours, the numbers that change during the run,
    what growing saves, and what a step takes on 8 to 1,024 devices."""
    from stylegan_pg.config.loading import load_config
    from stylegan_pg.config.schedule import phases
    from stylegan_pg.planning.plan import Machine, report
    from stylegan_pg.planning.scaling import Link

    machine = Machine(1 if devices is None else devices, device_flops, utilisation)
    given = overrides or []
    settings = load_config(config, given)
    if devices is not None and not any(item.startswith("growth.devices=") for item in given):
        made = load_config(config, [*given, f"growth.devices={devices}"])
        if phases(made) != phases(settings):
            was, settings = settings.growth.devices, made
            print(f"growth.schedule=auto for {devices} devices: train with growth.devices={devices} instead of {was}")
    print(report(settings, machine, out, Link(1e9 * link_gbit), 1e-6 * host_us, figure))


app.command()(snapshots.sample)
app.command()(snapshots.metrics)
app.command()(editing.mix)
app.command()(editing.interpolate)
app.command()(editing.video)
app.command()(exploring.explore)
app.command("import")(importing.import_)
app.command()(projecting.project)
app.command()(projecting.directions)
app.command()(averages.ema)
app.command()(averages.average)
app.command()(exporting.export)
app.add_typer(tools.data, name="data")
app.add_typer(tools.kernels, name="kernels")
