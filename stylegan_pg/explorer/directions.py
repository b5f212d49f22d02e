"""Directions in the space of a generator that change a face in a visible way, for the sliders of the page.

They come from the weights or from samples of w, without labels; or from a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import parse_json, printable

COUNT = 8  # directions of each kind
SAMPLES = 4096  # of w, whose principal components are taken
MOST_OF_A_FILE = 64
DESCRIPTION = "stylegan_pg_latents"  # in the header of a file that `stylegan-pg directions` writes


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
    """The directions of a safetensors file: those that `stylegan-pg directions` writes, which have names, lengths and
    ranges of layers; or any tensors [dim], [count, dim] or [count, layers, dim] by name.

    Raises:
        UsageError: the file cannot be read, or holds no direction for a generator of these sizes.
    """
    try:
        with tensor_file.opened(path) as file:
            text, tensors = file.metadata.get(DESCRIPTION), file.read()
    except (tensor_file.BadFileError, OSError) as error:
        raise UsageError(
            f"{printable(path)} holds no directions ({printable(error)}): give a safetensors file"
        ) from None
    found = [
        Direction(f"{path.stem}/{name}", f"file {path.name}", row)
        for name, row in (_described(path, text, tensors, num_layers) if text else _plain(tensors))
        if row.shape[-1:] == (dim,) and row.shape[:-1] in ((), (1,), (num_layers,)) and tensor_file.is_finite(row)
    ]
    if not found:
        raise UsageError(
            f"{printable(path)} holds no directions for this generator: tensors [{dim}], [count, {dim}] or "
            f"[count, {num_layers}, {dim}] are expected"
        )
    return found


def _plain(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, t in sorted(tensors.items()):
        if t.is_floating_point() and t.ndim in (1, 2, 3):
            rows = t.float()[None] if t.ndim == 1 else t.float()
            for i, row in enumerate(rows[:MOST_OF_A_FILE]):
                yield f"{name}{i + 1 if len(rows) > 1 else ''}", row


def _described(
    path: Path, text: str, tensors: Mapping[str, torch.Tensor], num_layers: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The names of the directions of a described file, and their changes [layers, dim] of w."""
    remedy = "give a file that `stylegan-pg directions` has written for this generator"
    about = parse_json(text, f"{printable(path)}: its description", remedy, max_bytes=tensor_file.MOST_HEADER)
    try:
        rows = tensors["directions"].float()
        if about["kind"] != "directions" or rows.ndim != 3:
            raise ValueError("it is of another kind")
        for row, name, scale, (first, end) in zip(
            rows[:MOST_OF_A_FILE], about["names"], about["scales"], about["layers"], strict=False
        ):
            inside = torch.zeros(num_layers, 1)
            inside[int(first) : int(end)] = float(scale)
            yield printable(name, 100), row * inside
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UsageError(f"{printable(path)} holds no directions ({printable(error)}): {remedy}") from None
