"""The mapping between our parameter names and those of public checkpoints of StyleGAN2, StyleGAN3 and R3GAN, for
import, export and tests.

The names of StyleGAN2 differ in two places only (layers.py and stylegan2.py say why). R3GAN's number the resolutions
from the input on, and the layers of each. Public state dicts also contain the resampling filters, which here are
derived from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.networks import r3gan, stylegan2, stylegan3

FILTERS = ("resample_filter", "up_filter", "down_filter")

# Parts of R3GAN's names: (ours, public), for the layers of a residual block and for all others.
RESIDUAL = {
    "conv0.weight": "LinearLayer1.Layer.weight",
    "conv0.bias": "NonLinearity1.Bias",
    "conv1.weight": "LinearLayer2.Layer.weight",
    "conv1.bias": "NonLinearity2.Bias",
    "conv2.weight": "LinearLayer3.Layer.weight",
}
G_ENDS = {"first.basis": "Basis", "first.linear.weight": "LinearLayer.weight"}
D_ENDS = {"basis": "Basis.weight", "linear.weight": "LinearLayer.weight"}
TRANSITION, KERNEL = "transition.weight", "Resampler.Kernel"


def from_public(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a public generator's or discriminator's state dict to our names; filters are left out."""
    if any(name.startswith("Model.") for name in state):
        return _from_public_r3gan(state)
    ours = {}
    for name, tensor in state.items():
        if name.endswith(FILTERS):
            continue
        if name.endswith(".const"):
            name = name.removesuffix("const") + "learned_input"
        ours[name] = tensor.reshape(1) if name.endswith("noise_strength") else tensor
    return ours


def to_public(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of our generator or discriminator under the public names, with filters, detached.

    Raises:
        UsageError: the public layout cannot express the network: it is of another kind, within a fade, or for
            non-square pictures.
    """
    of_r3gan = isinstance(module, (r3gan.Generator, r3gan.Discriminator))
    known = (stylegan2.Generator, stylegan2.Discriminator, stylegan3.Generator)
    if not of_r3gan and not isinstance(module, known):
        kind = type(module).__module__.rsplit(".", 1)[-1]
        raise UsageError(
            f"only StyleGAN2, StyleGAN3 and R3GAN networks have a public form, not {kind}: use its snapshot as it is"
        )
    if module.img_size != (module.resolution, module.resolution):
        raise UsageError("only square networks on a 4x4 base have a public form: use the snapshot as it is")
    if getattr(module, "fade", False) or getattr(getattr(module, "synthesis", None), "fade", False):
        raise UsageError("a network within a fade has no public form: export a snapshot from a stable phase")
    if of_r3gan:
        return _to_public_r3gan(module)
    if isinstance(module, stylegan3.Generator):
        filters = {name: f for name, f in module.named_buffers() if name.endswith(FILTERS)}
        return {name: tensor.detach() for name, tensor in {**module.state_dict(), **filters}.items()}
    public = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach()
        if name.endswith(".learned_input"):
            name = name.removesuffix("learned_input") + "const"
        public[name] = tensor.reshape([]) if name.endswith("noise_strength") else tensor
    # Every block has a filter, and so has every convolution but toRGB; the discriminator's 4x4 end has no block filter.
    for name, buffer in module.named_buffers():
        if not name.endswith("filter") or "torgb" in name:
            continue
        prefix = name.removesuffix("filter")
        if prefix.count(".") >= 2 or prefix.startswith("b"):
            public[prefix + "resample_filter"] = buffer.detach()
    net: Any = getattr(module, "synthesis", module)
    prefix = "synthesis." if net is not module else ""
    for r in net.resolutions:
        if prefix or r > 4:
            public[f"{prefix}b{r}.resample_filter"] = net.filter.detach()
    return public


# ---------------------------------------------------------------------------------------------------------------- R3GAN


def _layer_name(module: Any, name: str) -> str:
    """The public name of a parameter or filter of one of R3GAN's networks."""
    of_g = isinstance(module, r3gan.Generator)
    if name == "embed.weight":
        return "Model.EmbeddingLayer.weight"
    if name.endswith("rgb.weight"):
        return f"Model.{'Aggregation' if of_g else 'Extraction'}Layer.Layer.weight"
    block, rest = name.split(".", 1)
    stage, r = getattr(module, block), int(block[1:])
    number = module.resolutions.index(r)
    if rest.startswith("block"):
        part, rest = rest.split(".", 1)
        return f"Model.MainLayers.{number}.Layers.{int(part[5:]) + of_g}.{RESIDUAL[rest]}"
    last = {TRANSITION: "LinearLayer.Layer.weight", "filter": KERNEL} | (G_ENDS if of_g else D_ENDS)
    return f"Model.MainLayers.{number}.Layers.{0 if of_g else stage.count}.{last[rest]}"


def _to_public_r3gan(module: Any) -> dict[str, torch.Tensor]:
    tensors = {**module.state_dict(), **{n: t for n, t in module.named_buffers() if n.endswith(".filter")}}
    return {_layer_name(module, name): tensor.detach() for name, tensor in tensors.items()}


def _from_public_r3gan(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    of_g, ours = "Model.AggregationLayer.Layer.weight" in state, {}
    stages = 1 + max(int(m[1]) for m in map(re.compile(r"Model\.MainLayers\.(\d+)\.").match, state) if m)
    ends = {public: name for name, public in (G_ENDS if of_g else D_ENDS).items()}
    residual = {public: name for name, public in RESIDUAL.items()}
    for name, tensor in state.items():
        if name.endswith(KERNEL):
            continue
        if name.startswith("Model.EmbeddingLayer."):
            ours["embed.weight"] = tensor
        elif name.startswith(("Model.AggregationLayer.", "Model.ExtractionLayer.")):
            ours[f"b{2 << stages}.{'torgb' if of_g else 'fromrgb'}.weight"] = tensor
        else:
            _, _, stage, _, layer, rest = name.split(".", 5)
            number = int(stage) if of_g else stages - 1 - int(stage)
            inner = f"block{int(layer) - of_g}.{residual[rest]}" if rest in residual else ends.get(rest, TRANSITION)
            ours[f"b{4 << number}.{inner}"] = tensor
    return ours
