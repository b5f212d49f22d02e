"""The commands `ema` and `average`, which make snapshots by averaging. Each imports what it needs inside its function,
so that `--help` answers at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Optional

import typer

log = logging.getLogger(__name__)


def ema(
    run: Annotated[
        Path, typer.Argument(help="A run that was trained with ema.profiles, or one of its snapshots for its moment.")
    ],
    width: Annotated[
        Optional[float],
        typer.Option(help="Relative width of the average, its standard deviation over its length: 0.001 to 0.288."),
    ] = None,
    at: Annotated[Optional[float], typer.Option(help="Moment of the run in kimg; the newest by default.")] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="The snapshot; RUN/snapshots/ema-WIDTH-MOMENT.safetensors by default.")
    ] = None,
    sweep: Annotated[
        Optional[str],
        typer.Option(help="FROM:TO:STEP, such as 0.02:0.20:0.02: measure these widths and keep the best."),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Of --sweep: names, separated by commas; the first one says which width is the best.")
    ] = "swd",
    data: Annotated[
        Optional[str], typer.Option(help="Of --sweep: a packed dataset; by default the one that the run trains on.")
    ] = None,
    images: Annotated[Optional[int], typer.Option(min=1, help="Of --sweep: how many, for swd and ms_ssim.")] = None,
    weights: Annotated[
        Optional[list[Path]],
        typer.Option(help="Of --sweep: weights of Inception, VGG16 or LPIPS; recognised by content, repeat for more."),
    ] = None,
    extractor: Annotated[
        str, typer.Option(help="Of --sweep, instead of Inception and VGG16: pixels, or package.module:function.")
    ] = "",
    precision: Annotated[str, typer.Option(help="Of --sweep: of the feature networks, fp32 or bf16.")] = "fp32",
    batch: Annotated[int, typer.Option(min=1, help="Of --sweep: images at a time.")] = 32,
    seed: Annotated[str, typer.Option(help="Of --sweep: one number, of latents.")] = "0",
    device: Annotated[str, typer.Option(help="Of --sweep: auto, cpu or cuda.")] = "auto",
) -> None:
    """Make the snapshot of an average of any length after training, from the averages that a run has stored.

    With --sweep, a table of metrics by width is printed as it is measured. Under torchrun this work is divided among
    the processes.
    """
    from stylegan_pg.errors import UsageError

    if (width is None) == (sweep is None):
        raise UsageError("give --width, such as --width 0.07, or --sweep FROM:TO:STEP, such as 0.02:0.20:0.02")
    if sweep is not None:
        from stylegan_pg.checkpoint.snapshot import choose_device
        from stylegan_pg.distributed import process_group as dist
        from stylegan_pg.editing.width_sweep import parse_widths
        from stylegan_pg.editing.width_sweep import sweep as measure
        from stylegan_pg.metrics.base import Settings
        from stylegan_pg.metrics.command import parse_seed

        widths, kind, number = parse_widths(sweep), choose_device(device).type, parse_seed(seed)
        target, failed = dist.init(kind), True
        try:
            settings = Settings(target, tuple(map(str, weights or ())), extractor, precision, batch=batch, seed=number)
            how = {"names": metrics.split(","), "data": data, "images": images, "out": out, "settings": settings}
            for line in measure(run, widths, at, **how):
                if dist.is_main():
                    print(line, flush=True)
            failed = False
        finally:
            dist.shutdown(failed=failed)
        return
    from stylegan_pg.editing.averages import check_out, make, moment_of, path_of, remark_on

    assert width is not None
    if out is not None:
        check_out(out, [run])
    moment = moment_of(run, at, width)
    combination = moment.combination(width)
    (made,) = make(moment, [width], [combination])
    path = out or path_of(moment, width)
    made.save(path)
    if remark := remark_on(moment, width, combination):
        log.warning(remark)
    used = int((combination.weights != 0).sum())
    log.info(
        f"width {width:g} at {moment.nimg / 1000:.10g} kimg, of {used} stored average{'s' * (used != 1)} "
        f"(residual of the fit {combination.residual:.2g})"
    )
    print(path)


def average(
    snapshots: Annotated[
        list[Path], typer.Argument(help="Snapshots of equal networks, or runs for their best or newest one.")
    ],
    weights: Annotated[
        Optional[str], typer.Option(help="Numbers with commas between them, such as 1,2,1; equal ones by default.")
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="The snapshot; average.safetensors beside the first one by default.")
    ] = None,
) -> None:
    """Average the weights of several snapshots."""
    from stylegan_pg.checkpoint.names import meant_snapshot
    from stylegan_pg.editing.averages import average as average_of
    from stylegan_pg.editing.averages import check_out, free_path, parse_weights

    chosen = []
    for path in snapshots:
        path, remark = meant_snapshot(path)
        chosen.append(path)
        if remark:
            log.info(remark)
    numbers = parse_weights(weights or ",".join("1" * len(chosen)), len(chosen))
    if out is not None:
        check_out(out, chosen)
    made = average_of(chosen, numbers)
    path = out or free_path(chosen[0].parent)
    made.save(path)
    print(path)
