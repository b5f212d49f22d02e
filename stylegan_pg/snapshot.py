"""Snapshots: a generator to be used, in one file without code.

A safetensors file holds G_ema's weights; its header holds the JSON description from which the network is built, so
the two can never be separated. (A checkpoint, which is for continuing a run, is another thing: see checkpoint.py.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from stylegan_pg import files
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NETWORKS

FORMAT = 1


def save_snapshot(path: Path, G_ema: torch.nn.Module, description: Mapping[str, Any]) -> None:
    """Write atomically. `description` needs `network`, `kwargs`, `alpha`; the rest of it is for people (nimg, label
    names, the run's configuration).

    Raises:
        OSError: for example when the disk is full; nothing half-written is left.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in G_ema.state_dict().items()}
    meta = {"stylegan_pg": json.dumps({"format": FORMAT, **description})}
    path.parent.mkdir(exist_ok=True)  # but no folder of a run that was moved away
    with files.whole(path, sync=True) as file:
        file.write(save(tensors, meta))


def load_snapshot(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """The generator in a snapshot, ready to use: `G(z, c, psi=0.7)` gives images [N, C, R, R] in about [-1, 1].

    z is [N, G.z_dim]; c is [N, G.c_dim], one-hot, for conditional generators. `G.description` is the snapshot's
    description (label names, nimg, configuration). Noise is the fixed one unless `noise="random"` is given. A
    snapshot taken in the middle of a fade blends as it did then.

    Raises:
        UsageError: no such file, not a snapshot, or a damaged or newer one.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a snapshot, RUN/snapshots/*.safetensors")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            meta = (file.metadata() or {}).get("stylegan_pg")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is no snapshot, or a damaged one ({error}); take another of the run's") from None
    if meta is None:
        raise UsageError(f"{path} is not a snapshot (a checkpoint?): give RUN/snapshots/*.safetensors")
    try:
        description = json.loads(meta)
        if description["format"] != FORMAT:
            raise UsageError(f"{path} has snapshot format {description['format']}, this version reads {FORMAT}: update")
        kwargs = dict(description["kwargs"])
        if torch.device(device).type == "cpu" and kwargs.get("low_precision") == "fp16":
            kwargs["low_precision"] = "fp32"  # CPUs have no fp16 convolutions
        with torch.device("meta"):  # nothing is drawn: the caller's random streams stay as they are
            G: Any = NETWORKS[description["network"]].G(**kwargs)
        G.load_state_dict(tensors, assign=True)
        G = G.to(device, torch.float32)
        alpha = float(description["alpha"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{path}: the description does not fit the weights: {reason}") from None
    G.description = description
    if description["kwargs"].get("fade"):
        G.register_forward_pre_hook(partial(_at_alpha, alpha), with_kwargs=True)
    return G.eval().requires_grad_(False)


def _at_alpha(alpha: float, _: torch.nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {"alpha": alpha, **given}
