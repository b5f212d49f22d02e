"""Small generators and their snapshots, for tests of snapshots and sampling."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stylegan_pg.__main__ import main
from stylegan_pg.checkpoint.snapshot import save_snapshot
from stylegan_pg.config import MODELS
from stylegan_pg.config.families import fields_of
from stylegan_pg.networks import NETWORKS, NetworkShape

NAMES = ["cat", "dog", "owl"]


def built(
    resolution: int = 16, *, name: str = "stylegan2", fade: bool = False, c_dim: int = 0, **model
) -> tuple[Any, dict[str, Any]]:
    """Return a generator whose weights all differ from their initial values, and its description."""
    small = {"z_dim": 8, "w_dim": 8, "mapping_layers": 2, "channel_base": 64, "channel_max": 8}
    small = {key: value for key, value in small.items() if key in fields_of(MODELS[name])}
    config = MODELS[name](**{**small, **model})
    pair = NETWORKS[name]
    kwargs = pair.g_kwargs(config, NetworkShape(resolution, 16, fade, 3, c_dim, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        G = pair.G(**kwargs)
        for tensor in G.state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape)
    names = NAMES[:c_dim]
    return G.eval(), {"network": name, "kwargs": kwargs, "alpha": 1.0, "nimg": 5000, "label_names": names}


def saved(path: Path, changes: dict[str, Any] | None = None, **how) -> tuple[Any, Path]:
    G, description = built(**how)
    save_snapshot(path, G, {**description, **(changes or {})})
    return G, path


def command(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    """Return the exit code, stdout and stderr of the command. It runs in this process, which avoids importing torch
    each time."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["stylegan-pg", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return (end.value.code or 0, *capsys.readouterr())  # type: ignore[return-value]  # exits with a number


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def near(a: np.ndarray, b: np.ndarray) -> None:
    """Check equality up to one grey level, because batches of other sizes may be rounded differently."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
