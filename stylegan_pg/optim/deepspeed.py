"""Optimizer steps by DeepSpeed, which shards Adam's moments over the ranks (ZeRO). No other module imports it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.optim import moments
from stylegan_pg.optim.optimizer_step import NetworkOptimizer, norms


def import_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for a type of device.

    Raises:
        UsageError: if it is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it even of a single process
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise UsageError(
            f"train.engine=deepspeed needs DeepSpeed, which cannot be imported here ({error}): "
            "pip install 'stylegan-pg[deepspeed]', or take train.engine=accelerate"
        ) from None
    deepspeed.utils.logger.setLevel(logging.WARNING)


MOMENTS = moments.MOMENTS["adam"]


class GradientProxy(nn.Module):
    """The module that DeepSpeed's engine trains in place of a network: it has the network's parameters as flat vectors,
    and a loss whose gradients are given gradients.

    Each step of the engine is therefore one plain forward and backward pass, which reaches all parameters in the same
    order on all ranks. The engine never meets what it does not support: forward passes outside of it, second
    derivatives, parameters that are frozen for a while, different numbers of passes on the ranks, 0-dimensional
    parameters and those in channels_last.
    """

    def __init__(self, vectors: list[nn.Parameter]):
        super().__init__()
        self.vectors = nn.ParameterList(vectors)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Gradients [n] of each vector -> a scalar, of which only the gradients matter."""
        return torch.stack([v.dot(g) for v, g in zip(self.vectors, gradients, strict=True)]).sum()


class DeepSpeedOptimizer(NetworkOptimizer):
    """An optimizer step by DeepSpeed: ZeRO 0 (each rank has all of Adam's moments), 1 (shards of the moments) or 2 (of
    the gradients, too).

    DeepSpeed receives the gradients after the last pass, so each rank holds all of its own gradients until then.
    """

    RELIEF = "raise train.zero_stage, keep the moments on the host (train.zero_offload=true)"

    def _build(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        import deepspeed

        train = self.parallel.train
        self.vectors = {name: nn.Parameter(_flat(p.detach()).clone()) for name, p in self.named.items()}
        # A shard has one step count. Parameters with different counts (with growth.optimizer=carry, those that growth
        # has added) are therefore in different groups, each of which has its own shards.
        steps = {name: float((state or {}).get(f"step/{name}", 0)) for name in self.named}
        groups = [[n for n in self.named if steps[n] == count] for count in sorted(set(steps.values()), reverse=True)]
        adam = self.rates.of_adam() | {"eps": self.parallel.optim.eps, "fused": True}
        optimizer = torch.optim.Adam([{"params": [self.vectors[n] for n in group]} for group in groups], **adam)
        zero: dict = {"stage": train.zero_stage}
        if train.zero_offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's "batch" is one set of gradients
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # its default is 1
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
        }
        module = GradientProxy([self.vectors[n] for group in groups for n in group])
        self.order = [n for group in groups for n in group]
        made: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
        self.engine, self.optimizer = made[:2]
        self.shards = list(getattr(self.optimizer, "single_partition_of_fp32_groups", []))  # none at stage 0
        for name, p in self.named.items():  # the engine does not move its vectors after this
            p.data = _shaped(self.vectors[name].detach(), p)
        if state:
            self._fill(state, {id(shard): steps[group[0]] for shard, group in zip(self.shards, groups, strict=False)})

    @property
    def host_numbers(self) -> tuple[float, ...]:
        return tuple(self.rates)

    def _use(self) -> None:
        for group in self.optimizer.param_groups:
            group.update(self.rates.of_adam())

    def close(self) -> None:
        for p in self.named.values():
            p.data = p.data.clone()
        self.engine.destroy()

    def _last(self) -> None:
        pass  # the engine sums the gradients after all passes

    def exchange(self, loss: torch.Tensor, short: bool = False, halted: torch.Tensor | None = None) -> torch.Tensor:
        return self._reports(loss, short, halted)

    def _sizes(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        # The norm of a sum is at most the sum of the norms: if these are finite, the summed gradients are, too.
        return dist.all_reduce(norms(grads))

    def _apply(self, held: torch.Tensor) -> None:
        if held.item():  # the engine has no steps that the device decides
            return
        gradients = []
        for name in self.order:
            p = self.named[name]
            flat = torch.zeros_like(self.vectors[name]) if p.grad is None else _flat(torch.empty_like(p).copy_(p.grad))
            gradients.append(flat * dist.world() if dist.world() > 1 else flat)  # the engine computes the mean
        self.engine.backward(self.engine(gradients))
        self.engine.step()

    def clip(self, limit: float, held: torch.Tensor) -> None:
        super().clip(limit, held)
        self._refresh()

    def _refresh(self) -> None:
        if self.shards:
            self.optimizer.refresh_fp32_params()

    def gather(self) -> dict[str, torch.Tensor]:
        if not self.shards:
            states = {name: self.optimizer.state.get(self.vectors[name], {}) for name in self.order}
            whole = {f"{kind}/{name}": t for name, state in states.items() for kind, t in state.items()}
        elif not self.optimizer.optimizer.state:
            return {}
        else:
            from deepspeed.utils import safe_get_full_optimizer_state as full

            whole: dict[str, Any] = {f"{k}/{n}": full(self.vectors[n], k) for k in MOMENTS for n in self.order}
            of = self._shard_of()
            whole |= {f"step/{n}": self.optimizer.optimizer.state[of[n]]["step"].clone() for n in self.order}
        return {k: t if t.dim() == 0 else _shaped(t, self.named[k.split("/", 1)[1]]) for k, t in whole.items()}

    def _shard_of(self) -> dict[str, torch.Tensor]:
        names = {id(v): name for name, v in self.vectors.items()}
        groups = zip(self.optimizer.bit16_groups, self.shards, strict=True)
        return {names[id(v)]: shard for group, shard in groups for v in group}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.close()
        self._build(tensors)

    def _fill(self, state: Mapping[str, torch.Tensor], steps: dict[int, float]) -> None:
        """Set Adam's moments before the engine has created them."""
        flat = {
            key: _flat(torch.empty_like(self.named[name], dtype=t.dtype).copy_(t))
            for key, t in state.items()
            if (name := key.split("/", 1)[1]) in self.named and t.shape == self.named[name].shape
        }
        if not self.shards:
            for name, v in self.vectors.items():
                if f"exp_avg/{name}" in flat:
                    own = {kind: flat[f"{kind}/{name}"].clone() for kind in MOMENTS}
                    self.optimizer.state[v] = {"step": state[f"step/{name}"].to(v.device, copy=True)} | own
            return
        from deepspeed.utils import safe_set_full_optimizer_state as fill

        for shard in self.shards:
            own = {kind: torch.zeros_like(shard) for kind in MOMENTS}
            count = torch.tensor(steps[id(shard)], device=shard.device)
            self.optimizer.optimizer.state[shard] = {"step": count} | own
        self.optimizer._lazy_init_hp_params_optimizer_state()  # otherwise this happens after its first step
        for kind in MOMENTS:
            for name in self.order:
                if f"{kind}/{name}" in flat:
                    fill(self.vectors[name], flat[f"{kind}/{name}"], kind)


def _flat(t: torch.Tensor) -> torch.Tensor:
    """A view [numel] of a dense tensor: its elements in the order of memory."""
    return t.as_strided([t.numel()], [1])


def _shaped(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of _flat: a view with the shape and strides of `like`."""
    return vector.as_strided(like.shape, like.stride(), vector.storage_offset())
