"""Discriminators of any pair with further outputs beside the score, of which a system makes heads.

The last layer of D gets more outputs: with dense last layers that is a dense layer of a head on D's trunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from stylegan_pg.errors import UsageError


def with_outputs(
    D: type[nn.Module], kwargs: Mapping[str, Any], further: int, system: str, model: str
) -> dict[str, Any]:
    """The arguments of a discriminator's constructor for `further` numbers behind the score: D returns [N, 1 +
    further].

    Raises:
        UsageError: the discriminator has no argument `outputs`.
    """
    if "outputs" not in inspect.signature(D.__init__).parameters:
        raise UsageError(
            f"system.name={system} needs a discriminator with further outputs, which that of model.name={model} lacks: "
            "its constructor must have an argument `outputs`, the numbers that it returns of an image"
        )
    return {**kwargs, "outputs": 1 + further}
