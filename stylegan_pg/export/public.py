"""Generators as tensors under the names of the public checkpoints (networks/public_names.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import tensor_file
from stylegan_pg.errors import RunError
from stylegan_pg.export.program import FACTS, conditions, rebuilt
from stylegan_pg.inference.generate import latents
from stylegan_pg.networks.public_names import from_public, to_public

SUFFIXES = (".safetensors", ".pt")


def arguments(G: Any) -> dict[str, Any] | None:
    """The keyword arguments with which the public code builds such a generator; None where its networks take others
    (R3GAN and StyleGAN3, whose layers have defaults of their own there, are described by the snapshot's kwargs)."""
    kwargs = G.description["kwargs"]
    if G.description["network"] != "stylegan2":
        return None
    synthesis = {
        "channel_base": G.form.channel_base,
        "channel_max": G.form.channel_max,
        "num_fp16_res": 0,
        "conv_clamp": G.form.conv_clamp,
        "architecture": kwargs.get("architecture", "skip"),
        "resample_filter": list(kwargs.get("resample_filter", (1, 3, 3, 1))),
        "use_noise": kwargs.get("use_noise", True),
    }
    return {
        "z_dim": G.z_dim,
        "c_dim": G.c_dim,
        "w_dim": G.w_dim,
        "img_resolution": G.resolution,
        "img_channels": G.img_channels,
        "mapping_kwargs": {"num_layers": kwargs.get("mapping_layers", 8)},
        "synthesis_kwargs": synthesis,
    }


def write(G: Any, path: Path) -> None:
    """Write a loaded snapshot as .safetensors, with the public arguments as the metadata `init_kwargs`, or else as a
    file of torch.save that holds a flat dictionary of tensors.

    Raises:
        UsageError: the public layout cannot express the network.
    """
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in to_public(rebuilt(G, "fp32")).items()}
    if path.suffix != ".safetensors":
        torch.save(tensors, path)
        return
    metadata = {"format": "pt", FACTS: json.dumps(G.description)}
    if (given := arguments(G)) is not None:
        metadata["init_kwargs"] = json.dumps(given)
    with open(path, "wb") as file:
        tensor_file.write(file, tensors, metadata)


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `write` has written, under their public names."""
    if path.suffix != ".safetensors":
        return torch.load(path, weights_only=True)
    with tensor_file.opened(path) as file:
        return file.read()


@torch.no_grad()
def check(G: Any, path: Path) -> None:
    """Read a file back into a new network, whose tensors and images must be the snapshot's, bit for bit.

    Raises:
        RunError: they differ.
    """
    expected = rebuilt(G, "fp32")
    network = rebuilt(G, "fp32")
    for t in network.state_dict().values():
        t.zero_()
    network.load_state_dict(from_public(read(path)))
    different = [n for n, t in expected.state_dict().items() if not torch.equal(t, network.state_dict()[n])]
    z, c = latents([0, 1], G.z_dim), conditions(G, 2)
    if different or not torch.equal(network(z, c), expected(z, c)):
        where = f" in {different[0]}" if different else ""
        raise RunError(f"{path.name} differs from the snapshot when it is read back{where}, and was removed")
