"""The commands `sample` and `metrics`, which use snapshots. Each imports what it needs inside its function, so that
`--help` answers at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

log = logging.getLogger(__name__)

_CHOSEN = "A snapshot, RUN/snapshots/*.safetensors, or RUN for its best one by its metrics, else its newest"


def _chosen(path: Path) -> Path:
    """The snapshot that a path means. If that is a run's folder, a line on the console says which one is taken."""
    from stylegan_pg.checkpoint.names import meant_snapshot

    path, remark = meant_snapshot(path)
    if remark:
        log.info(remark)
    return path


def sample(
    snapshot: Annotated[Path, typer.Argument(help=f"{_CHOSEN}.")],
    out: Annotated[
        Optional[Path], typer.Option(help="Folder for the pictures; by default NAME-pictures beside the snapshot.")
    ] = None,
    seeds: Annotated[
        Optional[str],
        typer.Option("--seeds", "--seed", help="For example 5 or 1,5,9; 0-63 by default, 0-7 for a class grid."),
    ] = None,
    psi: Annotated[
        Optional[float],
        typer.Option(help="Truncation: 1 for none, 0 for the mean image; by default 0.7, or 1 where there is no w."),
    ] = None,
    cutoff: Annotated[Optional[int], typer.Option(min=0, help="Truncate only this many first layers.")] = None,
    labels: Annotated[
        Optional[str],
        typer.Option(
            help="Of conditional ones: names of classes first (cat,dog); #3 or index:3 is a place, counted from 0, "
            "#1-3 are several; plain numbers are places too where no class has another number for a name. Seeds and "
            "labels are paired; the shorter list is repeated."
        ),
    ] = None,
    condition: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Of those whose conditions are vectors: named entries, such as 'hair_red, glasses' or 'age=0.3'; all "
            "others are 0. Repeat for more, which are paired with the seeds as labels are."
        ),
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="One picture of all, instead of one each.")] = False,
    class_grid: Annotated[
        bool, typer.Option("--class-grid", help="One picture: a row for each class, a column for each seed.")
    ] = False,
    columns: Annotated[int, typer.Option(min=0, help="Of the grid; 0 for a square.")] = 0,
    interpolate: Annotated[int, typer.Option(min=0, help="Frames from each seed to the next, as a strip.")] = 0,
    noise: Annotated[str, typer.Option(help="const, random or none.")] = "const",
    out_shards: Annotated[
        Optional[Path],
        typer.Option(help="Folder for a packed dataset instead of pictures (WebDataset tars with labels and seeds)."),
    ] = None,
    count: Annotated[
        Optional[int], typer.Option(min=1, help="Images in the dataset, whose seeds follow --seed (0 by default).")
    ] = None,
    shard_images: Annotated[
        Optional[int], typer.Option(min=1, help="Images per tar; 1000 by default, or fewer large ones.")
    ] = None,
    ws: Annotated[
        Optional[Path], typer.Option(help="Latents that `project` found, instead of seeds; psi is 1 by default.")
    ] = None,
    direction: Annotated[
        Optional[list[str]],
        typer.Option(help="Move all ws: FILE of `directions`, FILE#NAME or FILE#NUMBER; repeat for more."),
    ] = None,
    strength: Annotated[
        Optional[list[float]], typer.Option(help="How far, such as 2 or -1.5; once, or for each direction.")
    ] = None,
    arithmetic: Annotated[
        Optional[str],
        typer.Option(
            help="Groups of seeds whose mean latents are added and subtracted, such as '1,2,3 - 4,5,6 + 7,8,9', with "
            "spaces around + and -; writes the result, and a picture of the groups."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Write images that a snapshot generates; of a generator of texts, samples.txt with a line for each seed.

    With --out-shards, the same command continues after an interruption, and torchrun divides the work.
    """
    if out_shards is not None:
        refused = {"--out": out, "--grid": grid, "--class-grid": class_grid, "--columns": columns}
        refused |= {"--interpolate": interpolate, "--ws": ws, "--direction": direction, "--strength": strength}
        refused |= {"--condition": condition, "--arithmetic": arithmetic}
        _refuse("--out-shards writes a dataset, without any of these", refused)
        how = {"psi": psi, "cutoff": cutoff, "noise": noise, "labels": labels, "batch": batch}
        _sample_shards(_chosen(snapshot), out_shards, device, count=count, seeds=seeds, per_shard=shard_images, **how)
        return
    _refuse("a dataset is written with --out-shards FOLDER", {"--count": count, "--shard-images": shard_images})
    from stylegan_pg.inference.sampling import sample as write_samples

    for line in write_samples(
        _chosen(snapshot),
        out,
        seeds=seeds,
        psi=psi,
        cutoff=cutoff,
        labels=labels,
        conditions=tuple(condition or ()),
        grid=grid,
        class_grid=class_grid,
        columns=columns,
        interpolate=interpolate,
        noise=noise,
        ws=ws,
        directions=tuple(direction or ()),
        strengths=tuple(strength or (1.0,)),
        arithmetic=arithmetic,
        batch=batch,
        device=device,
    ):
        print(line)


def _refuse(why: str, options: dict[str, Any]) -> None:
    """Raise UsageError if one of these options is given."""
    from stylegan_pg.errors import UsageError

    given = [name for name, value in options.items() if value]
    if given:
        raise UsageError(f"{' and '.join(given)}: {why}")


def _sample_shards(snapshot: Path, out: Path, device: str, **asked: Any) -> None:
    """Write a dataset of generated images, together with the other ranks if there are any."""
    from stylegan_pg.checkpoint.snapshot import choose_device
    from stylegan_pg.distributed import process_group as dist
    from stylegan_pg.inference.shards import WAIT_SEC, sample_shards

    target, failed = dist.init(choose_device(device).type, WAIT_SEC), True
    try:
        line = sample_shards(snapshot, out, target, progress=True, **asked)
        if dist.is_main():
            print(line)
        failed = False
    finally:
        dist.shutdown(failed=failed)


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

    If some metrics cannot be measured, the others are printed first, then the reasons, with exit code 1 or 2. Under
    torchrun the work is divided among the processes.
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
