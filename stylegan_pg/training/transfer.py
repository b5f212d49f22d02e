"""Transfer learning (`init`): the weights of another run, or of another program, as the start of a new one.

Tensors with the same name and shape are taken over, so a network of another resolution takes the blocks that both have.
"""

from __future__ import annotations

import dataclasses
import json
import logging
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
from stylegan_pg.interchange import importing
from stylegan_pg.untrusted import is_number, printable

log = logging.getLogger(__name__)

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


def read(path: str, model: ModelConfig) -> tuple[Weights, str, float | None]:
    """Read the weights of a checkpoint or snapshot, or of a file that `importing.read` knows.

    Returns:
        {"G", "D", "G_ema": state dict}; of a snapshot without "D", and with G_ema's weights as "G". How the keys
        model.* of the file's run differ, as the end of a sentence, "" if they do not. And the probability of
        augmentation that ADA had reached, None if the file does not say.

    Args:
        path: RUN/checkpoints/*.safetensors, RUN/snapshots/*.safetensors, or a public checkpoint.
        model: of the run that starts; its name must be that of the file.

    Raises:
        UsageError: no such file, a damaged one, or one of other networks.
    """
    if not Path(path).is_file():
        what = " is a folder" if Path(path).is_dir() else ": no such file"
        raise UsageError(
            f"init={path}{what}; give a snapshot, RUN/snapshots/*.safetensors, or a checkpoint, which holds D too, "
            "RUN/checkpoints/*.safetensors; or a public .pkl"
        )
    try:
        foreign = importing.is_foreign(path)
    except OSError as error:
        raise UsageError(f"init={path} cannot be read: {printable(error)}") from None
    if foreign:
        return _of_another_program(path, model)
    p = None
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
        found, then, system = None, state.get("config"), state.get("system")
        p = system.get("augment_p") if isinstance(system, dict) else None
        weights = {part: checkpoint.part_of(tensors, part) for part in ("G", "D", "G_ema")}
        for name, t in checkpoint.flatten(weights).items():
            if not (t.is_floating_point() and tensor_file.is_finite(t)):
                raise UsageError(
                    f"init={path} holds no finite numbers in {printable(name, 80)}: take an earlier checkpoint of the "
                    "run, or a snapshot"
                )
    stored = translated(then).get("model") if isinstance(then, dict) else None
    then = stored if isinstance(stored, dict) else {}
    found = printable(found or then.get("name"), 40)
    _check_family(path, found, model)
    return weights, _differences(then, model), p if is_number(p, 0, 1) else None


def _check_family(path: str, found: str, model: ModelConfig) -> None:
    if found != model.name:
        raise UsageError(f"init={path} holds {found} networks, model.name is {model.name}: take the same in both")


def _of_another_program(path: str, model: ModelConfig) -> tuple[Weights, str, float | None]:
    try:
        file = importing.read(path)
        weights, found, kwargs = importing.weights(file)
    except UsageError as error:
        raise UsageError(f"init={error}") from None
    _check_family(path, found, model)
    keys = {"architecture": "g_architecture", "use_noise": "noise", "embedding": "g_embedding"}
    then = {keys.get(name, name): value for name, value in kwargs.items()}
    if "radial" in kwargs:
        then["equivariance"] = "rotation" if kwargs["radial"] else "translation"
    if model.name == "r3gan":
        then = {key: then[key] for key in ("z_dim", "expansion", "g_embedding")}
    differences = _differences(then, model).replace(": its run had ", " and ")
    return weights, f": its resolution is {kwargs['resolution']}{differences}", file.found.augment_p


def _differences(then: dict[str, Any], model: ModelConfig) -> str:
    now = json.loads(json.dumps(dataclasses.asdict(model)))
    keys = [key for key in now if key in then and then[key] != now[key] and key not in _NO_SIZES]
    values = ", ".join(f"model.{key}={printable(json.dumps(then[key]), 60)}" for key in keys)
    return f": its run had {values}" if values else ""


def account(
    nets: Mapping[str, nn.Module], new: Sequence[str], source: Weights, init: str, why: str
) -> tuple[list[str], list[str]]:
    """Return (lines, warnings) for the log: how many numbers of each network came from `init`, with a warning if these
    are fewer than half.

    Args:
        nets: {"G": ..., "D": ...}.
        new: the names, "G/..." and "D/...", of the parameters that `init` did not hold.
        source, why: what `read` returned.

    Raises:
        UsageError: if no layer came from `init` (biases alone do not count).
    """
    missing, lines, warnings, amounts, layers = set(new), [], [], [], 0
    for player, net in nets.items():
        everything = {f"{player}/{name}": p for name, p in net.named_parameters()}
        taken = [p for name, p in everything.items() if name not in missing]
        layers += sum(p.dim() > 1 for p in taken)
        count, total = (sum(p.numel() for p in some) for some in (taken, everything.values()))
        amounts.append(f"{count} of the {total} numbers of {player}")
        if player not in source:
            lines.append(f"note: {player} starts anew, as {init} is a snapshot: a checkpoint holds both networks")
        elif 2 * count < total:
            warnings.append(f"{init} gave only {count} of the {total} numbers of {player}{why}")
    if not layers:
        raise UsageError(
            f"init={init} has no layer that fits this run's networks, so there is nothing to start from{why}; take its "
            "run's model.* keys, another file, or leave init= away"
        )
    return [f"taken over from it: {', '.join(amounts)}", *lines], warnings


def log_account(
    nets: Mapping[str, nn.Module], new: Sequence[str], source: Weights, init: str, why: str, later: bool
) -> None:
    """Log what came from `init` and what did not; `later`: whether the networks will still grow. See `account`."""
    lines, warnings = account(nets, new, source, init, why)
    for line in [f"started from {init}; new: {', '.join(new) or 'nothing'}", *lines]:
        log.info(line)
    for warning in warnings:
        log.warning(warning)
    if names := unused(nets["G"], source["G"]):
        log.info(f"not used of it: {', '.join(names)}{'; what grows later is drawn anew' if later else ''}")


# Layers that take the label beside other inputs, and the dimension of their inputs: for networks that embed the label
# first, and for those that do not (ProGAN, MLP).
EMBEDDINGS = ("mapping.embed.weight", "embed.weight")  # [numbers, c_dim]: of StyleGANs, of R3GAN
EMBEDDED = {"mapping.fc0.weight": 1, "b4.first.linear.weight": 1}
PLAIN = {"synthesis.b4.first.weight": 0, "synthesis.layers.0.weight": 1, "layers.0.weight": 1, "mapping.w_avg": 0}


def adopt(net: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Copy every tensor of `state` that fits into `net`; return the names of those that keep their initialisation.

    A generator that becomes conditional computes the same images as before, because the label's inputs get zeros.
    """
    new, ours = [], net.state_dict()
    embedding = next((ours[name] for name in EMBEDDINGS if name in ours), None)
    labels, layers = (net.c_dim, PLAIN) if embedding is None else (len(embedding), EMBEDDED)
    for name, tensor in ours.items():
        old = state.get(name)
        wider = old is not None and old.ndim == tensor.ndim and old.shape != tensor.shape and name in layers
        if old is not None and wider and not any(name in state for name in EMBEDDINGS):
            old = _with_labels(name, old, layers[name], labels)
        if old is not None and old.shape == tensor.shape:
            tensor.copy_(old)
        else:
            new.append(name)
    return new


def _with_labels(name: str, old: torch.Tensor, dim: int, labels: int) -> torch.Tensor:
    """A layer's tensor with zeros for `labels` further inputs, scaled so that the layer computes the same as before."""
    count, more = old.shape[dim], list(old.shape)
    more[dim] = labels
    gain = 1.0
    if name == "mapping.fc0.weight":
        gain = math.sqrt((count + labels) / count)  # because the equalised learning rate divides by this root
    elif name == "synthesis.b4.first.weight":
        # The equalised learning rate and the norm over latent and label cancel here. What remains is the label's 1
        # beside the squared length of the latent, which is `count` on average.
        gain = math.sqrt((count + 1) / count)
    return torch.cat([old * gain, old.new_zeros(more)], dim)


def unused(G: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """The resolutions of a generator that are in `state` and not in `G`, such as "b128", smallest first."""
    new = (name.removeprefix("synthesis.") for name in state.keys() - G.state_dict().keys())
    found = {name.split(".")[0] for name in new if name.startswith("b")}
    return sorted((name for name in found if name[1:].isdigit()), key=lambda name: int(name[1:]))
