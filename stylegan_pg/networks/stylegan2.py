"""StyleGAN2's generator and discriminator (Karras et al. 2020), which can grow, in the layout of public checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import StyleGAN2Config, StyleGAN3Config
from stylegan_pg.networks import growing
from stylegan_pg.networks.equalized import scaled_parameters
from stylegan_pg.networks.form import Form, NetworkShape, discriminator_form_kwargs, form_kwargs
from stylegan_pg.networks.layers import Conv2d, MappingNetwork
from stylegan_pg.networks.modulation import ModulatedConv2d, Style, SynthesisLayer, ToRGB, styles_of
from stylegan_pg.networks.ranges import checked


def generator_kwargs(model: StyleGAN2Config, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, all of them plain JSON values."""
    return dict(
        **form_kwargs(model, shape),
        z_dim=model.z_dim,
        w_dim=model.w_dim,
        mapping_layers=model.mapping_layers,
        architecture=model.g_architecture,
        use_noise=model.noise,
        resample_filter=list(model.resample_filter),
    )


def discriminator_kwargs(model: StyleGAN2Config | StyleGAN3Config, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator."""
    return dict(
        **discriminator_form_kwargs(model, shape),
        architecture=model.d_architecture,
        resample_filter=list(model.resample_filter),
    )


class SynthesisBlock(nn.Module):
    memory_format = torch.contiguous_format  # of the 4x4 input, which all that follows keeps

    def __init__(self, form: Form, resolution: int, w_dim: int, architecture: str, **layer: Any):
        super().__init__()
        size, channels = form.size(resolution), form.channels(resolution)
        self.architecture, self.dtype = architecture, form.dtype(resolution)
        layer = {**layer, "clamp": form.conv_clamp, "fp16": self.dtype == torch.float16}
        if resolution == 4:
            # Not named `const`: that is a reserved word where AOTInductor generates C++.
            self.learned_input = nn.Parameter(torch.randn(channels, *size))
        else:
            before = form.channels(resolution // 2)
            self.conv0 = SynthesisLayer(before, channels, w_dim, size, up=2, **layer)
            if architecture == "resnet":
                filter_ = layer["resample_filter"]
                self.skip = Conv2d(before, channels, 1, bias=False, up=2, resample_filter=filter_)
        self.conv1 = SynthesisLayer(channels, channels, w_dim, size, **layer)
        if architecture == "skip" or form.has_rgb(resolution):
            self.torgb = ToRGB(channels, form.img_channels, w_dim, clamp=form.conv_clamp)

    def modulated(self) -> list[ModulatedConv2d]:
        """The layers that take styles, in order."""
        return [getattr(self, name) for name in ("conv0", "conv1", "torgb") if hasattr(self, name)]

    def forward(self, x: torch.Tensor | None, styles: Sequence[Style], **noise) -> torch.Tensor:
        """x [N, in, H/2, W/2] (None at 4x4) and the styles of `modulated` -> [N, out, H, W]."""
        dtype = self.dtype or self.conv1.weight.dtype
        if x is None:
            x = self.learned_input.to(dtype).expand(styles[0].s.shape[0], -1, -1, -1)
            return self.conv1(x.contiguous(memory_format=self.memory_format), styles[0], **noise)
        x = x.to(dtype)
        if self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            return y + self.conv1(self.conv0(x, styles[0], **noise), styles[1], gain=math.sqrt(0.5), **noise)
        return self.conv1(self.conv0(x, styles[0], **noise), styles[1], **noise)


class SynthesisNetwork(growing.SynthesisNetwork):
    """A synthesis network whose toRGB uses the w of the next block's first layer: 1, 3, 5, ..."""

    @staticmethod
    def block_styles(blocks: Sequence[Any], ws: torch.Tensor) -> list[list[Style]]:
        layers = [block.modulated() for block in blocks]
        places = [i for k, block in enumerate(layers) for i, _ in enumerate(block, start=max(2 * k - 1, 0))]
        styles = iter(styles_of([layer for block in layers for layer in block], ws, places))
        return [[next(styles) for _ in block] for block in layers]

    def rgb(self, block: Any, x: torch.Tensor, styles: Sequence[Style]) -> torch.Tensor:
        return block.torgb(x, styles[-1])


class Generator(growing.Generator):
    """StyleGAN2's generator; for the further arguments see Form."""

    @checked
    def __init__(
        self,
        *,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        architecture: str = "skip",  # skip, resnet or orig
        use_noise: bool = True,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        **form: Any,
    ):
        f = Form(**form)
        mapping = MappingNetwork(z_dim, f.c_dim, w_dim, mapping_layers)
        layer = {"use_noise": use_noise, "resample_filter": tuple(resample_filter)}
        blocks = {r: SynthesisBlock(f, r, w_dim, architecture, **layer) for r in f.resolutions}
        synthesis = SynthesisNetwork(f, blocks, 2 * len(blocks), resample_filter, skips=architecture == "skip")
        super().__init__(f, z_dim, w_dim, mapping, synthesis)


class DiscriminatorBlock(growing.DiscriminatorBlock):
    """A block with a residual branch around its convolutions in the resnet architecture."""

    def __init__(self, in_channels: int, out_channels: int, img_channels: int, *, architecture: str, **how: Any):
        super().__init__(in_channels, out_channels, img_channels, **how)
        self.architecture = architecture
        if architecture == "resnet":
            filter_ = how["layer"]["resample_filter"]
            self.skip = Conv2d(in_channels, out_channels, 1, bias=False, down=2, resample_filter=filter_)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.architecture != "resnet":
            return super().forward(x)
        x = x.to(self.dtype or self.conv0.weight.dtype)
        skip, first, second = scaled_parameters(self.skip, self.conv0, self.conv1)
        y = self.skip(x, gain=math.sqrt(0.5), ready=skip)
        return y + self.conv1(self.conv0(x, ready=first), gain=math.sqrt(0.5), ready=second)


class Discriminator(growing.Discriminator):
    """StyleGAN2's discriminator; for the further arguments see Form."""

    @checked
    def __init__(
        self,
        *,
        mapping_layers: int = 8,
        architecture: str = "resnet",  # skip, resnet or orig
        mbstd_group: int = 4,
        mbstd_channels: int = 1,
        label: str = "projection",
        outputs: int = 1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        **form: Any,
    ):
        f = Form(**form)
        super().__init__(
            f,
            block=partial(DiscriminatorBlock, architecture=architecture),
            layer={"act": "lrelu", "clamp": f.conv_clamp, "resample_filter": tuple(resample_filter)},
            mapping_layers=mapping_layers,
            mbstd_group=mbstd_group,
            mbstd_channels=mbstd_channels,
            label=label,
            outputs=outputs,
            image_filter=resample_filter,
            skips=architecture == "skip",
        )
