"""The command line. What a command needs is imported inside it, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from typer.core import TyperGroup

from stylegan_pg import cli_tools, processors
from stylegan_pg.version import __version__


class _Home(TyperGroup):
    """Takes a leading `~` of arguments and of options' values for the home folder, as in `--out=~/pictures`, where the
    shell leaves it as it is."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if any("~" in arg for arg in args):
            from stylegan_pg.config.overrides import home

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
        str, typer.Option(help="none, auto (.txt files beside the pictures), or a JSON or CSV file of path and text.")
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
    out: Annotated[Optional[Path], typer.Option(help="Draw the plan into this PNG.")] = None,
) -> None:
    """Print the phases of a training run with their FLOPs, memory and hours, what growing saves, and what a step takes
    on 8 to 1,024 devices."""
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
    print(report(settings, machine, out, Link(1e9 * link_gbit)))


_CHOSEN = "A snapshot, RUN/snapshots/*.safetensors, or RUN for its best one by its metrics, else its newest"


def _chosen(path: Path) -> Path:
    """The snapshot that a path means; which one, if it is a run's folder, is told."""
    from stylegan_pg.checkpoint.names import meant_snapshot
    from stylegan_pg.distributed import process_group as dist

    path, told = meant_snapshot(path)
    if told and dist.is_main():
        print(told, file=sys.stderr)
    return path


@app.command()
def sample(
    snapshot: Annotated[Path, typer.Argument(help=f"{_CHOSEN}.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder for the pictures; by default NAME-pictures beside the snapshot.")
    ] = None,
    seeds: Annotated[
        Optional[str],
        typer.Option("--seeds", "--seed", help="For example 5 or 1,5,9; 0-63 by default, 0-7 for a class grid."),
    ] = None,
    psi: Annotated[float, typer.Option(help="Truncation: 1 for none, 0 for the mean image.")] = 0.7,
    cutoff: Annotated[Optional[int], typer.Option(min=0, help="Truncate only this many first layers.")] = None,
    labels: Annotated[
        Optional[str],
        typer.Option(
            help="Of conditional ones: names of classes first (cat,dog); #3 or index:3 is a place, counted from 0, "
            "#1-3 are several; plain numbers are places too where no class has another number for a name. Seeds and "
            "labels are paired; the shorter list is repeated."
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="One picture of all, instead of one each.")] = False,
    class_grid: Annotated[
        bool, typer.Option("--class-grid", help="One picture: a row for each class, a column for each seed.")
    ] = False,
    columns: Annotated[int, typer.Option(min=0, help="Of the grid; 0 for a square.")] = 0,
    interpolate: Annotated[int, typer.Option(min=0, help="Frames from each seed to the next, as a strip.")] = 0,
    noise: Annotated[str, typer.Option(help="const, random or none.")] = "const",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write images that a snapshot generates."""
    from stylegan_pg.inference.sampling import sample as write_samples

    for line in write_samples(
        _chosen(snapshot),
        out,
        seeds=seeds,
        psi=psi,
        cutoff=cutoff,
        labels=labels,
        grid=grid,
        class_grid=class_grid,
        columns=columns,
        interpolate=interpolate,
        noise=noise,
        batch=batch,
        device=device,
    ):
        print(line)


@app.command()
def metrics(
    snapshot: Annotated[Path, typer.Argument(help=f"{_CHOSEN}; or a packed dataset of its images.")],
    data: Annotated[
        Optional[str], typer.Option(help="Packed dataset to compare with; by default the one that the run trains on.")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Names, separated by commas, such as fid50k_full,kid50k_full,pr50k3_full,is50k,swd.")
    ] = "swd",
    images: Annotated[
        Optional[int], typer.Option(min=1, help="How many, for swd and ms_ssim (8192 and 10000 pairs by default).")
    ] = None,
    psi: Annotated[str, typer.Option(help="Truncation, or FROM:TO:STEP; 1, none, is the convention.")] = "1",
    weights: Annotated[
        Optional[list[Path]], typer.Option(help="Of Inception, VGG16 or LPIPS; recognised by content, repeat for more.")
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="Instead of Inception and VGG16: pixels, or package.module:function.")
    ] = "",
    precision: Annotated[str, typer.Option(help="Of the feature networks: fp32 or bf16.")] = "fp32",
    per_class: Annotated[bool, typer.Option("--per-class", help="Each class on its own.")] = False,
    neighbours: Annotated[int, typer.Option(min=0, help="Show so many samples beside their nearest real images.")] = 0,
    out: Annotated[
        Optional[Path], typer.Option(help="Folder for pictures; by default NAME-metrics beside the snapshot.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    seed: Annotated[
        str, typer.Option("--seed", "--seeds", help="One number: of latents and of the choice of real images.")
    ] = "0",
    cache: Annotated[bool, typer.Option(help="Keep what is computed of real images.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure a snapshot against a dataset; prints one JSON object for each psi and class.

    What cannot be measured costs nothing else: the reasons come last, with exit code 1 or 2. Under torchrun the work is
    shared out over the processes.
    """
    import json

    from stylegan_pg.checkpoint.snapshot import choose_device
    from stylegan_pg.distributed import process_group as dist
    from stylegan_pg.metrics.base import Settings
    from stylegan_pg.metrics.command import evaluate_snapshot, is_dataset, parse_seed

    kind, number, files = choose_device(device).type, parse_seed(seed), tuple(map(str, weights or ()))
    target, failed = dist.init(kind), True
    try:
        tools = Settings(target, files, extractor, precision, batch=batch, seed=number, cache=cache)
        for result in evaluate_snapshot(
            snapshot if is_dataset(snapshot) else _chosen(snapshot),
            data,
            names=metrics.split(","),
            images=images,
            psi=psi,
            per_class=per_class,
            neighbours=neighbours,
            out=out,
            settings=tools,
        ):
            if dist.is_main():
                print(json.dumps(result), flush=True)
        failed = False
    finally:
        dist.shutdown(failed=failed)


app.add_typer(cli_tools.data, name="data")
app.add_typer(cli_tools.kernels, name="kernels")
