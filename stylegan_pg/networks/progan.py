"""Progressive GAN's generator and discriminator (Karras et al. 2018, appendix A, table 2).

The gain of He's constant includes that of the activation: sqrt(2) in general, 1 in toRGB and the last dense layer, and
sqrt(2)/4 in the generator's first layer. The paper has no conditional networks of this kind. Here labels are
concatenated with the latent, as in its published code, and the discriminator uses projection. A `channel_base` of 16384
gives the channels of table 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import ProGANConfig
from stylegan_pg.networks import growing
from stylegan_pg.networks.equalized import scaled_parameters
from stylegan_pg.networks.form import Form, NetworkShape, discriminator_form_kwargs, form_kwargs
from stylegan_pg.networks.layers import Conv2d, given, normalize_2nd_moment
from stylegan_pg.networks.ranges import checked
from stylegan_pg.ops import bias_act, downsample2d

BOX = (1, 1)  # filter of nearest-neighbour up-sampling, and of down-sampling by the mean of four pixels
LAYER = {"act": "lrelu", "resample_filter": BOX, "he_gain": math.sqrt(2)}

# The discriminator takes the arguments of every growing one.
discriminator_kwargs = discriminator_form_kwargs


def generator_kwargs(model: ProGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, all of them plain JSON values."""
    return dict(**form_kwargs(model, shape), z_dim=model.z_dim)


class Normalization(nn.Module):
    """Concatenates z [N, z_dim] and c [N, c_dim] and normalises them to the hypersphere: w [N, z_dim + c_dim].

    It has no parameters; `w_avg` exists because the trainer and truncation expect it of a mapping.
    """

    w_avg: torch.Tensor

    def __init__(self, z_dim: int, c_dim: int):
        super().__init__()
        self.c_dim = c_dim
        self.register_buffer("w_avg", torch.zeros(z_dim + c_dim))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        if self.c_dim:
            z = torch.cat([z, given(c, self.c_dim).to(z.dtype)], dim=1)
        return normalize_2nd_moment(z)


class FirstLayer(nn.Module):
    """w [N, w_dim] -> [N, out, *size]: a dense layer whose bias is shared by the pixels of a channel."""

    def __init__(self, w_dim: int, out_channels: int, size: tuple[int, int]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(w_dim, out_channels, *size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = math.sqrt(2) / 4 / math.sqrt(w_dim)

    def factors(self) -> list[tuple[torch.Tensor, float]]:
        return [(self.weight, self.weight_gain)]

    def forward(self, w: torch.Tensor, ready: Sequence[torch.Tensor]) -> torch.Tensor:
        """`ready`: the weight, see equalized.scaled_parameters."""
        (weight,) = ready
        x = (w.to(weight.dtype) @ weight.flatten(1)).unflatten(1, weight.shape[1:])
        return bias_act(x, self.bias, act="lrelu", gain=1.0)


class SynthesisBlock(nn.Module):
    """Two convolutions, each followed by pixel norm."""

    memory_format = torch.contiguous_format  # of the first layer's result, which all that follows keeps

    def __init__(self, form: Form, resolution: int, w_dim: int):
        super().__init__()
        channels, self.dtype = form.channels(resolution), form.dtype(resolution)
        layer: dict[str, Any] = {**LAYER, "clamp": form.conv_clamp}
        if resolution == 4:
            self.first = FirstLayer(w_dim, channels, form.size(4))
        else:
            self.conv0 = Conv2d(form.channels(resolution // 2), channels, 3, up=2, **layer)
        self.conv1 = Conv2d(channels, channels, 3, **layer)
        if form.has_rgb(resolution):
            self.torgb = Conv2d(channels, form.img_channels, 1)

    def forward(self, x: torch.Tensor | None, ws: Sequence[torch.Tensor], **_noise) -> torch.Tensor:
        """x [N, in, H/2, W/2], or None at 4x4, which takes the one w [N, w_dim] -> [N, out, H, W]."""
        dtype = self.dtype or self.conv1.weight.dtype
        first, last = scaled_parameters(self.first if x is None else self.conv0, self.conv1)
        if x is None:
            y = self.first(ws[0], first).to(dtype).contiguous(memory_format=self.memory_format)
        else:
            y = self.conv0(x.to(dtype), ready=first)
        return normalize_2nd_moment(self.conv1(normalize_2nd_moment(y), ready=last))


class Generator(growing.Generator):
    """Progressive GAN's generator, which has one w and no noise; for the further arguments see Form."""

    @checked
    def __init__(self, *, z_dim: int = 512, **form: Any):
        f = Form(**form)
        w_dim = z_dim + f.c_dim
        blocks = {r: SynthesisBlock(f, r, w_dim) for r in f.resolutions}
        synthesis = growing.SynthesisNetwork(f, blocks, 1, BOX)
        super().__init__(f, z_dim, w_dim, Normalization(z_dim, f.c_dim), synthesis)


class DiscriminatorBlock(growing.DiscriminatorBlock):
    """A block that down-samples after the activation of the second convolution."""

    def __init__(self, *channels: int, **how: Any):
        super().__init__(*channels, down=1, **how)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return downsample2d(super().forward(x), self.conv1.filter)


class Discriminator(growing.Discriminator):
    """Progressive GAN's discriminator; for the further arguments see Form."""

    @checked
    def __init__(
        self,
        *,
        mbstd_group: int = 4,
        mbstd_channels: int = 1,
        label: str = "projection",
        outputs: int = 1,
        **form: Any,
    ):
        f = Form(**form)
        super().__init__(
            f,
            block=DiscriminatorBlock,
            layer={**LAYER, "clamp": f.conv_clamp},
            mbstd_group=mbstd_group,
            mbstd_channels=mbstd_channels,
            label=label,
            outputs=outputs,
            image_filter=BOX,
        )
