"""Low-pass filters designed with the Kaiser window, and what StyleGAN3's layers need of them.

The formulas are those of Kaiser (1974, "Nonrecursive digital filter design using the I0-sinh window function") as
StyleGAN3 uses them (Karras et al. 2021, appendices B and C). Frequencies are in cycles per unit of length, and rates in
samples per unit of length. All filters are float64 tensors on the CPU, even where networks are built on the meta
device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


def kaiser_beta(taps: int, width: float, rate: float) -> float:
    """The window's parameter for a filter of `taps` taps, if its transition from pass band to stop band is to be
    `width` wide."""
    attenuation = 2.285 * (taps - 1) * math.pi * width / (rate / 2) + 7.95  # in dB
    if attenuation > 50:
        return 0.1102 * (attenuation - 8.7)
    if attenuation > 21:
        return 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    return 0.0


def _distances(taps: int, rate: float) -> np.ndarray:
    """The distances of the taps from the filter's centre, in units of length."""
    return (np.arange(taps) - (taps - 1) / 2) / rate


def low_pass_taps(taps: int, cutoff: float, width: float, rate: float) -> torch.Tensor:
    """The separable filter [taps] with the sum 1: an ideal low-pass filter, multiplied by a Kaiser window.

    Args:
        cutoff: The middle of the transition from pass band to stop band.
        width: The width of that transition.
        rate: The sampling rate of the signal that is filtered.
    """
    f = np.sinc(2 * cutoff * _distances(taps, rate)) * np.kaiser(taps, kaiser_beta(taps, width, rate))
    return torch.from_numpy(f / f.sum())


def radial_low_pass_taps(taps: int, cutoff: float, width: float, rate: float) -> torch.Tensor:
    """The rotationally symmetric filter [taps, taps] with the sum 1 and the arguments of `low_pass_taps`: the jinc
    function, multiplied by the outer product of a Kaiser window."""
    x = _distances(taps, rate)
    r = np.hypot(*np.meshgrid(x, x))
    at_0 = cutoff  # the limit, which an odd number of taps takes in the centre
    with torch.device("cpu"):
        bessel = torch.special.bessel_j1(torch.from_numpy(2 * math.pi * cutoff * r)).numpy()
    f = np.where(r == 0, at_0, bessel / (math.pi * np.where(r == 0, 1, r)))
    window = np.kaiser(taps, kaiser_beta(taps, width, rate))
    f = f * np.outer(window, window)
    return torch.from_numpy(f / f.sum())


@dataclass(frozen=True)
class Signal:
    """The band of frequencies in which a layer's result lies, and the grid on which it is sampled.

    A picture at resolution 4 is one unit of length in each direction for a base of 4x4, so that a sampling rate of s
    gives s pixels; other bases have the same pixels, and more or fewer of them.

    Attributes:
        cutoff: The end of the pass band.
        half_width: Half the width of the transition to the stop band.
        rate: The sampling rate, a power of two.
        size: (rows, columns) of the grid, with a margin around the picture.
        channels: The number of channels.
    """

    cutoff: float
    half_width: float
    rate: int
    size: tuple[int, int]
    channels: int


FIRST_CUTOFF, FIRST_STOPBAND, LAST_STOPBAND = 2.0, 2.0**2.1, 2.0**0.3  # the last one relative to the last cutoff
MARGIN = 10  # pixels around the picture


def signals(
    resolution: int,
    base: tuple[int, int],
    *,
    layers: int,
    critical: int,
    channel_base: int,
    channel_max: int,
    img_channels: int,
) -> list[Signal]:
    """The signals that the layers of a generator give, those to RGB included: layers + 1 (Karras et al. 2021, section
    3.2 and appendix C). Both limits of the bands grow geometrically; they have their last values in the `critical` last
    layers and in that to RGB, whose grids have no margin."""
    last = resolution / 2
    found = []
    for i in range(layers + 1):
        e = min(i / (layers - critical), 1)
        cutoff = FIRST_CUTOFF * (last / FIRST_CUTOFF) ** e
        stopband = FIRST_STOPBAND * (last * LAST_STOPBAND / FIRST_STOPBAND) ** e
        rate = 2 ** math.ceil(math.log2(min(2 * stopband, resolution)))
        half_width = max(stopband, rate / 2) - cutoff
        margin = 0 if i >= layers - 1 else 2 * MARGIN
        size = (base[0] * rate // 4 + margin, base[1] * rate // 4 + margin)
        channels = img_channels if i == layers else round(min(channel_base / 2 / cutoff, channel_max))
        found.append(Signal(cutoff, half_width, rate, size, channels))
    return found


@dataclass(frozen=True)
class Resampling:
    """How the activation of a layer goes from one signal to another, through a temporary higher rate.

    Attributes:
        up, down: The factors of up-sampling before the activation, and of down-sampling behind it.
        up_filter, down_filter: [taps] or [taps, taps]; None where nothing is resampled.
        padding: (left, right, top, bottom) of the up-sampled picture, such that the result has its size.
    """

    up: int
    down: int
    up_filter: torch.Tensor | None
    down_filter: torch.Tensor | None
    padding: tuple[int, int, int, int]


TAPS = 6  # for each factor of resampling


def resampling(before: Signal, after: Signal, *, kernel: int, radial: bool, to_rgb: bool) -> Resampling:
    """The resampling of a layer whose convolution of `kernel` x `kernel` pixels makes its input larger by kernel - 1.

    With `radial`, the down-sampling filter is rotationally symmetric, unless the layer is critically sampled. A layer
    `to_rgb` has no activation and does not resample.
    """
    rate = max(before.rate, after.rate) * (1 if to_rgb else 2)  # the temporary one
    up, down = rate // before.rate, rate // after.rate
    up_filter = down_filter = None
    if up > 1 and not to_rgb:
        up_filter = low_pass_taps(TAPS * up, before.cutoff, 2 * before.half_width, rate)
    if down > 1 and not to_rgb:
        critical = after.cutoff * 2 == after.rate
        design = radial_low_pass_taps if radial and not critical else low_pass_taps
        down_filter = design(TAPS * down, after.cutoff, 2 * after.half_width, rate)
    taps = sum(1 if f is None else len(f) for f in (up_filter, down_filter))
    padding: list[int] = []
    for there, wanted in reversed(list(zip(before.size, after.size, strict=True))):
        total = (wanted - 1) * down + 1 - (there + kernel - 1) * up + taps - 2
        low = (total + up) // 2
        padding += [low, total - low]
    left, right, top, bottom = padding
    return Resampling(up, down, up_filter, down_filter, (left, right, top, bottom))
