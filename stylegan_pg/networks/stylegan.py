"""The first style-based generator and its discriminator (Karras et al. 2019, section 2 and appendix C).

The paper resamples by [1, 1], and blurs by [1, 2, 1] after every up-sampling and before every down-sampling
convolution. Both are linear, so the filter [1, 3, 3, 1] at the convolution does the same in one pass, except at the
border, where pixels outside the picture have the values that the convolution gives them instead of zero. Pictures in a
fade are resampled without the blur, as in ProGAN. A `channel_base` of 16384 gives the paper's channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import StyleGANConfig
from stylegan_pg.networks import growing
from stylegan_pg.networks.equalized import scaled_parameters, unstacked
from stylegan_pg.networks.form import Form, NetworkShape, discriminator_form_kwargs, form_kwargs
from stylegan_pg.networks.layers import (
    Conv2d,
    FullyConnected,
    MappingNetwork,
    affine_outputs,
    low_pass,
    noise_image,
    resampling_conv2d,
)
from stylegan_pg.networks.ranges import checked
from stylegan_pg.ops import bias_act

GAIN = math.sqrt(2)  # the gain in He's constant of every layer before a leaky ReLU
IMAGE_FILTER = (1, 1)


def generator_kwargs(model: StyleGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, all of them plain JSON values."""
    return dict(
        **form_kwargs(model, shape),
        z_dim=model.z_dim,
        w_dim=model.w_dim,
        mapping_layers=model.mapping_layers,
        use_noise=model.noise,
        resample_filter=list(model.resample_filter),
    )


def discriminator_kwargs(model: StyleGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator."""
    return dict(**discriminator_form_kwargs(model, shape), resample_filter=list(model.resample_filter))


class Epilogue(nn.Module):
    """Noise with a weight per channel, bias, leaky ReLU, instance norm and AdaIN, which applies the style's scale (+ 1)
    and shift (Karras et al. 2019, equation 1). [N, C, *size] and the affine's result [N, 2 C] -> [N, C, *size]."""

    noise_const: torch.Tensor

    def __init__(self, channels: int, w_dim: int, size: tuple[int, int], *, use_noise: bool, clamp: float | None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.affine = FullyConnected(w_dim, 2 * channels)
        self.use_noise, self.clamp = use_noise, clamp
        if use_noise:
            self.noise_weight = nn.Parameter(torch.zeros(channels))
            self.register_buffer("noise_const", torch.randn(size))

    def forward(
        self, x: torch.Tensor, style: torch.Tensor, *, noise: str = "const", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        n = noise_image(noise, self.noise_const, x, generator) if self.use_noise else None
        if n is not None:
            x = torch.addcmul(x, n.to(x.dtype), self.noise_weight[:, None, None].to(x.dtype))
        x = bias_act(x, self.bias, act="lrelu", gain=1.0, clamp=self.clamp)
        scale, shift = style[:, :, None, None].chunk(2, dim=1)
        # In the weights' precision. Group norm with one channel per group keeps the layout and accepts single pixels.
        y = torch.group_norm(x.to(scale.dtype), x.shape[1], eps=1e-8)
        return torch.addcmul(shift, y, scale + 1).to(x.dtype)


class SynthesisLayer(Epilogue):
    """A 3x3 convolution, which may double the size, followed by an Epilogue."""

    filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        channels: int,
        w_dim: int,
        size: tuple[int, int],
        *,
        up: int = 1,
        resample_filter: Sequence[float],
        **epilogue: Any,
    ):
        super().__init__(channels, w_dim, size, **epilogue)
        self.weight = nn.Parameter(torch.randn(channels, in_channels, 3, 3))
        self.register_buffer("filter", low_pass(resample_filter), persistent=False)
        self.up, self.weight_gain = up, GAIN / math.sqrt(in_channels * 9)

    def factors(self) -> list[tuple[torch.Tensor, float]]:
        return [(self.weight, self.weight_gain)]

    def forward(self, x: torch.Tensor, style: torch.Tensor, *, ready: Sequence[torch.Tensor], **noise: Any):
        return super().forward(resampling_conv2d(x, ready[0], self.filter, up=self.up), style, **noise)


class SynthesisBlock(nn.Module):
    memory_format = torch.contiguous_format  # of the first convolution's input, which all that follows keeps

    def __init__(self, form: Form, resolution: int, w_dim: int, *, use_noise: bool, resample_filter: Sequence[float]):
        super().__init__()
        size, channels = form.size(resolution), form.channels(resolution)
        self.dtype = form.dtype(resolution)
        epilogue: dict[str, Any] = {"use_noise": use_noise, "clamp": form.conv_clamp}
        layer = {**epilogue, "resample_filter": resample_filter}
        if resolution == 4:
            self.learned_input = nn.Parameter(torch.ones(channels, *size))
            self.input = Epilogue(channels, w_dim, size, **epilogue)
        else:
            self.conv0 = SynthesisLayer(form.channels(resolution // 2), channels, w_dim, size, up=2, **layer)
        self.conv1 = SynthesisLayer(channels, channels, w_dim, size, **layer)
        if form.has_rgb(resolution):
            self.torgb = Conv2d(channels, form.img_channels, 1)

    def styled(self) -> list[Epilogue]:
        """The two layers that take styles, in order."""
        return [self.input if hasattr(self, "input") else self.conv0, self.conv1]

    def forward(self, x: torch.Tensor | None, styles: Sequence[torch.Tensor], **noise: Any) -> torch.Tensor:
        """x [N, in, H/2, W/2] (None at 4x4) and the styles of `styled`, each [N, 2 C] -> [N, out, H, W]."""
        dtype = self.dtype or self.conv1.weight.dtype
        if x is None:
            (last,) = scaled_parameters(self.conv1)
            # The norm of the constant, which is nearly even at first, is exact in the contiguous layout only.
            y: torch.Tensor = self.input(
                self.learned_input[None].repeat(styles[0].shape[0], 1, 1, 1), styles[0], **noise
            )
            y = y.to(dtype).contiguous(memory_format=self.memory_format)
        else:
            first, last = scaled_parameters(self.conv0, self.conv1)
            y = self.conv0(x.to(dtype), styles[0], ready=first, **noise)
        return self.conv1(y, styles[1], ready=last, **noise)


class SynthesisNetwork(growing.SynthesisNetwork):
    @staticmethod
    def block_styles(blocks: Sequence[Any], ws: torch.Tensor) -> list[list[torch.Tensor]]:
        """The results of the layers' affines, which are computed together."""
        affines = [layer.affine for block in blocks for layer in block.styled()]
        outputs = affine_outputs(affines, ws, range(len(affines)))
        found = unstacked(outputs, [(ws.shape[0], len(affine.bias)) for affine in affines])
        return [found[i : i + 2] for i in range(0, len(affines), 2)]


class Generator(growing.Generator):
    """The style-based generator, which truncates its first 8 layers only (Karras et al. 2019, appendix B: those of
    4x4 to 32x32); for the further arguments see Form."""

    truncation_cutoff = 8

    @checked
    def __init__(
        self,
        *,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        use_noise: bool = True,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        **form: Any,
    ):
        f = Form(**form)
        mapping = MappingNetwork(z_dim, f.c_dim, w_dim, mapping_layers, he_gain=GAIN)
        layer: dict[str, Any] = {"use_noise": use_noise, "resample_filter": tuple(resample_filter)}
        blocks = {r: SynthesisBlock(f, r, w_dim, **layer) for r in f.resolutions}
        synthesis = SynthesisNetwork(f, blocks, 2 * len(blocks), IMAGE_FILTER)
        super().__init__(f, z_dim, w_dim, mapping, synthesis)


class Discriminator(growing.Discriminator):
    """ProGAN's discriminator with a blur before each down-sampling convolution; for the further arguments see Form."""

    @checked
    def __init__(
        self,
        *,
        mbstd_group: int = 4,
        mbstd_channels: int = 1,
        label: str = "projection",
        outputs: int = 1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        **form: Any,
    ):
        f = Form(**form)
        filter_ = tuple(resample_filter)
        super().__init__(
            f,
            block=growing.DiscriminatorBlock,
            layer={"act": "lrelu", "clamp": f.conv_clamp, "resample_filter": filter_, "he_gain": GAIN},
            mbstd_group=mbstd_group,
            mbstd_channels=mbstd_channels,
            label=label,
            outputs=outputs,
            image_filter=IMAGE_FILTER,
        )
