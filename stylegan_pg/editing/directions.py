"""Directions in w along which a generator's images change in one respect.

- Closed-form factorisation of the style affines (Shen and Zhou 2021, "Closed-form factorization of latent semantics in
  GANs", equation 5): the unit vectors n that the affines A of some layers lengthen most, which are eigenvectors of the
  sum of A^T A.
- Principal components of w (Harkonen et al. 2020, "GANSpace", section 2.2).
- Towards a class: the difference of mean w.
- Of a score: the normal of a linear regression of a number per image on w. Shen et al. 2020 ("InterFaceGAN", section
  3.1) take the normal of a separating hyperplane, which for two classes is the same but for the loss.

All functions are deterministic for a seed and do not depend on the batch size.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stylegan_pg.data.classes import conditions_at
from stylegan_pg.errors import UsageError
from stylegan_pg.images import to_uint8
from stylegan_pg.inference.generate import finite
from stylegan_pg.inference.latent_files import Directions
from stylegan_pg.metrics.features import rgb
from stylegan_pg.rng import generator
from stylegan_pg.untrusted import printable

AT_A_TIME = 4096  # rows of w
RIDGE = 1e-2  # of the regression, as a share of the mean variance of w
HELD_OUT = 5  # every so manieth sample tests the regression

Range = tuple[int, int]  # the first layer, and the one after the last


def check_w(G: Any) -> None:
    """Raise UsageError for a generator without a mapping network to w."""
    if not hasattr(G, "styles") or next(iter(G.mapping.parameters()), None) is None:
        raise UsageError(
            "directions are found in w, and this generator has no mapping from z to w (as those of StyleGAN, StyleGAN2 "
            "and StyleGAN3 have): its z has no preferred directions"
        )


def parse_layers(text: str | None, num_ws: int) -> list[Range]:
    """'0-3,4-7' -> [(0, 4), (4, 8)]; all layers, [(0, num_ws)], for None.

    Raises:
        UsageError: the text is no list of ranges, or they go beyond the layers.
    """
    if text is None:
        return [(0, num_ws)]
    ranges = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < num_ws:
            raise UsageError(
                f"--layers {printable(repr(text), 80)} is not possible: write ranges such as 0-3,4-7, within 0 to "
                f"{num_ws - 1}"
            )
        ranges.append((first, last + 1))
    if len(set(ranges)) < len(ranges):
        raise UsageError(f"--layers {printable(repr(text), 80)} names a range twice")
    return ranges


class Samples(NamedTuple):
    """w float32 [n, w_dim] on the CPU, and the class of each, -1 without classes."""

    w: torch.Tensor
    classes: list[int]


@torch.no_grad()
def sampled_w(G: Any, count: int, seed: int, classes: Sequence[int] = ()) -> Samples:
    """Draw z and map it to w, for the classes of a conditional generator in turn. Each w depends on the seed and its
    place only."""
    place = next(G.parameters())
    z = torch.randn([count, G.z_dim], generator=generator(seed, "directions"))
    labels = [classes[i % len(classes)] for i in range(count)] if G.c_dim else [-1] * count
    parts = []
    for i in range(0, count, AT_A_TIME):
        c = conditions_at(G, labels[i : i + AT_A_TIME]).to(place) if G.c_dim else None
        parts.append(G.mapping(z[i : i + AT_A_TIME].to(place), c).float().cpu())
    return Samples(torch.cat(parts), labels)


# ------------------------------------------------------------------------------------------------------- affines


def style_affines(G: Any) -> list[tuple[int, torch.Tensor]]:
    """The matrices that map w to styles: (number of the w that a layer takes, float64 [styles, w_dim])."""
    return [(place, _matrix(affine)) for place, affine in _affines(G.synthesis)]


def _affines(synthesis: Any) -> Iterator[tuple[int, Any]]:
    if hasattr(synthesis, "layers"):  # StyleGAN3
        yield 0, synthesis.input.affine
        for i, layer in enumerate(synthesis.layers):
            yield i + 1, layer.affine
        return
    place = 0
    for k, r in enumerate(synthesis.resolutions):
        block = getattr(synthesis, f"b{r}")
        if hasattr(block, "modulated"):  # StyleGAN2, whose toRGB takes the w of the next block's first layer
            for i, layer in enumerate(block.modulated(), start=max(2 * k - 1, 0)):
                yield i, layer.affine
        elif hasattr(block, "styled"):  # StyleGAN
            for layer in block.styled():
                yield place, layer.affine
                place += 1
        else:
            raise UsageError("the layers of this generator have no styles that are linear in w: take --method pca")


def _matrix(affine: Any) -> torch.Tensor:
    weight, gain = affine.factors()[0]
    return weight.detach().double().cpu() * gain


# ------------------------------------------------------------------------------------------------------- methods


def factorized(G: Any, ranges: Sequence[Range], count: int, samples: Samples) -> Directions:
    """The `count` directions of each range of layers that change its styles most, largest first.

    Strength 1 is one standard deviation of w along the direction. `facts` gives the eigenvalues.

    Raises:
        UsageError: the generator has no w, or its layers are of an unknown kind.
    """
    check_w(G)
    vectors, layers, values = [], [], []
    affines = style_affines(G)
    for first, end in ranges:
        inside = [matrix for place, matrix in affines if first <= place < end]
        gram = torch.stack([matrix.t() @ matrix for matrix in inside]).sum(dim=0)
        value, vector = torch.linalg.eigh(gram)
        kept = min(count, len(value))
        vectors.append(signed(vector.t().flip(0)[:kept]))
        layers += [(first, end)] * kept
        values += value.flip(0)[:kept].tolist()
    found = torch.cat(vectors)
    return _directions(
        found, layers, _numbered("factor", layers, G.num_ws), _spread(found, samples.w), eigenvalues=values
    )


def principal(G: Any, ranges: Sequence[Range], count: int, samples: Samples) -> Directions:
    """The first `count` principal components of w, each for every range of layers.

    Strength 1 is one standard deviation of w along the direction. `facts` gives the share of the variance.

    Raises:
        UsageError: the generator has no w.
    """
    check_w(G)
    w = samples.w.double()
    value, vector = torch.linalg.eigh(torch.cov(w.t()))
    kept = min(count, len(value))
    components, shares = signed(vector.t().flip(0)[:kept]), (value.flip(0)[:kept] / value.sum()).tolist()
    layers = [pair for pair in ranges for _ in range(kept)]
    found = components.repeat(len(ranges), 1)
    scales = value.flip(0)[:kept].clamp(min=0).sqrt().tolist() * len(ranges)
    return _directions(found, layers, _numbered("pc", layers, G.num_ws), scales, variance=shares * len(ranges))


def between_classes(
    G: Any, ranges: Sequence[Range], samples: Samples, names: Sequence[str], pair: tuple[int, int] | None = None
) -> Directions:
    """Directions from the mean w of all samples to that of each class; or with `pair`, from one class to another.

    Strength 1 is the way from one mean to the other. The samples of all classes have different z.

    Args:
        names: of all classes of the generator.

    Raises:
        UsageError: the generator has no w or no classes, only one class was sampled, or classes have the same mean.
    """
    check_w(G)
    if not G.c_dim:
        raise UsageError("--method classes needs a conditional generator: take factorize, pca, or --scorer")
    labels = torch.tensor(samples.classes)
    means = {k: samples.w[labels == k].double().mean(dim=0) for k in sorted(set(samples.classes))}
    if len(means) < 2:
        raise UsageError("--method classes compares classes: sample two or more, or leave --labels out")
    overall = torch.stack(list(means.values())).mean(dim=0)
    ways = {f"to {names[k]}": mean - overall for k, mean in means.items()}
    if pair is not None:
        ways = {f"{names[pair[0]]} to {names[pair[1]]}": means[pair[1]] - means[pair[0]]}
    lengths = [float(way.norm()) for way in ways.values()]
    if min(lengths) < 1e-9:
        raise UsageError("classes of this generator have the same w on average: it does not use its condition")
    unit = torch.stack([way / length for way, length in zip(ways.values(), lengths, strict=True)])
    layers = [one for one in ranges for _ in ways]
    titles = [_titled(name, one, ranges, G.num_ws) for one in ranges for name in ways]
    return _directions(unit.repeat(len(ranges), 1), layers, _distinct(titles), lengths * len(ranges))


def scored(
    G: Any, ranges: Sequence[Range], samples: Samples, scores: torch.Tensor, name: str = "score"
) -> tuple[Directions, float]:
    """The direction of a number per image: the normal of its ridge regression on w.

    Strength 1 is one standard deviation of w along the direction. `facts` gives the correlation of prediction and score
    for samples that the regression has not seen (every HELD_OUT-th), which is returned as well.

    Args:
        scores: [n], of the images of the samples.

    Raises:
        UsageError: the generator has no w, or the scores are all equal or not finite.
    """
    check_w(G)
    w, y = samples.w.double(), scores.double()
    if not bool(y.isfinite().all()):
        raise UsageError("the scorer gives numbers that are not finite (NaN or infinity): correct it")
    if float(y.std()) <= 1e-9 * max(1.0, float(y.abs().max())):
        raise UsageError("the scorer gives the same number for all images, so that nothing can be learned of it")
    seen = torch.arange(len(y)) % HELD_OUT != 0
    predicted = (w[~seen] - w[seen].mean(dim=0)) @ _normal(w[seen], y[seen])
    correlation = float(torch.corrcoef(torch.stack([predicted, y[~seen]]))[0, 1].nan_to_num(0.0))
    normal = _normal(w, y)
    unit = (normal / normal.norm().clamp(min=1e-30))[None]
    found = unit.repeat(len(ranges), 1)
    titles = [_titled(name, one, ranges, G.num_ws) for one in ranges]
    scales = _spread(found, samples.w)
    return _directions(found, [*ranges], _distinct(titles), scales, correlation=correlation), correlation


def _normal(w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The coefficients [d] of the ridge regression of y [n] on w [n, d]."""
    centred, away = w - w.mean(dim=0), y - y.mean()
    covariance = centred.t() @ centred / len(w)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(w.shape[1], dtype=w.dtype)
    return torch.linalg.solve(covariance + ridge, centred.t() @ away / len(w))


def signed(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [k, d], each with the sign that makes its largest component positive, because eigenvectors have none."""
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return vectors * largest.sign()


def _spread(vectors: torch.Tensor, w: torch.Tensor) -> list[float]:
    """The standard deviations of w [n, d] along unit vectors [k, d]."""
    return (w.double() @ vectors.double().t()).std(dim=0).tolist()


def _titled(name: str, layers: Range, ranges: Sequence[Range], num_ws: int) -> str:
    return name if len(ranges) == 1 and layers == (0, num_ws) else f"{name} layers {layers[0]}-{layers[1] - 1}"


def _numbered(word: str, layers: Sequence[Range], num_ws: int) -> list[str]:
    """Names such as "factor 0", counted anew in each range, which is named unless there is one of all layers."""
    counts: dict[Range, int] = {}
    names = []
    for one in layers:
        names.append(_titled(f"{word} {counts.get(one, 0)}", one, list(dict.fromkeys(layers)), num_ws))
        counts[one] = counts.get(one, 0) + 1
    return names


def _distinct(names: Sequence[str]) -> list[str]:
    """Names cut to what a file may hold, with a number where two are equal."""
    short = [name[:150] for name in names]
    return [f"{name} ({i})" if short.count(name) > 1 else name for i, name in enumerate(short)]


def _directions(
    vectors: torch.Tensor, layers: list[Range], names: list[str], scales: list[float], **facts: Any
) -> Directions:
    return Directions(names, vectors.float()[:, None], scales, layers, facts)


# ------------------------------------------------------------------------------------------------------- scores


def load_scorer(name: str, device: torch.device) -> Callable[[torch.Tensor], Any]:
    """Import and call a factory, "package.module:function", which takes no arguments and returns a function from uint8
    RGB images [n, 3, H, W] to numbers [n] or [n, 1]. (An extractor of metrics is given in the same way.)

    Raises:
        UsageError: the name is no importable one, or importing or calling fails.
    """
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UsageError(
            f"the scorer {printable(repr(name), 80)} is no importable name such as package.module:function"
        )
    where, function = name.split(":")
    try:
        scorer = getattr(importlib.import_module(where), function)()
        if isinstance(scorer, nn.Module):
            scorer = scorer.eval().requires_grad_(False).to(device)
    except Exception as error:  # a user's code can raise anything
        raise UsageError(f"the scorer {name} cannot be loaded: {type(error).__name__}: {printable(error)}") from None
    if not callable(scorer):
        raise UsageError(f"the scorer {name} must return a function of images, not {type(scorer).__name__}")
    return scorer


@torch.no_grad()
def scores_of(
    G: Any, w: torch.Tensor, scorer: Callable[[torch.Tensor], Any], name: str, batch: int
) -> Iterator[torch.Tensor]:
    """Yield the scores, float64 [n], of the images of w [N, w_dim], in batches.

    Raises:
        UsageError: the scorer fails, or returns anything but one real number for each image.
        RunError: the images are not finite.
    """
    place, alpha = next(G.parameters()), getattr(G, "description", {}).get("alpha", 1.0)
    for i in range(0, len(w), batch):
        ws = w[i : i + batch, None].to(place).expand(-1, G.num_ws, -1).contiguous()
        images = rgb(to_uint8(finite(G.synthesis(ws, alpha=alpha, noise="const"))))
        try:
            found = torch.as_tensor(scorer(images)).detach()
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # a user's code can raise anything
            raise UsageError(f"the scorer {name} failed: {type(error).__name__}: {printable(error)}") from None
        if found.is_complex() or found.numel() != len(images) or math.prod(found.shape[1:]) != 1:
            raise UsageError(f"the scorer {name} must return {len(images)} numbers, not a tensor {list(found.shape)}")
        yield found.double().flatten().cpu()
