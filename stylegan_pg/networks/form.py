"""The form of a network: the numbers that determine the sizes of its layers, derived from configuration and phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stylegan_pg.config import ConvolutionalConfig

LOW_PRECISION = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class NetworkShape:
    """The properties of a phase and a dataset that, with the model's configuration, determine a network's form."""

    resolution: int
    full_resolution: int  # the low-precision layers are counted down from here
    fade: bool
    img_channels: int
    c_dim: int
    mbstd_group: int


def form_kwargs(model: ConvolutionalConfig, shape: NetworkShape) -> dict[str, Any]:
    """The arguments of Form, which every network of convolutions takes; all of them are plain JSON values."""
    low = model.low_precision_at
    if low is None:  # "auto" before it has measured
        count = 0 if model.low_precision == "auto" else model.low_precision_resolutions
        low = [shape.full_resolution >> i for i in range(count)]
    return {
        "resolution": shape.resolution,
        "base": list(model.base),
        "img_channels": shape.img_channels,
        "c_dim": shape.c_dim,
        "channel_base": model.channel_base,
        "channel_max": model.channel_max,
        "fade": shape.fade,
        "conv_clamp": model.conv_clamp,
        "low_precision": ("bf16" if model.low_precision == "auto" else model.low_precision) if low else "fp32",
        "low_precision_at": [r for r in low if r >= 8],
    }


def discriminator_form_kwargs(model: ConvolutionalConfig, shape: NetworkShape) -> dict[str, Any]:
    """The arguments that every discriminator of convolutions takes."""
    own = {"mbstd_group": shape.mbstd_group, "mbstd_channels": model.mbstd_channels, "label": model.label}
    return {**form_kwargs(model, shape), **own}


@dataclass(frozen=True)
class Form:
    """The size of a network of one phase. A resolution r is a power of two and stands for pictures of
    base[0] * r / 4 rows and base[1] * r / 4 columns."""

    resolution: int
    base: Sequence[int] = (4, 4)  # rows and columns at resolution 4
    img_channels: int = 3
    c_dim: int = 0
    channel_base: int = 32768
    channel_max: int = 512
    fade: bool = False
    conv_clamp: float | None = None
    low_precision: str = "fp32"
    low_precision_at: Sequence[int] = ()

    @property
    def resolutions(self) -> list[int]:
        """All resolutions from 4 up to the form's own."""
        return [2**i for i in range(2, self.resolution.bit_length())]

    def size(self, resolution: int) -> tuple[int, int]:
        """Rows and columns of pictures at a resolution."""
        rows, columns = self.base
        return rows * resolution // 4, columns * resolution // 4

    def channels(self, resolution: int) -> int:
        """Channels of the layers of a resolution. A `channel_base` of 16384 gives those of ProGAN and StyleGAN (Karras
        et al. 2018, table 2), 32768 those of StyleGAN2 (2020, section 6)."""
        return min(self.channel_base // resolution, self.channel_max)

    def dtype(self, resolution: int) -> torch.dtype | None:
        """The dtype in which a resolution's layers compute; None: the dtype of their weights."""
        return LOW_PRECISION[self.low_precision] if resolution in self.low_precision_at else None

    def has_rgb(self, resolution: int) -> bool:
        """Whether a resolution has layers to or from RGB: the highest, and in a fade also the one before it."""
        return resolution == self.resolution or (self.fade and resolution == self.resolution // 2)
