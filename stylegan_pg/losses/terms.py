"""Regularisation terms: pure functions of networks and tensors, one value per sample.

A term is anything that is added to the loss of a side besides its objective, at every step or lazily (Karras et al.
2020, appendix B). The engine sums the values over its share of the batch and divides by the global batch, so nothing
here knows how a batch was dealt out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from stylegan_pg.config import (
    DraganConfig,
    DriftConfig,
    GradientPenaltyConfig,
    PathLengthConfig,
    R1Config,
    R2Config,
)
from stylegan_pg.losses.objectives import per_image, scores_of

DRAGAN_NOISE = 0.25  # standard deviation, in images of [-1, 1]


def total(output: Any) -> torch.Tensor:
    """The sum over images of what D makes of them: its score, or the mean of its scores."""
    scores = scores_of(output)
    plain = len(scores) == 1 and scores[0].numel() == len(scores[0])
    return scores[0].sum() if plain else per_image(_same, output).sum()


def _same(scores: torch.Tensor) -> torch.Tensor:
    return scores


def r1(logits: Any, real: torch.Tensor) -> torch.Tensor:
    """Squared norm [N] of the gradient of D's scores with respect to the real images, differentiable
    (Mescheder et al. 2018, equation 9; without its gamma/2). `real` must require grad."""
    (gradient,) = torch.autograd.grad(total(logits), real, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3])


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
    """What a term on D sees of one micro-batch. `D(images, c)` has augmentation and the fade's alpha bound.

    real, fake [N, C, H, W]: this step's images, detached; c, c_fake [N, classes]: their labels, None without any;
    u [N], uniform in [0, 1), and noise [N, C, H, W], N(0, 1), drawn by sample. What is not in a term's `needs` may be
    None.
    """

    D: Callable[[torch.Tensor, torch.Tensor | None], Any]
    real: torch.Tensor
    c: torch.Tensor | None
    fake: torch.Tensor | None = None
    c_fake: torch.Tensor | None = None
    u: torch.Tensor | None = None
    noise: torch.Tensor | None = None


@dataclass
class GInputs:
    """What a term on G sees of one micro-batch. `synthesis(ws)` has alpha and noise bound; `noise` is per-sample
    N(0, 1) of the images' shape; `state` holds the running means that belong to the checkpoint."""

    synthesis: Callable[[torch.Tensor], torch.Tensor]
    ws: torch.Tensor
    noise: torch.Tensor
    state: dict[str, float] = field(default_factory=dict)


def r1_term(x: DInputs) -> dict[str, torch.Tensor]:
    """|grad D(x)|^2 / 2, to be weighted by gamma."""
    real = x.real.detach().requires_grad_(True)
    penalty = r1(x.D(real, x.c), real)
    return {"loss": penalty / 2, "r1_penalty": penalty}


def r2_term(x: DInputs) -> dict[str, torch.Tensor]:
    """|grad D(G(z))|^2 / 2 with respect to the generated images, to be weighted by gamma (Mescheder et al. 2018,
    equation 10)."""
    assert x.fake is not None
    fake = x.fake.detach().requires_grad_(True)
    penalty = r1(x.D(fake, x.c_fake), fake)
    return {"loss": penalty / 2, "r2_penalty": penalty}


def gradient_penalty_term(x: DInputs, *, target: float = 1.0) -> dict[str, torch.Tensor]:
    """(|grad D| - target)^2 / target^2 at u x + (1 - u) G(z), with the real image's label (Gulrajani et al. 2017,
    equation 3, lambda being the weight).

    That text has the target 1, where the division changes nothing. With it the penalty is the relative deviation from
    the target, so that a weight means the same at any.
    """
    assert x.fake is not None
    assert x.u is not None
    mixed = torch.lerp(x.fake.detach(), x.real.detach(), x.u[:, None, None, None]).requires_grad_(True)
    norm = gradient_norm(x.D(mixed, x.c), mixed)
    return {"loss": (norm / target - 1).square(), "gp_norm": norm}


def drift_term(scores_real: Any, scores_fake: Any) -> dict[str, torch.Tensor]:
    """D(x)^2, which keeps D's scores near zero (Karras et al. 2018, appendix A.1); the mean of it where D gives an
    image several scores."""
    return {"loss": per_image(torch.square, scores_real)}


def dragan_term(x: DInputs, *, target: float = 1.0) -> dict[str, torch.Tensor]:
    """(|grad D| - target)^2 at x + 0.25 N(0, 1) (Kodali et al. 2017, section 2.3, lambda being the weight).

    The noise has a fixed scale, as the paper's N(0, cI) has, and not one that follows from the batch, which would make
    the penalty depend on how the batch is dealt out: half the standard deviation of typical images in [-1, 1], 0.5.
    """
    assert x.noise is not None
    near = (x.real.detach() + DRAGAN_NOISE * x.noise).requires_grad_(True)
    norm = gradient_norm(x.D(near, x.c), near)
    return {"loss": (norm - target).square(), "dragan_norm": norm}


def path_length_term(x: GInputs) -> dict[str, torch.Tensor]:
    """(length - running mean)^2; the mean is the one from before this step, so that it is the same for all ranks.

    Where the mapping has nothing to learn, the ws come without a graph: what is learned is in the synthesis alone.
    """
    h, w = x.noise.shape[2:]
    ws = x.ws if x.ws.requires_grad else x.ws.detach().requires_grad_(True)
    lengths = path_lengths(x.synthesis(ws), ws, x.noise / (h * w) ** 0.5)
    penalty = (lengths - x.state.get("pl_mean", 0.0)).square()
    return {"loss": penalty, "pl_length": lengths, "pl_penalty": penalty}


class Term(NamedTuple):
    """How a term is computed: `compute(inputs, **options)` returns {"loss": [N]} and the values [N] that `reports`
    names. The options are the keys of the configuration that only this term has (TermConfig.options).

    `on` is the side that is trained. `keep` maps some of the values to the names of their running means, which are part
    of the state (GANState.means) and are updated with loss.pl_decay. `needs` lists which of the inputs "fake" (with its
    labels), "u" and "noise" are used. A term `of_scores` has no pass of its own, but is added in D's main pass:
    compute(scores_real, scores_fake, **options).
    """

    on: str
    compute: Callable[..., dict[str, torch.Tensor]]
    reports: tuple[str, ...] = ()
    keep: dict[str, str] = {}
    needs: tuple[str, ...] = ()
    of_scores: bool = False


TERMS: dict[str, Term] = {
    R1Config.name: Term("D", r1_term, ("r1_penalty",)),
    R2Config.name: Term("D", r2_term, ("r2_penalty",), needs=("fake",)),
    GradientPenaltyConfig.name: Term("D", gradient_penalty_term, ("gp_norm",), needs=("fake", "u")),
    DriftConfig.name: Term("D", drift_term, of_scores=True),
    DraganConfig.name: Term("D", dragan_term, ("dragan_norm",), needs=("noise",)),
    PathLengthConfig.name: Term("G", path_length_term, ("pl_length", "pl_penalty"), keep={"pl_length": "pl_mean"}),
}
