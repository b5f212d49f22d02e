"""The common part of the growing networks: generator, discriminator, and the fades between resolutions.

Each instance has exactly the resolution of its phase. With `fade=True` the layers to and from RGB of the previous
resolution exist as well, and `alpha` in [0, 1] blends them with the newest block (Karras et al. 2018, figure 2).
Growing means building the next size and copying the tensors of the same names; no parameter is masked or unused.

The pairs differ in their blocks, which they build themselves; module `b{r}` is that of resolution r. R3GAN shares the
fades and the discriminator's way through the blocks only (networks/r3gan.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.networks.equalized import scaled_parameters
from stylegan_pg.networks.form import Form
from stylegan_pg.networks.layers import (
    Conv2d,
    FullyConnected,
    MappingNetwork,
    given,
    low_pass,
    minibatch_stddev,
    planes,
)
from stylegan_pg.ops import downsample2d, upsample2d


class SynthesisNetwork(nn.Module):
    """ws [N, num_ws, w_dim] -> image [N, img_channels, H, W], roughly in [-1, 1].

    A block takes x [N, in, H/2, W/2] (None at the lowest resolution), what `block_styles` gives it, and `noise` and
    `generator`. If it has a layer `torgb`, that converts its result to a picture. With `skips` the picture
    is the sum over all resolutions, otherwise that of the highest one. `image_filter` up-samples pictures.
    """

    filter: torch.Tensor

    def __init__(
        self,
        form: Form,
        blocks: Mapping[int, nn.Module],
        num_ws: int,
        image_filter: Sequence[float],
        skips: bool = False,
    ):
        super().__init__()
        self.resolution, self.resolutions, self.fade = form.resolution, form.resolutions, form.fade
        self.num_ws, self.skips = num_ws, skips
        self.register_buffer("filter", low_pass(image_filter), persistent=False)
        for r, block in blocks.items():
            setattr(self, f"b{r}", block)

    @staticmethod
    def block_styles(blocks: Sequence[Any], ws: torch.Tensor) -> Sequence[Sequence[Any]]:
        """What the layers of each of these blocks, the first and those after it, take of ws [N, num_ws, w_dim]."""
        return [ws.unbind(dim=1)] * len(blocks)

    def rgb(self, block: Any, x: torch.Tensor, styles: Sequence[Any]) -> torch.Tensor:
        """Convert the result x of a block to a picture."""
        return block.torgb(x)

    def forward(
        self,
        ws: torch.Tensor,
        *,
        alpha: float | torch.Tensor = 1.0,
        noise: str = "const",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """`alpha` is used in a fading network only; noise is const, random (from `generator`) or none."""
        x = img = None
        blocks = [getattr(self, f"b{r}") for r in self.resolutions]
        for r, block, styles in zip(self.resolutions, blocks, self.block_styles(blocks, ws), strict=True):
            x = block(x, styles, noise=noise, generator=generator)
            if not hasattr(block, "torgb"):
                continue
            rgb = self.rgb(block, x, styles).to(ws.dtype)
            if img is None:
                img = rgb
            else:
                below = upsample2d(img, self.filter)
                img = blended(rgb, below, alpha, self.skips) if self.fade and r == self.resolution else below + rgb
        assert img is not None
        return img


def blended(new: torch.Tensor, old: torch.Tensor, alpha: float | torch.Tensor, skips: bool) -> torch.Tensor:
    """A fade from the picture or features `old` to `new`; with `skips`, `new` is added to it. Both have the same dtype.
    Where alpha is a tensor of shape [], it is not rounded to their dtype if that is less precise."""
    dtype = new.dtype
    if isinstance(alpha, torch.Tensor):
        wide = torch.promote_types(dtype, alpha.dtype)
        new, old, alpha = new.to(wide), old.to(wide), alpha.to(wide)
    return (old + alpha * new if skips else torch.lerp(old, new, alpha)).to(dtype)


class Generator(nn.Module):
    """z -> w -> image, from a mapping z [N, z_dim], c [N, c_dim] -> w [N, w_dim] and a synthesis network."""

    truncation_cutoff: int | None = None  # default number of ws that truncation changes; None: all

    def __init__(self, form: Form, z_dim: int, w_dim: int, mapping: nn.Module, synthesis: nn.Module):
        super().__init__()
        self.form, self.z_dim, self.c_dim, self.w_dim = form, z_dim, form.c_dim, w_dim
        self.resolution, self.img_channels = form.resolution, form.img_channels
        self.img_size = form.size(form.resolution)
        self.mapping: Any = mapping
        self.synthesis: Any = synthesis
        self.num_ws: int = self.synthesis.num_ws

    def styles(
        self, z: torch.Tensor, c: torch.Tensor | None = None, *, psi: float = 1.0, cutoff: int | None = None
    ) -> torch.Tensor:
        """z [N, z_dim], c [N, c_dim] -> ws [N, num_ws, w_dim].

        Truncation moves the w of the first `cutoff` layers (None: the network's `truncation_cutoff`) towards the mean,
        w_avg + psi (w - w_avg) (Karras et al. 2019, section 2.2); psi = 1 does not change w.
        """
        ws = self.mapping(z, c)[:, None].repeat(1, self.num_ws, 1)
        if psi != 1:
            cutoff = self.truncation_cutoff if cutoff is None else cutoff
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
        alpha: float | torch.Tensor = 1.0,
        noise: str = "const",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Images [N, img_channels, H, W] in about [-1, 1] for latents z [N, z_dim]; see `styles`, SynthesisNetwork."""
        ws = self.styles(z, c, psi=psi, cutoff=cutoff)
        return self.synthesis(ws, alpha=alpha, noise=noise, generator=generator)


class DiscriminatorBlock(nn.Module):
    """Two convolutions, the second of which halves the size; `layer` holds arguments of both (see Conv2d)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_channels: int,
        *,
        fromrgb: bool,
        dtype: torch.dtype | None,
        layer: Mapping[str, Any],
        down: int = 2,
    ):
        super().__init__()
        self.dtype = dtype
        if fromrgb:
            self.fromrgb = Conv2d(img_channels, in_channels, 1, **layer)
        self.conv0 = Conv2d(in_channels, in_channels, 3, **layer)
        self.conv1 = Conv2d(in_channels, out_channels, 3, down=down, **layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in, H, W] -> [N, out, H/2, W/2]."""
        first, second = scaled_parameters(self.conv0, self.conv1)
        return self.conv1(self.conv0(x.to(self.dtype or self.conv0.weight.dtype), ready=first), ready=second)


class DiscriminatorEpilogue(nn.Module):
    """The last block: minibatch stddev, a convolution and two dense layers. [N, C, *size] -> [N, out]."""

    def __init__(
        self,
        channels: int,
        out: int,
        img_channels: int,
        size: tuple[int, int],
        *,
        fromrgb: bool,
        mbstd_group: int,
        mbstd_channels: int,
        layer: Mapping[str, Any],
    ):
        super().__init__()
        self.mbstd_group, self.mbstd_channels = mbstd_group, mbstd_channels
        if fromrgb:
            self.fromrgb = Conv2d(img_channels, channels, 1, **{**layer, "clamp": None})
        self.conv = Conv2d(channels + mbstd_channels, channels, 3, **layer)
        dense = {"act": layer["act"], "he_gain": layer.get("he_gain")}
        self.fc = FullyConnected(channels * size[0] * size[1], channels, **dense)
        self.out = FullyConnected(channels, out)

    def forward(self, x: torch.Tensor, batches: int = 1) -> torch.Tensor:
        x = x.to(self.fc.weight.dtype)
        if self.mbstd_channels:
            x = minibatch_stddev(x, min(self.mbstd_group, len(x) // batches), self.mbstd_channels, batches)
        conv, fc, out = scaled_parameters(self.conv, self.fc, self.out)
        return self.out(self.fc(self.conv(x, ready=conv).flatten(1), fc), out)


class ImageReader(nn.Module):
    """What growing discriminators have in common: images go through the blocks from the highest resolution down.

    A block halves the size of its input, except for the last one, which takes x and `batches` (see Discriminator). The
    first one, and those that receive the picture in a fade or with `skips`, have a layer `fromrgb`. `image_filter`
    down-samples pictures. With `planes`, `fromrgb` also takes the condition, as `planes` constant channels.
    """

    filter: torch.Tensor

    def __init__(
        self,
        form: Form,
        blocks: Mapping[int, nn.Module],
        image_filter: Sequence[float],
        skips: bool = False,
        planes: int = 0,
    ):
        super().__init__()
        self.resolution, self.img_channels, self.c_dim = form.resolution, form.img_channels, form.c_dim
        self.planes = planes
        self.img_size, self.fade, self.skips = form.size(form.resolution), form.fade, skips
        self.resolutions, self.columns = form.resolutions[::-1], {r: form.size(r)[1] for r in form.resolutions}
        self.register_buffer("filter", low_pass(image_filter), persistent=False)
        for r, block in blocks.items():
            setattr(self, f"b{r}", block)

    def read(
        self, img: torch.Tensor, alpha: float | torch.Tensor, batches: int, c: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The result of the last block for images [N, img_channels, H, W] and, where there are planes, c [N, c_dim]."""
        x: Any = None
        for r in self.resolutions:
            block = getattr(self, f"b{r}")
            if hasattr(block, "fromrgb"):
                while img.shape[-1] > self.columns[r]:
                    img = downsample2d(img, self.filter)
                dtype = getattr(block, "dtype", None) or block.fromrgb.weight.dtype
                seen = torch.cat([img, planes(given(c, self.c_dim), img)], dim=1) if self.planes else img
                y = block.fromrgb(seen.to(dtype))
                if x is None:
                    x = y
                elif self.fade and r == self.resolution // 2:
                    x = blended(x.to(dtype), y, alpha, self.skips)
                else:
                    x = x.to(dtype) + y
            x = block(x) if r > 4 else block(x, batches)
        return x


class Discriminator(ImageReader):
    """image [N, img_channels, H, W] (and c [N, c_dim]) -> scores [N, 1].

    Conditional networks use projection (Miyato & Koyama 2018) on an embedding of the labels, which consists of
    `mapping_layers` dense layers; or, if `label` is "concatenation", the labels are planes beside the picture's
    channels. `mbstd_group` must divide the batch; a smaller batch forms one group. With `skips` every resolution
    receives the picture. With more `outputs`, there are further numbers behind the score, [N, outputs], for heads.
    """

    b4: DiscriminatorEpilogue

    def __init__(
        self,
        form: Form,
        *,
        block: Callable[..., nn.Module],
        layer: Mapping[str, Any],
        mbstd_group: int,
        mbstd_channels: int,
        image_filter: Sequence[float],
        mapping_layers: int = 0,
        skips: bool = False,
        label: str = "projection",
        outputs: int = 1,
    ):
        blocks, projects = {}, bool(form.c_dim) and label == "projection"
        inputs = form.img_channels + (0 if projects else form.c_dim)
        for r in form.resolutions[:0:-1]:
            channels = form.channels(r), form.channels(r // 2), inputs
            blocks[r] = block(*channels, fromrgb=skips or form.has_rgb(r), dtype=form.dtype(r), layer=layer)
        width = form.channels(4)
        cmap_dim = width if projects else 0
        blocks[4] = DiscriminatorEpilogue(
            width,
            (cmap_dim or 1) + outputs - 1,
            inputs,
            form.size(4),
            fromrgb=skips or form.has_rgb(4),
            mbstd_group=mbstd_group,
            mbstd_channels=mbstd_channels,
            layer=layer,
        )
        super().__init__(form, blocks, image_filter, skips, inputs - form.img_channels)
        self.cmap_dim = cmap_dim
        if projects:
            self.mapping = MappingNetwork(0, form.c_dim, cmap_dim, mapping_layers, w_avg=False)

    @property
    def score_layer(self) -> nn.Module:
        return self.b4.out

    def forward(
        self, img: torch.Tensor, c: torch.Tensor | None = None, *, alpha: float | torch.Tensor = 1.0, batches: int = 1
    ) -> torch.Tensor:
        """`alpha` is used in a fading network only; 0 uses the down-sampled image alone. `img` may consist of several
        `batches` of equal size, one after another, which are scored as if each came alone."""
        x = self.read(img, alpha, batches, c)
        if self.cmap_dim:
            compared, further = x[:, : self.cmap_dim], x[:, self.cmap_dim :]
            score = (compared * self.mapping(None, c)).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
            x = torch.cat([score, further], dim=1) if further.shape[1] else score
        return x


def frozen(D: Any, count: int) -> list[tuple[str, nn.Parameter]]:
    """The parameters, with their names, of D's `count` highest resolutions, which are not trained (Mo et al. 2020,
    Freeze-D). The 4x4 block is always trained.
    """
    resolutions = sorted(D.resolutions, reverse=True)[:-1][:count] if count else []
    return [(f"b{r}.{name}", p) for r in resolutions for name, p in getattr(D, f"b{r}").named_parameters()]
