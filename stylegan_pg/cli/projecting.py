"""The commands `project` and `directions`. Each imports what it needs inside its function, so that `--help` answers at
once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from stylegan_pg.cli.snapshots import _CHOSEN, _chosen

_LABELS = "Of conditional ones: the class of the pictures, one or one for each; by default that of the nearest sample."


def project(
    snapshot: Annotated[Path, typer.Argument(help=f"{_CHOSEN}.")],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder for the results; by default NAME-projected beside the snapshot.")
    ] = None,
    space: Annotated[
        str, typer.Option(help="w+, a w for each layer; w, one for all; z, which generators without w have.")
    ] = "w+",
    steps: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of the optimisation.")] = 1000,
    init: Annotated[
        str, typer.Option(help="Where it begins: nearest, the nearest of 1,000 samples; or mean, the mean latent.")
    ] = "nearest",
    crop: Annotated[
        str, typer.Option(help="Pictures of another shape: none, leave them out; center, cut out the central part.")
    ] = "none",
    labels: Annotated[Optional[str], typer.Option(help=_LABELS)] = None,
    distance: Annotated[
        str,
        typer.Option(
            help="auto (lpips where its weights are found, else discriminator, else pixels), lpips, discriminator "
            "(features of D), or pixels."
        ),
    ] = "auto",
    weights: Annotated[
        Optional[list[Path]], typer.Option(help="Of VGG16 and LPIPS; recognised by content, repeat for more.")
    ] = None,
    discriminator: Annotated[
        Optional[Path], typer.Option(help="A checkpoint with D; by default the newest of the snapshot's run.")
    ] = None,
    optimize_noise: Annotated[
        bool, typer.Option("--optimize-noise", help="Find the noise inputs of the layers, too.")
    ] = False,
    lr: Annotated[
        float, typer.Option(min=1e-6, max=100, help="Learning rate, in standard deviations of latents.")
    ] = 0.25,
    video: Annotated[bool, typer.Option("--video", help="Write a video of the progress for each picture.")] = False,
    fps: Annotated[int, typer.Option(min=1, max=240, help="Frames per second of the videos.")] = 30,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Find latents of which a snapshot makes given pictures; `sample --ws` renders them."""
    from stylegan_pg.editing.projecting import project_files
    from stylegan_pg.editing.projection import Settings

    for line in project_files(
        _chosen(snapshot),
        pictures,
        out,
        device=device,
        settings=Settings(space=space, steps=steps, init=init, lr=lr, optimize_noise=optimize_noise, seed=seed),
        labels=labels,
        crop=crop,
        distance=distance,
        weights=tuple(weights or ()),
        discriminator=discriminator,
        batch=batch,
        video=video,
        fps=fps,
    ):
        print(line, flush=True)


def directions(
    snapshot: Annotated[Path, typer.Argument(help=f"{_CHOSEN}.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder for the results; by default NAME-directions beside the snapshot.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="factorize, what changes the styles most; pca, principal components of w; classes, towards each "
            "class; scorer, what changes the number that --scorer gives."
        ),
    ] = "factorize",
    count: Annotated[int, typer.Option(min=1, help="Directions of each range of layers (factorize, pca).")] = 5,
    layers: Annotated[
        Optional[str],
        typer.Option(help="Ranges of layers that directions change, such as 0-3,4-7 (counted from 0); all by default."),
    ] = None,
    labels: Annotated[
        Optional[str],
        typer.Option(help="Of conditional ones: the classes that are sampled; A,B with --method classes: from A to B."),
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(help="package.module:function, which returns a function from n uint8 RGB images to n numbers."),
    ] = "",
    samples: Annotated[
        Optional[int], typer.Option(min=16, max=10_000_000, help="Of w: 10000 by default, for a scorer 2000.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Of the strips that show the directions.")] = "0-3",
    strength: Annotated[float, typer.Option(min=0, max=1e4, help="Of the outermost pictures of the strips.")] = 3.0,
    psi: Annotated[float, typer.Option(help="Truncation of the strips.")] = 0.7,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the samples.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Find directions in w that change a snapshot's images; `sample --direction` applies them."""
    from stylegan_pg.editing.finding import find_directions

    for line in find_directions(
        _chosen(snapshot),
        out,
        device=device,
        method="scorer" if scorer and method == "factorize" else method,
        count=count,
        layers=layers,
        labels=labels,
        scorer=scorer,
        samples=samples,
        seeds=seeds,
        strength=strength,
        psi=psi,
        batch=batch,
        seed=seed,
    ):
        print(line, flush=True)
