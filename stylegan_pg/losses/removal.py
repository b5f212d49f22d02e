"""Losses about what a network finds out: what an inspector minimises and an encoder maximises (scrubber), and how far
D's styles of a picture are from saying nothing (CAN). All return one value per image."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def inspection(guess: torch.Tensor, truth: torch.Tensor, deviation: torch.Tensor | None = None) -> torch.Tensor:
    """The loss [N] of a guess about a condition.

    Args:
        guess: logits [N, K], or a vector [N, K]. truth: one-hot classes [N, K], or the vector.
        deviation: standard deviations [K] of the entries of a vector, whose mean squared error is relative to them, so
            that 1 is what somebody reaches who knows nothing; None for classes, whose loss is the cross-entropy.
    """
    if deviation is None:
        return -(truth * F.log_softmax(guess, dim=1)).sum(dim=1)
    return relative_error(guess, truth, deviation)


def relative_error(values: torch.Tensor, targets: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """The mean [N] over the entries of ((value - target) / deviation)^2; values and targets [N, K], deviation [K]. Its
    mean over images is 1 - R^2."""
    return ((values - targets) / deviation).square().mean(dim=1)


def reversed_loss(loss: torch.Tensor, most: float | None = None) -> torch.Tensor:
    """What an encoder minimises where an inspector minimises `loss` [N]: its negative (the gradient reversal of Ganin
    and Lempitsky 2015), which has no gradient above `most`."""
    return -loss if most is None else -loss.clamp(max=most)


def categorical_ambiguity(logits: torch.Tensor) -> torch.Tensor:
    """The cross-entropy [N] of the uniform distribution and softmax(logits), logits [N, K]; at least ln K."""
    return -F.log_softmax(logits, dim=1).mean(dim=1)


def binary_ambiguity(logits: torch.Tensor) -> torch.Tensor:
    """-sum_k (1/K log p_k + (1 - 1/K) log(1 - p_k)) with p = softmax(logits), [N] for logits [N, K] (Elgammal et al.
    2017, equation 2)."""
    log_p = F.log_softmax(logits, dim=1)
    k = logits.shape[1]
    # log(1 - p_k) as a sum over the other styles, which is exact where p_k is nearly 1
    others = (
        logits[:, None, :]
        .expand(-1, k, -1)
        .masked_fill(torch.eye(k, dtype=torch.bool, device=logits.device), float("-inf"))
    )
    log_rest = torch.logsumexp(others, dim=2) - torch.logsumexp(logits, dim=1, keepdim=True)
    return -(log_p / k + log_rest * (1 - 1 / k)).sum(dim=1)


AMBIGUITIES = {"categorical": categorical_ambiguity, "binary": binary_ambiguity}
