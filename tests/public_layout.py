"""Files in the layout of public checkpoints, for tests: pickles of real torch modules, whose classes are made here.

The classes are put into modules with the names of the originals while a file is written, and are gone afterwards, so
that reading it by way of Python's own unpickler would fail.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SOURCE = "raise SystemExit('the source text in a model file was executed')\n"


class EasyDict(dict):
    pass


class Persistent(nn.Module):
    """Pickled as the persistent classes of the public networks are: by a function, with its source text."""

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name}
        return _reconstruct_persistent_obj, (EasyDict(meta, state=self.__dict__),), None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    class_name = "Persistent"


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a pickle was executed")


def _kind(name: str, module: str) -> type[nn.Module]:
    return type(name, (nn.Module,), {"__module__": module, "__qualname__": name})


_R3GAN = {
    "R3GAN.Networks": ("Generator", "GeneratorStage", "ResidualBlock", "Convolution"),
    "R3GAN.FusedOperators": ("BiasedActivationCUDA",),
    "R3GAN.Resamplers": ("InterpolativeUpsamplerCUDA",),
}
INNER = {module: {name: _kind(name, module) for name in names} for module, names in _R3GAN.items()}


def _of_r3gan(name: str, above: str) -> nn.Module:
    """A plain module, as R3GAN has them inside of its persistent one."""
    if name in ("MainLayers", "Layers"):
        return nn.ModuleList()
    if name == "Layer":
        return nn.Conv2d(1, 1, 1, bias=False)
    if name == "EmbeddingLayer":
        return nn.Linear(1, 1, bias=False)
    kinds = {kind: cls for classes in INNER.values() for kind, cls in classes.items()}
    known = {"Model": "Generator", "Resampler": "InterpolativeUpsamplerCUDA"}
    if name.startswith("NonLinearity"):
        known[name] = "BiasedActivationCUDA"
    elif name.isdecimal():
        known[name] = "GeneratorStage" if above.endswith("MainLayers") else "ResidualBlock"
    return kinds[known.get(name, "Convolution")]()


_PLACES: dict[str, dict[str, Any]] = {
    "dnnlib": {"EasyDict": EasyDict},
    "dnnlib.util": {"EasyDict": EasyDict},
    "torch_utils": {},
    "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    "R3GAN": {},
    **INNER,
}
EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextlib.contextmanager
def originals() -> Iterator[None]:
    """A block in which modules with the names of the originals can be imported."""
    made = {}
    for name, content in _PLACES.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(content)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def module(
    state: Mapping[str, torch.Tensor],
    kwargs: Mapping[str, Any],
    class_name: str,
    *,
    parameters: set[str] | None = None,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    inner: bool = False,
) -> Any:
    """A tree of modules with the tensors of a public state dict.

    Args:
        state: of a network, under public names.
        kwargs: of its constructor.
        class_name: of its class.
        parameters: the names that are parameters; the others are buffers. None: as the public networks have it.
        attributes: {path of a module: attributes}, beside the tensors.
        inner: whether modules inside are plain ones, as in R3GAN.
    """
    top: Any = Persistent()
    top.class_name = class_name
    top._init_args, top._init_kwargs = (), EasyDict(kwargs)
    top.w_dim = np.int64(7)  # such attributes occur, and mean nothing where tensors say more
    top.sizes = np.array([3.0, 4.0])
    nodes = {"": top}

    def at(path: str) -> Any:
        if path not in nodes:
            above, _, name = path.rpartition(".")
            nodes[path] = _of_r3gan(name, above) if inner else Persistent()
            at(above).add_module(name, nodes[path])
        return nodes[path]

    for name, t in state.items():
        path, _, last = name.rpartition(".")
        buffers = ("resample_filter", "w_avg", "noise_const", "up_filter", "down_filter", "magnitude_ema", "Kernel")
        is_buffer = last in (*buffers, "freqs", "phases", "transform") if parameters is None else name not in parameters
        if is_buffer:
            at(path).register_buffer(last, t)
        else:
            at(path).register_parameter(last, nn.Parameter(t))
    for path, given in (attributes or {}).items():
        for name, value in given.items():
            setattr(at(path), name, value)
    top.register_buffer("nothing", None)
    return top.requires_grad_(False)


def augment_pipe(p: float) -> Any:
    made: Any = Persistent()
    made.class_name = "AugmentPipe"
    made.register_buffer("p", torch.tensor(p))
    made.register_buffer("Hz_geom", torch.ones(12))
    return made


def write(path: Path, content: Any, protocol: int) -> Path:
    with originals(), path.open("wb") as file:
        pickle.dump(content, file, protocol)
    return path
