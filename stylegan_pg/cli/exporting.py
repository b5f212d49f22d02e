"""The command `export`, which imports what it needs inside its function, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from stylegan_pg.cli import snapshots


def export(
    snapshot: Annotated[Path, typer.Argument(help=f"{snapshots._CHOSEN}.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx; torch, a package of torch.export; aoti, compiled for this processor or GPU; public, tensors "
            "under the names of public checkpoints; hub, a folder to upload; web, a page that generates in the browser."
        ),
    ],
    out: Annotated[
        Optional[Path],
        typer.Option(help="File, or folder of hub and web; by default in RUN/exports, or beside the snapshot."),
    ] = None,
    precision: Annotated[
        Optional[str], typer.Option(help="fp32, the default, or fp16: 16 bits in the layers from 8x8 on.")
    ] = None,
    inputs: Annotated[
        Optional[str], typer.Option(help="z, latents and classes, the default; or w, styles [N, num_ws, w_dim].")
    ] = None,
    noise: Annotated[
        Optional[str], typer.Option(help="Noise images of StyleGAN and StyleGAN2: const, the default, or none.")
    ] = None,
    device: Annotated[
        Optional[str], typer.Option(help="That torch and aoti are made for: cpu, the default, cuda or auto.")
    ] = None,
    title: Annotated[Optional[str], typer.Option(help="Of the model card or the page.")] = None,
    licence: Annotated[Optional[str], typer.Option("--license", help="Of the model card, such as cc-by-4.0.")] = None,
    ort_web: Annotated[Optional[Path], typer.Option(help="For web: folder of the npm package onnxruntime-web.")] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="For web: fetch onnxruntime-web with npm, unless it was before.")
    ] = False,
) -> None:
    """Write a snapshot in another format, and check the result by running it.

    The exported function takes psi and a mask of the layers that are truncated, and any batch size.
    """
    from stylegan_pg.export.command import export as write_export

    for line in write_export(
        snapshots._chosen(snapshot),
        to,
        out,
        precision=precision,
        inputs=inputs,
        noise=noise,
        device=device,
        title=title,
        licence=licence,
        ort_web=ort_web,
        fetch=fetch,
    ):
        print(line, flush=True)
