"""How a training step runs on the devices there are; the only module that imports accelerate and DeepSpeed.

`dist` creates the process group and both adopt it. A player's passes gather gradients in its network, however many
passes there are and whatever they differentiate twice; then `Learner.step` sums them over the ranks and moves the
weights. Two engines do that: our own sums (accelerate), and DeepSpeed, which keeps Adam's moments in shards.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stylegan_pg import checkpoint, dist
from stylegan_pg.config import Config
from stylegan_pg.data.stream import Batch
from stylegan_pg.errors import UsageError
from stylegan_pg.gradients import GradientSum

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's
OUT_OF_MEMORY = "out of memory"  # what Learner.step returns if a rank was
# What errors say that have no type of their own: of the host, and of libraries that get memory beside PyTorch's.
NO_MEMORY = ("DefaultCPUAllocator: can't allocate", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no room for a tensor."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in NO_MEMORY)


class Parallel:
    """This rank's device and the engine of the run."""

    def __init__(self, config: Config):
        """Joins the process group.

        Raises:
            UsageError: if the world is not the one that the launcher announced, or DeepSpeed is not installed.
        """
        self.train = config.train
        self.device = dist.init(config.train.device, config.train.timeout_sec, config.train.join_sec)
        if self.device.type == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate looks for devices to pair with the ranks
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
        if self.accelerator.num_processes != dist.world():
            raise UsageError(
                f"accelerate sees {self.accelerator.num_processes} processes, the process group {dist.world()}: "
                "start with `torchrun --nproc-per-node N` or `accelerate launch --multi_gpu --num_processes N`"
            )
        with dist.together():  # whatever this rank's engine: that all have the same one is looked at later (peers.py)
            if config.train.engine == "deepspeed":
                _import_deepspeed(self.device)
        if config.train.engine == "deepspeed":
            dist.ensure_group()
        self.copies: torch.cuda.Stream | None = None  # where batches travel to the device
        self.scale = 1.0  # of losses, so that small gradients survive fp16; a power of two
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
        torch.backends.cudnn.benchmark = not config.train.deterministic
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def send(self, batch: Batch) -> Batch:
        """Start to copy a batch to this rank's device, beside what that is doing."""
        if self.device.type != "cuda" or batch.fault:
            return batch
        self.copies = self.copies or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.copies):
            sent = [t if t is None else t.to(self.device, non_blocking=True) for t in (batch.image, batch.condition)]
            ready = self.copies.record_event()
        for t in sent:
            if t is not None:
                t.record_stream(torch.cuda.current_stream(self.device))  # where it will be used
        image, condition = sent
        assert image is not None
        return dataclasses.replace(batch, image=image, condition=condition, ready=ready)

    def prepare(self, net: nn.Module, frozen: set[str], lr: float, beta1: float, beta2: float, eps: float) -> Learner:
        """What trains a network with Adam, except for the parameters whose names are in `frozen`. A collective call,
        on equal networks."""
        adam = {"lr": lr, "betas": (float(beta1), float(beta2)), "eps": eps, "fused": True}
        kind = ShardedLearner if self.train.engine == "deepspeed" else Learner
        return kind(self, net, {name: p for name, p in net.named_parameters() if name not in frozen}, adam)


class Learner:
    """A network and its optimiser: gradients summed by ourselves, each rank with all of Adam's moments.

    One step is `begin`, as many `backward` as were announced, on any number of forward passes, and `step`.
    """

    optimizer: Any

    def __init__(self, parallel: Parallel, net: nn.Module, named: dict[str, nn.Parameter], adam: dict):
        self.parallel, self.net, self.named, self.adam = parallel, net, named, adam
        self.kind, self.left = "", 0
        self._build()

    def _build(self) -> None:
        self.optimizer = torch.optim.Adam(self.named.values(), **self.adam)
        self.sums = GradientSum(list(self.named.values()), self.parallel.train.bucket_mib)

    def close(self) -> None:
        """Let go of the network, before another learner takes it or its successor."""
        self.sums.close()

    def begin(self, kind: str, passes: int) -> None:
        """Start afresh for a step of a kind, the same on all ranks, with so many backward passes on this rank."""
        self._clear()
        self.kind, self.left = kind, passes

    def _clear(self) -> None:
        for p in self.named.values():
            p.grad = None

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss of shape [], which is this rank's part of the sum over all of them."""
        assert self.left > 0, "more backward passes than were announced"
        self.left -= 1
        if self.left == 0:
            self._last()
        scale = self.parallel.scale
        self.parallel.accelerator.backward(loss * scale if scale != 1 else loss)

    def _last(self) -> None:
        if dist.world() > 1:
            self.sums.arm(self.kind)

    def step(self, loss: torch.Tensor, short: bool = False) -> str:
        """Sum the gradients over the ranks, step, and clear them. A collective call.

        A parameter that a pass did not reach has the gradient zero, on one rank as on many: Adam must not skip it
        here and step it there.

        Args:
            loss: this rank's, of shape []; only whether it is finite counts.
            short: this rank ran out of memory before it had made all of its passes.

        Returns:
            "", or on all ranks alike why nothing has moved: OUT_OF_MEMORY if any rank was short, else what was not
            finite: "the loss" or the first such parameter's name.

        Raises:
            PeersLost: another rank is gone.
        """
        self.sums.finish(self.kind)
        named, grads = self._trained()
        unscale(grads, self.parallel.scale)
        return self._move(loss, short, named, norms(grads))

    def _trained(self) -> tuple[list[str], list[torch.Tensor]]:
        """Names and gradients of what is not frozen at the moment; zeros where no pass has been."""
        trained = {name: p for name, p in self.named.items() if p.requires_grad}
        for p in trained.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return list(trained), [p.grad for p in trained.values() if p.grad is not None]

    def _move(self, loss: torch.Tensor, short: bool, names: list[str], sizes: torch.Tensor) -> str:
        """Make the optimiser's step, unless something speaks against it on any rank."""
        told = dist.all_reduce(torch.stack([loss.detach().to(sizes.dtype).reshape([]), sizes.new_tensor(float(short))]))
        loss_sum, ran_short, *values = torch.cat([told, sizes]).tolist()
        fault = OUT_OF_MEMORY if ran_short else "" if math.isfinite(loss_sum) else "the loss"
        if not fault:
            fault = next((name for name, v in zip(names, values, strict=True) if not math.isfinite(v)), "")
        if not fault:
            self._apply()
        self._clear()
        return fault

    def _apply(self) -> None:
        self.optimizer.step()

    def clip(self, limit: float) -> None:
        """Bring the weights that are not frozen into [-limit, limit]."""
        with torch.no_grad():
            for p in self.named.values():
                if p.requires_grad:
                    p.clamp_(-limit, limit)

    def gather(self) -> dict[str, torch.Tensor]:
        """Adam's state by parameter name ("exp_avg/mapping.fc0.weight"), whole, on every rank; those tensors may be
        the ones in use. The same for all engines and any world. A collective call."""
        return checkpoint.optimizer_tensors(self.net, self.optimizer)

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `gather`, and to be called whenever weights were changed from outside. Names that the
        network does not have are passed over, those that the tensors lack start afresh."""
        checkpoint.restore_optimizer(self.net, self.optimizer, tensors)


def unscale(grads: Sequence[torch.Tensor], scale: float) -> None:
    if scale != 1:
        for grad in grads:
            grad.mul_(1 / scale)


def norms(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n] of n gradients."""
    return torch.stack(torch._foreach_norm(grads))  # type: ignore[attr-defined]  # as torch's clip_grad_norm_ does


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


def _import_deepspeed(device: torch.device) -> None:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed demands of a single process too
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise UsageError(
            f"train.engine=deepspeed needs DeepSpeed, which cannot be imported here ({error}): "
            "pip install 'stylegan-pg[deepspeed]', or take train.engine=accelerate"
        ) from None
    deepspeed.utils.logger.setLevel(logging.WARNING)


class HandOver(nn.Module):
    """All that DeepSpeed gets to see of a network: its parameters as flat vectors, and a loss whose gradients are the
    ones that are handed over.

    So every forward and backward pass of its engine is of one plain form, reaches every parameter in the same order on
    all ranks and comes once per step; what its engine does not survive (forwards outside of it, passes that
    differentiate twice, unfrozen neighbours, unequal numbers of passes on the ranks, 0-dimensional and channels-last
    parameters) never comes near it.
    """

    def __init__(self, vectors: list[nn.Parameter]):
        super().__init__()
        self.vectors = nn.ParameterList(vectors)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Gradients [n] of each vector -> a scalar whose value does not matter."""
        return torch.stack([v.dot(g) for v, g in zip(self.vectors, gradients, strict=True)]).sum()


class ShardedLearner(Learner):
    """The same by DeepSpeed: ZeRO 0 (all of Adam everywhere), 1 (its moments in shards), 2 (gradients too).

    Gradients are handed over after the last pass, so until then each rank holds all of its own.
    """

    def _build(self, state: Mapping[str, torch.Tensor] | None = None) -> None:
        import deepspeed

        train = self.parallel.train
        self.vectors = {name: nn.Parameter(_flat(p.detach()).clone()) for name, p in self.named.items()}
        # A shard has one step count, so parameters of different ones (those that growth has added, where
        # growth.optimizer=carry) go into groups, each with its own shards.
        steps = {name: float((state or {}).get(f"step/{name}", 0)) for name in self.named}
        groups = [[n for n in self.named if steps[n] == count] for count in sorted(set(steps.values()), reverse=True)]
        optimizer = torch.optim.Adam([{"params": [self.vectors[n] for n in group]} for group in groups], **self.adam)
        zero: dict = {"stage": train.zero_stage}
        if train.zero_offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # of its own "batches", the hand-overs
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # its default is 1
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
        }
        module = HandOver([self.vectors[n] for group in groups for n in group])
        self.order = [n for group in groups for n in group]
        made: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
        self.engine, self.optimizer = made[:2]
        self.shards = list(getattr(self.optimizer, "single_partition_of_fp32_groups", []))  # none at stage 0
        for name, p in self.named.items():  # the engine keeps its vectors where they are from now on
            p.data = _shaped(self.vectors[name].detach(), p)
        if state:
            self._fill(state, {id(shard): steps[group[0]] for shard, group in zip(self.shards, groups, strict=False)})

    def close(self) -> None:
        for p in self.named.values():
            p.data = p.data.clone()
        self.engine.destroy()

    def _last(self) -> None:
        pass  # the sum is the engine's, and comes after the passes

    def step(self, loss: torch.Tensor, short: bool = False) -> str:
        names, grads = self._trained()
        unscale(grads, self.parallel.scale)
        # No sum of gradients is longer than the sum of their lengths: what is finite here is finite behind the sum.
        return self._move(loss, short, names, dist.all_reduce(norms(grads)))

    def _apply(self) -> None:
        gradients = []
        for name in self.order:
            p = self.named[name]
            flat = torch.zeros_like(self.vectors[name]) if p.grad is None else _flat(torch.empty_like(p).copy_(p.grad))
            gradients.append(flat * dist.world() if dist.world() > 1 else flat)  # the engine takes the mean
        self.engine.backward(self.engine(gradients))
        self.engine.step()

    def clip(self, limit: float) -> None:
        super().clip(limit)
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
        """Adam's moments, which the engine has not made yet."""
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
        self.optimizer._lazy_init_hp_params_optimizer_state()  # else it does that after its first step
        for kind in MOMENTS:
            for name in self.order:
                if f"{kind}/{name}" in flat:
                    fill(self.vectors[name], flat[f"{kind}/{name}"], kind)


def _flat(t: torch.Tensor) -> torch.Tensor:
    """[numel]: the elements of a dense tensor in the order in which they lie in memory, a view."""
    return t.as_strided([t.numel()], [1])


def _shaped(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of _flat, a view of shape and strides of `like`."""
    return vector.as_strided(like.shape, like.stride(), vector.storage_offset())
