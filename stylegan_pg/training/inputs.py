"""From a batch of the loader to what networks take: on the device, in the networks' dtype, pictures in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stylegan_pg.data.loader.loader import Batch, read_fields
from stylegan_pg.ops import downsample2d, upsample2d
from stylegan_pg.training.train_state import TrainState


def on_device(batch: Batch, state: TrainState) -> dict[str, Any]:
    """The fields of a batch on this rank's device, as Context.field describes them."""
    if batch.ready is not None:
        torch.cuda.current_stream(state.device).wait_event(batch.ready)
    fields = batch.map(lambda t: t.to(state.device, state.dtype if t.is_floating_point() else t.dtype))
    size = batch.image.shape[2:]
    for name, t in fields.items():
        if isinstance(t, torch.Tensor) and t.ndim == 4 and name not in batch.masks:
            fields[name] = _picture(t, state, fades=t.shape[2:] == size)
    return fields


def _picture(t: torch.Tensor, state: TrainState, fades: bool) -> torch.Tensor:
    """uint8 -> [-1, 1]; within a fade blended with its own down- and up-sampled copy, as G's images are."""
    layout = torch.channels_last if state.config.train.channels_last else torch.contiguous_format
    if not t.is_floating_point():
        t = t.to(state.dtype).div(127.5).sub(1)
    t = t.contiguous(memory_format=layout)
    if fades and state.current.fade:
        f = state.D.filter
        t = torch.lerp(upsample2d(downsample2d(t, f), f), t, state.alpha)
    return t


def inputs_at(ordinals: Sequence[int], state: TrainState) -> dict[str, Any]:
    """What the system's generator takes of the images with these ordinals (System.inputs), for sample grids."""
    data, resolution = state.config.data, state.current.resolution
    others = {name: index.table(resolution) for name, index in state.index.others.items()}
    batch = read_fields(state.table, ordinals, state.system.inputs(), state.config.seed, others, data.derived)
    return on_device(batch, state)
