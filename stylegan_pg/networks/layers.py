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

from stylegan_pg.ops import (
    ACTIVATIONS,
    bias_act,
    conv3x3,
    conv3x3_is_faster,
    converted,
    downsample2d,
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
    """Per-pixel noise N(0, 1) for x [N, C, H, W]: for "const" the given [H, W] as [1, 1, H, W], for "random" new
    numbers [N, 1, H, W] from `generator`, for "none" None."""
    if noise == "random":
        return torch.randn([len(x), 1, *x.shape[2:]], device=x.device, generator=generator).to(const.dtype)
    return None if noise == "none" else const[None, None]


def convolve(x: torch.Tensor, weight: torch.Tensor, *, transposed: bool = False, stride: int = 1) -> torch.Tensor:
    """Correlate x with the weight [O, I, k, k], at stride 1 without changing the size; or the transposed convolution.

    The result has x's dtype, whatever the weight's is. A CPU without instructions for bfloat16 computes it from float32
    numbers, by conv3x3 if that is faster, and rounds the result.
    """
    how: dict[str, Any] = {"transposed": transposed, "stride": stride}
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or MULTIPLIES_BF16:
        return _convolve(x, weight.to(x.dtype), **how)
    if conv3x3_is_faster(x, weight, **how):
        return conv3x3(x, weight, **how)
    return converted(_convolve(converted(x, torch.float32), weight.float(), **how), x.dtype)


def _convolve(x: torch.Tensor, weight: torch.Tensor, transposed: bool, stride: int) -> torch.Tensor:
    padding = weight.shape[-1] // 2 if stride == 1 else 0
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.weight_gain
        bias = self.bias * self.bias_gain if self.bias_gain != 1 else self.bias
        if self.act == "linear":
            return torch.addmm(bias.to(x.dtype), x, weight.t())
        return bias_act(x @ weight.t(), bias, act=self.act, gain=self.act_gain)


def given(c: torch.Tensor | None, c_dim: int) -> torch.Tensor:
    """Check that a conditional network was given its condition, and return it.

    Raises:
        ValueError: c is None.
    """
    if c is None:
        raise ValueError(f"this network is conditional: give c of shape [N, {c_dim}]")
    return c


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
        x = torch.cat(parts, dim=1)
        for i in range(self.layers):
            x = getattr(self, f"fc{i}")(x)
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

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        weight = self.weight * self.weight_gain
        x = resampling_conv2d(x, weight, self.filter, up=self.up, down=self.down)
        clamp = None if self.clamp is None else self.clamp * gain
        return bias_act(x, self.bias, act=self.act, gain=self.act_gain * gain, clamp=clamp)


class ModulatedConv2d(nn.Module):
    """The convolution of StyleGAN2: each sample's input channels are scaled by its style s, and the result by
    d = rsqrt(sum (w s)^2 + 1e-8) (Karras et al. 2020, equations 1 to 3).

    Scaling activations instead of weights needs no per-sample weight: sum (w s)^2 is a matrix product of s^2 with
    the weights' squared norms.
    """

    filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel: int,
        *,
        up: int = 1,
        demodulate: bool = True,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1)
        self.register_buffer("filter", low_pass(resample_filter), persistent=False)
        self.up, self.demodulate = up, demodulate
        self.style_gain = 1.0 if demodulate else 1 / math.sqrt(in_channels * kernel**2)

    def modulated(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution of the scaled input, [N, out, H', W'], and the factors d [N, out] that are still to be
        applied."""
        s = self.affine(w.to(self.affine.weight.dtype)) * self.style_gain
        weight = self.weight
        if x.dtype == torch.float16 and self.demodulate:
            # The demodulation cancels both scales; without them the sums overflow in half precision.
            per_output = weight.norm(float("inf"), dim=[1, 2, 3], keepdim=True) * math.sqrt(weight[0].numel())
            weight = weight / per_output
            s = s / s.norm(float("inf"), dim=1, keepdim=True)
        d = None
        if self.demodulate:
            d = (s.square() @ weight.square().sum([2, 3]).t() + 1e-8).rsqrt()
        x = bias_act(x, scale=s)
        return resampling_conv2d(x, weight, self.filter, up=self.up), d


class SynthesisLayer(ModulatedConv2d):
    """Modulated convolution, noise, bias, leaky ReLU, gain and clamp, in this order."""

    noise_const: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        size: tuple[int, int],
        *,
        up: int = 1,
        use_noise: bool = True,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        clamp: float | None = None,
    ):
        super().__init__(in_channels, out_channels, w_dim, 3, up=up, resample_filter=resample_filter)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.use_noise, self.clamp = use_noise, clamp
        if use_noise:
            # Of shape [1] and not []: DeepSpeed cannot flatten parameters without dimensions.
            self.noise_strength = nn.Parameter(torch.zeros(1))
            self.register_buffer("noise_const", torch.randn(size))

    def forward(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        *,
        noise: str = "const",
        generator: torch.Generator | None = None,
        gain: float = 1.0,
    ) -> torch.Tensor:
        x, d = self.modulated(x, w)
        n = noise_image(noise, self.noise_const, x, generator) if self.use_noise else None
        n = None if n is None else n * self.noise_strength
        clamp = None if self.clamp is None else self.clamp * gain
        return bias_act(x, self.bias, scale=d, noise=n, act="lrelu", gain=math.sqrt(2) * gain, clamp=clamp)


class ToRGB(ModulatedConv2d):
    """1x1 modulated convolution to image channels, without demodulation."""

    def __init__(self, in_channels: int, img_channels: int, w_dim: int, *, clamp: float | None = None):
        super().__init__(in_channels, img_channels, w_dim, 1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.clamp = clamp

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return bias_act(self.modulated(x, w)[0], self.bias, clamp=self.clamp)


def minibatch_stddev(x: torch.Tensor, group: int, channels: int = 1) -> torch.Tensor:
    """Append the standard deviation over each group, averaged into `channels` maps (Karras et al. 2018, section 3).

    [N, C, H, W] -> [N, C + channels, H, W]. Samples i, i + N/group, i + 2N/group, ... form a group; `group` divides N.
    """
    n, c, h, w = x.shape
    if n % group:
        raise ValueError(f"minibatch stddev: a batch of {n} does not divide into groups of {group}")
    y = x.reshape(group, n // group, channels, c // channels, h, w)
    y = y - y.mean(dim=0)
    y = (y.square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])
    y = y.reshape(-1, channels, 1, 1).repeat(group, 1, h, w)
    return torch.cat([x, y], dim=1)
