"""How a training step runs on the devices there are; the only module that imports accelerate.

`dist` creates the process group and accelerate adopts it. Gradients are summed by `dist.sum_gradients`, so that every
pass, also one through a gradient, counts on every rank.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable

import torch
from torch import nn

from stylegan_pg import dist
from stylegan_pg.config import Config
from stylegan_pg.data.stream import Batch
from stylegan_pg.errors import UsageError


class Parallel:
    """This rank's device, and the two things a player does on it: backward passes and optimiser steps."""

    def __init__(self, config: Config):
        """Joins the process group.

        Raises:
            UsageError: if the world is not the one that the launcher announced.
        """
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

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss * self.scale if self.scale != 1 else loss)

    def step(self, module: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> str:
        """Sum the gradients over the ranks, step, and clear them.

        A parameter that a pass did not reach has the gradient zero, on one rank as on many: Adam must not skip it
        here and step it there.

        Args:
            loss: this rank's, of shape []; only whether it is finite counts.

        Returns:
            "", or on all ranks alike what was not finite: "the loss" or the first such parameter's name. Then nothing
            has moved.
        """
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for _, p in named:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for _, p in named if p.grad is not None]
        total = loss.detach().to(grads[0].dtype).reshape(1).clone()
        dist.sum_gradients([*grads, total])
        if self.scale != 1:
            for grad in grads:
                grad.mul_(1 / self.scale)
        norms = torch._foreach_norm  # type: ignore[attr-defined]  # as torch's own clip_grad_norm_ does
        sizes = torch.stack([total[0], *norms(grads)]).tolist()
        fault = next((i for i, size in enumerate(sizes) if not math.isfinite(size)), None)
        if fault is None:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return "" if fault is None else ["the loss", *(name for name, _ in named)][fault]

    def adam(self, parameters: Iterable[nn.Parameter], lr: float, beta1: float, beta2: float, eps: float):
        """Adam with fused updates."""
        return torch.optim.Adam(parameters, lr=lr, betas=(float(beta1), float(beta2)), eps=eps, fused=True)
