"""The state of optimizers by parameter name: reading it from an optimizer, checking it, and restoring it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from stylegan_pg.checkpoint.tensor_file import check_tensors
from stylegan_pg.untrusted import printable

# By `optim.name`: tensors of the parameter's shape and dtype. Adam's state also has `step`, a scalar.
MOMENTS: dict[str, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "rmsprop": ("square_avg",),
    "sgd": ("momentum_buffer",),
}
STEP = "step"


class HasState(Protocol):
    """An optimizer of torch or of this package."""

    state: Any  # {parameter: {kind: tensor}}


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of the state of a parameter, for the optimizer that `optim.name` names."""
    return (*MOMENTS[name], *([STEP] if name == "adam" else []))


def optimizer_tensors(module: torch.nn.Module, optimizer: HasState) -> dict[str, torch.Tensor]:
    """An optimiser's state by parameter name: {"exp_avg/mapping.fc0.weight": ...}."""
    return {
        f"{kind}/{name}": t
        for name, p in module.named_parameters()
        for kind, t in optimizer.state.get(p, {}).items()
        if isinstance(t, torch.Tensor)
    }


def check_optimizer(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], named: str, optimizer: str = "adam"
) -> None:
    """Check that an optimiser's state, as optimizer_tensors returns it, fits its parameters: Adam's fused update reads
    both as flat memory without comparing their sizes. Names that the parameters do not have are ignored. `optimizer` is
    that of `optim.name`.

    Raises:
        ValueError: as check_tensors; also if a part of a parameter's state is missing.
    """
    parts = parts_of(optimizer)
    kinds: dict[str, set[str]] = {}
    for key, t in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters:
            continue
        kinds.setdefault(name, set()).add(kind)
        if kind not in parts:
            raise ValueError(f"{named}: {printable(key, 80)} is no part of the state of {optimizer}")
        if kind == STEP:
            if t.ndim or t.dtype != torch.float32 or not 0 <= t.item() < 1 << 53:
                raise ValueError(f"{named}: {key} is {t.dtype} {list(t.shape)}, not one number of steps")
        else:
            check_tensors({key: t}, {key: parameters[name]}, named)
    for name, found in kinds.items():
        if missing := {*parts} - found:
            raise ValueError(f"{named} lacks {sorted(missing)[0]}/{name}, but has {sorted(found)[0]}/{name}")


def restore_optimizer(
    module: torch.nn.Module, optimizer: HasState, tensors: Mapping[str, torch.Tensor], name: str = "adam"
) -> None:
    """The inverse of optimizer_tensors for the optimizer that `optim.name` names. Names that the module does not have
    are ignored. Parameters without a state in `tensors` start with none.

    Raises:
        ValueError: as check_optimizer.
    """
    parameters = dict(module.named_parameters())
    check_optimizer(tensors, parameters, "the optimiser's state", name)
    for key, t in tensors.items():
        kind, of = key.split("/", 1)
        if of in parameters:
            p = parameters[of]
            if kind in MOMENTS[name]:
                # In the parameter's own memory layout, as Adam creates it: fused updates read both as flat memory.
                value = torch.empty_like(p, dtype=t.dtype).copy_(t).detach()
            else:
                fused = getattr(optimizer, "defaults", {}).get("fused")
                value = t.to(p.device if fused else "cpu", copy=True)
            optimizer.state[p][kind] = value
