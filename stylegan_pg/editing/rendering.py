"""Pictures from a loaded generator for the functions of this room: styles of seeds, and batches of images.

Every image depends on its own
inputs only, so results do not depend on the batch size, except for rounding (one grey level in float32, and a few in
networks of low precision).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint.snapshot import choose_device, load_snapshot
from stylegan_pg.data.classes import conditions_at, parse_classes
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import finite, latents
from stylegan_pg.inference.look import Look
from stylegan_pg.inference.sampling import paired
from stylegan_pg.networks import accepted
from stylegan_pg.rng import generator
from stylegan_pg.untrusted import printable

KEYS_AT_A_TIME = 256  # latents that are mapped to w together


def pictured(snapshot: Path, device: str) -> Any:
    """Load the generator of a snapshot that makes pictures. Raises UsageError; see load_snapshot."""
    G = load_snapshot(snapshot, choose_device(device))
    if G.img_channels not in (1, 3, 4):
        raise UsageError(f"{printable(snapshot)} makes points, not pictures: use it from Python")
    return G


def has_layers(G: Any) -> bool:
    """Whether a generator has a w for each of several layers. Progressive GAN's only w is the normalised z."""
    return hasattr(G, "styles") and G.num_ws > 1


def conditions_for_seeds(
    G: Any, seeds: Sequence[int], labels: str | None
) -> tuple[list[int], torch.Tensor | None, list[int]]:
    """Pair seeds with classes as `sample` does: the shorter list is repeated; without labels all classes take turns.

    Returns:
        The seeds, their conditions [N, c_dim] (None for an unconditional generator), and their classes (-1: none).
    """
    pairs = paired(seeds, parse_classes(G, labels), labels is not None)
    classes = [k for _, k in pairs]
    return [seed for seed, _ in pairs], conditions_at(G, classes) if G.c_dim else None, classes


@torch.no_grad()
def styles_of_seeds(G: Any, seeds: Sequence[int], c: torch.Tensor | None, look: Look) -> torch.Tensor:
    """Truncated styles, float32 [N, num_ws, w_dim] on the generator's device, of seeds and conditions [N, c_dim]."""
    return styles_of_latents(G, latents(seeds, G.z_dim), c, look)


@torch.no_grad()
def styles_of_latents(G: Any, z: torch.Tensor, c: torch.Tensor | None, look: Look) -> torch.Tensor:
    """Truncated styles [N, num_ws, w_dim] of latents z [N, z_dim] and conditions [N, c_dim]."""
    like = next(G.parameters())
    parts = []
    for i in range(0, len(z), KEYS_AT_A_TIME):
        some = None if c is None else c[i : i + KEYS_AT_A_TIME].to(like)
        parts.append(G.styles(z[i : i + KEYS_AT_A_TIME].to(like), some, psi=look.psi, cutoff=look.cutoff))
    return torch.cat(parts)


@torch.no_grad()
def images_of_styles(G: Any, ws: torch.Tensor, look: Look, first: int = 0) -> Iterator[torch.Tensor]:
    """Synthesise styles [N, num_ws, w_dim]; yields uint8 [n, C, H, W] on the CPU.

    Args:
        first: The number of the first image, from which its random noise follows.

    Raises:
        RunError: The images are not finite.
    """
    like = next(G.parameters())
    how = {"alpha": getattr(G, "description", {}).get("alpha", 1.0), "noise": look.noise}
    for i, size, noise in _batches(len(ws), look, first, like.device):
        known = accepted(G.synthesis, **how, **noise)
        yield to_uint8(finite(G.synthesis(ws[i : i + size].to(like), **known))).cpu()


@torch.no_grad()
def images_of_latents(
    G: Any, z: torch.Tensor, c: torch.Tensor | None, look: Look, first: int = 0
) -> Iterator[torch.Tensor]:
    """Generate images of latents z [N, z_dim] and conditions c [N, c_dim]; yields uint8 [n, C, H, W] on the CPU.

    Args:
        first: The number of the first image, from which its random noise follows.

    Raises:
        RunError: The images are not finite.
    """
    like = next(G.parameters())
    how = {"psi": look.psi, "cutoff": look.cutoff, "noise": look.noise}
    for i, size, noise in _batches(len(z), look, first, like.device):
        given = [] if c is None else [c[i : i + size].to(like)]
        known = accepted(G, **how, **noise)
        yield to_uint8(finite(G(z[i : i + size].to(like), *given, **known))).cpu()


def _batches(
    count: int, look: Look, first: int, device: torch.device
) -> Iterator[tuple[int, int, dict[str, torch.Generator]]]:
    """The first image and the size of each batch, and the source of its random noise.

    Images with random noise are made one by one: within a batch, the noise of an image would depend on its place.
    """
    size = 1 if look.noise == "random" else look.batch
    for i in range(0, count, size):
        random = {}
        if look.noise == "random":
            random = {"generator": generator(look.seed, "picture-noise", first + i, device=device)}
        yield i, min(size, count - i), random
