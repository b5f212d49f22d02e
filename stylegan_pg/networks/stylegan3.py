"""StyleGAN3's generator (Karras et al. 2021, "Alias-free generative adversarial networks"), in the layout of public
checkpoints. Its discriminator is StyleGAN2's.

Every layer's result is treated as a sampled continuous signal with a limited band of frequencies (filters.signals), so
that the picture follows its input when that is moved. Config T (3x3 kernels, separable filters) follows translation,
config R (1x1 kernels, radially symmetric filters) rotation, too. The networks do not grow.

Two statistics are those of one pass over the global batch, whatever ranks and micro-batches it is dealt out to:

- The published code divides the styles of a batch by their common root mean square. Demodulation cancels any factor of
  an image's styles, but for its epsilon, so no such division is made here. (The reference tensors of the published
  networks are matched to 1e-6, see tests/test_stylegan3.py.) In half precision each image's styles are normalised by
  themselves.
- `magnitude_ema` of a layer, the running mean square of its input, follows the global batch. A pass uses the value from
  before it, where the published code uses the one that it has just updated; otherwise micro-batches would have
  different gains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.config import StyleGAN3Config
from stylegan_pg.networks import growing, stylegan2
from stylegan_pg.networks.filters import Signal, resampling, signals
from stylegan_pg.networks.form import Form, NetworkShape, form_kwargs
from stylegan_pg.networks.layers import FullyConnected, MappingNetwork, convolve
from stylegan_pg.networks.modulation import Modulated, Style, styles_of
from stylegan_pg.networks.ranges import checked
from stylegan_pg.ops import bias_act, filtered_lrelu

Discriminator = stylegan2.Discriminator
HALF_LIFE = 20_000  # images after which the running mean squares have made half of the way to a new value
OUTPUT_SCALE = 0.25  # of the pictures, whose layer gives about four times the range (Karras et al. 2021, appendix C)


def generator_kwargs(model: StyleGAN3Config, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Generator, all of them plain JSON values."""
    turns = model.equivariance == "rotation"
    form = form_kwargs(model, shape)
    del form["fade"]
    return dict(
        **form,
        z_dim=model.z_dim,
        w_dim=model.w_dim,
        mapping_layers=model.mapping_layers,
        kernel=1 if turns else 3,
        radial=turns,
    )


def discriminator_kwargs(model: StyleGAN3Config, shape: NetworkShape) -> dict[str, Any]:
    """Arguments of Discriminator."""
    widths = {"channel_base": model.d_channel_base, "channel_max": model.d_channel_max}
    given = stylegan2.discriminator_kwargs(model, shape)
    return given | {name: width for name, width in widths.items() if width is not None}


class SynthesisInput(nn.Module):
    """w [N, w_dim] -> x [N, C, H, W]: waves of fixed frequencies and phases, which w turns and moves, combined by a
    learned matrix (Karras et al. 2021, section 3.1 and appendix F).

    Attributes:
        transform: [3, 3], a buffer: the transformation of the picture's plane that is applied on top of the learned
            one, the identity unless a user sets it. It takes coordinates [x, y, 1] of the result to those of the
            waves; the origin is the picture's centre, and a picture of 4 x 4 base pixels is one unit wide and high. A
            tensor [N, 3, 3] in its place transforms each image by itself.
        freqs, phases: [C, 2] in cycles per unit, and [C] in cycles.
    """

    freqs: torch.Tensor
    phases: torch.Tensor
    transform: torch.Tensor
    memory_format = torch.contiguous_format  # of the result, which all that follows keeps

    def __init__(self, signal: Signal, w_dim: int):
        super().__init__()
        self.size, self.rate, self.bandwidth = signal.size, signal.rate, signal.cutoff
        freqs = torch.randn(signal.channels, 2)
        radii = freqs.square().sum(dim=1, keepdim=True).sqrt()
        freqs = freqs / (radii * radii.square().exp() ** 0.25) * self.bandwidth  # uniform within a disc
        self.weight = nn.Parameter(torch.randn(signal.channels, signal.channels))
        self.affine = FullyConnected(w_dim, 4)
        with torch.no_grad():
            self.affine.weight.zero_()
            self.affine.bias[0].fill_(1)
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", torch.rand(signal.channels) - 0.5)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        t = self.affine(w)
        t = t / t[:, :2].norm(dim=1, keepdim=True)
        turn = torch.stack([t[:, 0], -t[:, 1], t[:, 1], t[:, 0]], dim=1).reshape(-1, 2, 2)
        moved = self.transform[..., :2, :] - t[:, 2:, None] * self.transform[..., 2:, :]
        matrix = turn @ moved  # [N, 2, 3]
        freqs = self.freqs @ matrix[:, :, :2]  # [N, C, 2]
        phases = self.phases + (self.freqs @ matrix[:, :, 2:])[:, :, 0]
        # Waves that a transformation has made too fast for the grid fade out. At resolution 4 the band ends there.
        span = max(self.rate / 2 - self.bandwidth, 1e-3)
        amplitudes = (1 - (freqs.norm(dim=2) - self.bandwidth) / span).clamp(0, 1)
        y, x = (self._places(n, w)[:, None] for n in self.size)
        rows = y * freqs[:, None, :, 1] + phases[:, None]  # [N, H, C]
        waves = (2 * math.pi * (rows[:, :, None] + (x * freqs[:, None, :, 0])[:, None])).sin()  # [N, H, W, C]
        gain = 1 / math.sqrt(len(self.weight))
        mixed = waves.flatten(1, 2) @ ((self.weight.t() * gain) * amplitudes[:, :, None])
        mixed = mixed.reshape(waves.shape).permute(0, 3, 1, 2)
        return mixed.contiguous(memory_format=self.memory_format)

    def _places(self, n: int, like: torch.Tensor) -> torch.Tensor:
        """The coordinates of n pixels in a row, of which the middle is the picture's."""
        return (torch.arange(n, dtype=like.dtype, device=like.device) + (0.5 - n / 2)) / self.rate


class SynthesisLayer(Modulated):
    """Modulated convolution, bias and filtered leaky ReLU: from one signal to the next (Karras et al. 2021, figure 4b).

    The layer to RGB has neither demodulation nor an activation. The convolution makes the grid larger by kernel - 1;
    its zeros at the borders lie outside of the picture, as the margin is wider.
    """

    magnitude_ema: torch.Tensor
    up_filter: torch.Tensor | None
    down_filter: torch.Tensor | None
    changing_buffers = ("magnitude_ema",)

    def __init__(
        self,
        before: Signal,
        after: Signal,
        w_dim: int,
        *,
        kernel: int,
        radial: bool,
        clamp: float | None,
        dtype: torch.dtype | None,
        to_rgb: bool,
    ):
        half = dtype == torch.float16
        super().__init__(before.channels, after.channels, w_dim, kernel, demodulate=not to_rgb, fp16=half)
        self.bias = nn.Parameter(torch.zeros(after.channels))
        self.register_buffer("magnitude_ema", torch.ones([]))
        change = resampling(before, after, kernel=kernel, radial=radial, to_rgb=to_rgb)
        for name, f in (("up_filter", change.up_filter), ("down_filter", change.down_filter)):
            # Made on the CPU even if the network is built on the meta device, see layers.low_pass.
            self.register_buffer(name, None if f is None else f.float(), persistent=False)
        self.how: dict[str, Any] = {"up": change.up, "down": change.down, "padding": change.padding, "clamp": clamp}
        self.in_size, self.rate, self.dtype, self.clamp = before.size, after.rate, dtype, clamp

    def convolved(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return convolve(x, weight, full=True)

    def forward(self, x: torch.Tensor, style: Style, gain: torch.Tensor) -> torch.Tensor:
        """[N, in, H, W] -> [N, out, H', W']; `gain`, of shape [], multiplies x."""
        x = x.to(self.dtype or self.weight.dtype)
        if not self.demodulate:
            x, _ = self.modulated(x, style._replace(s=style.s * gain))
            return bias_act(x, self.bias, clamp=self.clamp)
        x, d = self.modulated(x, style)
        assert d is not None
        x = bias_act(x, scale=d * gain)
        return filtered_lrelu(x, self.up_filter, self.down_filter, self.bias, **self.how)


class SynthesisNetwork(nn.Module):
    """ws [N, num_ws, w_dim] -> image [N, img_channels, H, W], roughly in [-1, 1].

    The first w goes to the input, and one to each layer. The layers are named by number, size and channels.
    """

    def __init__(self, form: Form, w_dim: int, *, layers: int, critical: int, kernel: int, radial: bool):
        super().__init__()
        self.resolution = form.resolution
        every = signals(
            form.resolution,
            (form.base[0], form.base[1]),
            layers=layers,
            critical=critical,
            channel_base=form.channel_base,
            channel_max=form.channel_max,
            img_channels=form.img_channels,
        )
        self.input = SynthesisInput(every[0], w_dim)
        self.names = []
        for i, after in enumerate(every):
            to_rgb = i == layers
            layer = SynthesisLayer(
                every[max(i - 1, 0)],
                after,
                w_dim,
                kernel=1 if to_rgb else kernel,
                radial=radial,
                clamp=form.conv_clamp,
                dtype=form.dtype(after.rate),
                to_rgb=to_rgb,
            )
            self.names.append(_name(i, after))
            setattr(self, self.names[-1], layer)
        self.num_ws = len(every) + 1

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The layers in order, the last one to RGB."""
        return [getattr(self, name) for name in self.names]

    def forward(
        self,
        ws: torch.Tensor,
        *,
        alpha: float | torch.Tensor = 1.0,
        noise: str = "const",
        generator: torch.Generator | None = None,
        followed_batch: int = 0,
    ) -> torch.Tensor:
        """`alpha`, `noise` and `generator` have no effect, as there is no fade and no noise. With `followed_batch`, the
        running mean squares of the layers' inputs follow those of this pass, for a global batch of so many images."""
        layers = self.layers
        styles = styles_of(layers, ws, range(1, self.num_ws))
        gains = torch.stack([layer.magnitude_ema for layer in layers]).rsqrt().unbind()
        squares = []
        x = self.input(ws[:, 0])
        for layer, style, gain in zip(layers, styles, gains, strict=True):
            if followed_batch:
                squares.append(_mean_square(x.detach()))
            x = layer(x, style, gain)
        if squares:
            _follow([layer.magnitude_ema for layer in layers], squares, 1 - 0.5 ** (followed_batch / HALF_LIFE))
        return x.to(ws.dtype) * OUTPUT_SCALE


def _name(i: int, signal: Signal) -> str:
    rows, columns = signal.size
    size = str(columns) if rows == columns else f"{rows}x{columns}"
    return f"L{i}_{size}_{signal.channels}"


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    return (x if x.dtype == torch.float64 else x.float()).square().mean()


@torch.no_grad()
def _follow(means: Sequence[torch.Tensor], squares: Sequence[torch.Tensor], weight: float) -> None:
    """Move running means towards new values by a share of the way."""
    values = [square.to(mean.dtype) for mean, square in zip(means, squares, strict=True)]
    torch._foreach_lerp_(means, values, weight)  # type: ignore[attr-defined]  # not in stubs


class Generator(growing.Generator):
    """StyleGAN3's generator. It does not fade; for the further arguments see Form, where resolutions of low precision
    are sampling rates of layers.

    `layers` are those before the one to RGB, of which the last `critical` have the full band of frequencies.
    """

    @checked
    def __init__(
        self,
        *,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 2,
        layers: int = 14,
        critical: int = 2,
        kernel: int = 3,  # 3 in config T, 1 in config R
        radial: bool = False,  # true in config R
        **form: Any,
    ):
        if layers <= critical:
            raise ValueError(f"layers is {layers}, where it must be more than the {critical} critical ones")
        f = Form(**form)
        if f.fade:
            raise ValueError("fade is true, where it must be false: StyleGAN3 does not grow")
        mapping = MappingNetwork(z_dim, f.c_dim, w_dim, mapping_layers)
        how = {"layers": layers, "critical": critical, "kernel": kernel, "radial": radial}
        super().__init__(f, z_dim, w_dim, mapping, SynthesisNetwork(f, w_dim, **how))
