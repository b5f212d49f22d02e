"""Directions in the space of a generator that change a face in a visible way, for the sliders of the page.

They come from samples of w and from the weights (editing/directions.py), without labels; or from a file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.editing.directions import Samples, factorized, principal, signed
from stylegan_pg.errors import UsageError
from stylegan_pg.inference import latent_files
from stylegan_pg.untrusted import printable

COUNT = 8  # directions of each kind
MOST_OF_A_FILE = 64


@dataclass(frozen=True)
class Direction:
    """name: unique among those of a generator. kind: its origin. vector [dim], or [layers, dim]: the change of the
    generator's latent (w, or z where there is no w) that stands for one standard deviation."""

    name: str
    kind: str
    vector: torch.Tensor


def in_w(G: Any, samples: Samples) -> list[Direction]:
    """The principal components of w, and the directions that change the styles of all layers most."""
    layers = [(0, G.num_ws)]
    found = []
    for name, kind, method in (
        ("pca", "principal components of w", principal),
        ("weights", "factorisation of the weights", factorized),
    ):
        with contextlib.suppress(UsageError):  # layers of an unknown kind cannot be factorised
            directions = method(G, layers, COUNT, samples)
            steps = enumerate(zip(directions.vectors, directions.scales, strict=True), start=1)
            found += [Direction(f"{name}{i}", kind, scale * vector[0]) for i, (vector, scale) in steps]
    return found


@torch.no_grad()
def in_z(G: Any) -> list[Direction]:
    """The directions, of length 1, that change what the first layer of a generator without w makes of z most:
    eigenvectors of A^T A for its weight A (Shen and Zhou 2021, equation 5)."""
    weight = _first_weight(G)
    if weight is None:
        return []
    a = weight.double()
    values, vectors = torch.linalg.eigh(a.t() @ a)
    chosen = signed(vectors[:, values.argsort(descending=True)[:COUNT]].t())
    return [Direction(f"weights{i + 1}", "factorisation of the weights", v.to(weight)) for i, v in enumerate(chosen)]


def _first_weight(G: Any) -> torch.Tensor | None:
    """The weight with which a generator without w reads its latent, [outputs, z_dim]. None if it is not known."""
    b4 = getattr(getattr(G, "synthesis", G), "b4", None)
    first: Any = getattr(b4, "first", None)
    if hasattr(first, "linear"):  # R3GAN, whose latent is followed by the embedding of the condition
        return first.linear.weight[:, : G.z_dim]
    if hasattr(first, "weight"):  # Progressive GAN
        return first.weight[: G.z_dim].flatten(1).t()
    return None


def read_directions(path: Path, G: Any, num_layers: int, dim: int) -> list[Direction]:
    """The directions of a safetensors file: those that `stylegan-pg directions` writes, which have names, lengths and
    ranges of layers; or any tensors [dim], [count, dim] or [count, layers, dim] by name.

    Raises:
        UsageError: the file cannot be read, or holds no direction for a generator of these sizes.
    """
    try:
        with tensor_file.opened(path) as file:
            is_described = latent_files.KEY in file.metadata
            rows = [] if is_described else list(_plain(file.read(), num_layers, dim))
    except (tensor_file.BadFileError, OSError) as error:
        raise UsageError(
            f"{printable(path)} holds no directions ({printable(error)}): give a safetensors file"
        ) from None
    if is_described:
        of_file = latent_files.load_directions(path, G)
        names = enumerate(of_file.names[:MOST_OF_A_FILE])
        rows = [(printable(name, 100), of_file.step(i, num_layers)) for i, name in names]
    if not rows:
        raise UsageError(
            f"{printable(path)} holds no directions for this generator: tensors [{dim}], [count, {dim}] or "
            f"[count, {num_layers}, {dim}] are expected"
        )
    return [Direction(f"{path.stem}/{name}", f"file {path.name}", row) for name, row in rows]


def _plain(tensors: Mapping[str, torch.Tensor], num_layers: int, dim: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, t in sorted(tensors.items()):
        if not t.is_floating_point() or t.ndim not in (1, 2, 3) or not tensor_file.is_finite(t):
            continue
        rows = t.float()[None] if t.ndim == 1 else t.float()
        if rows.shape[-1] != dim or rows.shape[1:-1] not in ((), (1,), (num_layers,)):
            continue
        for i, row in enumerate(rows[:MOST_OF_A_FILE]):
            yield f"{printable(name, 100)}{i + 1 if len(rows) > 1 else ''}", row
