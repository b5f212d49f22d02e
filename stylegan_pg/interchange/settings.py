"""What a public network was told to do, where its tensors do not show it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stylegan_pg.interchange.pickles import Refused
from stylegan_pg.interchange.public import Network
from stylegan_pg.untrusted import is_number, printable

# What the published networks can be told to do otherwise, and these cannot.
FIXED = {"lr_multiplier": 0.01, "activation": "lrelu"}
FIXED_IN_3 = {
    "margin_size": 10,
    "output_scale": 0.25,
    "first_cutoff": 2.0,
    "first_stopband": 2**2.1,
    "last_stopband_rel": 2**0.3,
    "filter_size": 6,
    "lrelu_upsampling": 2,
}
_ACTIVE = re.compile(r"synthesis\.b\d+\.conv[01]|synthesis\.L\d+_\d+_\d+|mapping\.fc\d+")  # layers with an activation
# Arguments that StyleGAN3's repository gives to a generator itself.
_LATER = ("channel_base", "channel_max", "num_fp16_res", "conv_clamp", "architecture", "fused_modconv_default")


class Settings:
    """What a network was told: attributes, then arguments, then a default."""

    def __init__(self, net: Network):
        self.net, self.given = net, dict(net.kwargs)
        # StyleGAN2-ADA has the arguments of the synthesis network in a table of their own, later versions do not.
        later = any(name in net.kwargs for name in _LATER) and "synthesis_kwargs" not in net.kwargs
        self.later = later and bool(net.shown)  # tables of tensors have no version
        for table in ("synthesis_kwargs", "block_kwargs", "layer_kwargs"):
            inner = self.given.get(table)
            self.given |= inner if isinstance(inner, dict) else {}
        mapping = net.kwargs.get("mapping_kwargs")
        self.mapping = mapping if isinstance(mapping, dict) else {}

    def attributes(self, name: str, below: str = "") -> Iterator[tuple[str, Any]]:
        """(path of a module, value) of all modules with an attribute, of those whose path begins with `below`."""
        for path, facts in self.net.facts.items():
            if name in facts and path.startswith(below):
                yield path, facts[name]

    def of_layers(self, name: str) -> list[Any]:
        """The values of an attribute of all layers with an activation."""
        return [value for path, value in self.attributes(name) if _ACTIVE.fullmatch(path)]

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute of the synthesis network as a whole, or the argument."""
        facts = self.net.facts.get("synthesis", {})
        return facts[name] if facts.get(name) is not None else self.given.get(name, default)

    def number(self, name: str, default: float | None, low: float = 0, high: float = 1 << 30) -> Any:
        """A number, as an int where it is whole.

        Raises:
            Refused: it is none, or out of range.
        """
        value = self.get(name, default)
        if value is None:
            return None
        if not is_number(value, low, high):
            raise Refused(f"says that {name} is {printable(repr(value), 60)}, which is no number from {low} to {high}")
        return int(value) if value == int(value) else value

    def check_fixed(self, fixed: Mapping[str, Any]) -> None:
        """
        Raises:
            Refused: a setting has another value than this package's networks have.
        """
        for name, wanted in fixed.items():
            value = self.mapping.get(name, self.get(name, wanted))
            fits = is_number(value) and math.isclose(value, wanted) if is_number(wanted) else value == wanted
            if not fits:
                raise Refused(
                    f"is of a network with {name}={printable(repr(value), 60)}; this package's have {wanted:.6g}"
                    if is_number(wanted)
                    else f"is of a network with {name}={printable(repr(value), 60)}; this package's have {wanted}"
                )
        for activation in self.of_layers("activation"):
            if activation != "lrelu":
                raise Refused(f"is of a network with the activation {printable(repr(activation), 60)}, not lrelu")
        for _, gain in self.attributes("bias_gain", "mapping.fc"):
            if not (is_number(gain) and math.isclose(gain, 0.01)):
                raise Refused(
                    f"is of a network whose mapping learns at {printable(repr(gain), 60)} of the rate, not 0.01"
                )

    def check_sizes(self, kwargs: Mapping[str, Any]) -> None:
        """
        Raises:
            Refused: the arguments contradict the shapes of the tensors.
        """
        names = {"img_resolution": "resolution", "z_dim": "z_dim", "c_dim": "c_dim", "w_dim": "w_dim"}
        for public, ours in (names | {"img_channels": "img_channels"}).items():
            given = self.net.kwargs.get(public)
            if given is not None and ours in kwargs and given != kwargs[ours]:
                raise Refused(
                    f"contradicts itself: {public} is {printable(repr(given), 60)}, its tensors have {kwargs[ours]}"
                )
