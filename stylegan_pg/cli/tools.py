"""The commands `data` and `kernels`, which are groups of subcommands. Each subcommand imports what it needs inside its
function, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from stylegan_pg.untrusted import printable

if TYPE_CHECKING:
    from stylegan_pg.data.datasets.index import DatasetIndex

LONGEST_LINE = 100_000  # characters about a dataset, such as the names of its classes

data = typer.Typer(help="A dataset: verify it, describe it, measure how fast it is read.", no_args_is_help=True)
_URL = typer.Argument(help="A packed dataset (folder, http(s)://, s3://) or WebDataset tars, as data.url.")
_BASE = typer.Option(help="Rows x columns at resolution 4 that foreign tars' pictures are cropped to.")


def _dataset(url: str, base: str) -> DatasetIndex:
    from stylegan_pg.data.datasets.opening import load_index
    from stylegan_pg.data.pack.options import parse_base

    return load_index(url, parse_base(base))


@data.command("check")
def data_check(
    url: Annotated[str, _URL],
    resolution: Annotated[Optional[int], typer.Option(help="One; all by default, of foreign tars the largest.")] = None,
    workers: Annotated[Optional[int], typer.Option(min=1, help="Processes; all cores by default.")] = None,
    base: Annotated[str, _BASE] = "4x4",
) -> None:
    """Verify every checksum and decode every image, and print what is damaged. The exit code is 1 if anything is."""
    from stylegan_pg.data.verify import check

    index = _dataset(url, base)
    packed = any(shard.index_sha256 for shard in index.shards)
    resolutions = [*index.resolutions] if packed else [max(index.resolutions)]
    bad = 0
    for line in check(index, resolutions if resolution is None else [resolution], workers):
        print(printable(line, LONGEST_LINE), flush=True)
        bad += 1
    print(f"{printable(index.path)}: {index.count} images, {f'faults: {bad}' if bad else 'all good'}")
    if bad:
        raise typer.Exit(1)


@data.command("info")
def data_info(
    url: Annotated[str, _URL],
    out: Annotated[Optional[Path], typer.Option(help="Write a contact sheet of its images into this PNG.")] = None,
    base: Annotated[str, _BASE] = "4x4",
) -> None:
    """Count images, classes and bytes; show a contact sheet."""
    from stylegan_pg.data.datasets.contact_sheet import contact_sheet
    from stylegan_pg.data.verify import info

    index = _dataset(url, base)
    for line in info(index):
        print(printable(line, LONGEST_LINE))
    if out is not None:
        contact_sheet(index, out)
        print(f"contact sheet: {out}")


@data.command("bench")
def data_bench(
    url: Annotated[str, _URL],
    resolution: Annotated[Optional[int], typer.Option(help="The largest by default.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode.")] = 2,
    window: Annotated[int, typer.Option(min=1, help="As data.window.")] = 65536,
    seconds: Annotated[float, typer.Option(min=0, help="For how long.")] = 10.0,
    base: Annotated[str, _BASE] = "4x4",
) -> None:
    """Measure how fast batches are read, in the order of training."""
    from stylegan_pg.data.verify import bench

    index = _dataset(url, base)
    size = resolution or max(index.resolutions)
    for line in bench(index, size, batch=batch, workers=workers, window=window, seconds=seconds):
        print(line, flush=True)


kernels = typer.Typer(
    help="The compiled kernels: which are used on this machine, why, and their speed.", no_args_is_help=False
)


@kernels.callback(invoke_without_command=True)
def _kernels(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        kernels_status()


@kernels.command("status")
def kernels_status() -> None:
    """Show which implementation each operation uses on each device, why, and how to get a better one."""
    from stylegan_pg.ops.native import status

    print(status())


@kernels.command("build")
def kernels_build(
    into: Annotated[Optional[Path], typer.Option(help="Copy the libraries there, for $STYLEGAN_PG_PREBUILT.")] = None,
    device: Annotated[
        Optional[list[str]], typer.Option(help="cpu or cuda, also where there is no GPU; repeat for both.")
    ] = None,
) -> None:
    """Compile the kernels that this machine can use, unless it has them; fails if one cannot be built.

    The CUDA kernels are built for the GPUs in $TORCH_CUDA_ARCH_LIST, else for those of this machine, else for A100,
    H100 and B200.
    """
    from stylegan_pg.ops.native import build_all

    for line in build_all(device or [], into):
        print(line)


@kernels.command("bench")
def kernels_bench(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0, help="For each row.")] = 0.5,
    only: Annotated[str, typer.Option(help="Rows whose name contains this.")] = "",
) -> None:
    """Time the operations against plain PyTorch and against copying."""
    from stylegan_pg.ops import bench, native

    native.check_device(device)
    print(native.status())
    print(bench.HEAD)
    for row in bench.rows(device, seconds, only):
        print(bench.line(row), flush=True)
