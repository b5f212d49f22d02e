"""The devices that a run has: joins the process group, sends batches, and chooses the engine that trains a network.

`dist` creates the process group, and accelerate and DeepSpeed adopt it. Only this module and monitoring/trackers.py
import accelerate.
"""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import nn

from stylegan_pg.config import Config
from stylegan_pg.data.loader.loader import Batch
from stylegan_pg.distributed import environment, launcher
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.optim.adam import Rates
from stylegan_pg.optim.deepspeed import DeepSpeedOptimizer, import_deepspeed
from stylegan_pg.optim.optimizer_step import NetworkOptimizer


class Devices:
    """This rank's device and the engine of the run."""

    def __init__(self, config: Config):
        """Joins the process group.

        Raises:
            UsageError: if the world is not the one that the launcher announced, or DeepSpeed is not installed.
        """
        self.train = config.train
        self.device = dist.init(config.train.device, config.train.timeout_sec, config.train.join_sec)
        cpu = self.device.type == "cpu"
        with environment.only_the_place(launcher.place(), cpu=cpu):
            from accelerate import Accelerator
            from accelerate.utils import GradientAccumulationPlugin

            whole = GradientAccumulationPlugin(num_steps=1)  # micro-batches are divided by ourselves
            self.accelerator = Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_plugin=whole)
        if self.accelerator.num_processes != dist.world():
            raise UsageError(
                f"accelerate sees {self.accelerator.num_processes} processes, the process group {dist.world()}: "
                "start with `torchrun --nproc-per-node N` or `accelerate launch --multi_gpu --num_processes N`"
            )
        with dist.together():  # consistency.py checks later that all ranks have the same engine
            if config.train.engine == "deepspeed":
                import_deepspeed(self.device)
        if config.train.engine == "deepspeed":
            dist.ensure_group()
        self.copies: torch.cuda.Stream | None = None  # where batches travel to the device
        self.optim = config.optim
        self.scale: torch.Tensor | None = None  # of losses, see `use_scale`; None: 1
        self.given_scale = 1.0
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.train.tf32
        torch.backends.cudnn.benchmark = not config.train.deterministic
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def send(self, batch: Batch) -> Batch:
        """Start to copy a batch to this rank's device, in a stream beside the computation."""
        if self.device.type != "cuda" or batch.fault:
            return batch
        self.copies = self.copies or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.copies):
            sent = batch.map(lambda t: t.to(self.device, non_blocking=True))
            ready = self.copies.record_event()
        for t in sent.values():
            if isinstance(t, torch.Tensor):
                t.record_stream(torch.cuda.current_stream(self.device))  # where it will be used
        return dataclasses.replace(batch, fields=sent, ready=ready)

    def use_scale(self, scale: float) -> None:
        """Multiply losses by a number, so that small gradients survive fp16. It is on the device, in memory that stays
        the same, so that it may change between replays of a captured step."""
        if self.scale is None and scale != 1:
            self.scale = torch.full([], scale, dtype=getattr(torch, self.train.dtype), device=self.device)
        elif self.scale is not None and scale != self.given_scale:
            self.scale.fill_(scale)
        self.given_scale = scale

    def prepare(self, net: nn.Module, frozen: set[str], rates: Rates, beta2_moves: bool) -> NetworkOptimizer:
        """What trains a network, except for the parameters whose names are in `frozen`. `beta2_moves`: whether
        `rates.beta2` will change often. A collective call, on equal networks."""
        kind = DeepSpeedOptimizer if self.train.engine == "deepspeed" else NetworkOptimizer
        named = {name: p for name, p in net.named_parameters() if name not in frozen}
        return kind(self, net, named, rates, beta2_moves)
