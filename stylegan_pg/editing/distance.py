"""Distances of images for projection, as squared Euclidean distances of embeddings.

The distance of two images is the sum of a distance of pixels and of a perceptual one. Every part is written as an
embedding, a function from images to vectors, so that what belongs to a target is computed once, and all pairs of many
images cost one matrix product.

- Pixels: the mean squared difference, averaged over a pyramid of halved resolutions.
- LPIPS (Zhang et al. 2018): differences of VGG16's features, with learned weights, of images of at most 256 pixels.
- Features of a discriminator: those of its blocks, compared in the way of LPIPS with equal weights. A discriminator
  has been trained on the very images that are projected, and needs no weights from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stylegan_pg.checkpoint import checkpoint, tensor_file
from stylegan_pg.config import MODELS
from stylegan_pg.config.families import fields_of
from stylegan_pg.config.renamed import translated
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.metrics.features import load_distance, rgb
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.untrusted import printable

KINDS = ("auto", "lpips", "discriminator", "pixels")
SMALLEST = 8  # pixels of the shorter side of the coarsest level of a pyramid
SMALLEST_LPIPS = 16  # VGG16 halves images four times
LARGEST_LPIPS = 256  # pixels of the shorter side, as in the published projector (Karras et al. 2020, appendix D)
LARGEST_MAPS = 128  # rows of a discriminator's features; larger ones would take more memory than they are worth
EPS = 1e-12
EXCESS = 0.01  # the share of values beyond the range that is kept

Embedding = Callable[[torch.Tensor], torch.Tensor]


class ImageDistance:
    """The distance of images [n, C, H, W] in about [-1, 1].

    Attributes:
        name: what it consists of, for messages.
        parts: embeddings, each from images [n, C, H, W] to [n, d]. The distance is the sum of the squared Euclidean
            distances of all of them.
    """

    def __init__(self, name: str, parts: Sequence[Embedding]):
        self.name, self.parts = name, list(parts)

    def embed(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The embeddings of images, each [n, d]. What exceeds the range of colours hardly counts, as it is cut off
        when a picture is written; a little of it remains, so that the gradient can lead back into the range."""
        inside = images.clamp(-1, 1)
        return [part(inside + EXCESS * (images - inside)) for part in self.parts]

    def __call__(self, images: torch.Tensor, targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Distances [n] of images [n, C, H, W] from the images whose embeddings are `targets`, in pairs."""
        each = [(a - b).square().sum(dim=1) for a, b in zip(self.embed(images), targets, strict=True)]
        return torch.stack(each).sum(dim=0)

    def all_pairs(self, images: torch.Tensor, targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Distances [n, m] of images [n, C, H, W] from each of the m images whose embeddings are `targets`."""
        each = [
            torch.stack([(a - row).square().sum(dim=1) for row in b], dim=1)
            for a, b in zip(self.embed(images), targets, strict=True)
        ]
        return torch.stack(each).sum(dim=0)


def pixel_embedding(images: torch.Tensor) -> torch.Tensor:
    """Images [n, C, H, W] at their own resolution and at halved ones, [n, d], scaled so that the squared distance is
    the mean over these levels of the mean squared difference."""
    levels = [images]
    while min(levels[-1].shape[2:]) >= 2 * SMALLEST:
        levels.append(F.avg_pool2d(levels[-1], 2, ceil_mode=False))
    return torch.cat([x.flatten(1) / math.sqrt(x[0].numel() * len(levels)) for x in levels], dim=1)


def unit_maps(maps: Sequence[torch.Tensor], weights: Sequence[torch.Tensor | float]) -> torch.Tensor:
    """Feature maps [n, c, h, w] as one embedding [n, d], of which the squared distance is LPIPS's (Zhang et al. 2018,
    equation 1): features of a pixel are divided by their norm, squared differences are multiplied by `weights`, each
    [c, 1, 1] or a number, and averaged over pixels."""
    found = []
    for x, weight in zip(maps, weights, strict=True):
        unit = x * (x.square().sum(dim=1, keepdim=True) + EPS).rsqrt()
        root = weight.sqrt() if isinstance(weight, torch.Tensor) else math.sqrt(weight)
        found.append((unit * (root / math.sqrt(x.shape[2] * x.shape[3]))).flatten(1))
    return torch.cat(found, dim=1)


def lpips_embedding(files: Sequence[str | Path], device: torch.device) -> Embedding:
    """The embedding of LPIPS, with weights that metrics.weights.find_weights finds.

    Raises:
        UsageError: weights are missing or do not fit.
    """
    module: Any = load_distance(files, device).module.eval().requires_grad_(False)
    weights = [getattr(module, f"lin{i}").model[-1].weight[0].to(device) for i in range(module.L)]
    if any(bool((weight < 0).any()) for weight in weights):
        raise UsageError("the weights of lpips are negative in places, which those of LPIPS are not: take its own")

    def embed(images: torch.Tensor) -> torch.Tensor:
        x = rgb(images * 127.5 + 127.5)
        if (factor := min(x.shape[2:]) // LARGEST_LPIPS) > 1:
            x = F.avg_pool2d(x, factor)
        return unit_maps(module.net(module.normalize(x)), weights)

    return embed


class _Last(nn.Module):
    """Stands in for a discriminator's last block, whose minibatch statistics would make images depend on others."""

    def forward(self, x: torch.Tensor, batches: int = 1) -> torch.Tensor:
        return x


def discriminator_embedding(D: Any) -> Embedding:
    """The embedding of the blocks of a discriminator of this package, which is changed for it.

    Images of another size are resized to D's.
    """
    maps: list[torch.Tensor] = []
    for module in D.modules():
        if isinstance(getattr(module, "dtype", None), torch.dtype):
            module.dtype = None  # float32 throughout, as gradients of features in 16 bits are inexact
    D.b4 = _Last()
    for r in D.resolutions:
        if r > 4 and D.img_size[0] * r // D.resolution // 2 <= LARGEST_MAPS:
            getattr(D, f"b{r}").register_forward_hook(lambda _module, _inputs, result: maps.append(result))

    def embed(images: torch.Tensor) -> torch.Tensor:
        if tuple(images.shape[2:]) != tuple(D.img_size):
            images = F.interpolate(images, tuple(D.img_size), mode="bilinear", antialias=True, align_corners=False)
        maps.clear()
        D.read(images, 1.0, 1)
        found = unit_maps(maps, [1 / len(maps)] * len(maps))
        maps.clear()
        return found

    return embed


def load_discriminator(path: Path, G: Any) -> Any:
    """Build the discriminator of a checkpoint, for images with the channels of G.

    Raises:
        UsageError: the file is no checkpoint of this package's networks, or of images of other channels or shapes.
        RunError: the file cannot be read at the moment.
    """
    remedy = "give a checkpoint of the generator's run, RUN/checkpoints/*.safetensors, or --distance pixels"
    try:
        tensors, state = checkpoint.read(path)
    except checkpoint.BadCheckpointError as error:
        raise UsageError(f"{printable(error)}: {remedy}") from None
    stored = state.get("config")
    model = translated(stored).get("model") if isinstance(stored, dict) else None
    state_dict = checkpoint.part_of(tensors, "D")
    try:
        if not isinstance(model, dict) or model.get("name") not in MODELS:
            raise ValueError("it names no networks of this package")
        known = fields_of(MODELS[model["name"]])
        config = MODELS[model["name"]](**{key: _by_resolution(value) for key, value in model.items() if key in known})
        found = [name.split(".")[0][1:] for name in state_dict if name.startswith("b")]
        resolution = max(int(r) for r in found if r.isdigit())
        D = _fitting(config, resolution, G, state_dict)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UsageError(
            f"{printable(path)} holds no discriminator of such images: {printable(error)}; {remedy}"
        ) from None
    ratio = G.img_size[0] * D.img_size[1], G.img_size[1] * D.img_size[0]
    if ratio[0] != ratio[1]:
        raise UsageError(f"{printable(path)} holds a discriminator of pictures of another shape: {remedy}")
    return D.to(next(G.parameters()).device).eval().requires_grad_(False)


def _by_resolution(value: Any) -> Any:
    """A value of a configuration that was stored as JSON, in which tables by resolution have texts as keys."""
    return {int(key): entry for key, entry in value.items()} if isinstance(value, dict) else value


def _fitting(config: Any, resolution: int, G: Any, state_dict: dict[str, torch.Tensor]) -> Any:
    """The discriminator with these tensors, which tell whether it is in a fade. Raises ValueError if none fits."""
    pair, reasons = NETWORKS[config.name], []
    for fade in (False, True):
        shape = NetworkShape(resolution, resolution, fade, G.img_channels, G.c_dim, 1)
        with torch.device("meta"):
            D: Any = pair.D(**pair.d_kwargs(config, shape))
        if not hasattr(D, "read"):
            raise ValueError("it has no blocks of resolutions")
        try:
            tensor_file.check_tensors(state_dict, D.state_dict(), "its discriminator")
        except ValueError as error:
            reasons.append(str(error))
            continue
        D.load_state_dict(state_dict, assign=True)
        return D
    raise ValueError(reasons[0])


def newest_checkpoint(snapshot: Path) -> Path | None:
    """The newest file named like a checkpoint of the run that a snapshot belongs to, RUN/snapshots/NAME; None if there
    is none."""
    for folder in (snapshot.absolute().parent.parent, snapshot.absolute().parent):
        found = checkpoint.found(folder / "checkpoints")
        if found:
            return found[0]
    return None


def make_distance(
    G: Any,
    kind: str = "auto",
    *,
    weights: Sequence[str | Path] = (),
    discriminator: Path | None = None,
    snapshot: Path | None = None,
) -> tuple[ImageDistance, str]:
    """The distance for images of a generator, and a remark about how it was chosen ("" if it was asked for).

    Args:
        G: the generator.
        kind: one of KINDS. "auto" takes LPIPS if its weights are found, else the discriminator, else pixels alone.
        weights: files with the weights of LPIPS and VGG16, see metrics.weights.find_weights.
        discriminator: a checkpoint that holds one; None to look for one beside the snapshot.
        snapshot: the file that G is from.

    Raises:
        UsageError: what was asked for is missing or does not fit.
    """
    if kind not in KINDS:
        raise UsageError(f"distance {printable(repr(kind), 60)} is unknown: choose {', '.join(KINDS)}")
    device, remarks = next(G.parameters()).device, []
    small = min(G.img_size) < SMALLEST_LPIPS
    if kind == "lpips" and small:
        raise UsageError(f"LPIPS needs images of {SMALLEST_LPIPS} pixels or more, not {min(G.img_size)}: take pixels")
    if kind == "lpips" or (kind == "auto" and not small and not discriminator):
        try:
            embedding = lpips_embedding(weights, device)
            return ImageDistance("LPIPS and pixels", [pixel_embedding, embedding]), ""
        except UsageError:
            if weights or kind == "lpips":
                raise
    if kind == "pixels":
        return ImageDistance("pixels", [pixel_embedding]), ""
    path = discriminator or (newest_checkpoint(snapshot) if snapshot else None)
    if path is None and kind == "discriminator":
        raise UsageError("no checkpoint is beside the snapshot: give one that holds D, --discriminator FILE")
    if path is not None:
        try:
            embedding = discriminator_embedding(load_discriminator(path, G))
            name = "features of D and pixels"
            return ImageDistance(name, [pixel_embedding, embedding]), f"distance: {name} (D of {printable(path)})"
        except (UsageError, RunError) as error:
            if discriminator or kind == "discriminator":
                raise
            remarks.append(f"{error}")
    remarks.insert(0, "distance: pixels, as there are no weights of LPIPS (--weights) and no checkpoint with D")
    return ImageDistance("pixels", [pixel_embedding]), "; ".join(remarks)
