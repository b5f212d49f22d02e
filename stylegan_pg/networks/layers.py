"""Layers with equalised learning rate, shared by the networks (Karras et al. 2018, section 4.1; 2020, section 2).

Weights are stored at unit variance and scaled when they are used, so Adam changes all layers at the same relative rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from stylegan_pg.networks.equalized import scaled_parameters, stacked
from stylegan_pg.ops import (
    ACTIVATIONS,
    bias_act,
    conv3x3,
    conv3x3_is_faster,
    converted,
    downsample2d,
    grouped_conv,
    setup_filter,
    upfirdn2d,
    upsample2d,
)
from stylegan_pg.ops.recipes import has_bf16_instructions

MULTIPLIES_BF16 = has_bf16_instructions()  # this CPU


def normalize_2nd_moment(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Scale x [N, C, ...] to a mean square of one over its channels (pixel norm; Karras et al. 2018, section 4.2)."""
    exact = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x * (exact.square().mean(dim=1, keepdim=True) + eps).rsqrt().to(x.dtype)


def low_pass(taps: Sequence[float]) -> torch.Tensor:
    """The 2-D filter of `taps`, for a buffer that is not saved. It is created on the CPU even if the network is built
    on the meta device (to receive a snapshot's weights), because its values could not be restored there."""
    with torch.device("cpu"):
        return setup_filter(taps)


def noise_image(
    noise: str, const: torch.Tensor, x: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor | None:
    """Per-pixel noise N(0, 1) for x [N, C, H, W]: for "const" the given [H, W] as [1, 1, H, W], or the given [N, 1, H,
    W], for "random" new numbers [N, 1, H, W] from `generator`, for "none" None."""
    if noise == "random":
        return torch.randn([len(x), 1, *x.shape[2:]], device=x.device, generator=generator).to(const.dtype)
    return None if noise == "none" else const[None, None] if const.ndim == 2 else const


def convolve_groups(x: torch.Tensor, weight: torch.Tensor, groups: int, padding: int) -> torch.Tensor:
    """Correlate x [N, I, H, W] with the weight [O, I / groups, kh, kw], each group of channels by itself. The result
    has x's dtype, as that of `convolve`."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or MULTIPLIES_BF16:
        return grouped_conv(x, weight.to(x.dtype), groups=groups, padding=padding)
    return converted(grouped_conv(converted(x, torch.float32), weight.float(), groups=groups, padding=padding), x.dtype)


def convolve(
    x: torch.Tensor, weight: torch.Tensor, *, transposed: bool = False, stride: int = 1, full: bool = False
) -> torch.Tensor:
    """Correlate x with the weight [O, I, k, k], at stride 1 without changing the size, or with `full` increasing it by
    k - 1; or the transposed convolution.

    The result has x's dtype, whatever the weight's is. A CPU without instructions for bfloat16 computes it from float32
    numbers, by conv3x3 if that is faster, and rounds the result.
    """
    how: dict[str, Any] = {"transposed": transposed, "stride": stride}
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or MULTIPLIES_BF16:
        return _convolve(x, weight.to(x.dtype), full=full, **how)
    if conv3x3_is_faster(x, weight, **how):
        return conv3x3(F.pad(x, [weight.shape[-1] // 2] * 4) if full else x, weight, **how)
    return converted(_convolve(converted(x, torch.float32), weight.float(), full=full, **how), x.dtype)


def _convolve(x: torch.Tensor, weight: torch.Tensor, transposed: bool, stride: int, full: bool) -> torch.Tensor:
    padding = weight.shape[-1] - 1 if full else weight.shape[-1] // 2 if stride == 1 else 0
    if transposed:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=stride, padding=padding)
    return F.conv2d(x, weight, stride=stride, padding=padding)


def resampling_conv2d(
    x: torch.Tensor, weight: torch.Tensor, f: torch.Tensor | None, *, up: int = 1, down: int = 1
) -> torch.Tensor:
    """Convolve with a weight [O, I, k, k] and keep the size, double it (up=2) or halve it (down=2), with FIR filter f.

    The result has x's dtype, whatever the weight's is. Up-sampling uses true convolution (a flipped kernel), the others
    use correlation, as the published weights expect.
    """
    k = weight.shape[-1]
    if up == 1 and down == 1:
        return convolve(x, weight)
    assert f is not None
    taps = f.shape[-1]
    if up == 2:
        if k == 1:  # cheaper before the up-sampling
            return upsample2d(convolve(x, weight), f)
        x = convolve(x, weight, transposed=True, stride=2)
        # The remaining padding for the filter: the transposed convolution has added k - 1 and removed one.
        before, after = (taps + 1) // 2 + k // 2 - (k - 1), (taps - 2) // 2 + k // 2 - (k - 2)
        return upfirdn2d(x, f, padding=(before, after, before, after), gain=4.0)
    before, after = (taps - 1) // 2 + k // 2, (taps - 2) // 2 + k // 2
    if k == 1:
        return convolve(downsample2d(x, f), weight)
    return convolve(upfirdn2d(x, f, padding=(before, after, before, after)), weight, stride=2)


def gains_of(act: str, he_gain: float | None) -> tuple[float, float]:
    """The gains of a layer's weight and of its activation.

    By default the weight has gain 1, and the activation has its own gain, sqrt(2) for leaky ReLU. With `he_gain` the
    weight has that gain, as in He's constant, and the activation has gain 1. The two differ in the effect of the bias
    only (Karras et al. 2018, section 4.1).
    """
    return (1.0, ACTIVATIONS[act][1]) if he_gain is None else (he_gain, 1.0)


class FullyConnected(nn.Module):
    """x W^T * lr_multiplier / sqrt(in) + b * lr_multiplier, then the activation with its gain. [N, in] -> [N, out].

    For `he_gain` see gains_of.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        act: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
        he_gain: float | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init)))
        self.act = act
        weight_gain, self.act_gain = gains_of(act, he_gain)
        self.weight_gain = weight_gain * lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def factors(self) -> list[tuple[torch.Tensor, float]]:
        return [(self.weight, self.weight_gain), (self.bias, self.bias_gain)]

    def forward(self, x: torch.Tensor, ready: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """`ready`: weight and bias, see equalized.scaled_parameters."""
        weight, bias = ready or scaled_parameters(self)[0]
        weight = weight.to(x.dtype)
        if self.act == "linear":
            return torch.addmm(bias.to(x.dtype), x, weight.t())
        return bias_act(x @ weight.t(), bias, act=self.act, gain=self.act_gain)


def affine_outputs(layers: Sequence[FullyConnected], ws: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """What L linear layers make of their ws, in one matrix product: [L, N, out], the largest number of outputs. Zeros
    follow the outputs of smaller layers.

    Args:
        ws: [N, num_ws, in]. places: which of them each layer takes.
    """
    (weight, a), (bias, b) = (zip(*each, strict=True) for each in zip(*(one.factors() for one in layers), strict=True))
    weight, bias = stacked(weight, a), stacked(bias, b)
    w = ws.to(weight.dtype).unbind(dim=1)
    return torch.baddbmm(bias[:, None], torch.stack([w[i] for i in places]), weight.transpose(1, 2))


def given(c: torch.Tensor | None, c_dim: int) -> torch.Tensor:
    """Check that a conditional network was given its condition, and return it.

    Raises:
        ValueError: c is None.
    """
    if c is None:
        raise ValueError(f"this network is conditional: give c of shape [N, {c_dim}]")
    return c


def planes(c: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Conditions c [N, c_dim] as constant planes [N, c_dim, H, W] of the size of images [N, C, H, W], to be
    concatenated with them."""
    return c.to(images.dtype)[:, :, None, None].expand(-1, -1, *images.shape[2:])


class MappingNetwork(nn.Module):
    """z [N, z_dim] and c [N, c_dim] -> w [N, w_dim], both inputs normalised (Karras et al. 2019, section 2).

    A generator's mapping has a running mean of w, `w_avg`, which the trainer updates from the global batch. For
    `he_gain` see gains_of.
    """

    w_avg: torch.Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        layers: int,
        *,
        lr_multiplier: float = 0.01,
        w_avg: bool = True,
        he_gain: float | None = None,
    ):
        super().__init__()
        self.c_dim, self.layers = c_dim, layers
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        width = z_dim + (w_dim if c_dim else 0)
        for i in range(layers):
            layer: dict[str, Any] = {"act": "lrelu", "lr_multiplier": lr_multiplier, "he_gain": he_gain}
            fc = FullyConnected(width if i == 0 else w_dim, w_dim, **layer)
            setattr(self, f"fc{i}", fc)
        if w_avg:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: torch.Tensor | None, c: torch.Tensor | None = None) -> torch.Tensor:
        parts = [] if z is None else [normalize_2nd_moment(z)]
        if self.c_dim:
            parts.append(normalize_2nd_moment(self.embed(given(c, self.c_dim))))
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        layers = [getattr(self, f"fc{i}") for i in range(self.layers)]
        for layer, ready in zip(layers, scaled_parameters(*layers), strict=True):
            x = layer(x, ready)
        return x


class Conv2d(nn.Module):
    """Convolution with bias, activation, gain and clamp, which may change the resolution. [N, in, H, W] -> [N, out,
    ...].

    For `he_gain` see gains_of.
    """

    filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        bias: bool = True,
        act: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        clamp: float | None = None,
        he_gain: float | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("filter", low_pass(resample_filter), persistent=False)
        self.up, self.down, self.act, self.clamp = up, down, act, clamp
        weight_gain, self.act_gain = gains_of(act, he_gain)
        self.weight_gain = weight_gain / math.sqrt(in_channels * kernel**2)

    def factors(self) -> list[tuple[torch.Tensor, float]]:
        return [(self.weight, self.weight_gain)]

    def forward(self, x: torch.Tensor, gain: float = 1.0, ready: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """`gain`: of the result. `ready`: the weight, see equalized.scaled_parameters."""
        (weight,) = ready or scaled_parameters(self)[0]
        x = resampling_conv2d(x, weight, self.filter, up=self.up, down=self.down)
        clamp = None if self.clamp is None else self.clamp * gain
        return bias_act(x, self.bias, act=self.act, gain=self.act_gain * gain, clamp=clamp)


def minibatch_stddev(x: torch.Tensor, group: int, channels: int = 1, batches: int = 1) -> torch.Tensor:
    """Append the standard deviation over each group, averaged into `channels` maps (Karras et al. 2018, section 3).

    [N, C, H, W] -> [N, C + channels, H, W]. Samples i, i + N/group, i + 2N/group, ... form a group; `group` divides N.
    x may consist of several `batches` of N, one after another, whose samples do not meet in a group.
    """
    n, (c, h, w) = len(x) // batches, x.shape[1:]
    if n % group:
        raise ValueError(f"minibatch stddev: a batch of {n} does not divide into groups of {group}")
    y = x.reshape(batches, group, n // group, channels, c // channels, h, w)
    y = (y.var(dim=1, correction=0) + 1e-8).sqrt().mean(dim=[3, 4, 5])
    y = y.reshape(batches, 1, -1, channels, 1, 1).expand(-1, group, -1, -1, h, w).reshape(-1, channels, h, w)
    return torch.cat([x, y], dim=1)
