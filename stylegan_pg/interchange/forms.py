"""The form of a public network: which of this package's generators it is, and with which arguments.

Sizes follow from the shapes of the tensors. What the shapes do not show (limits of activations, half precision, ...)
comes from attributes that the public classes keep beside their tensors, else from the arguments of their constructors,
else from the defaults of the version that wrote the file. Whatever this package's networks compute in one way only
must have that value, or the network is refused: an import never gives other images than the original.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from stylegan_pg.interchange.pickles import Refused
from stylegan_pg.interchange.public import Network
from stylegan_pg.interchange.settings import FIXED, FIXED_IN_3, Settings
from stylegan_pg.networks import NETWORKS
from stylegan_pg.networks.filters import signals
from stylegan_pg.networks.layers import low_pass
from stylegan_pg.networks.public_names import from_public
from stylegan_pg.untrusted import is_number, printable

MOST_BLOCKS, MOST_LAYERS = 16, 255
_TOLERANCE = 1e-5  # of filters, whose largest tap is about 1


def renamed(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A public state dict under this package's names.

    Raises:
        Refused: it is not of a network that this package knows.
    """
    if any(len(match[1]) > 2 for match in map(re.compile(r"Model\.MainLayers\.(\d+)").match, state) if match):
        raise Refused("holds a network of more resolutions than any R3GAN has")
    try:
        return from_public(state)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError):
        raise Refused("holds a network whose layers are not those of StyleGAN2, StyleGAN3 or R3GAN") from None


def generator_form(net: Network, state: Mapping[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    """The family of a generator, and the arguments of its class, from its public state dict.

    Raises:
        Refused: it is none that this package can compute.
    """
    settings = Settings(net)
    try:
        if any(name.startswith("Model.") for name in state):
            name, kwargs = "r3gan", _r3gan(settings, state)
        elif "synthesis.input.freqs" in state:
            name, kwargs = "stylegan3", _stylegan3(settings, state)
        elif "synthesis.b4.const" in state:
            name, kwargs = "stylegan2", _stylegan2(settings, state)
        else:
            raise Refused("holds a generator that is none of StyleGAN2, StyleGAN3 and R3GAN")
    except KeyError as error:
        raise Refused(f"holds a generator that lacks {printable(error, 80)}") from None
    except (IndexError, ValueError, TypeError, ArithmeticError):
        raise Refused("holds a generator whose tensors have impossible shapes") from None
    settings.check_sizes(kwargs)
    return name, kwargs


def built(name: str, kwargs: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> Any:
    """A generator with the tensors of a public state dict.

    Raises:
        Refused: names, shapes or filters are not those of such a generator.
    """
    ours = renamed(state)
    try:
        with torch.device("meta"):
            G: Any = NETWORKS[name].G(**kwargs)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise Refused(f"is of a generator that cannot be built: {printable(error)}") from None
    expected = G.state_dict()
    if ours.keys() != expected.keys():
        odd = min(ours.keys() ^ expected.keys())
        raise Refused(f"{'lacks' if odd in expected else 'has'} {printable(odd, 80)}, unlike any {name} of its sizes")
    for key, t in expected.items():
        if t.shape != ours[key].shape:
            raise Refused(f"has {key} of shape {list(ours[key].shape)}, where {list(t.shape)} fits the other layers")
    _check_filters(name, kwargs, G, state)
    G.load_state_dict(ours, assign=True)
    return G.eval().requires_grad_(False)


def _check_filters(name: str, kwargs: Mapping[str, Any], G: Any, state: Mapping[str, torch.Tensor]) -> None:
    if name == "stylegan3":
        wanted = {key: f for key, f in G.named_buffers() if key.endswith(("up_filter", "down_filter"))}
        found = {key: f for key, f in state.items() if key.endswith(("up_filter", "down_filter"))}
        pairs = [(f, wanted.get(key)) for key, f in found.items()]
    else:
        taps = low_pass(kwargs.get("resample_filter", (1, 3, 3, 1)))
        pairs = [(f, taps) for key, f in state.items() if key.endswith(("resample_filter", "Resampler.Kernel"))]
    for f, known in pairs:
        fits = known is not None and f.shape == known.shape and float((f - known).abs().max()) <= _TOLERANCE
        if not fits:  # not so either if the difference is not a number
            raise Refused(f"is of a {name} with other filters of up- or down-sampling than this package's")


# ---------------------------------------------------------------------------------------------------- the families


def _mapping(settings: Settings, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of generators with a mapping network."""
    settings.check_fixed(FIXED)
    w_dim = len(state["mapping.w_avg"])
    embed = state.get("mapping.embed.weight")
    layers = sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in state)
    first = state["mapping.fc0.weight"].shape[1] if layers else settings.net.kwargs["z_dim"]
    c_dim = 0 if embed is None else embed.shape[1]
    z_dim = first - (w_dim if c_dim and layers else 0)
    return {"z_dim": z_dim, "c_dim": c_dim, "w_dim": w_dim, "mapping_layers": layers, "base": [4, 4]}


def _limit(settings: Settings, default: float | None) -> float | None:
    """The limit of activations."""
    limits = [value for value in settings.of_layers("conv_clamp") if value is None or is_number(value, 0, 1e30)]
    if len(set(limits)) > 1:
        raise Refused("is of a network whose layers are limited differently")
    if limits:
        return limits[0]
    return settings.number("conv_clamp", default, high=1e30)


def _count_of_half(settings: Settings) -> int:
    """How many of the highest resolutions compute in half precision."""
    return int(settings.number("num_fp16_res", 4 if settings.later else 0, high=32))


def _half_precision(resolutions: list[int]) -> dict[str, Any]:
    """fp16 in the layers of some resolutions (here never in those of 4x4 pixels)."""
    low = sorted((r for r in set(resolutions) if r >= 8), reverse=True)
    return {"low_precision": "fp16" if low else "fp32", "low_precision_at": low}


def _stylegan2(settings: Settings, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    mapping = _mapping(settings, state)
    blocks = (re.match(r"synthesis\.b(\d{1,5})\.", name) for name in state)
    found = sorted({int(block[1]) for block in blocks if block})
    top = found[-1]
    if len(found) > MOST_BLOCKS:
        raise Refused("holds a network of more resolutions than any StyleGAN2 has")
    widths = {r: len(state[f"synthesis.b{r}.conv1.bias"]) for r in found}
    residual = any(name.endswith(".skip.weight") for name in state)
    architecture = "resnet" if residual else "skip" if "synthesis.b4.torgb.weight" in state else "orig"
    base, most = _channels(settings, {r: (width, float(r)) for r, width in widths.items()}, math.floor)
    if any(path.startswith("synthesis.b") for path, _ in settings.attributes("use_fp16")):
        blocks_of_half = [path for path, half in settings.attributes("use_fp16", "synthesis.b") if half is True]
        low = [int(m[1]) for path in blocks_of_half if (m := re.fullmatch(r"synthesis\.b(\d{1,5})", path))]
    else:
        low = [top >> i for i in range(_count_of_half(settings))]
    return {
        "resolution": top,
        "img_channels": len(state[f"synthesis.b{top}.torgb.bias"]),
        "channel_base": base,
        "channel_max": most,
        "fade": False,
        "conv_clamp": _limit(settings, 256 if settings.later else None),
        **_half_precision(low),
        **mapping,
        "architecture": architecture,
        "use_noise": "synthesis.b4.conv1.noise_strength" in state,
        "resample_filter": _taps([f for name, f in state.items() if name.endswith("resample_filter")]),
    }


def _stylegan3(settings: Settings, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    settings.check_fixed(FIXED_IN_3)
    settings.later = bool(settings.net.shown)
    layers = {}
    for name in state:
        if match := re.fullmatch(r"synthesis\.(L(\d{1,3})_(\d{1,6})_(\d{1,6}))\.weight", name):
            layers[int(match[2])] = (match[1], int(match[3]), int(match[4]))
    last = max(layers)
    resolution = layers[last][1]
    critical = int(settings.number("num_critical", 2, low=1, high=255))
    how: dict[str, Any] = {"layers": last, "critical": critical, "img_channels": layers[last][2]}
    if not critical < last <= MOST_LAYERS or not 4 <= resolution <= 1 << 16:
        raise Refused("holds a StyleGAN3 without layers, or of an impossible size")
    shape = signals(resolution, (4, 4), channel_base=1, channel_max=1, **how)
    sizes = {i: (layers[i][2], 2 * shape[i].cutoff) for i in range(last)}
    base, most = _channels(settings, sizes, round)
    rates = {signal.rate for signal in shape if signal.rate << _count_of_half(settings) > resolution}
    radial = any(f.ndim == 2 for name, f in state.items() if name.endswith("down_filter"))
    return {
        **_mapping(settings, state),
        **how,
        "resolution": resolution,
        "channel_base": base,
        "channel_max": most,
        "conv_clamp": _limit(settings, 256),
        **_half_precision(list(rates)),
        "kernel": state[f"synthesis.{layers[0][0]}.weight"].shape[-1],
        "radial": radial,
    }


def _r3gan(settings: Settings, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    ours = renamed(state)
    found = sorted({int(m[1]) for m in map(re.compile(r"b(\d{1,5})\.block").match, ours) if m})
    kwargs: dict[str, list[int]] = {"widths": [], "groups": [], "blocks": []}
    expansion = 0
    for r in found:
        inner, width = ours[f"b{r}.block0.conv0.weight"].shape[:2]
        expansion = inner // width
        kwargs["widths"].append(width)
        kwargs["groups"].append(inner // ours[f"b{r}.block0.conv1.weight"].shape[1])
        kwargs["blocks"].append(sum(re.fullmatch(rf"b{r}\.block\d+\.conv0\.weight", name) is not None for name in ours))
    embed = ours.get("embed.weight")
    embedding, c_dim = (1, 0) if embed is None else embed.shape
    w_dim = ours["b4.first.linear.weight"].shape[1]
    stages = settings.net.kwargs.get("FP16Stages")
    low = [i for i in stages if type(i) is int and 0 <= i < len(found)] if isinstance(stages, list) else []
    for path, kind in settings.attributes("DataType", "Model.MainLayers."):
        stage = path.rpartition(".")[2]
        if kind == "bfloat16" and stage.isdecimal() and len(stage) < 4:
            low.append(int(stage))
    at = sorted({4 << i for i in low if i > 0}, reverse=True)
    return {
        "resolution": found[-1],
        "base": [4, 4],
        "img_channels": len(ours[f"b{found[-1]}.torgb.weight"]),
        "c_dim": c_dim,
        "fade": False,
        "conv_clamp": settings.number("conv_clamp", None, high=1e30),  # this package's addition
        "low_precision": "bf16" if at else "fp32",
        "low_precision_at": at,
        **kwargs,
        "expansion": expansion,
        "z_dim": w_dim - (embedding if c_dim else 0),
        "embedding": embedding,
    }


def _channels(settings: Settings, sizes: Mapping[int, tuple[int, float]], rounded: Any) -> tuple[int, int]:
    """channel_base and channel_max of layers.

    Args:
        sizes: of each layer, its channels and the number that channel_base is divided by.
        rounded: how the quotient becomes a whole number.

    Raises:
        Refused: no such numbers give these channels.
    """
    most = max(width for width, _ in sizes.values())
    given = [settings.number(name, None) for name in ("channel_base", "channel_max")]
    powers = [1 << i for i in range(4, 25)]
    own = [number for width, by in sizes.values() for number in (round(width * by), math.ceil(width * by))]
    pairs = [(base, limit) for base in (given[0], *powers, *own) for limit in (given[1], most)]
    for base, limit in pairs:
        if not isinstance(base, int) or not isinstance(limit, int):
            continue
        if all(rounded(min(base / by, limit)) == width for width, by in sizes.values()):
            return base, limit
    raise Refused("has layers whose channels do not follow from a channel_base and a channel_max")


def _taps(filters: list[torch.Tensor]) -> list[float]:
    """The taps of a separable filter [n, n], as small whole numbers if they are in such proportions. The first filter
    stands for all, which are compared with it later."""
    if not filters:
        return [1.0, 3.0, 3.0, 1.0]
    if filters[0].ndim != 2 or not 1 <= len(filters[0]) <= 64:
        raise Refused("is of a StyleGAN2 with other filters of up- or down-sampling than this package's")
    taps = filters[0].double().sum(dim=1)
    smallest = float(taps.abs().min())
    if smallest > 0:
        scaled = taps / smallest
        if float((scaled - scaled.round()).abs().max()) < 1e-4:
            taps = scaled.round()
    return [float(tap) for tap in taps]
