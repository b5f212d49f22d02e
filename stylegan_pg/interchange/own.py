"""Generators of this package's own files: a snapshot as it is, and G or G_ema of a checkpoint."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint import checkpoint, tensor_file
from stylegan_pg.checkpoint.snapshot import load_snapshot
from stylegan_pg.config import Config
from stylegan_pg.config.loading import load_config
from stylegan_pg.config.schedule import phases, size_at
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NETWORKS, NetworkShape
from stylegan_pg.untrusted import printable, whole_number

REMEDY = "give a checkpoint of a run, RUN/checkpoints/*.safetensors, or a snapshot, RUN/snapshots/*.safetensors"


def generator(path: Path, part: str) -> tuple[Any, dict[str, Any], list[str]]:
    """A generator, the description of its snapshot, and lines that say what the file is.

    Args:
        path: of a checkpoint or snapshot.
        part: "G_ema" or "G"; a snapshot has the first one only.

    Raises:
        UsageError: the file is damaged, or does not hold this generator.
        RunError: it cannot be read at the moment.
    """
    shown = printable(path)
    try:
        tensors, state = checkpoint.read(path)
    except checkpoint.BadCheckpointError as fault:
        if "checksum" in str(fault):
            raise UsageError(f"{fault}: take another checkpoint of the run") from None
        G = load_snapshot(path)
        if part != "G_ema":
            raise UsageError(f"{shown} is a snapshot, which holds G_ema and no {part}: give a checkpoint") from None
        return G, G.description, [f"{shown}: a snapshot already, of {G.description['network']}"]
    weights = checkpoint.part_of(tensors, part)
    try:
        config = _stored_config(state["config"])
        plan = phases(config)
        phase = plan[whole_number(state["phase"], 0, len(plan) - 1, "its phase", REMEDY)]
        nimg = whole_number(state["nimg"], phase.start, 1 << 53, "its nimg", REMEDY)
        shape = NetworkShape(
            phase.resolution,
            config.resolution,
            phase.fade,
            _image_channels(weights, config, phase.resolution),
            _condition_size(weights, config),
            phase.mbstd_group,
        )
        kwargs = NETWORKS[config.model.name].g_kwargs(config.model, shape)
        with torch.device("meta"):
            G = NETWORKS[config.model.name].G(**kwargs)
        tensor_file.check_tensors(weights, G.state_dict(), f"its {part}")
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, UsageError) as error:
        raise UsageError(
            f"{shown}: its networks cannot be built from its configuration ({printable(error)}); {REMEDY}"
        ) from None
    G.load_state_dict(weights, assign=True)
    about = {
        "network": config.model.name,
        "kwargs": kwargs,
        "alpha": phase.alpha(nimg),
        "nimg": nimg,
        "label_names": [],
    }
    lines = [f"{shown}: a checkpoint of {config.model.name} at {phase}, {nimg} images shown"]
    return G.eval(), about | {"config": state["config"]}, lines


def _stored_config(stored: Mapping[str, Any]) -> Config:
    """The configuration of a checkpoint, checked like that of a run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(json.dumps(stored))  # JSON is YAML, too
        return load_config(file)


def _image_channels(weights: Mapping[str, torch.Tensor], config: Config, resolution: int) -> int:
    for name in (f"synthesis.b{resolution}.torgb.bias", f"b{resolution}.torgb.weight"):
        if name in weights:
            return len(weights[name])
    numbered = re.compile(r"synthesis\.(?:L|layers\.)(\d+)[_\d]*\.bias")  # of StyleGAN3, of perceptrons
    outputs = {int(match[1]): len(t) for name, t in weights.items() if (match := numbered.fullmatch(name))}
    last = outputs[max(outputs)]
    rows, columns = size_at(resolution, config.model.base)
    return last if config.model.name == "stylegan3" else last // (rows * columns)


def _condition_size(weights: Mapping[str, torch.Tensor], config: Config) -> int:
    for name in ("mapping.embed.weight", "embed.weight"):
        if name in weights:
            return weights[name].shape[1]
    for name, dim in {"synthesis.b4.first.weight": 0, "synthesis.layers.0.weight": 1}.items():  # beside the latent
        if name in weights:
            return weights[name].shape[dim] - config.model.z_dim
    return 0
