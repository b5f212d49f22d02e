"""Interpolation from seed to seed, in z, on the sphere of z, or in w, as frames of a video, a GIF or a strip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.data.classes import parse_numbers
from stylegan_pg.editing import encoding, walks
from stylegan_pg.editing.rendering import (
    conditions_for_seeds,
    has_layers,
    images_of_latents,
    images_of_styles,
    pictured,
    styles_of_seeds,
)
from stylegan_pg.errors import UsageError
from stylegan_pg.inference.generate import latents
from stylegan_pg.inference.look import Look, look_for
from stylegan_pg.inference.sampling import enough_memory
from stylegan_pg.untrusted import printable

SPACES = ("w", "z", "slerp")
FRAMES = 60  # from each keyframe to the next, by default
MOST_FRAMES = 10_000_000


def default_space(G: Any) -> str:
    """Styles, or the sphere of z for a generator without a w for each layer."""
    return "w" if has_layers(G) else "slerp"


def check_space(G: Any, space: str) -> None:
    """Raises UsageError if a generator cannot be interpolated in this space."""
    if space not in SPACES:
        raise UsageError(f"space {printable(repr(space))} is not possible: {', '.join(SPACES)}")
    if space == "w" and not has_layers(G):
        raise UsageError("space w: this generator has no ws of its layers, only z: take z or slerp")


def interpolate(
    G: Any,
    seeds: Sequence[int],
    c: torch.Tensor | None = None,
    *,
    frames: int,
    space: str | None = None,
    easing: str = "linear",
    loop: bool = False,
    look: Look | None = None,
) -> Iterator[torch.Tensor]:
    """Generate the frames of a path through keyframes; yields uint8 images [C, H, W].

    Without `loop`, the first frame is the picture of the first seed and the last one that of the last seed. With it,
    the path returns to the first seed, and the last frame comes one step before the first.

    Args:
        seeds: Of the keyframes.
        c: Conditions [len(seeds), c_dim] of a conditional generator. In w, each keyframe's condition enters its styles;
            in the other spaces, conditions are interpolated with the easing (linearly for "cubic", whose negative
            weights would leave the range of conditions).
        frames: The number of all frames.
        space: "w", styles of all layers; "z", latents, linearly; "slerp", latents on great circles (see
            walks.on_sphere). None: see default_space.
        easing: A name in walks.WAYS.
        look: Options; None for look_for(G).

    Raises:
        UsageError: The space, the easing or the number of frames is not possible. RunError: the images are not finite.
    """
    look = look or look_for(G)
    space = space or default_space(G)
    check_space(G, space)
    _check(easing, len(seeds), frames)
    keys = styles_of_seeds(G, seeds, c, look) if space == "w" else latents(seeds, G.z_dim)
    return _frames(G, keys.cpu(), c, frames, space, easing, loop, look)


def interpolate_styles(
    G: Any, ws: torch.Tensor, *, frames: int, easing: str = "linear", loop: bool = False, look: Look | None = None
) -> Iterator[torch.Tensor]:
    """Generate the frames of a path through styles, for example of projected pictures; yields uint8 images [C, H, W].

    Args:
        ws: Styles [K, num_ws, w_dim] of the keyframes, which are not truncated.
        frames, easing, loop, look: As of `interpolate`.

    Raises:
        UsageError: The styles are not those of this generator, or an option is not possible. RunError: the images are
            not finite.
    """
    if not has_layers(G) or ws.shape[1:] != (G.num_ws, G.w_dim):
        raise UsageError(f"styles of shape {list(ws.shape)} are not those of this generator")
    _check(easing, len(ws), frames)
    return _frames(G, ws.detach().cpu(), None, frames, "w", easing, loop, look or look_for(G))


def _check(easing: str, keys: int, frames: int) -> None:
    walks.check_keys(easing, keys)
    if keys < 1 or not 1 <= frames <= MOST_FRAMES:
        raise UsageError(f"frames={frames} of {keys} keyframes: give 1 to {MOST_FRAMES}, and a keyframe or more")


def _frames(
    G: Any,
    keys: torch.Tensor,
    c: torch.Tensor | None,
    frames: int,
    space: str,
    easing: str,
    loop: bool,
    look: Look,
) -> Iterator[torch.Tensor]:
    """Interpolate between keys, styles [K, num_ws, w_dim] or latents [K, z_dim] on the CPU. Each batch's inputs are
    computed when it is due, so memory does not grow with the frames."""
    count, flat = len(keys), keys.flatten(1)
    for first in range(0, frames, look.batch):
        at = walks.positions(frames, count, loop, first, min(first + look.batch, frames))
        if space == "slerp":
            x = walks.on_sphere(flat, at, easing, loop)
        else:
            mixture = walks.weights(at, count, easing, loop)
            used = mixture.any(dim=0)
            x = mixture[:, used] @ flat[used].double()
        x = x.float().unflatten(1, keys.shape[1:])
        if space == "w":
            batches = images_of_styles(G, x, look, first)
        else:
            way = easing if easing in walks.EASINGS else "linear"
            rows = None if c is None else (walks.weights(at, count, way, loop) @ c.double()).float()
            batches = images_of_latents(G, x, rows, look, first)
        for images in batches:
            yield from images


def interpolate_command(
    snapshot: Path,
    out: Path | None,
    *,
    seeds: str,
    labels: str | None,
    frames: int | None,
    space: str | None,
    easing: str,
    loop: bool,
    format: str | None,
    fps: float,
    columns: int,
    scale: int,
    psi: float | None,
    cutoff: int | None,
    noise: str,
    batch: int,
    device: str,
    progress: bool = True,
) -> Path:
    """What `stylegan-pg interpolate` does; returns the path of the file or folder.

    Args:
        out: By default NAME-interpolation beside the snapshot, with the suffix of `format`, which is mp4 if none is
            given.
        frames: Of all; by default 60 from each keyframe to the next.

    Raises:
        UsageError: An option is invalid, PyAV is missing, or the file cannot be written. RunError: the disk is full,
            memory is short, or the generator has diverged.
    """
    numbers = parse_numbers(seeds)
    latents([max(numbers)], 1)  # refuses those that are too large
    to = encoding.target(
        default_path(snapshot, "interpolation", format) if out is None else out,
        format,
        fps=fps,
        columns=columns,
        scale=scale,
    )
    G = pictured(snapshot, device)
    look = look_for(G, psi=psi, cutoff=cutoff, noise=noise, batch=batch)
    numbers, c, _ = conditions_for_seeds(G, numbers, labels)
    if len(numbers) < 2:
        raise UsageError(f"--seeds {seeds} is one keyframe: give two seeds or more, or two labels for one seed")
    frames = FRAMES * (len(numbers) - (not loop)) if frames is None else frames
    with enough_memory(batch):
        path = interpolate(G, numbers, c, frames=frames, space=space, easing=easing, loop=loop, look=look)
        return encoding.write(path, frames, G.img_size, to, progress=progress)


def default_path(snapshot: Path, what: str, format: str | None) -> Path:
    """NAME-WHAT beside a snapshot, with the suffix of a format (None: mp4)."""
    suffixes = {format: suffix for suffix, format in encoding.SUFFIXES.items()}
    return snapshot.parent / f"{snapshot.stem}-{what}{suffixes.get(format or 'mp4', '')}"
