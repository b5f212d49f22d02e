"""The mapping between our parameter names and those of the public StyleGAN2 and StyleGAN3 checkpoints, for import,
export and tests.

The names differ in two places only (layers.py and stylegan2.py say why). The public state dicts also contain the
resampling filters, which here are derived from the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.networks import stylegan2, stylegan3

FILTERS = ("resample_filter", "up_filter", "down_filter")


def from_public(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a public generator's or discriminator's state dict to our names; filters are left out."""
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
    if not isinstance(module, (stylegan2.Generator, stylegan2.Discriminator, stylegan3.Generator)):
        kind = type(module).__module__.rsplit(".", 1)[-1]
        raise UsageError(f"only StyleGAN2 and StyleGAN3 have a public form, not {kind}: use its snapshot as it is")
    if module.img_size != (module.resolution, module.resolution):
        raise UsageError("only square networks on a 4x4 base have a public form: use the snapshot as it is")
    if getattr(module, "fade", False) or getattr(getattr(module, "synthesis", None), "fade", False):
        raise UsageError("a network within a fade has no public form: export a snapshot from a stable phase")
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
