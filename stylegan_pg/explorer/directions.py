"""Directions in the space of a generator that change a face in a visible way, for the sliders of the page.

They come from the weights or from samples of w, without labels; or from a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

COUNT = 8  # directions of each kind
SAMPLES = 4096  # of w, whose principal components are taken
MOST_OF_A_FILE = 64


@dataclass(frozen=True)
class Direction:
    """name: unique among those of a generator. kind: its origin. vector [dim], or [layers, dim]: the change of the
    generator's latent (w, or z where there is no w) that stands for one standard deviation."""

    name: str
    kind: str
    vector: torch.Tensor


@torch.no_grad()
def principal_components(w: torch.Tensor, count: int = COUNT) -> list[Direction]:
    """The first principal components of samples w [N, w_dim], each as long as the standard deviation along it
    (Härkönen et al. 2020, GANSpace, section 2.1). There are min(count, w_dim, N - 1) of them."""
    centred = (w - w.mean(dim=0)).double()
    values, vectors = torch.linalg.eigh(centred.t() @ centred / max(len(w) - 1, 1))
    order = values.argsort(descending=True)[: min(count, len(w) - 1)]
    chosen = signed(vectors[:, order].t()) * values[order].clamp(min=0).sqrt()[:, None]
    return [Direction(f"pca{i + 1}", "principal components of w", v.to(w)) for i, v in enumerate(chosen)]


@torch.no_grad()
def factorised(weight: torch.Tensor, deviations: torch.Tensor | None, count: int = COUNT) -> list[Direction]:
    """The directions that change what a layer makes of the latent most: eigenvectors of A^T A for the layer's weight
    A [outputs, dim] (Shen and Zhou 2021, closed-form factorization, eq. 5).

    Args:
        deviations: samples [N, dim] of the latent, whose standard deviation along a direction becomes its length;
            None: the latent is normal, and the length is 1.
    """
    a = weight.double()
    values, vectors = torch.linalg.eigh(a.t() @ a)
    chosen = signed(vectors[:, values.argsort(descending=True)[:count]].t())
    if deviations is not None:
        chosen = chosen * (deviations.double() @ chosen.t()).std(dim=0)[:, None]
    return [Direction(f"weights{i + 1}", "factorisation of the weights", v.to(weight)) for i, v in enumerate(chosen)]


def signed(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [n, dim] with the sign for which the component of largest magnitude is positive: eigenvectors have no
    sign of their own, and libraries differ in it."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)


def style_weights(synthesis: Any, w_dim: int) -> torch.Tensor | None:
    """The weights of all affine layers that make styles of w, [outputs, w_dim] one below the other. None if there are
    none."""
    found = [
        module.weight
        for name, module in synthesis.named_modules()
        if name.rpartition(".")[2] == "affine" and getattr(module, "weight", torch.empty(0)).shape[1:] == (w_dim,)
    ]
    return torch.cat(found) if found else None


def first_weight(G: Any) -> torch.Tensor | None:
    """The weight with which a generator without w reads its latent, [outputs, z_dim]. None if it is not known."""
    b4 = getattr(getattr(G, "synthesis", G), "b4", None)
    first: Any = getattr(b4, "first", None)
    if hasattr(first, "linear"):  # R3GAN, whose latent is followed by the embedding of the condition
        return first.linear.weight[:, : G.z_dim]
    if hasattr(first, "weight"):  # Progressive GAN
        return first.weight[: G.z_dim].flatten(1).t()
    return None


def read_directions(path: Path, num_layers: int, dim: int) -> list[Direction]:
    """The directions of a safetensors file: tensors [dim], [count, dim] or [count, layers, dim] by name.

    Raises:
        UsageError: the file cannot be read, or a tensor is not made for a generator of these sizes.
    """
    try:
        with tensor_file.opened(path) as file:
            tensors = file.read()
    except (tensor_file.BadFileError, OSError) as error:
        raise UsageError(
            f"{printable(path)} holds no directions ({printable(error)}): give a safetensors file"
        ) from None
    found = []
    for name, t in sorted(tensors.items()):
        if not t.is_floating_point() or not tensor_file.is_finite(t):
            continue  # such as eigenvalues' indices; what has a fitting shape must be finite
        rows = t.float()[None] if t.ndim == 1 else t.float()
        if (
            rows.ndim not in (2, 3)
            or rows.shape[-1] != dim
            or (rows.ndim == 3 and rows.shape[1] not in (1, num_layers))
        ):
            continue
        several = len(rows) > 1
        for i, row in enumerate(rows[:MOST_OF_A_FILE]):
            found.append(Direction(f"{path.stem}/{name}{i + 1 if several else ''}", f"file {path.name}", row))
    if not found:
        raise UsageError(
            f"{printable(path)} holds no directions for this generator: tensors [{dim}], [count, {dim}] or "
            f"[count, {num_layers}, {dim}] are expected"
        )
    return found
