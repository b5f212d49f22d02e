"""Regularisation terms: pure functions of networks and tensors that return one value per image.

A term is added to the objective of G or D, at every step or lazily (Karras et al. 2020, appendix B). The engine sums
the values over its share of the batch and divides by the global batch, so a term does not depend on how a batch is
divided among ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from stylegan_pg.config import (
    DiversityConfig,
    DraganConfig,
    DriftConfig,
    FeatureMatchingConfig,
    GradientPenaltyConfig,
    HistoricalAveragingConfig,
    PathLengthConfig,
    R1Config,
    R2Config,
)
from stylegan_pg.losses import techniques
from stylegan_pg.losses.objectives import per_image, scores_of

DRAGAN_NOISE = 0.25  # standard deviation, in images of [-1, 1]


def total(output: Any) -> torch.Tensor:
    """The sum over images of D's score, or of the mean of its scores if it has several per image."""
    scores = scores_of(output)
    plain = len(scores) == 1 and scores[0].numel() == len(scores[0])
    return scores[0].sum() if plain else per_image(_same, output).sum()


def _same(scores: torch.Tensor) -> torch.Tensor:
    return scores


def squared_norms(outputs: Sequence[Any], images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each of several batches of images, the squared norm [N] of the gradient of D's scores with respect to them,
    differentiable (Mescheder et al. 2018, equations 9 and 10; without their gamma/2).

    Args:
        outputs: what D returned for each batch; it must not depend on another one.
        images: the batches [N, C, H, W], which must require grad.
    """
    gradients = torch.autograd.grad(sum(map(total, outputs[1:]), total(outputs[0])), images, create_graph=True)
    return [gradient.square().sum(dim=[1, 2, 3]) for gradient in gradients]


def r1(logits: Any, real: torch.Tensor) -> torch.Tensor:
    """`squared_norms` of one batch."""
    return squared_norms([logits], [real])[0]


def gradient_norm(logits: Any, images: torch.Tensor) -> torch.Tensor:
    """Norm [N] of the gradient of D's scores with respect to the images, differentiable, with the derivative 0 where
    the gradient vanishes. `images` must require grad."""
    (gradient,) = torch.autograd.grad(total(logits), images, create_graph=True)
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)


def path_lengths(images: torch.Tensor, ws: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Lengths [N] of J^T y: sqrt of the mean over the ws of the sum over w_dim of the squared gradient of
    sum(images * noise), differentiable (Karras et al. 2020, section 3.2).

    images [N, C, H, W] computed from ws [N, num_ws, w_dim]; noise y ~ N(0, 1) / sqrt(H W), the images' shape.
    """
    (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


@dataclass
class DInputs:
    """The inputs of a term on D for one micro-batch. `D(images, c)` applies augmentation and the fade's alpha.

    real, fake [N, C, H, W]: this step's images, detached; c, c_fake [N, c_dim]: their conditions, None without any;
    u [N], uniform in [0, 1), and noise [N, C, H, W], N(0, 1), drawn for each image by itself; norms: the squared norms
    [N] of D's gradients at the images "real" or "fake", if they are known. Inputs that are not in the term's `needs`
    may be None.
    """

    D: Callable[[torch.Tensor, torch.Tensor | None], Any]
    real: torch.Tensor
    c: torch.Tensor | None
    fake: torch.Tensor | None = None
    c_fake: torch.Tensor | None = None
    u: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def squared_norm(self, at: str) -> torch.Tensor:
        """The squared norm [N] of D's gradient at the images "real" or "fake", from a pass of its own if it is not
        known; see `squared_norms`."""
        if at in self.norms:
            return self.norms[at]
        images, c = (self.real, self.c) if at == "real" else (self.fake, self.c_fake)
        assert images is not None
        images = images.detach().requires_grad_(True)
        return r1(self.D(images, c), images)


@dataclass
class GInputs:
    """The inputs of a term on G for one micro-batch. `synthesis(ws)` applies the fade's alpha and per-pixel noise.

    ws [N, num_ws, w_dim]; noise: N(0, 1) of the images' shape, drawn for each image by itself; state: the running means
    of terms by name, which are part of a checkpoint.
    """

    synthesis: Callable[[torch.Tensor], torch.Tensor]
    ws: torch.Tensor
    noise: torch.Tensor
    state: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


def r1_term(x: DInputs) -> dict[str, torch.Tensor]:
    """|grad D(x)|^2 / 2, to be weighted by gamma (Mescheder et al. 2018, equation 9)."""
    penalty = x.squared_norm("real")
    return {"loss": penalty / 2, "r1_penalty": penalty}


def r2_term(x: DInputs) -> dict[str, torch.Tensor]:
    """|grad D(G(z))|^2 / 2 with respect to the generated images, to be weighted by gamma (Mescheder et al. 2018,
    equation 10)."""
    penalty = x.squared_norm("fake")
    return {"loss": penalty / 2, "r2_penalty": penalty}


def gradient_penalty_term(x: DInputs, *, target: float = 1.0) -> dict[str, torch.Tensor]:
    """(|grad D| - target)^2 / target^2 at u x + (1 - u) G(z), with the real image's label (Gulrajani et al. 2017,
    equation 3, lambda being the weight).

    In that text the target is 1, and the division has no effect. Because of it the penalty is the relative deviation
    from the target, so that a weight has the same meaning for every target.
    """
    assert x.fake is not None
    assert x.u is not None
    mixed = torch.lerp(x.fake.detach(), x.real.detach(), x.u[:, None, None, None]).requires_grad_(True)
    norm = gradient_norm(x.D(mixed, x.c), mixed)
    return {"loss": (norm / target - 1).square(), "gp_norm": norm}


def drift_term(scores_real: Any, scores_fake: Any) -> dict[str, torch.Tensor]:
    """D(x)^2, which keeps D's scores near zero (Karras et al. 2018, appendix A.1); its mean if D returns several scores
    per image."""
    return {"loss": per_image(torch.square, scores_real)}


def near_images(real: torch.Tensor, noise: torch.Tensor, law: str) -> torch.Tensor:
    """Points near images [N, C, H, W] at which DRAGAN penalises gradients, of noise N(0, 1) of their shape.

    Args:
        law: "normal": x + 0.25 N(0, 1), as the paper's N(0, cI), whose scale is half of 0.5, the standard deviation of
            typical images in [-1, 1]. "uniform": x + 0.5 s u, as the authors' program and Jin et al. 2017 have it, with
            u in [0, 1) for each number and s the standard deviation of x. There, x is the batch; here it is the image
            itself, because a scale of the batch would make the penalty depend on how the batch is divided.
    """
    if law == "normal":
        return real + DRAGAN_NOISE * noise
    u = (1 + torch.erf(noise / 2**0.5)) / 2
    return real + 0.5 * real.std(dim=[1, 2, 3], keepdim=True, correction=0) * u


def dragan_term(x: DInputs, *, target: float = 1.0, noise: str = "normal") -> dict[str, torch.Tensor]:
    """(|grad D| - target)^2 at `near_images` (Kodali et al. 2017, section 2.3, lambda being the weight)."""
    assert x.noise is not None
    near = near_images(x.real.detach(), x.noise, noise).requires_grad_(True)
    norm = gradient_norm(x.D(near, x.c), near)
    return {"loss": (norm - target).square(), "dragan_norm": norm}


def path_length_term(x: GInputs) -> dict[str, torch.Tensor]:
    """(length - running mean)^2 (Karras et al. 2020, section 3.2). The mean is that before this step, so that it is the
    same on all ranks.

    If the mapping has no parameters, the ws have no graph, and only the synthesis network is regularised.
    """
    h, w = x.noise.shape[2:]
    ws = x.ws if x.ws.requires_grad else x.ws.detach().requires_grad_(True)
    lengths = path_lengths(x.synthesis(ws), ws, x.noise / (h * w) ** 0.5)
    penalty = (lengths - x.state.get("pl_mean", 0.0)).square()
    return {"loss": penalty, "pl_length": lengths, "pl_penalty": penalty}


def feature_matching_term(
    fake: torch.Tensor, real: torch.Tensor, group: int, *, norm: str = "l2"
) -> dict[str, torch.Tensor]:
    """The distance of the mean features of generated and real images, over groups; see techniques.feature_matching."""
    distance = techniques.feature_matching(fake, real, group, norm)
    return {"loss": distance, "feature_distance": distance}


def diversity_term(
    images: Sequence[torch.Tensor], latents: Sequence[torch.Tensor], *, limit: float = 1.0
) -> dict[str, torch.Tensor]:
    """-min(difference of images / difference of latents, limit), see techniques.diversity."""
    ratio = techniques.diversity(images, latents)
    return {"loss": -ratio.clamp(max=limit), "diversity": ratio}


def historical_averaging_term(
    weights: Sequence[torch.Tensor], means: Sequence[torch.Tensor], known: torch.Tensor, count: int
) -> dict[str, torch.Tensor]:
    """||theta - mean theta||^2 as the value of each of `count` images. `known`, of shape [], is 0 before there is a
    mean, and then 1."""
    distance = (known * techniques.squared_distance(weights, means)).expand(count)
    return {"loss": distance, "history_distance": distance}


class Term(NamedTuple):
    """How a term is computed: `compute(inputs, **options)` returns {"loss": [N]} and the values [N] that `reports`
    names. The options are the keys of the configuration that only this term has (TermConfig.options).

    `on` is the side that is trained; "GD" are both, each with its own. `keep` maps some of the values to the names of
    their running means, which are part of the state (GANState.means) and are updated with loss.pl_decay. `needs` lists
    which of the inputs "fake" (with its labels), "u" and "noise" are used. A term `of_scores` has no pass of its own,
    but is added in D's main pass: compute(scores_real, scores_fake, **options). A term that uses nothing but
    DInputs.squared_norm(at) is computed in that pass, too, where it is made at every step; its inputs then hold the
    norm.

    On the side of G, a term `of_ws` takes GInputs; one `of_features` is added in G's main pass, compute(fake, real,
    group, **options) of D's features; one `of_pairs` compares images of two latents, compute(images, latents,
    **options). A term `of_weights` has no images: compute(weights, means, known, count, **options).
    """

    on: str
    compute: Callable[..., dict[str, torch.Tensor]]
    reports: tuple[str, ...] = ()
    keep: dict[str, str] = {}
    needs: tuple[str, ...] = ()
    of_scores: bool = False
    at: str = ""
    of_ws: bool = False
    of_features: bool = False
    of_pairs: bool = False
    of_weights: bool = False

    @property
    def joins(self) -> bool:
        """Whether it always has its gradients from the main pass of its side, also where it is lazy."""
        return self.of_scores or self.of_features


TERMS: dict[str, Term] = {
    R1Config.name: Term("D", r1_term, ("r1_penalty",), at="real"),
    R2Config.name: Term("D", r2_term, ("r2_penalty",), needs=("fake",), at="fake"),
    GradientPenaltyConfig.name: Term("D", gradient_penalty_term, ("gp_norm",), needs=("fake", "u")),
    DriftConfig.name: Term("D", drift_term, of_scores=True),
    DraganConfig.name: Term("D", dragan_term, ("dragan_norm",), needs=("noise",)),
    PathLengthConfig.name: Term(
        "G", path_length_term, ("pl_length", "pl_penalty"), keep={"pl_length": "pl_mean"}, of_ws=True
    ),
    FeatureMatchingConfig.name: Term("G", feature_matching_term, ("feature_distance",), of_features=True),
    DiversityConfig.name: Term("G", diversity_term, ("diversity",), of_pairs=True),
    HistoricalAveragingConfig.name: Term("GD", historical_averaging_term, ("history_distance",), of_weights=True),
}
