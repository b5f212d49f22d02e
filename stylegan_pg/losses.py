"""Objectives and regularisation terms: pure functions of networks and tensors, one value per sample.

The trainer sums them over its share of the batch and divides by the global batch, so nothing here knows how a batch
was dealt out. An objective is a pair of functions of D's scores; a term is anything else that is added to a player's
loss, at every step or lazily (Karras et al. 2020, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F


def logistic_g(fake: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """Non-saturating generator loss softplus(-D(G(z))), same shape as `fake` (Goodfellow et al. 2014)."""
    return F.softplus(-fake)


def logistic_d(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """softplus(D(G(z))) + softplus(-D(x)), same shape as the scores."""
    return F.softplus(fake) + F.softplus(-real)


class Objective(NamedTuple):
    g: Callable[..., torch.Tensor]
    d: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    paired: bool = False


OBJECTIVES = {"logistic": Objective(logistic_g, logistic_d)}


def r1(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Squared norm [N] of the gradient of D's scores with respect to the real images, differentiable
    (Mescheder et al. 2018, equation 9; without its gamma/2). `real` must require grad."""
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3])


def path_lengths(images: torch.Tensor, ws: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Lengths [N] of J^T y: sqrt of the mean over the ws of the sum over w_dim of the squared gradient of
    sum(images * noise), differentiable (Karras et al. 2020, section 3.2).

    images [N, C, H, W] computed from ws [N, num_ws, w_dim]; noise y ~ N(0, 1) / sqrt(H W), the images' shape.
    """
    (gradient,) = torch.autograd.grad((images * noise).sum(), ws, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()


@dataclass
class DInputs:
    """What a term on D sees of one micro-batch. `D(images, c)` has the fade's alpha bound."""

    D: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
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


def r1_term(x: DInputs, target: float = 1.0) -> dict[str, torch.Tensor]:
    """|grad D(x)|^2 / 2, to be weighted by gamma."""
    real = x.real.detach().requires_grad_(True)
    penalty = r1(x.D(real, x.c), real)
    return {"loss": penalty / 2, "r1_penalty": penalty}


def path_length_term(x: GInputs, target: float = 1.0) -> dict[str, torch.Tensor]:
    """(length - running mean)^2; the mean is the one from before this step, so that it is the same for all ranks."""
    h, w = x.noise.shape[2:]
    lengths = path_lengths(x.synthesis(x.ws), x.ws, x.noise / (h * w) ** 0.5)
    penalty = (lengths - x.state.get("pl_mean", 0.0)).square()
    return {"loss": penalty, "pl_length": lengths, "pl_penalty": penalty}


class Term(NamedTuple):
    """`compute` gives {"loss": [N]} and the values [N] named in `reports`; `keep` maps some of these to the running
    mean of theirs that is kept in the state (with loss.pl_decay)."""

    on: str
    compute: Callable[..., dict[str, torch.Tensor]]
    reports: tuple[str, ...] = ()
    keep: dict[str, str] = {}
    needs: tuple[str, ...] = ()
    of_scores: bool = False


TERMS = {
    "r1": Term("D", r1_term, ("r1_penalty",)),
    "path_length": Term("G", path_length_term, ("pl_length", "pl_penalty"), keep={"pl_length": "pl_mean"}),
}
