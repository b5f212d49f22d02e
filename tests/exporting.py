"""Snapshots of generators with random weights at any size, for tests of exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from stylegan_pg.checkpoint.snapshot import save_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.config.families import fields_of
from stylegan_pg.networks import NETWORKS, NetworkShape

SMALL = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
NAMES = ["cat", "dog", '<owl> & "co"', "эму"]
VECTORS = [[0.5, -1.0, 2.0], [1.5, 0.25, 0.0]]


def snapshot(
    path: Path,
    name: str = "stylegan2",
    resolution: int = 16,
    *,
    classes: int = 0,
    vectors: bool = False,
    channels: int = 3,
    fade: bool = False,
    small: bool = True,
    seed: int = 0,
    more: dict[str, Any] | None = None,
    **model: Any,
) -> Path:
    """Write a snapshot whose weights, biases, noise strengths and w_avg all are random, and return its path.

    Activations keep about their variance in networks of any depth. `small` says whether the network has few
    channels; `more` are arguments of the generator that no configuration sets.
    """
    known = fields_of(MODELS[name])
    given = {**(SMALL if small else {}), **model}
    config = MODELS[name](**{key: value for key, value in given.items() if key in known})
    c_dim = len(VECTORS[0]) if vectors else classes
    kwargs = NETWORKS[name].g_kwargs(config, NetworkShape(resolution, resolution, fade, channels, c_dim, 4))
    kwargs |= more or {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        G = NETWORKS[name].G(**kwargs)
        for key, t in G.state_dict().items():
            if not t.is_floating_point():
                continue  # the count of batch normalisation
            if t.ndim == 0:
                t += 0.2 * torch.rand([])
            elif t.ndim > 1 and not t.any():
                t += torch.randn(t.shape) / math.sqrt(t[0].numel())
            elif not key.endswith(("transform", "freqs")):
                t += 0.1 * torch.randn(t.shape)
    description = {"network": name, "kwargs": kwargs, "alpha": 0.375 if fade else 1.0, "nimg": 5000}
    if vectors:
        description |= {"condition": "pose", "conditions": VECTORS}
    save_snapshot(path, G.eval(), {**description, "label_names": NAMES[:classes]})
    return path
