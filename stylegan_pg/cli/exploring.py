"""The command `explore`. It imports what it needs inside its function, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def explore(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="SNAPSHOT|RUN...", help="Snapshots, and folders of runs, also while they train."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[
        Optional[int],
        typer.Option(min=0, max=65535, help="0 for any free one; by default 8765 or the next free one."),
    ] = None,
    allow_host: Annotated[
        Optional[list[str]],
        typer.Option(help="A further name in the browser's address bar, such as that of a proxy. Repeat for more."),
    ] = None,
    open: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser, if it has a display.")
    ] = True,
    directions: Annotated[
        Optional[list[Path]], typer.Option(help="A safetensors file of directions in w. Repeat for more.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a video that are made at once.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Explore generators and watch runs, on a page in the browser.

    The page makes no request beyond this machine. Needs the extra `ui`.
    """
    from stylegan_pg.explorer.command import explore as serve

    serve(
        paths,
        host=host,
        port=port,
        allowed=allow_host or (),
        open_browser=open,
        device=device,
        batch=batch,
        direction_files=directions or (),
    )
