"""Distributions on the line, whose distances are known exactly, and a critic that is trained to tell two of them apart
with the package's objective, penalty, optimizers and clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from stylegan_pg.losses import OBJECTIVES, DInputs, per_image
from stylegan_pg.losses.terms import gradient_norm, gradient_penalty_term
from stylegan_pg.networks.mlp import Discriminator
from stylegan_pg.optim.adam import DeviceAdam, Rates
from stylegan_pg.optim.rmsprop_sgd import DeviceRMSProp
from stylegan_pg.rng import generator

Points = Callable[[int, torch.Generator], torch.Tensor]  # (count, stream) -> float32 [count]
BATCH = 256


def normal(mean: float, deviation: float) -> Points:
    return lambda count, g: mean + deviation * torch.randn(count, generator=g)


def uniform(low: float, high: float) -> Points:
    return lambda count, g: low + (high - low) * torch.rand(count, generator=g)


def either(a: Points, b: Points) -> Points:
    """An equal mixture."""
    return lambda count, g: torch.where(torch.rand(count, generator=g) < 0.5, a(count, g), b(count, g))


def wasserstein(a: Points, b: Points, seed: int = 0, count: int = 200_000) -> float:
    """The Wasserstein distance W1 of two distributions: the mean distance of their quantiles."""
    first, second = (
        points(count, generator(seed, "exact", i)).double().sort().values for i, points in enumerate((a, b))
    )
    return float((first - second).abs().mean())


@dataclass(frozen=True)
class Training:
    """How a critic is trained: by RMSProp where `rmsprop`, else by Adam with betas (0, 0.9). `clip` limits its weights
    after each step, and `penalty` is the weight of the gradient penalty; 0 for none."""

    objective: str
    lr: float
    steps: int
    rmsprop: bool = False
    clip: float = 0.0
    penalty: float = 0.0
    width: int = 64
    hidden: int = 2


def critic(real: Points, fake: Points, how: Training, seed: int) -> Discriminator:
    """D, an MLP, trained to tell points of two distributions apart.

    It begins as a constant. With the gradient penalty and near distributions, D could otherwise stay in a local optimum
    whose slope has the wrong sign, because on the line no way leads around the slope 0.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        D = Discriminator(resolution=4, img_channels=1, width=how.width, hidden=how.hidden)
    nn.init.zeros_(list(D.layers.children())[-1].get_parameter("weight"))
    weights = list(D.parameters())
    if how.rmsprop:
        optimizer = DeviceRMSProp(weights, Rates(how.lr, 0.0, 0.99), 1e-8)
    else:
        optimizer = DeviceAdam(weights, Rates(how.lr, 0.0, 0.9), 1e-8, capturable=False, beta2_moves=False)
    g, made = generator(seed, "points of the line"), torch.zeros([])
    objective = OBJECTIVES[how.objective]
    for _ in range(how.steps):
        x, y = (points(BATCH, g)[:, None, None, None] for points in (real, fake))
        loss = per_image(objective.d, D(x), D(y)).mean()
        if how.penalty:
            u = torch.rand(BATCH, generator=g)
            inputs = DInputs(D=lambda images, c: D(images), real=x, c=None, fake=y, u=u)
            loss = loss + how.penalty * gradient_penalty_term(inputs)["loss"].mean()
        for p in weights:
            p.grad = None
        loss.backward()
        optimizer.make_step(made)
        if how.clip:
            with torch.no_grad():
                nn.utils.vector_to_parameters(
                    nn.utils.parameters_to_vector(weights).clamp(-how.clip, how.clip), weights
                )
    return D


@torch.no_grad()
def value(D: nn.Module, real: Points, fake: Points, how: Training, seed: int, count: int = 20_000) -> float:
    """How much lower D's loss is than that of a constant D: E D(x) - E D(G(z)) for `wgan`, at most 2 ln 2 for
    `logistic`."""
    g, d = generator(seed, "value of a critic"), OBJECTIVES[how.objective].d
    scores = [D(points(count, g)[:, None, None, None]).double() for points in (real, fake)]
    return float((d(*map(torch.zeros_like, scores)) - d(*scores)).mean())


def slopes(D: nn.Module, at: torch.Tensor) -> torch.Tensor:
    """|D'| at points [n]."""
    x = at.detach()[:, None, None, None].requires_grad_(True)
    return gradient_norm(D(x), x).detach()


def pull(D: nn.Module, at: torch.Tensor, objective: str) -> float:
    """The mean magnitude of the gradient of G's loss with respect to generated points [n]."""
    x = at.detach()[:, None, None, None].requires_grad_(True)
    (gradient,) = torch.autograd.grad(per_image(OBJECTIVES[objective].g, D(x), None).sum(), x)
    return float(gradient.abs().mean())
