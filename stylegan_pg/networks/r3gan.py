"""R3GAN's generator and discriminator (Huang et al. 2024, "The GAN is dead; long live the GAN! A modern baseline GAN").

Both are residual networks of the same kind (ResNeXt; Xie et al. 2017), without normalisation, equalised learning rate,
styles, noise or minibatch stddev. The generator has no w.

Weights are drawn from N(0, gain^2 / inputs). The gain of the first two convolutions of a residual block is
sqrt(2 / (1 + 0.2^2)) L^(-1/4), where L is the number of residual blocks of the whole network, that of the third one is
0 (Zhang et al. 2019, Fixup), and that of all others is 1. The paper's networks do not grow. Here they may: L then
counts the blocks of the network of a phase, when it is built, and blocks that come from the phase before keep the
weights that were drawn for its L. In a fade there are layers to and from RGB of two resolutions, as in
networks/growing.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import R3GANConfig, r3gan_stages
from stylegan_pg.networks.form import Form, NetworkShape, form_kwargs
from stylegan_pg.networks.growing import ImageReader, blended
from stylegan_pg.networks.layers import convolve_groups, given, low_pass
from stylegan_pg.networks.ranges import checked
from stylegan_pg.ops import bias_act, downsample2d, upsample2d

TAPS = (1, 3, 3, 1)  # bilinear resampling, [1, 2, 1] * [1, 1]
SLOPE = 0.2  # of bias_act's leaky ReLU
HE_GAIN = math.sqrt(2 / (1 + SLOPE**2))


@dataclass(frozen=True)
class R3GANForm(Form):
    """The sizes of one network. widths, groups, blocks: channels, groups of the grouped convolutions and number of
    residual blocks of each resolution, from 4 up."""

    widths: Sequence[int] = ()
    groups: Sequence[int] = ()
    blocks: Sequence[int] = ()
    expansion: int = 2

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a list has not one entry for each resolution, or channels do not divide into groups.
        """
        for name in ("widths", "groups", "blocks"):
            if len(getattr(self, name)) != len(self.resolutions):
                count = len(self.resolutions)
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, where {count} resolutions need one each"
                )
        for width, groups in zip(self.widths, self.groups, strict=True):
            if self.expansion * width % groups:
                raise ValueError(f"{self.expansion} times {width} channels do not divide into {groups} groups")

    def channels(self, resolution: int) -> int:
        return self.widths[self.resolutions.index(resolution)]


def _arguments(model: R3GANConfig, shape: NetworkShape) -> dict[str, Any]:
    """The arguments of R3GANForm, all of them plain JSON values."""
    stages = r3gan_stages(model, shape.resolution).values()
    kwargs = form_kwargs(model, shape)
    kwargs = {name: value for name, value in kwargs.items() if name not in ("channel_base", "channel_max")}
    lists = {"widths": [s.channels for s in stages], "groups": [s.groups for s in stages]}
    return {**kwargs, **lists, "blocks": [s.blocks for s in stages], "expansion": model.expansion}


def generator_kwargs(model: R3GANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, all of them plain JSON values."""
    return {**_arguments(model, shape), "z_dim": model.z_dim, "embedding": model.g_embedding}


def discriminator_kwargs(model: R3GANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, all of them plain JSON values."""
    kwargs = _arguments(model, shape)
    return {**kwargs, "embedding": model.d_embedding or kwargs["widths"][0], "label": model.label}


def drawn(gain: float, *shape: int) -> nn.Parameter:
    """A weight [outputs, inputs, ...] from N(0, gain^2 / inputs), all zeros if the gain is 0."""
    return nn.Parameter(torch.randn(shape) * (gain / math.sqrt(math.prod(shape[1:]))))


class Convolution(nn.Module):
    """A convolution without bias that keeps the size, [N, in, H, W] -> [N, out, H, W]; or with `biased`, one that is
    followed by a biased leaky ReLU with gain 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, groups: int = 1, gain: float = 1.0, biased=False
    ):
        super().__init__()
        self.groups, self.padding = groups, kernel // 2
        self.weight = drawn(gain, out_channels, in_channels // groups, kernel, kernel)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if biased else None

    def forward(self, x: torch.Tensor, clamp: float | None = None) -> torch.Tensor:
        x = convolve_groups(x, self.weight, self.groups, self.padding)
        return x if self.bias is None else bias_act(x, self.bias, act="lrelu", gain=1.0, clamp=clamp)


class Linear(nn.Module):
    """[N, in] -> [N, out], without bias."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0):
        super().__init__()
        self.weight = drawn(gain, out_features, in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.weight.dtype) @ self.weight.t()


class ResidualBlock(nn.Module):
    """x + conv2(conv1(conv0(x))), whose middle one is grouped and has more channels: [N, C, H, W] -> the same."""

    def __init__(self, form: R3GANForm, resolution: int):
        super().__init__()
        i, gain = form.resolutions.index(resolution), HE_GAIN * sum(form.blocks) ** -0.25
        channels, groups = form.widths[i], form.groups[i]
        inner = form.expansion * channels
        self.conv0 = Convolution(channels, inner, 1, gain=gain, biased=True)
        self.conv1 = Convolution(inner, inner, 3, groups=groups, gain=gain, biased=True)
        self.conv2 = Convolution(inner, channels, 1, gain=0.0)
        self.clamp = form.conv_clamp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(self.conv0(x, self.clamp), self.clamp))


class Stage(nn.Module):
    """The residual blocks of one resolution, and the layer between it and the next lower one, if that has another
    number of channels."""

    block0: ResidualBlock

    def __init__(self, form: R3GANForm, resolution: int):
        super().__init__()
        self.dtype = form.dtype(resolution)
        self.count = form.blocks[form.resolutions.index(resolution)]
        for i in range(self.count):
            setattr(self, f"block{i}", ResidualBlock(form, resolution))

    def between(self, before: int, after: int) -> Convolution | None:
        """A convolution from one number of channels to another, None if they are equal."""
        return Convolution(before, after, 1) if before != after else None

    def converted(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype of the stage."""
        return x.to(self.dtype or self.block0.conv0.weight.dtype)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.count):
            x = getattr(self, f"block{i}")(x)
        return x


class Basis(nn.Module):
    """w [N, w_dim] -> [N, C, *size]: learned pictures, each of them times a number that is linear in w."""

    memory_format = torch.contiguous_format  # of the result, which all that follows keeps

    def __init__(self, w_dim: int, channels: int, size: tuple[int, int]):
        super().__init__()
        self.basis = nn.Parameter(torch.randn(channels, *size))
        self.linear = Linear(w_dim, channels)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        x = self.basis * self.linear(w)[:, :, None, None]
        return x.contiguous(memory_format=self.memory_format)


class GeneratorStage(Stage):
    """Doubles the size, except for the first stage; then the residual blocks. [N, in, H/2, W/2] -> [N, out, H, W]."""

    filter: torch.Tensor

    def __init__(self, form: R3GANForm, resolution: int, w_dim: int):
        super().__init__(form, resolution)
        channels = form.channels(resolution)
        if resolution == 4:
            self.first = Basis(w_dim, channels, form.size(4))
        else:
            self.transition = self.between(form.channels(resolution // 2), channels)
            self.register_buffer("filter", low_pass(TAPS), persistent=False)
        if form.has_rgb(resolution):
            self.torgb = Convolution(channels, form.img_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: of the first stage, w [N, w_dim]."""
        if hasattr(self, "first"):
            return self.residual(self.first(x))
        x = self.converted(x)
        if self.transition is not None:
            x = self.transition(x)
        return self.residual(upsample2d(x, self.filter))


class Generator(nn.Module):
    """z [N, z_dim] (and c [N, c_dim]) -> images [N, img_channels, H, W] in about [-1, 1]; for the further arguments see
    R3GANForm. Conditions go through a linear layer with `embedding` outputs, which are concatenated with z."""

    filter: torch.Tensor
    b4: GeneratorStage

    @checked
    def __init__(self, *, z_dim: int = 64, embedding: int = 64, **form: Any):
        super().__init__()
        f = self.form = R3GANForm(**form)
        self.z_dim, self.c_dim, self.fade = z_dim, f.c_dim, f.fade
        self.resolution, self.resolutions = f.resolution, f.resolutions
        self.img_channels, self.img_size = f.img_channels, f.size(f.resolution)
        self.register_buffer("filter", low_pass(TAPS), persistent=False)
        for r in f.resolutions:
            setattr(self, f"b{r}", GeneratorStage(f, r, z_dim + (embedding if f.c_dim else 0)))
        if f.c_dim:
            self.embed = Linear(f.c_dim, embedding)

    def forward(
        self, z: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float | torch.Tensor = 1.0
    ) -> torch.Tensor:
        """`alpha` is used in a fading network only."""
        dtype = self.b4.first.basis.dtype
        x = z.to(dtype)
        if self.c_dim:
            x = torch.cat([x, self.embed(given(c, self.c_dim))], dim=1)
        img = None
        for r in self.resolutions:
            block = getattr(self, f"b{r}")
            x = block(x)
            if hasattr(block, "torgb"):
                rgb = block.torgb(x).to(dtype)
                img = rgb if img is None else blended(rgb, upsample2d(img, self.filter), alpha, False)
        assert img is not None
        return img


class DiscriminatorStage(Stage):
    """The residual blocks; then the size is halved. [N, in, H, W] -> [N, out, H/2, W/2]."""

    filter: torch.Tensor

    def __init__(self, form: R3GANForm, resolution: int, inputs: int):
        super().__init__(form, resolution)
        channels = form.channels(resolution)
        if form.has_rgb(resolution):
            self.fromrgb = Convolution(inputs, channels, 1)
        self.transition = self.between(channels, form.channels(resolution // 2))
        self.register_buffer("filter", low_pass(TAPS), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = downsample2d(self.residual(self.converted(x)), self.filter)
        return x if self.transition is None else self.transition(x)


class DiscriminatorEnd(Stage):
    """The last residual blocks, a weighted sum over the pixels of each channel, and a linear layer: [N, C, *size] ->
    [N, out]."""

    def __init__(self, form: R3GANForm, out: int, inputs: int):
        super().__init__(form, 4)
        channels = form.channels(4)
        if form.has_rgb(4):
            self.fromrgb = Convolution(inputs, channels, 1)
        self.basis = drawn(1.0, channels, 1, *form.size(4))
        self.linear = Linear(channels, out)

    def forward(self, x: torch.Tensor, batches: int = 1) -> torch.Tensor:
        """Images do not meet, whether they are of one batch or of several."""
        x = self.residual(x.to(self.basis.dtype))
        return self.linear((x * self.basis[:, 0]).sum(dim=[2, 3]))


class Discriminator(ImageReader):
    """image [N, img_channels, H, W] (and c [N, c_dim]) -> scores [N, 1]; for the further arguments see R3GANForm.

    A conditional network makes `embedding` numbers of an image, and multiplies them by as many that a linear layer
    makes of the condition (projection; Miyato and Koyama 2018); or, if `label` is "concatenation", the condition is
    planes beside the picture's channels. With more `outputs`, there are further numbers behind the score, [N, outputs],
    for heads.
    """

    b4: DiscriminatorEnd

    @checked
    def __init__(self, *, embedding: int = 64, label: str = "projection", outputs: int = 1, **form: Any):
        f = R3GANForm(**form)
        planes = f.c_dim if label == "concatenation" else 0
        compared = embedding if f.c_dim and not planes else 0
        inputs = f.img_channels + planes
        blocks: dict[int, nn.Module] = {r: DiscriminatorStage(f, r, inputs) for r in f.resolutions[:0:-1]}
        blocks[4] = DiscriminatorEnd(f, (compared or 1) + outputs - 1, inputs)
        super().__init__(f, blocks, TAPS, planes=planes)
        self.compared = compared
        if compared:
            self.embed = Linear(f.c_dim, embedding, gain=embedding**-0.5)

    @property
    def score_layer(self) -> nn.Module:
        return self.b4.linear

    def forward(
        self, img: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float | torch.Tensor = 1.0, batches: int = 1
    ) -> torch.Tensor:
        """`alpha` is used in a fading network only; 0 uses the down-sampled image alone."""
        x = self.read(img, alpha, batches, c)
        if self.compared:
            compared, further = x[:, : self.compared], x[:, self.compared :]
            score = (compared * self.embed(given(c, self.c_dim))).sum(dim=1, keepdim=True)
            x = torch.cat([score, further], dim=1) if further.shape[1] else score
        return x
