"""Transfer learning: weights of another run as the start of a new one, and layers that stay as they were.

What has the same name and shape is taken over, so a network of another resolution takes the blocks that both have.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stylegan_pg.checkpoint import checkpoint, tensor_file
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config import ModelConfig
from stylegan_pg.config.renamed import translated
from stylegan_pg.errors import UsageError
from stylegan_pg.untrusted import printable

Weights = dict[str, dict[str, torch.Tensor]]
# Keys of model.* that no layer's size depends on.
_NO_SIZES = (
    "low_precision",
    "low_precision_resolutions",
    "low_precision_at",
    "w_avg_beta",
    "conv_clamp",
    "mbstd_group",
)


def read(path: str, model: ModelConfig) -> tuple[Weights, str]:
    """{"G", "D", "G_ema": state dict} of a checkpoint; a snapshot has no "D", and G_ema stands for G too. With them,
    what the file's run had otherwise under model.*, as the end of a sentence, or "".

    Args:
        path: RUN/checkpoints/*.safetensors or RUN/snapshots/*.safetensors.
        model: of the run that starts; its name must be that of the file.

    Raises:
        UsageError: no such file, a damaged one, or one of other networks.
    """
    if not Path(path).is_file():
        what = " is a folder" if Path(path).is_dir() else ": no such file"
        raise UsageError(
            f"init={path}{what}; give a snapshot, RUN/snapshots/*.safetensors, or a checkpoint, which holds D too, "
            "RUN/checkpoints/*.safetensors"
        )
    try:
        tensors, state = checkpoint.read(Path(path))
    except checkpoint.BadCheckpointError as fault:
        if "checksum" in str(fault):
            raise UsageError(f"init={fault}: take another checkpoint of the run, or a snapshot") from None
        try:
            G = load_snapshot(path)
        except UsageError as error:
            raise UsageError(f"init={error}") from None
        found, state_dict, then = G.description["network"], G.state_dict(), G.description.get("config")
        weights = {"G": state_dict, "G_ema": state_dict}
    else:
        found, then = None, state.get("config")
        weights = {part: checkpoint.part_of(tensors, part) for part in ("G", "D", "G_ema")}
        for name, t in checkpoint.flatten(weights).items():
            if not (t.is_floating_point() and tensor_file.is_finite(t)):
                raise UsageError(
                    f"init={path} holds no finite numbers in {printable(name, 80)}: take an earlier checkpoint of the "
                    "run, or a snapshot"
                )
    told = translated(then).get("model") if isinstance(then, dict) else None
    then = told if isinstance(told, dict) else {}
    found = printable(found or then.get("name"), 40)
    if found != model.name:
        raise UsageError(f"init={path} holds {found} networks, model.name is {model.name}: take the same in both")
    return weights, _differences(then, model)


def _differences(then: dict[str, Any], model: ModelConfig) -> str:
    now = json.loads(json.dumps(dataclasses.asdict(model)))
    keys = [key for key in now if key in then and then[key] != now[key] and key not in _NO_SIZES]
    told = ", ".join(f"model.{key}={printable(json.dumps(then[key]), 60)}" for key in keys)
    return f": its run had {told}" if told else ""


def account(nets: Mapping[str, nn.Module], new: Sequence[str], source: Weights, init: str, why: str) -> list[str]:
    """How much of each network came from `init`, in numbers; a warning where that is less than half.

    Args:
        nets: {"G": ..., "D": ...}.
        new: the names, "G/..." and "D/...", of what `init` had nothing for.
        source, why: what `read` gave.

    Raises:
        UsageError: if no layer of them came from there (single biases do not count).
    """
    missing, lines, amounts, layers = set(new), [], [], 0
    for player, net in nets.items():
        everything = {f"{player}/{name}": p for name, p in net.named_parameters()}
        taken = [p for name, p in everything.items() if name not in missing]
        layers += sum(p.dim() > 1 for p in taken)
        count, total = (sum(p.numel() for p in some) for some in (taken, everything.values()))
        amounts.append(f"{count} of the {total} numbers of {player}")
        if player not in source:
            lines.append(f"note: {player} starts anew, as {init} is a snapshot: a checkpoint holds both networks")
        elif 2 * count < total:
            lines.append(f"warning: {init} gave only {count} of the {total} numbers of {player}{why}")
    if not layers:
        raise UsageError(
            f"init={init} has no layer that fits this run's networks, so there is nothing to start from{why}; take its "
            "run's model.* keys, another file, or leave init= away"
        )
    return [f"taken over from it: {', '.join(amounts)}", *lines]


# The layers with inputs of the label behind others, and which dimension these are: where the label is embedded first,
# and where it goes in as it is (ProGAN, MLP).
EMBEDDED = {"mapping.fc0.weight": 1}
PLAIN = {"synthesis.b4.first.weight": 0, "synthesis.layers.0.weight": 1, "layers.0.weight": 1, "mapping.w_avg": 0}


def adopt(net: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Give `net` every tensor of `state` that fits; returns the names that stay as they were initialised.

    A generator that becomes conditional keeps what it computed: the label's inputs get zeros.
    """
    new, ours = [], net.state_dict()
    embedding = ours.get("mapping.embed.bias")
    labels, layers = (net.c_dim, PLAIN) if embedding is None else (len(embedding), EMBEDDED)
    for name, tensor in ours.items():
        old = state.get(name)
        wider = old is not None and old.ndim == tensor.ndim and old.shape != tensor.shape and name in layers
        if old is not None and wider and "mapping.embed.weight" not in state:
            old = _with_labels(name, old, layers[name], labels)
        if old is not None and old.shape == tensor.shape:
            tensor.copy_(old)
        else:
            new.append(name)
    return new


def _with_labels(name: str, old: torch.Tensor, dim: int, labels: int) -> torch.Tensor:
    """A layer's tensor with zeros for so many inputs more, which then does what it did."""
    count, more = old.shape[dim], list(old.shape)
    more[dim] = labels
    gain = 1.0
    if name == "mapping.fc0.weight":
        gain = math.sqrt((count + labels) / count)  # the equalised learning rate divides by it
    elif name == "synthesis.b4.first.weight":
        # It does so here as well, but the norm over latent and label multiplies by the same; what is left is the
        # label's 1 beside the latent's squared length, of `count` on average.
        gain = math.sqrt((count + 1) / count)
    return torch.cat([old * gain, old.new_zeros(more)], dim)


def unused(G: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """The resolutions of a generator that `state` has and `G` has not: "b128" and so on, smallest first."""
    found = {name.split(".")[1] for name in state.keys() - G.state_dict().keys() if name.startswith("synthesis.b")}
    return sorted((name for name in found if name[1:].isdigit()), key=lambda name: int(name[1:]))
