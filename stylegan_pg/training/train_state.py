"""The two players of a phase: their networks and optimisers, how they grow, and what a checkpoint keeps of them."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from typing import Any

import torch

from stylegan_pg.checkpoint import checkpoint, tensor_file
from stylegan_pg.config import Config, TermConfig
from stylegan_pg.config.schedule import Phase, deal, lazy_ratio
from stylegan_pg.data.datasets.index import DatasetIndex, check_base
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import RunError, UsageError
from stylegan_pg.losses import TERMS
from stylegan_pg.networks import NETWORKS, NetworkShape, copy_same_names, to_channels_last
from stylegan_pg.ops import pool
from stylegan_pg.optim import moments
from stylegan_pg.optim.optimizer_step import Learner
from stylegan_pg.rng import derive, generator
from stylegan_pg.training import transfer
from stylegan_pg.training.compilation import compile_pair
from stylegan_pg.training.devices import Parallel

TRAINS = "_trains_"  # in Players.state, before the names of parameters that train.freeze_d means and `init` lacked


class Players:
    """G, D, G_ema and what trains them in one phase."""

    G: Any  # of the classes in NETWORKS, whose attributes torch.nn.Module does not declare
    D: Any
    G_ema: Any
    learners: dict[str, Learner]  # of G and D

    def __init__(self, config: Config, index: DatasetIndex, parallel: Parallel):
        """
        Raises:
            UsageError: where configuration and dataset do not fit together.
        """
        self.index, self.parallel = index, parallel
        self.device, self.dtype = parallel.device, getattr(torch, config.train.dtype)
        self.use(config)
        check_base(index, config)
        self.classes = len(index.label_names) if config.data.conditional else 0
        if config.data.conditional and not self.classes:
            raise UsageError(f"data.conditional=true, but {index.path} has no labels: pack it with --labels")
        if self.classes and (bare := int((index.table(config.resolution).label < 0).sum())):
            raise UsageError(
                f"data.conditional=true, but {bare} of {index.count} images in {index.path} have no label: pack them "
                "with --unlabelled skip, or set data.conditional=false"
            )
        self.terms = config.loss.all_terms()
        self.nimg = 0
        self.phase: Phase | None = None
        self.state: dict[str, float] = {}  # running means of terms, ADA's p, ...: numbers that a checkpoint keeps
        self.said: set[str] = set()
        self.notes: list[str] = []  # for the log

    def use(self, config: Config) -> None:
        """Take a configuration, before the first phase."""
        self.config = config
        self.model = config.model
        if self.device.type == "cpu" and self.model.low_precision == "fp16":
            self.model = dataclasses.replace(self.model, low_precision="fp32")  # CPUs have no fp16 convolutions

    # ------------------------------------------------------------------------------------------------ phases

    @property
    def alpha(self) -> float:
        return self.current.alpha(self.nimg)

    @property
    def current(self) -> Phase:
        assert self.phase is not None, "enter a phase first"
        return self.phase

    def enter(self, phase: Phase, init: transfer.Weights | None = None) -> list[str]:
        """Build the networks of a phase; they take over what the ones before them had under the same names, or what
        `init` holds. Returns the names of those parameters that `init` had nothing for."""
        old = (self.G, self.D, self.G_ema, self.learners) if self.phase else None
        pool.clear()  # results have other sizes from now on
        shape = NetworkShape(
            phase.resolution, self.config.resolution, phase.fade, self.index.channels, self.classes, phase.mbstd_group
        )
        pair = NETWORKS[self.model.name]
        self.G_kwargs = pair.g_kwargs(self.model, shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.config.seed, "init", phase.index))
            G, D = pair.G(**self.G_kwargs), pair.D(**pair.d_kwargs(self.model, shape))
        new = []
        if old:
            copy_same_names(G, old[0])
            copy_same_names(D, old[1])
        elif init:
            new = [f"G/{n}" for n in transfer.adopt(G, init["G"])]
            new += [f"D/{n}" for n in transfer.adopt(D, init.get("D", {}))]
            frozen = [name for name, _ in transfer.frozen(D, self.config.train.freeze_d)]
            lacking = [name for name in frozen if f"D/{name}" in new]
            if frozen and lacking == frozen:
                raise UsageError(
                    f"train.freeze_d={self.config.train.freeze_d} has nothing to keep: init={self.config.init} does "
                    f"not hold D/{frozen[0]} and what else it stands for; give a checkpoint, and where that is of a "
                    "lower resolution, a larger train.freeze_d"
                )
            self.state |= {TRAINS + name: 1 for name in lacking}
        self.G, self.D = (self._place(net) for net in (G, D))
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        if old:
            copy_same_names(self.G_ema, old[2])
        elif init:
            transfer.adopt(self.G_ema, init["G_ema"])
        self.learners = {"G": self._learner(self.G, "G", phase.g_lr), "D": self._learner(self.D, "D", phase.d_lr)}
        for player, learner in old[3].items() if old else ():
            if phase.optimizer == "carry":
                self.learners[player].restore(learner.gather())
            learner.close()
        self.phase = phase
        self.table: SampleTable = self.index.table(phase.resolution)
        dist.check_same([*self.G.parameters(), *self.D.parameters()], f"the networks at the start of {phase}")

        self.share = deal(phase.batch, phase.mbstd_group, dist.world())[dist.rank()]
        self.split(int(self.state.get(self._kept_micro_batch(), 0)) or phase.micro_batch)
        if self.config.train.compile and not phase.fade:  # in a fade alpha changes at every step
            self._compile()
        return new

    def frozen(self) -> dict[str, torch.nn.Parameter]:
        """What of D is not trained, by name: its highest resolutions, but for what `init` lacked."""
        found = transfer.frozen(self.D, self.config.train.freeze_d)
        return {name: p for name, p in found if TRAINS + name not in self.state}

    def split(self, micro_batch: int) -> None:
        """Deal this rank's share out to passes of `micro_batch` images, whole groups; 0: one pass."""
        passes = math.ceil(len(self.share) / micro_batch) if micro_batch else 1
        self.parts = self._passes(self.share, self.current.mbstd_group, passes)

    def _kept_micro_batch(self) -> str:
        """The name in `state` of the micro-batch that was found to fit in this phase, for what is configured."""
        return f"_micro_batch_{self.current.index}_{self.current.micro_batch}"

    def halve(self, where: str) -> None:
        """Halve the micro-batch, on all ranks, after one of them ran out of memory in `where`.

        Raises:
            RunError: with what to do, if it is one minibatch-stddev group already.
        """
        pool.clear()
        phase = self.current
        group, largest = phase.mbstd_group, len(deal(phase.batch, phase.mbstd_group, dist.world())[0])
        before = min(int(self.state.get(self._kept_micro_batch(), 0)) or phase.micro_batch or largest, largest)
        if before <= group:
            raise RunError(
                f"out of memory in {where} at nimg {self.nimg} ({phase}) with a micro-batch of {before}, which cannot "
                f"be halved: a minibatch-stddev group is {group}. Lower model.mbstd_group or model.channel_base, set "
                "model.low_precision, raise loss.pl_batch_shrink if it was path_length, or take larger devices"
            )
        after = max(before // 2 // group, 1) * group
        self.state[self._kept_micro_batch()] = after
        self.split(after)
        self.notes.append(
            f"out of memory in {where} at nimg {self.nimg} ({phase}): the micro-batch is now {after} instead of "
            f"{before}, the batch still {phase.batch}; train.micro_batch={after} avoids this"
        )

    def _compile(self) -> None:
        def trial() -> None:
            if count := max(map(len, self.parts), default=0):
                ws = torch.zeros([count, self.G.num_ws, self.G.w_dim], device=self.device, dtype=self.dtype)
                c = torch.zeros([count, self.classes], device=self.device, dtype=self.dtype) if self.classes else None
                noise = generator(self.config.seed, "compile", device=self.device)
                images = self.G.synthesis(ws, alpha=self.alpha, noise="random", generator=noise)
                self.D(images, c, alpha=self.alpha).sum().backward()

        if fault := compile_pair(self.G, self.D, trial):
            self._say_once(f"train.compile: {self.current} cannot be compiled here and runs eagerly: {fault}")
        elif self.terms:
            names = ", ".join(t.name for t in self.terms)
            self._say_once(f"train.compile: what differentiates twice cannot be compiled and runs eagerly: {names}")

    def _say_once(self, note: str) -> None:
        if dist.is_main() and note not in self.said:
            print(f"note: {note}", file=sys.stderr)
        self.said.add(note)

    def _place(self, net: torch.nn.Module) -> torch.nn.Module:
        net = net.to(self.device, self.dtype)
        return to_channels_last(net) if self.config.train.channels_last else net

    def _terms_of(self, player: str) -> list[TermConfig]:
        return [t for t in self.terms if TERMS[t.name].on == player]

    def _learner(self, net: torch.nn.Module, player: str, lr: float) -> Learner:
        ratio = lazy_ratio([t.every for t in self._terms_of(player) if t.every > 1 and not TERMS[t.name].of_scores])
        o = self.config.optim
        frozen = set(self.frozen()) if player == "D" else set()
        return self.parallel.prepare(net, frozen, lr * ratio, o.beta1**ratio, o.beta2**ratio, o.eps)

    def _passes(self, share: list[int], group: int, passes: int) -> list[list[int]]:
        """The positions within this rank's share that make up each pass: whole groups, at most `passes` times."""
        return [part for part in deal(len(share), group, min(passes, len(share) // group)) if part] if share else []

    # ----------------------------------------------------------------------------------------- for checkpoints

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint keeps of the players, by part and name. A collective call."""
        return checkpoint.flatten(
            {
                "G": self.G.state_dict(),
                "D": self.D.state_dict(),
                "G_ema": self.G_ema.state_dict(),
                "opt_G": self.learners["G"].gather(),
                "opt_D": self.learners["D"].gather(),
            }
        )

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`, in a phase of the same form.

        Raises:
            UsageError: if the networks are of another form.
        """
        nets = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
        parts = {part: checkpoint.part_of(tensors, part) for part in [*nets, "opt_G", "opt_D"]}
        try:
            for name, net in nets.items():
                tensor_file.check_tensors(parts[name], net.state_dict(), f"the checkpoint's {name}")
            for name in self.learners:
                parameters = dict(nets[name].named_parameters())
                moments.check_optimizer(parts[f"opt_{name}"], parameters, f"the checkpoint's Adam state of {name}")
        except ValueError as error:
            raise UsageError(
                f"{error}, as the configuration has it: take the configuration that the run was started with, or "
                f"restore another checkpoint in {self.config.run}"
            ) from None
        for name, net in nets.items():
            net.load_state_dict(parts[name])
        for name, learner in self.learners.items():
            learner.restore(parts[f"opt_{name}"])
