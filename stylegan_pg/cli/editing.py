"""The commands `mix`, `interpolate` and `video`. Each imports what it needs inside its function, so that `--help`
answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from stylegan_pg.cli.snapshots import _CHOSEN, _chosen

_Snapshot = Annotated[Path, typer.Argument(help=f"{_CHOSEN}.")]
_Psi = Annotated[
    Optional[float],
    typer.Option(help="Truncation: 1 for none, 0 for the mean image; by default 0.7, or 1 where there is no w."),
]
_Cutoff = Annotated[Optional[int], typer.Option(min=0, help="Truncate only this many first layers.")]
_Noise = Annotated[str, typer.Option(help="const, random or none.")]
_Batch = Annotated[int, typer.Option(min=1, help="Images at a time.")]
_Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
_Format = Annotated[
    Optional[str], typer.Option(help="mp4, webm, gif, frames or strip, instead of what the suffix of --out says.")
]
_Scale = Annotated[int, typer.Option(min=1, max=64, help="Enlarge pixels by this factor.")]


def mix(
    snapshot: _Snapshot,
    rows: Annotated[str, typer.Option(help="Seeds of the rows, such as 0-3 or 1,5,9.")] = "0-3",
    cols: Annotated[str, typer.Option("--cols", "--columns", help="Seeds of the columns.")] = "10-15",
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            "--styles",
            help="Whose styles come from the column's seed: coarse, middle, fine, or numbers such as 0-6,9.",
        ),
    ] = "coarse",
    row_labels: Annotated[
        Optional[str], typer.Option(help="Of conditional ones: classes of the rows, as in `sample`.")
    ] = None,
    col_labels: Annotated[
        Optional[str], typer.Option("--col-labels", "--column-labels", help="Classes of the columns.")
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="The PNG file; by default NAME-mix.png beside the snapshot.")
    ] = None,
    psi: _Psi = None,
    cutoff: _Cutoff = None,
    noise: _Noise = "const",
    batch: _Batch = 16,
    device: _Device = "auto",
) -> None:
    """Mix styles: a matrix of pictures with some layers of the column's seed, and the others of the row's."""
    from stylegan_pg.editing.mix import mix_command

    path = mix_command(
        _chosen(snapshot),
        out,
        rows=rows,
        columns=cols,
        layers=layers,
        row_labels=row_labels,
        column_labels=col_labels,
        psi=psi,
        cutoff=cutoff,
        noise=noise,
        batch=batch,
        device=device,
    )
    print(path)


def interpolate(
    snapshot: _Snapshot,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Of the keyframes, in this order, such as 0-4 or 1,5,9.")
    ] = "0-4",
    out: Annotated[
        Optional[Path],
        typer.Option(
            help="NAME.mp4, NAME.webm, NAME.gif, NAME.png for a strip, or NAME for a folder of PNG files; by default "
            "an MP4 beside the snapshot."
        ),
    ] = None,
    frames: Annotated[
        Optional[int], typer.Option(min=1, help="Of the whole; 60 from each keyframe to the next by default.")
    ] = None,
    space: Annotated[
        Optional[str],
        typer.Option(help="w (default), z, or slerp: z along great circles (default where there is no w)."),
    ] = None,
    easing: Annotated[
        str,
        typer.Option(
            help="linear; smooth, smoother or sine, which slow down at keyframes; or cubic, a spline through them."
        ),
    ] = "linear",
    loop: Annotated[bool, typer.Option("--loop", help="Return to the first keyframe.")] = False,
    labels: Annotated[
        Optional[str], typer.Option(help="Of conditional ones: the keyframes' classes, paired as in `sample`.")
    ] = None,
    format: _Format = None,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 30.0,
    columns: Annotated[int, typer.Option(min=0, help="Of a strip; 0 for one row.")] = 0,
    scale: _Scale = 1,
    psi: _Psi = None,
    cutoff: _Cutoff = None,
    noise: _Noise = "const",
    batch: _Batch = 16,
    device: _Device = "auto",
) -> None:
    """Interpolate from seed to seed, as a video, a GIF, a folder of frames or a strip."""
    from stylegan_pg.editing.interpolate import interpolate_command

    path = interpolate_command(
        _chosen(snapshot),
        out,
        seeds=seeds,
        labels=labels,
        frames=frames,
        space=space,
        easing=easing,
        loop=loop,
        format=format,
        fps=fps,
        columns=columns,
        scale=scale,
        psi=psi,
        cutoff=cutoff,
        noise=noise,
        batch=batch,
        device=device,
    )
    print(path)


def video(
    snapshot: _Snapshot,
    out: Annotated[
        Optional[Path],
        typer.Option(
            help="NAME.mp4, NAME.webm, NAME.gif, or NAME for a folder of PNG files; by default an MP4 beside the "
            "snapshot."
        ),
    ] = None,
    grid: Annotated[str, typer.Option(help="Columns x rows of walks.")] = "1x1",
    seconds: Annotated[float, typer.Option(help="Length of the loop.")] = 10.0,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 30.0,
    keyframes: Annotated[
        Optional[int], typer.Option(min=1, help="Of each walk; one for every 2 seconds by default, at least 3.")
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="The first seed; or a list, which is repeated.")
    ] = "0",
    mix: Annotated[
        Optional[str],
        typer.Option(
            help="Mix styles over time: these layers (as of `mix`) follow a walk of the column, the others one of the "
            "row."
        ),
    ] = None,
    walk: Annotated[
        str, typer.Option(help="spline through the keyframes; or gaussian, latents smoothed over time.")
    ] = "spline",
    labels: Annotated[
        Optional[str], typer.Option(help="Of conditional ones: classes, as in `sample`; all in turn by default.")
    ] = None,
    labels_by: Annotated[
        str, typer.Option(help="walk: each keeps its class; keyframe: the keyframes have the classes in turn.")
    ] = "walk",
    format: Annotated[
        Optional[str], typer.Option(help="mp4, webm, gif or frames, instead of what the suffix of --out says.")
    ] = None,
    scale: _Scale = 1,
    psi: _Psi = None,
    cutoff: _Cutoff = None,
    noise: _Noise = "const",
    batch: _Batch = 16,
    device: _Device = "auto",
) -> None:
    """Make a video, which can be repeated without a jump, of a grid of walks."""
    from stylegan_pg.editing.video import video_command

    path = video_command(
        _chosen(snapshot),
        out,
        grid=grid,
        seconds=seconds,
        fps=fps,
        keyframes=keyframes,
        seeds=seeds,
        labels=labels,
        labels_by=labels_by,
        walk=walk,
        mix=mix,
        format=format,
        scale=scale,
        psi=psi,
        cutoff=cutoff,
        noise=noise,
        batch=batch,
        device=device,
    )
    print(path)
