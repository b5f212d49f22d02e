"""Transfer learning: weights of another run as the start of a new one, and layers that stay as they were.

What has the same name and shape is taken over, so a network of another resolution takes the blocks that both have.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stylegan_pg import checkpoint
from stylegan_pg.errors import UsageError
from stylegan_pg.networks.layers import FullyConnected
from stylegan_pg.snapshot import load_snapshot

Weights = dict[str, dict[str, torch.Tensor]]


def read(path: str, network: str) -> Weights:
    """{"G", "D", "G_ema": state dict} of a checkpoint; a snapshot has no "D", and G_ema stands for G too.

    Args:
        path: RUN/checkpoints/*.safetensors or RUN/snapshots/*.safetensors.
        network: model.name, which must be that of the file.

    Raises:
        UsageError: no such file, a damaged one, or one of other networks.
    """
    if not Path(path).is_file():
        raise UsageError(f"init={path}: no such file; give a snapshot or a checkpoint, RUN/snapshots/*.safetensors")
    try:
        tensors, state = checkpoint.read(Path(path))
    except checkpoint.BadCheckpointError as fault:
        if "checksum" in str(fault):
            raise UsageError(f"init={fault}: take another checkpoint of the run, or a snapshot") from None
        try:
            G = load_snapshot(path)
        except UsageError as error:
            raise UsageError(f"init={error}") from None
        found, state_dict = G.description["network"], G.state_dict()
        weights = {"G": state_dict, "G_ema": state_dict}
    else:
        found = state["config"]["model"]["name"]
        weights = {part: checkpoint.part_of(tensors, part) for part in ("G", "D", "G_ema")}
    if found != network:
        raise UsageError(f"init={path} holds {found} networks, model.name is {network}: take the same in both")
    return weights


def adopt(net: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Give `net` every tensor of `state` that fits; returns the names that stay as they were initialised.

    A dense layer that has more inputs than it had (a generator that becomes conditional: the label's come behind the
    latent's) keeps what it computed: the old weights, for the equalised learning rate's other factor, and zeros.
    """
    new = []
    for name, tensor in net.state_dict().items():
        old = state.get(name)
        if old is not None and old.shape == tensor.shape:
            tensor.copy_(old)
        elif old is not None and _has_more_inputs(net, name, tensor, old):
            tensor.zero_()
            tensor[:, : old.shape[1]] = old.to(tensor) * math.sqrt(tensor.shape[1] / old.shape[1])
        else:
            new.append(name)
    return new


def _has_more_inputs(net: nn.Module, name: str, tensor: torch.Tensor, old: torch.Tensor) -> bool:
    layer, _, leaf = name.rpartition(".")
    dense = leaf == "weight" and isinstance(net.get_submodule(layer), FullyConnected)
    return dense and tensor.ndim == old.ndim == 2 and len(tensor) == len(old) and tensor.shape[1] > old.shape[1]


def freeze(D: Any, count: int) -> list[nn.Parameter]:
    """The parameters of D's `count` highest resolutions, which are not to be trained (Mo et al. 2020, Freeze-D).

    The last one, 4x4, always learns, and so does a D without resolutions.
    """
    frozen = sorted(getattr(D, "resolutions", []), reverse=True)[:-1][:count]
    return [p for r in frozen for p in getattr(D, f"b{r}").parameters()]
