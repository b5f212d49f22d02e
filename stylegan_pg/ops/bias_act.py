"""Bias, activation, gain and clamp, the tail of every layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# name -> (function, default gain that keeps a unit-variance input at unit variance)
ACTIVATIONS = {
    "linear": (lambda x: x, 1.0),
    "relu": (torch.relu, math.sqrt(2)),
    "lrelu": (lambda x: F.leaky_relu(x, 0.2), math.sqrt(2)),
    "tanh": (torch.tanh, 1.0),
    "sigmoid": (torch.sigmoid, 1.0),
    "elu": (F.elu, 1.0),
    "selu": (F.selu, 1.0),
    "softplus": (F.softplus, 1.0),
    "swish": (F.silu, math.sqrt(2)),
}


def bias_act(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    dim: int = 1,
) -> torch.Tensor:
    """clamp(act(x + bias) * gain), as separate PyTorch operations.

    Args:
        x: any float tensor.
        bias: [x.shape[dim]] or None; cast to x's dtype.
        act: a key of ACTIVATIONS; leaky ReLU has slope 0.2.
        gain: factor after the activation; None takes the activation's own (sqrt(2) for the rectifiers).
        clamp: limit of the magnitude after the gain, None for no limit.
        dim: the dimension that the bias runs along.
    """
    function, default_gain = ACTIVATIONS[act]
    if bias is not None:
        x = x + bias.to(x.dtype).reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = function(x)
    gain = default_gain if gain is None else gain
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)
