"""The features that a discriminator makes its scores of: what its last layer, `score_layer`, is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stylegan_pg.errors import UsageError


def features_of(D: Any) -> nn.Module:
    """The layer of a discriminator whose input are its features.

    Raises:
        UsageError: it has no attribute `score_layer`.
    """
    layer = getattr(D, "score_layer", None)
    if not isinstance(layer, nn.Module):
        raise UsageError(
            "loss.terms: feature_matching is of the features that D's last layer is given, and this discriminator "
            f"({type(D).__name__}) does not name that layer: give it an attribute score_layer, or leave the term away"
        )
    return layer


class Captured:
    """Within the block, `features` gets the features [N, ...] of each pass of a discriminator, with their graphs."""

    def __init__(self, D: Any):
        self.layer, self.features = features_of(D), list[torch.Tensor]()

    def __enter__(self) -> Captured:
        self.handle = self.layer.register_forward_pre_hook(lambda _, given: self.features.append(given[0]))
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()
