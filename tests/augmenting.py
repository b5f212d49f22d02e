"""Helpers for the tests of augmentation: images, and parameters of single operations."""

from typing import Any

import numpy as np
import torch

from stylegan_pg import augment
from stylegan_pg.augment import ada
from stylegan_pg.config import AUGMENTATIONS, PipelineConfig

ALL = "bgcfno"


def made(**keys: Any) -> augment.Augment:
    """ADA's whole pipeline, or another mode of augmentation; other keys are those of its section."""
    cls = AUGMENTATIONS[keys.pop("mode", "fixed")]
    result = augment.make(cls(**({"pipeline": ALL} if issubclass(cls, PipelineConfig) else {}) | keys))
    assert result
    return result


def pictures(n: int, c: int, h: int, w: int, dtype=torch.float32) -> torch.Tensor:
    """Random images [n, c, h, w] in [-1, 1], in which every change is visible."""
    return torch.rand([n, c, h, w], generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 2 - 1


def smooth(c: int, h: int, w: int, dtype=torch.float32) -> torch.Tensor:
    """An image [1, c, h, w] of a few waves. It depends little on the kind of interpolation, but much on the
    position."""
    y, x = np.mgrid[:h, :w]
    waves = [np.sin(0.31 * x + 0.17 * y + i) + np.cos(0.26 * y - 0.11 * x + 2 * i) for i in range(c)]
    return torch.tensor(np.stack(waves)[None] / 2).to(dtype)


def off(pipeline: str, n: int, size: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    """The parameters that leave n images unchanged."""
    return ada.draw(pipeline, n, 0.0, torch.Generator(), size)


def fixed(pipeline: str, n: int = 1, **values: Any) -> dict[str, torch.Tensor]:
    """The parameters that leave n images unchanged, except for the given values."""
    params = off(pipeline, n)
    for name, value in values.items():
        params[name] = torch.as_tensor(value).expand(params[name].shape).to(params[name].dtype)
    return params
