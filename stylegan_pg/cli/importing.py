"""The command `import`. It imports what it needs inside its function, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="Public .pkl of StyleGAN2-ADA, StyleGAN3 or R3GAN; .pt or .safetensors with the same names; or a "
            "checkpoint of a run, RUN/checkpoints/*.safetensors."
        ),
    ],
    out: Annotated[
        Optional[Path], typer.Option(help="The snapshot; by default NAME.safetensors beside the file.")
    ] = None,
    part: Annotated[str, typer.Option(help="Which generator: G_ema, the averaged one, or G.")] = "G_ema",
) -> None:
    """Make a snapshot of a generator that another program has trained. Nothing in the file is executed."""
    from stylegan_pg.interchange.command import import_file

    for line in import_file(file, out, part):
        print(line)
