"""How a training step runs on the devices there are; the only module that imports accelerate.

`dist` creates the process group and accelerate adopts it. Gradients are summed by `dist.sum_gradients`, so that every
pass, also one through a gradient, counts on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import nn

from stylegan_pg import dist
from stylegan_pg.config import Config
from stylegan_pg.errors import UsageError


class Parallel:
    """This rank's device, and the two things a player does on it: backward passes and optimiser steps."""

    def __init__(self, config: Config):
        """Joins the process group.

        Raises:
            UsageError: if the world is not the one that the launcher announced.
        """
        self.device = dist.init(config.train.device)
        if self.device.type == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate looks for devices to pair with the ranks
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no")
        if self.accelerator.num_processes != dist.world():
            raise UsageError(
                f"accelerate sees {self.accelerator.num_processes} processes, the process group {dist.world()}: "
                "start with `torchrun --nproc-per-node N` or `accelerate launch --multi_gpu --num_processes N`"
            )
        self.half_precision = config.model.low_precision == "fp16" and self.device.type == "cuda"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
        torch.backends.cudnn.benchmark = not config.train.deterministic
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Sum the gradients over the ranks, step, and clear them.

        A parameter that a pass did not reach has the gradient zero, on one rank as on many: Adam must not skip it
        here and step it there.
        """
        for p in module.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        dist.sum_gradients(module.parameters())
        if self.half_precision:
            for p in module.parameters():
                if p.grad is not None:
                    torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def adam(self, parameters: Iterable[nn.Parameter], lr: float, beta1: float, beta2: float, eps: float):
        """Adam with fused updates."""
        return torch.optim.Adam(parameters, lr=lr, betas=(float(beta1), float(beta2)), eps=eps, fused=True)
