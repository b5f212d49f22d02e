"""DCGAN's generator and discriminator: transposed and strided convolutions with batch normalisation (Radford et al.
2016), with the layers and names of PyTorch's published example, for any resolution and any base grid.

With a `channel_base` of 2048, a resolution of 64 and 100 latents these have the example's 3,576,704 and 2,765,568
parameters. Layers are at `main.{i}`; what lies between them (activations) has no parameters. A label is concatenated
with the latents in G; in D it is concatenated with the picture as constant planes, or its embedding is multiplied with
the features (Miyato and Koyama 2018).

Without batch normalisation (`normalization="none"`), layers have biases instead, which it would make superfluous.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stylegan_pg.config import DCGANConfig
from stylegan_pg.networks.form import Form, NetworkShape, form_kwargs
from stylegan_pg.networks.latent_law import LatentLaw
from stylegan_pg.networks.layers import given, planes
from stylegan_pg.networks.minibatch import MinibatchScore
from stylegan_pg.networks.ranges import checked
from stylegan_pg.networks.virtual_norm import VirtualBatchNorm, normalized

SLOPE = 0.2  # of D's leaky ReLU
DEVIATION = 0.02  # of initial weights
DEFAULTS = {"channel_base": 2048}  # of Form


def initialize(net: nn.Module) -> None:
    """Draw weights of convolutions from N(0, 0.02) and those of normalisations from N(1, 0.02), whose biases are 0
    (Radford et al. 2016, section 4)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, DEVIATION)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, VirtualBatchNorm)):
            nn.init.normal_(module.weight, 1.0, DEVIATION)
            nn.init.zeros_(module.bias)


class Convolution(nn.Conv2d):
    """A convolution that computes in `dtype`, by default that of its weights."""

    dtype: torch.dtype | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias, x = _converted(self, input)
        return F.conv2d(x, weight, bias, self.stride, self.padding)


class TransposedConvolution(nn.ConvTranspose2d):
    """The same for a transposed convolution."""

    dtype: torch.dtype | None = None

    def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        weight, bias, x = _converted(self, input)
        return F.conv_transpose2d(x, weight, bias, self.stride, self.padding)  # type: ignore[arg-type]  # no "same"


def _converted(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Weight and bias of a layer and its input, in the dtype that it computes in."""
    weight, bias = layer.weight, layer.bias
    dtype = layer.dtype or weight.dtype
    return weight.to(dtype), None if bias is None else bias.to(dtype), x.to(dtype)


class Clamped(nn.Module):
    """An activation, limited to [-limit, limit] unless that is None."""

    def __init__(self, act: nn.Module, limit: float | None):
        super().__init__()
        self.act, self.limit = act, limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(x)
        return x if self.limit is None else x.clamp(-self.limit, self.limit)


def _layer(kind: type[Any], dtype: torch.dtype | None, a: int, b: int, size: Any, bias: bool) -> nn.Module:
    """A layer that doubles or halves the size, or with a `size` one between vectors and pictures of it."""
    how = {"kernel_size": 4, "stride": 2, "padding": 1} if size is None else {"kernel_size": size}
    layer = kind(a, b, **how, bias=bias)
    layer.dtype = dtype
    return layer


class Generator(nn.Module):
    """z [N, z_dim], c [N, c_dim] -> images [N, img_channels, *base * resolution / 4] in [-1, 1]; for the further
    arguments see Form and LatentLaw.

    With `normalization` "virtual" it keeps a reference batch of latents, which is drawn with its weights.
    """

    reference: torch.Tensor
    reference_c: torch.Tensor

    @checked
    def __init__(
        self,
        *,
        z_dim: int = 100,
        latent: str = "normal",
        categories: Sequence[int] = (),
        continuous: int = 0,
        normalization: str = "batch",
        references: int = 64,
        **form: Any,
    ):
        super().__init__()
        f = self.form = Form(**{**DEFAULTS, **form})
        self.resolution, self.img_channels, self.img_size = f.resolution, f.img_channels, f.size(f.resolution)
        self.z_dim, self.c_dim = z_dim, f.c_dim
        self.law = LatentLaw(z_dim, latent, categories, continuous)
        *hidden, _ = f.resolutions
        widths = [z_dim + f.c_dim, *(f.channels(r) for r in hidden), f.img_channels]
        self.main = nn.Sequential()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            inner, size = i < len(hidden), None if i else f.size(4)
            dtype, bias = f.dtype(f.resolutions[i]), inner and normalization == "none"
            self.main.append(_layer(TransposedConvolution, dtype, a, b, size, bias))
            if inner:
                self.main.extend([*normalized(normalization, b, references), Clamped(nn.ReLU(), f.conv_clamp)])
        self.main.append(nn.Tanh())
        initialize(self)
        self.references = references if normalization == "virtual" else 0
        if self.references:
            self.register_buffer("reference", torch.randn(references, z_dim))
            if f.c_dim:
                self.register_buffer("reference_c", torch.zeros(references, f.c_dim))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        c = given(c, self.c_dim) if self.c_dim else None
        if self.references:
            z = torch.cat([self.reference.to(z.dtype), z])
            c = None if c is None else torch.cat([self.reference_c.to(c.dtype), c])
        z = self.law(z)
        if c is not None:
            z = torch.cat([z, c.to(z.dtype)], dim=1)
        return self.main(z[:, :, None, None])[self.references :].to(self.main[0].weight.dtype)

    def refer(self, images: torch.Tensor, c: torch.Tensor | None) -> None:
        """Take the conditions [references, c_dim] of real pictures for the latents of the reference batch."""
        if c is not None:
            self.reference_c.copy_(c)


class Discriminator(nn.Module):
    """Images [N, img_channels, *base * resolution / 4] and c [N, c_dim] -> scores [N, 1]; for the further arguments see
    Form.

    `label` says what becomes of c: "concatenation" with the image, or "projection" of the features. With more
    `outputs`, there are further numbers behind the score, [N, outputs], for heads. With `normalization` "virtual" it
    keeps a reference batch of real pictures (`refer`). `minibatch_kernels` add minibatch discrimination over groups of
    `mbstd_group` images.
    """

    reference: torch.Tensor
    reference_c: torch.Tensor

    @checked
    def __init__(
        self,
        *,
        label: str = "projection",
        normalization: str = "batch",
        references: int = 64,
        minibatch_kernels: int = 0,
        minibatch_dims: int = 5,
        mbstd_group: int = 4,
        outputs: int = 1,
        **form: Any,
    ):
        super().__init__()
        f = self.form = Form(**{**DEFAULTS, **form})
        self.resolution, self.img_channels, self.img_size = f.resolution, f.img_channels, f.size(f.resolution)
        self.c_dim, self.label = f.c_dim, label
        inputs = f.img_channels + (f.c_dim if label == "concatenation" else 0)
        widths = [inputs, *(f.channels(r) for r in reversed(f.resolutions[:-1])), outputs]
        self.main = nn.Sequential()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            inner, dtype = i < len(widths) - 2, f.dtype(f.resolutions[-1 - i])
            bias = normalization == "none" and inner
            self.main.append(_layer(Convolution, dtype, a, b, None if inner else f.size(4), bias))
            if inner:
                self.main.extend(normalized(normalization, b, references) if i else [])
                self.main.append(Clamped(nn.LeakyReLU(SLOPE), f.conv_clamp))
        self.channels = widths[-2]  # of the features
        self.feature_size = f.size(4)
        initialize(self)
        if f.c_dim and label == "projection":
            self.embed = nn.Linear(f.c_dim, self.channels, bias=False)
            nn.init.normal_(self.embed.weight, 0.0, DEVIATION)
        self.has_minibatch = minibatch_kernels > 0
        if self.has_minibatch:
            size = self.channels * self.feature_size[0] * self.feature_size[1]
            self.minibatch = MinibatchScore(size, minibatch_kernels, minibatch_dims, mbstd_group)
        self.references = references if normalization == "virtual" else 0
        if self.references:
            self.register_buffer("reference", torch.zeros(references, f.img_channels, *self.img_size))
            if f.c_dim:
                self.register_buffer("reference_c", torch.zeros(references, f.c_dim))

    @property
    def score_layer(self) -> nn.Module:
        return self.main[-1]

    def refer(self, images: torch.Tensor, c: torch.Tensor | None) -> None:
        """Take real pictures [references, C, H, W], and their conditions, as the reference batch."""
        self.reference.copy_(images)
        if c is not None:
            self.reference_c.copy_(c)

    def features(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """What the last layer makes scores of: [N, channels, *base]."""
        c = given(c, self.c_dim) if self.c_dim else None
        if self.references:
            images = torch.cat([self.reference.to(images.dtype), images])
            c = None if c is None else torch.cat([self.reference_c.to(c.dtype), c])
        if self.label == "concatenation" and c is not None:
            images = torch.cat([images, planes(c, images)], dim=1)
        return self.main[:-1](images)[self.references :]

    def scores(self, features: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Scores [N, 1] of features, or with further numbers behind them [N, outputs]."""
        x = self.main[-1](features).flatten(1)
        if self.has_minibatch:
            x = torch.cat([x[:, :1] + self.minibatch(features), x[:, 1:]], dim=1)
        if self.label != "projection" or not self.c_dim:
            return x
        embedded = self.embed(given(c, self.c_dim).to(x.dtype))
        fits = (embedded * features.to(x.dtype).sum(dim=[2, 3])).sum(dim=1, keepdim=True)
        return torch.cat([x[:, :1] + fits, x[:, 1:]], dim=1)

    def forward(self, images: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return self.scores(self.features(images, c), c)


def generator_kwargs(model: DCGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, plain JSON values."""
    own = {"z_dim": model.z_dim, "latent": model.latent, "normalization": model.normalization}
    return {**form_kwargs(model, shape), **own, "references": model.references}


def discriminator_kwargs(model: DCGANConfig, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator, plain JSON values."""
    own = model.normalization if model.d_normalization == "same" else model.d_normalization
    minibatch = {"minibatch_kernels": model.minibatch_kernels, "minibatch_dims": model.minibatch_dims}
    norm = {"normalization": own, "references": model.references, "mbstd_group": shape.mbstd_group}
    return {**form_kwargs(model, shape), "label": model.label, **norm, **minibatch}
