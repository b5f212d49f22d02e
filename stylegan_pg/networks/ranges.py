"""Ranges of the arguments of networks' constructors.

The arguments come from configurations and from the descriptions in snapshots, which may come from somebody else, so
each is checked before anything is built with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec

from stylegan_pg.config import BEGANConfig, CharsConfig, DCGANConfig, DDGANConfig, MLPConfig, StyleGAN2Config
from stylegan_pg.config.fields import choices_of, values_of
from stylegan_pg.networks.form import LOW_PRECISION
from stylegan_pg.untrusted import is_number

P = ParamSpec("P")
Range = tuple[Callable[[Any], bool], str]  # (a test of a value, the range's description)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int, high: int) -> Range:
    return lambda v: _is_whole(v, low, high), f"a whole number from {low} to {high}"


def _pair(high: int) -> Range:
    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == 2 and all(_is_whole(v, 1, high) for v in value)

    return fits, f"two whole numbers from 1 to {high}"


def _one_of(*choices: str) -> Range:
    return lambda v: isinstance(v, str) and v in choices, " or ".join(choices)


def _is_resolution(value: Any) -> bool:
    return _is_whole(value, 4, 1 << 16) and value & (value - 1) == 0


def _are_taps(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_TAPS:
        return False
    return all(is_number(v, -1e15, 1e15) for v in value) and abs(math.fsum(value)) > 1e-15


def _are_resolutions(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= 16 and all(map(_is_resolution, value))


def _list_of(high: int) -> Range:
    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) <= 16 and all(_is_whole(v, 1, high) for v in value)

    return fits, f"a list of whole numbers from 1 to {high}"


def _is_alphabet(value: Any) -> bool:
    (field,) = (field for field in dataclasses.fields(CharsConfig) if field.name == "alphabet")
    return isinstance(value, str) and all(demand.fits(value) for demand in values_of(field).demands)


MOST_TAPS = 64
_FLAG: Range = (lambda v: isinstance(v, bool), "true or false")
RANGES: dict[str, Range] = {
    "resolution": (_is_resolution, "a power of two from 4 to 65536"),
    "base": _pair(4096),
    "img_size": _pair(1 << 16),
    "img_channels": _whole(1, 4096),
    "c_dim": _whole(0, 1_000_000),
    "z_dim": _whole(1, 1 << 16),
    "w_dim": _whole(1, 1 << 16),
    "channel_base": _whole(1, 1 << 30),
    "channel_max": _whole(1, 1 << 16),
    "width": _whole(1, 1 << 16),
    "hidden": _whole(0, 256),
    "mapping_layers": _whole(0, 256),
    "mbstd_group": _whole(1, 1 << 20),
    "mbstd_channels": _whole(0, 1 << 16),
    "fade": _FLAG,
    "use_noise": _FLAG,
    "widths": _list_of(1 << 16),
    "groups": _list_of(1 << 22),
    "blocks": _list_of(64),
    "expansion": _whole(1, 64),
    "embedding": _whole(1, 1 << 16),
    "conv_clamp": (lambda v: v is None or (is_number(v, 0, 1e30) and v > 0), "a number above 0, or null"),
    "layers": _whole(2, 256),
    "critical": _whole(1, 255),
    "kernel": (lambda v: _is_whole(v, 1, 3) and v != 2, "1 or 3"),
    "radial": _FLAG,
    "depth": _whole(0, 64),
    "start": (_is_resolution, "a power of two from 4 to 65536"),
    "outputs": _whole(1, 1 << 16),
    "latent": _one_of(*choices_of(MLPConfig, "latent")),
    "categories": _list_of(1 << 12),
    "continuous": _whole(0, 1 << 12),
    "code_dim": _whole(1, 1 << 16),
    "energy": _one_of(*choices_of(BEGANConfig, "energy")),
    "steps": _whole(1, 64),
    "beta_min": (lambda v: is_number(v, 0, 1e3) and v > 0, "a number above 0 and at most 1000"),
    "beta_max": (lambda v: is_number(v, 0, 1e3) and v > 0, "a number above 0 and at most 1000"),
    "multipliers": _list_of(64),
    "blocks_each": _whole(1, 64),
    "time_dim": _whole(1, 1 << 16),
    "attention_at": (_are_resolutions, "a list of powers of two from 4 to 65536"),
    "stages": _one_of(*choices_of(DDGANConfig, "d_stages")),
    "normalization": _one_of(*choices_of(DCGANConfig, "normalization")),
    "references": _whole(1, 1 << 16),
    "minibatch_kernels": _whole(0, 1 << 16),
    "minibatch_dims": _whole(1, 1 << 16),
    "label": _one_of(*choices_of(DCGANConfig, "label")),
    "kept": _whole(0, 1 << 20),
    "alphabet": (_is_alphabet, "5 to 1024 different printable characters, one of them a space"),
    "length": _whole(1, 1 << 12),
    "output": _one_of(*choices_of(CharsConfig, "output")),
    "temperature": (lambda v: is_number(v, 1e-30, 1e3), "a number above 0, at most 1000"),
    "architecture": _one_of(*choices_of(StyleGAN2Config, "g_architecture")),
    "low_precision": _one_of(*LOW_PRECISION),
    "low_precision_at": (_are_resolutions, "a list of powers of two from 4 to 65536"),
    "resample_filter": (_are_taps, f"1 to {MOST_TAPS} finite numbers whose sum is not 0"),
}


def check_arguments(arguments: dict[str, Any]) -> None:
    """Check arguments against their ranges; unknown names are left to the constructors.

    Raises:
        ValueError: an argument is out of its range; the message has its name.
    """
    for name in arguments.keys() & RANGES.keys():
        fits, wanted = RANGES[name]
        if not fits(arguments[name]):
            raise ValueError(f"{name} is {repr(arguments[name])[:80]}, where it must be {wanted}")
    base, resolution = arguments.get("channel_base"), arguments.get("resolution", 4)
    if base is not None and base < resolution:
        raise ValueError(f"channel_base is {base}, which leaves no channel at resolution {resolution}")


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate a constructor whose arguments are all passed by name, so that they are checked first."""

    @functools.wraps(init)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        check_arguments(kwargs)
        init(*args, **kwargs)

    return wrapper
