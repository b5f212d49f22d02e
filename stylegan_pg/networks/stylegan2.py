"""StyleGAN2's generator and discriminator (Karras et al. 2020), in the public checkpoints' layout, able to grow.

Each instance has exactly the resolution of its phase. With `fade=True` the previous resolution's way to and from RGB
is kept as well, and `alpha` in [0, 1] blends it with the newest block (Karras et al. 2018, figure 2). Growing means
building the next size and copying what has the same name: nothing is masked, nothing is unused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.networks.layers import (
    Conv2d,
    FullyConnected,
    SynthesisLayer,
    ToRGB,
    minibatch_stddev,
    normalize_2nd_moment,
)
from stylegan_pg.ops import downsample2d, setup_filter, upsample2d

ARCHITECTURES = ("skip", "resnet", "orig")
LOW_PRECISION = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Channels of the layers of a resolution (Karras et al. 2020, table 2 of the supplement)."""
    return min(channel_base // resolution, channel_max)


def _block_dtype(resolution: int, low_precision: str, low_precision_at: Sequence[int]) -> torch.dtype | None:
    return LOW_PRECISION[low_precision] if resolution in low_precision_at else None


class MappingNetwork(nn.Module):
    """z [N, z_dim] and c [N, c_dim] -> w [N, w_dim], both inputs normalised (Karras et al. 2019, section 2).

    The generator's has a running mean of w, `w_avg`, which the trainer updates from the global batch.
    """

    w_avg: torch.Tensor

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, layers: int, *, lr_multiplier: float = 0.01, w_avg: bool = True
    ):
        super().__init__()
        self.c_dim, self.layers = c_dim, layers
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        width = z_dim + (w_dim if c_dim else 0)
        for i in range(layers):
            fc = FullyConnected(width if i == 0 else w_dim, w_dim, act="lrelu", lr_multiplier=lr_multiplier)
            setattr(self, f"fc{i}", fc)
        if w_avg:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: torch.Tensor | None, c: torch.Tensor | None = None) -> torch.Tensor:
        parts = [] if z is None else [normalize_2nd_moment(z)]
        if self.c_dim:
            if c is None:
                raise ValueError(f"this network is conditional: give c of shape [N, {self.c_dim}]")
            parts.append(normalize_2nd_moment(self.embed(c)))
        x = torch.cat(parts, dim=1)
        for i in range(self.layers):
            x = getattr(self, f"fc{i}")(x)
        return x


class SynthesisBlock(nn.Module):
    memory_format = torch.contiguous_format  # of the 4x4 input, which all that follows keeps

    def __init__(self, resolution, in_channels, out_channels, w_dim, img_channels, architecture, torgb, dtype, **layer):
        super().__init__()
        self.resolution, self.architecture, self.dtype = resolution, architecture, dtype
        filter_, clamp = layer["resample_filter"], layer["clamp"]
        if resolution == 4:
            # Not named `const`: that is a reserved word where AOTInductor generates C++.
            self.learned_input = nn.Parameter(torch.randn(out_channels, 4, 4))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, up=2, **layer)
            if architecture == "resnet":
                self.skip = Conv2d(in_channels, out_channels, 1, bias=False, up=2, resample_filter=filter_)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, **layer)
        if torgb:
            self.torgb = ToRGB(out_channels, img_channels, w_dim, clamp=clamp)

    def forward(self, x: torch.Tensor | None, ws: Sequence[torch.Tensor], **noise) -> torch.Tensor:
        """x [N, in, R/2, R/2] (None at 4x4) and this block's styles, each [N, w_dim] -> [N, out, R, R]."""
        dtype = self.dtype or self.conv1.weight.dtype
        if x is None:
            x = self.learned_input.to(dtype)[None].repeat(len(ws[0]), 1, 1, 1)
            return self.conv1(x.contiguous(memory_format=self.memory_format), ws[0], **noise)
        x = x.to(dtype)
        if self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            return y + self.conv1(self.conv0(x, ws[0], **noise), ws[1], gain=math.sqrt(0.5), **noise)
        return self.conv1(self.conv0(x, ws[0], **noise), ws[1], **noise)


class SynthesisNetwork(nn.Module):
    """ws [N, num_ws, w_dim] -> image [N, img_channels, R, R], roughly in [-1, 1]."""

    filter: torch.Tensor

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        img_channels: int,
        *,
        channel_base: int,
        channel_max: int,
        architecture: str,
        fade: bool,
        use_noise: bool,
        resample_filter: Sequence[float],
        conv_clamp: float | None,
        low_precision: str,
        low_precision_at: Sequence[int],
    ):
        super().__init__()
        self.resolution, self.fade, self.architecture = resolution, fade, architecture
        self.resolutions = [2**i for i in range(2, resolution.bit_length())]
        self.num_ws = 2 * len(self.resolutions)
        self.register_buffer("filter", setup_filter(resample_filter), persistent=False)
        for r in self.resolutions:
            block = SynthesisBlock(
                r,
                channels_at(r // 2, channel_base, channel_max),
                channels_at(r, channel_base, channel_max),
                w_dim,
                img_channels,
                architecture,
                torgb=architecture == "skip" or r == resolution or (fade and r == resolution // 2),
                dtype=_block_dtype(r, low_precision, low_precision_at),
                use_noise=use_noise,
                resample_filter=tuple(resample_filter),
                clamp=conv_clamp,
            )
            setattr(self, f"b{r}", block)

    def forward(
        self,
        ws: torch.Tensor,
        *,
        alpha: float = 1.0,
        noise: str = "const",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """`alpha` counts only in a fading network; noise is const, random (from `generator`) or none."""
        w = ws.unbind(dim=1)
        x = img = None
        for i, r in enumerate(self.resolutions):
            block: SynthesisBlock = getattr(self, f"b{r}")
            x = block(x, [w[0]] if i == 0 else w[2 * i - 1 : 2 * i + 1], noise=noise, generator=generator)
            if not hasattr(block, "torgb"):
                continue
            rgb = block.torgb(x, w[2 * i + 1]).to(ws.dtype)
            if img is None:
                img = rgb
            else:
                weight = alpha if self.fade and r == self.resolution else 1.0
                # With skips every resolution adds to the picture; otherwise the newest one replaces it.
                keep = 1.0 if self.architecture == "skip" else 1.0 - weight
                img = keep * upsample2d(img, self.filter) + weight * rgb
        assert img is not None
        return img


class Generator(nn.Module):
    """StyleGAN2's generator: z -> w -> image."""

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int = 3,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "skip",
        fade: bool = False,
        use_noise: bool = True,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        conv_clamp: float | None = 256.0,
        low_precision: str = "fp32",
        low_precision_at: Sequence[int] = (),
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.resolution, self.img_channels = resolution, img_channels
        self.img_size = (resolution, resolution)
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, mapping_layers)
        self.synthesis = SynthesisNetwork(
            w_dim,
            resolution,
            img_channels,
            channel_base=channel_base,
            channel_max=channel_max,
            architecture=architecture,
            fade=fade,
            use_noise=use_noise,
            resample_filter=resample_filter,
            conv_clamp=conv_clamp,
            low_precision=low_precision,
            low_precision_at=low_precision_at,
        )
        self.num_ws = self.synthesis.num_ws

    def styles(
        self, z: torch.Tensor, c: torch.Tensor | None = None, *, psi: float = 1.0, cutoff: int | None = None
    ) -> torch.Tensor:
        """z [N, z_dim], c [N, c_dim] -> ws [N, num_ws, w_dim].

        Truncation moves the first `cutoff` layers (None: all) towards the mean: w_avg + psi (w - w_avg)
        (Karras et al. 2019, section 2.2; psi 1 leaves w alone).
        """
        ws = self.mapping(z, c)[:, None].repeat(1, self.num_ws, 1)
        if psi != 1:
            cutoff = self.num_ws if cutoff is None else cutoff
            low = torch.lerp(self.mapping.w_avg.to(ws.dtype), ws[:, :cutoff], psi)
            ws = torch.cat([low, ws[:, cutoff:]], dim=1)
        return ws

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        *,
        psi: float = 1.0,
        cutoff: int | None = None,
        alpha: float = 1.0,
        noise: str = "const",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Images [N, img_channels, R, R] in about [-1, 1] for latents z [N, z_dim]; see `styles`, SynthesisNetwork."""
        ws = self.styles(z, c, psi=psi, cutoff=cutoff)
        return self.synthesis(ws, alpha=alpha, noise=noise, generator=generator)


class DiscriminatorBlock(nn.Module):
    def __init__(
        self, resolution, in_channels, out_channels, img_channels, architecture, fromrgb, dtype, filter_, clamp
    ):
        super().__init__()
        self.architecture, self.dtype = architecture, dtype
        layer = {"act": "lrelu", "clamp": clamp, "resample_filter": filter_}
        if fromrgb:
            self.fromrgb = Conv2d(img_channels, in_channels, 1, **layer)
        self.conv0 = Conv2d(in_channels, in_channels, 3, **layer)
        self.conv1 = Conv2d(in_channels, out_channels, 3, down=2, **layer)
        if architecture == "resnet":
            self.skip = Conv2d(in_channels, out_channels, 1, bias=False, down=2, resample_filter=filter_)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in, R, R] -> [N, out, R/2, R/2]."""
        x = x.to(self.dtype or self.conv0.weight.dtype)
        if self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5))
        return self.conv1(self.conv0(x))


class DiscriminatorEpilogue(nn.Module):
    """The 4x4 end: minibatch stddev, a convolution and two dense layers. [N, C, 4, 4] -> [N, out]."""

    def __init__(self, channels, out, img_channels, fromrgb, mbstd_group, mbstd_channels, filter_, clamp):
        super().__init__()
        self.mbstd_group, self.mbstd_channels = mbstd_group, mbstd_channels
        if fromrgb:
            self.fromrgb = Conv2d(img_channels, channels, 1, act="lrelu", resample_filter=filter_)
        self.conv = Conv2d(channels + mbstd_channels, channels, 3, act="lrelu", clamp=clamp, resample_filter=filter_)
        self.fc = FullyConnected(channels * 16, channels, act="lrelu")
        self.out = FullyConnected(channels, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.fc.weight.dtype)
        if self.mbstd_channels:
            x = minibatch_stddev(x, min(self.mbstd_group, len(x)), self.mbstd_channels)
        return self.out(self.fc(self.conv(x).flatten(1)))


class Discriminator(nn.Module):
    """image [N, img_channels, R, R] (and c [N, c_dim]) -> logits [N, 1]; conditional by projection.

    `mbstd_group` must divide every batch it is given (smaller batches form one group).
    """

    filter: torch.Tensor

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int = 3,
        c_dim: int = 0,
        mapping_layers: int = 8,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: str = "resnet",
        fade: bool = False,
        mbstd_group: int = 4,
        mbstd_channels: int = 1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        conv_clamp: float | None = 256.0,
        low_precision: str = "fp32",
        low_precision_at: Sequence[int] = (),
    ):
        super().__init__()
        self.resolution, self.img_channels, self.c_dim = resolution, img_channels, c_dim
        self.fade, self.architecture = fade, architecture
        self.resolutions = [2**i for i in range(resolution.bit_length() - 1, 1, -1)]
        self.register_buffer("filter", setup_filter(resample_filter), persistent=False)
        filter_ = tuple(resample_filter)

        def has_fromrgb(r: int) -> bool:
            return architecture == "skip" or r == resolution or (fade and r == resolution // 2)

        for r in self.resolutions[:-1]:
            block = DiscriminatorBlock(
                r,
                channels_at(r, channel_base, channel_max),
                channels_at(r // 2, channel_base, channel_max),
                img_channels,
                architecture,
                has_fromrgb(r),
                _block_dtype(r, low_precision, low_precision_at),
                filter_,
                conv_clamp,
            )
            setattr(self, f"b{r}", block)
        width = channels_at(4, channel_base, channel_max)
        self.cmap_dim = width if c_dim else 0
        self.b4 = DiscriminatorEpilogue(
            width, self.cmap_dim or 1, img_channels, has_fromrgb(4), mbstd_group, mbstd_channels, filter_, conv_clamp
        )
        if c_dim:
            self.mapping = MappingNetwork(0, c_dim, self.cmap_dim, mapping_layers, w_avg=False)

    def forward(self, img: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float = 1.0) -> torch.Tensor:
        """`alpha` counts only in a fading network: 0 sees the down-sampled image alone."""
        x: Any = None
        for r in self.resolutions:
            block = getattr(self, f"b{r}")
            if hasattr(block, "fromrgb"):
                while img.shape[-1] > r:
                    img = downsample2d(img, self.filter)
                dtype = getattr(block, "dtype", None) or block.fromrgb.weight.dtype
                y = block.fromrgb(img.to(dtype))
                if x is None:
                    x = y
                else:
                    weight = alpha if self.fade and r == self.resolution // 2 else 1.0
                    keep = 1.0 if self.architecture == "skip" else 1.0 - weight
                    x = weight * x.to(dtype) + keep * y
            x = block(x)
        if self.c_dim:
            x = (x * self.mapping(None, c)).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x
