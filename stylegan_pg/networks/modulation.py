"""The modulated convolutions of StyleGAN2 (Karras et al. 2020, section 2), and the styles of many layers at once.

A style scales the input channels of a convolution, and demodulation divides its result by the norm that this gives the
weights: d = rsqrt(sum (w s)^2 + 1e-8). Scaling activations instead of weights needs no per-sample weight: sum (w s)^2
is a matrix product of s^2 with the weights' squared norms.

The styles s of all layers come from one batched matrix product, and their factors d from another (`styles_of`), because
each layer's own takes a GPU less time than its host needs to start it. Smaller layers are padded with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from stylegan_pg.networks.equalized import scaled, stacked, unstacked
from stylegan_pg.networks.layers import FullyConnected, affine_outputs, low_pass, noise_image, resampling_conv2d
from stylegan_pg.ops import bias_act

EPS = 1e-8


class Style(NamedTuple):
    """Of one layer: s [N, in], and the factors d [N, out] of its result, None without demodulation or where the layer
    computes them itself (in half precision)."""

    s: torch.Tensor
    d: torch.Tensor | None


class Modulated(nn.Module):
    """A convolution of x [N, in, H, W] whose input channels a style scales (Karras et al. 2020, eq. 1 to 3).

    A layer is called with its Style, or with the w [N, w_dim] from which that is computed. `fp16` says that x will have
    16 bits with a small range (float16), for which weights and styles are normalised before they are used.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel: int,
        *,
        demodulate: bool = True,
        fp16: bool = False,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.affine = FullyConnected(w_dim, in_channels, bias_init=1)
        self.demodulate, self.fp16 = demodulate, fp16
        self.style_gain = 1.0 if demodulate else 1 / math.sqrt(in_channels * kernel**2)

    def convolved(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The convolution itself, which gives [N, out, H', W']."""
        raise NotImplementedError

    def modulated(self, x: torch.Tensor, style: Style | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The convolution of the scaled input, [N, out, H', W'], and the factors d [N, out] that are still to be
        applied."""
        s, d = style if isinstance(style, Style) else styles_of([self], style[:, None], [0])[0]
        weight = self.weight
        if self.demodulate and x.dtype == torch.float16:
            # The demodulation cancels both scales; without them the sums overflow in half precision.
            per_output = weight.norm(float("inf"), dim=[1, 2, 3], keepdim=True) * math.sqrt(weight[0].numel())
            weight = weight / per_output
            s = s / s.norm(float("inf"), dim=1, keepdim=True)
        if self.demodulate and (d is None or x.dtype == torch.float16):
            d = (s.square() @ weight.square().sum([2, 3]).t() + EPS).rsqrt()
        return self.convolved(bias_act(x, scale=s), weight), d


class ModulatedConv2d(Modulated):
    """The modulated convolution that keeps the size, or doubles it with up=2."""

    filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        kernel: int,
        *,
        up: int = 1,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        **how: bool,
    ):
        super().__init__(in_channels, out_channels, w_dim, kernel, **how)
        self.register_buffer("filter", low_pass(resample_filter), persistent=False)
        self.up = up

    def convolved(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return resampling_conv2d(x, weight, self.filter, up=self.up)


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
        fp16: bool = False,
        resample_filter: Sequence[float] = (1, 3, 3, 1),
        clamp: float | None = None,
    ):
        super().__init__(in_channels, out_channels, w_dim, 3, up=up, fp16=fp16, resample_filter=resample_filter)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.use_noise, self.clamp = use_noise, clamp
        if use_noise:
            # Of shape [1] and not []: DeepSpeed cannot flatten parameters without dimensions.
            self.noise_strength = nn.Parameter(torch.zeros(1))
            self.register_buffer("noise_const", torch.randn(size))

    def forward(
        self,
        x: torch.Tensor,
        style: Style | torch.Tensor,
        *,
        noise: str = "const",
        generator: torch.Generator | None = None,
        gain: float = 1.0,
    ) -> torch.Tensor:
        x, d = self.modulated(x, style)
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

    def forward(self, x: torch.Tensor, style: Style | torch.Tensor) -> torch.Tensor:
        return bias_act(self.modulated(x, style)[0], self.bias, clamp=self.clamp)


# ------------------------------------------------------------------------------------------------ styles of many layers


def styles_of(layers: Sequence[Modulated], ws: torch.Tensor, places: Sequence[int]) -> list[Style]:
    """The styles of layers.

    Args:
        ws: [N, num_ws, w_dim]. places: which of them each layer takes.
    """
    divided = [i for i, layer in enumerate(layers) if layer.demodulate and not layer.fp16]
    order = divided + [i for i in range(len(layers)) if i not in divided]
    s = affine_outputs([layers[i].affine for i in order], ws, [places[i] for i in order])
    factors: Sequence[torch.Tensor | None] = [None] * len(layers)
    if divided:
        weights = [layers[i].weight for i in divided]
        scales = s.split([len(divided), len(order) - len(divided)])[0] if len(divided) < len(order) else s
        norms = squared_norms(weights)
        scales = scales[..., : norms.shape[2]] if norms.shape[2] < scales.shape[2] else scales
        d = (scales.square() @ norms.transpose(1, 2) + EPS).rsqrt()
        factors = [*unstacked(d, [(ws.shape[0], len(weight)) for weight in weights]), *factors[len(divided) :]]
    each = unstacked(s, [(ws.shape[0], layers[i].weight.shape[1]) for i in order])
    each = scaled(each, [layers[i].style_gain for i in order])
    found = {i: Style(one, factor) for i, one, factor in zip(order, each, factors, strict=True)}
    return [found[i] for i in range(len(layers))]


def squared_norms(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The squared norms of the kernels of L weights [out, in, k, k]: [L, out, in], padded with zeros."""
    if torch.compiler.is_compiling():
        return stacked([weight.square().sum([2, 3]) for weight in weights], [1.0] * len(weights))
    return _SquaredNorms.apply(*weights)  # type: ignore[return-value]  # apply is untyped


class _SquaredNorms(torch.autograd.Function):
    """Squared norms, of which autograd keeps no squares."""

    @staticmethod
    def forward(ctx: Any, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*weights)
        size = [max(weight.shape[i] for weight in weights) for i in (0, 1)]
        norms = weights[0].new_zeros([len(weights), *size])
        squares = torch._foreach_mul(weights, weights)  # type: ignore[attr-defined]  # not in stubs
        for square, norm in zip(squares, norms.unbind(), strict=True):
            torch.sum(square, dim=(2, 3), out=norm[: square.shape[0], : square.shape[1]])
        return norms

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        twice = (2 * grad)[..., None, None].unbind()
        shapes = [weight.shape[:2] for weight in ctx.saved_tensors]
        return tuple(w * g[:out, :i] for w, g, (out, i) in zip(ctx.saved_tensors, twice, shapes, strict=True))
