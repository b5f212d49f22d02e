"""Images of latents that a file holds (`sample --ws`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from stylegan_pg.data.classes import file_names
from stylegan_pg.errors import UsageError
from stylegan_pg.images import save_image, tile, to_uint8
from stylegan_pg.inference.generate import between, finite, images_of, writing
from stylegan_pg.inference.latent_files import Latents, load_latents

MOST_PIXELS = 1 << 28  # of one picture


@torch.no_grad()
def images_of_latents(
    G: Any, latents: Latents, *, psi: float = 1.0, cutoff: int | None = None, noise: str = "const", batch: int = 16
) -> Iterator[torch.Tensor]:
    """Images of latents, in their order; yields uint8 batches [n, C, H, W] on the CPU.

    Args:
        G: a generator of load_snapshot, or a Moved one.
        latents: as load_latents returns them for it. Their noise replaces the constant noise of G.
        psi, cutoff: truncation of the ws, as in Generator.styles.
        noise: const, random or none.
        batch: images at a time.

    Raises:
        RunError: the images are not finite. UsageError: psi is not 1, and the generator has no ws.
    """
    if latents.ws is None:
        assert latents.z is not None, "load_latents requires one of them"
        yield from images_of(G, latents.z, latents.c, batch=batch, psi=psi)
        return
    like = next(G.parameters())
    alpha = getattr(G, "description", {}).get("alpha", 1.0)
    offset = getattr(G, "offset", 0.0)
    how = {"alpha": alpha, "noise": noise}
    for i in range(0, len(latents.ws), batch):
        ws = latents.ws[i : i + batch].to(like)
        if psi != 1:
            end = getattr(G, "truncation_cutoff", None) if cutoff is None else cutoff
            end = G.num_ws if end is None else end
            ws = torch.cat([torch.lerp(G.mapping.w_avg.to(ws.dtype), ws[:, :end], psi), ws[:, end:]], dim=1)
        given = {name: x[i : i + batch, None].to(like) for name, x in latents.noise.items()}
        yield to_uint8(finite(functional_call(G.synthesis, given, (ws + offset,), how))).cpu()


def between_latents(latents: Latents, steps: int) -> Latents:
    """Latents of `steps` images from each picture towards the next, and of the last one: linear in w, on great circles
    in z. Optimised noise is left out, as mixtures of two patterns of noise have too little variance."""
    count = len(latents.names)
    places = [(i, k / steps) for i in range(count - 1) for k in range(steps)] + [(count - 1, 0.0)]

    def mixed(x: torch.Tensor | None, round: bool = False) -> torch.Tensor | None:
        if x is None:
            return None
        parts = []
        for (a, b), t in itertools.product(itertools.pairwise(x), range(steps)):
            at = torch.tensor([[t / steps]])
            parts.append(between(a, b, at)[0] if round else torch.lerp(a, b, t / steps))
        return torch.stack([*parts, x[-1]])

    names = [f"{latents.names[i]}-{share:.4f}" for i, share in places]
    z = None if latents.ws is not None else mixed(latents.z, round=True)
    return Latents(names, mixed(latents.ws), z, mixed(latents.c))


def sample_saved(
    G: Any,
    path: Path,
    out: Path,
    *,
    grid: bool = False,
    interpolate: int = 0,
    columns: int = 0,
    batch: int = 16,
    **how: Any,
) -> Iterator[str]:
    """Write the images of a file of latents into a folder; yields a line for each file written.

    One PNG per picture, with `grid` one of all, or with `interpolate` a strip from picture to picture. `how`: psi,
    cutoff and noise, see images_of_latents.

    Raises:
        UsageError, RunError: as load_latents and images_of_latents; the folder cannot be written.
    """
    latents = load_latents(path, G)
    if interpolate and len(latents.names) < 2:
        raise UsageError(f"--interpolate goes from picture to picture, and {path} holds one: leave it out")
    frames = (len(latents.names) - 1) * interpolate + 1 if interpolate else len(latents.names)
    if frames * math.prod(G.img_size) > MOST_PIXELS and (grid or interpolate):
        raise UsageError(f"one picture of {frames} images would have more than {MOST_PIXELS} pixels: write single ones")
    if interpolate:
        latents = between_latents(latents, interpolate)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    made = images_of_latents(G, latents, batch=batch, **how)
    if grid or interpolate:
        wide = columns or (frames if interpolate else math.ceil(math.sqrt(frames)))
        target = out / ("interpolation.png" if interpolate else "grid.png")
        picture = tile(torch.cat(list(made)), min(wide, frames))
        with writing(out):
            save_image(picture, target)
        yield str(target)
        return
    names = iter(file_names(latents.names))
    for image in itertools.chain.from_iterable(made):
        target = out / f"{next(names)}.png"
        with writing(out):
            save_image(image, target)
        yield str(target)
