"""The state of training: networks, G_ema and optimizers of one phase, their growth, and the content of checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from stylegan_pg.checkpoint import checkpoint, tensor_file
from stylegan_pg.config import Config, curves
from stylegan_pg.config.schedule import Phase, lazy_ratio, learning_rate, number
from stylegan_pg.data.conditions import Conditions, condition_field, condition_size, conditions_of
from stylegan_pg.data.datasets.index import DatasetIndex, check_base
from stylegan_pg.data.datasets.table import SampleTable
from stylegan_pg.data.loader.reading import read_batch
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.errors import UsageError
from stylegan_pg.networks import NetworkShape, copy_same_names, to_channels_last
from stylegan_pg.ops import pool
from stylegan_pg.optim import moments
from stylegan_pg.optim.adam import Rates
from stylegan_pg.optim.ema import PowerAverage
from stylegan_pg.optim.optimizer_step import NetworkOptimizer
from stylegan_pg.rng import derive, generator
from stylegan_pg.systems.base import Side, System
from stylegan_pg.systems.catalogue import system_of
from stylegan_pg.systems.state import REMEDY, read_state
from stylegan_pg.training import compilation, transfer
from stylegan_pg.training.buffers import BufferMeans
from stylegan_pg.training.devices import Devices
from stylegan_pg.training.micro_batches import MicroBatches
from stylegan_pg.training.running import RunningState
from stylegan_pg.untrusted import whole_number

log = logging.getLogger(__name__)

SIDES: tuple[Side, Side] = ("G", "D")


class TrainState:
    """A system in its present phase, G_ema, and the optimizers of both sides."""

    FP16_SCALE = 65536.0  # initial loss scale

    G_ema: Any  # of G's class, whose attributes torch.nn.Module does not declare
    averages: list[PowerAverage]  # of G, beside G_ema
    optimizers: dict[str, NetworkOptimizer]
    table: SampleTable
    micro_batches: MicroBatches

    def __init__(self, config: Config, index: DatasetIndex, parallel: Devices, system: System | None = None):
        """
        Raises:
            UsageError: the configuration and the dataset do not fit together.
        """
        self.index, self.parallel = index, parallel
        self.device, self.dtype = parallel.device, getattr(torch, config.train.dtype)
        self.system = system or system_of(config)
        self.use(config)
        check_base(index, config)
        self.system.look_at(index)
        self.condition = condition_field(index, config.data.condition) if config.data.conditional else ""
        self.c_dim = condition_size(index, self.condition) if self.condition else 0
        if self.condition:
            conditions_of(index, index.table(config.resolution), self.condition)  # raises if images have none
        self.conditions: Conditions | None = None  # of the real images of the present phase
        self.noted: set[str] = set()  # notes that are logged once
        self.nimg = 0  # real images shown to D
        self.phase: Phase | None = None
        half = self.model.low_precision == "fp16"
        self.running = RunningState(loss_scale=config.train.loss_scale or (self.FP16_SCALE if half else 1.0))

    def use(self, config: Config) -> None:
        """Take a configuration, before the first phase."""
        self.config, self.model = config, config.model
        if self.device.type == "cpu" and self.model.low_precision == "fp16":
            self.model = dataclasses.replace(self.model, low_precision="fp32")  # CPUs have no fp16 convolutions
        self.system.use(dataclasses.replace(config, model=self.model))

    @property
    def G(self) -> Any:
        return self.system.G

    @property
    def D(self) -> Any:
        return self.system.D

    @property
    def alpha(self) -> float:
        return self.current.alpha(self.nimg)

    @property
    def current(self) -> Phase:
        assert self.phase is not None, "enter a phase first"
        return self.phase

    @property
    def fields(self) -> list[str]:
        """The fields of a batch besides the picture."""
        return list(dict.fromkeys([*filter(None, [self.condition]), *self.system.fields()]))

    # ------------------------------------------------------------------------------------------------ phases

    def enter(self, phase: Phase, init: transfer.Weights | None = None) -> list[str]:
        """Build the networks of a phase. Tensors with the same names are taken over from the networks of the phase
        before, or from `init`. Returns the names of the parameters that `init` does not hold. A collective call."""
        old = {"G": self.G, "D": self.D, "G_ema": self.G_ema} if self.phase else {}
        optimizers = self.optimizers if self.phase else {}
        pool.clear()  # results have other sizes from now on
        self._build(phase)
        new = self._take_over(old, init)
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        if old:
            copy_same_names(self.G_ema, old["G_ema"])
        elif init:
            transfer.adopt(self.G_ema, init["G_ema"])
        self.averages = [PowerAverage(width, self.G, phase.start) for width in self.config.ema.profiles]
        self.phase = phase
        self.optimizers = {side: self._optimizer(side) for side in SIDES}
        for side, optimizer in optimizers.items():
            if phase.optimizer == "carry":
                self.optimizers[side].restore(optimizer.gather())
            optimizer.close()
        self.check_ranks(f"the networks at the start of {phase}")
        self.buffers = BufferMeans(self.system.net.values())
        self.micro_batches = MicroBatches(phase, self.running.micro_batches.get(self.phase_key, 0))
        if self.config.train.compile:
            self._compile()
        return new

    def _compile(self) -> None:
        count = max(map(len, self.micro_batches.parts), default=0)

        def trial() -> None:
            if count:
                self.system.trial(count, self.device, self.dtype)

        if fault := compilation.compile_system(self.system, trial):
            self._note_once(f"train.compile: {self.current} cannot be compiled here and runs eagerly: {fault}")
        elif names := ", ".join(self.system.not_compiled()):
            self._note_once(f"train.compile: what differentiates twice cannot be compiled and runs eagerly: {names}")

    def _note_once(self, note: str) -> None:
        if note not in self.noted:
            log.info(f"note: {note}")
        self.noted.add(note)

    def _build(self, phase: Phase) -> None:
        self.table = self.index.table(phase.resolution)
        self.conditions = conditions_of(self.index, self.table, self.condition) if self.condition else None
        full, channels = self.config.resolution, self.index.channels
        shape = NetworkShape(phase.resolution, full, phase.fade, channels, self.c_dim, phase.mbstd_group)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.config.seed, "init", phase.index))
            self.system.build(shape, self.conditions)
        if count := self.system.references():
            with dist.together():
                self.system.refer(*self._references(count))

    def _references(self, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Real pictures [count, C, H, W] in [-1, 1] that follow from the seed, and their conditions."""
        g = generator(self.config.seed, "references")
        chosen = torch.randint(len(self.table), [count], generator=g).tolist()
        images = read_batch(self.table, chosen)
        if not images.is_floating_point():
            images = images.float().div(127.5).sub(1)
        return images, None if self.conditions is None else self.conditions.at(chosen)

    def _take_over(self, old: Mapping[str, Any], init: transfer.Weights | None) -> list[str]:
        """Take over weights from the phase before or from `init`, and move the networks to their device."""
        new = []
        if old:
            for side in SIDES:
                copy_same_names(self.system.net[side], old[side])
        elif init:
            new = [f"{side}/{n}" for side in SIDES for n in transfer.adopt(self.system.net[side], init.get(side, {}))]
            self.system.lacks({name.removeprefix("D/") for name in new if name.startswith("D/")})
        self.system.G, self.system.D = self._place(self.G), self._place(self.D)
        return new

    def _place(self, net: torch.nn.Module) -> torch.nn.Module:
        net = net.to(self.device, self.dtype)
        return to_channels_last(net) if self.config.train.channels_last else net

    def _optimizer(self, side: Side) -> NetworkOptimizer:
        """Make the optimizer of a side."""
        frozen = set(self.system.frozen()) if side == "D" else set()
        moves = curves.is_curve(self.config.optim.beta2)
        return self.parallel.prepare(self.system.net[side], frozen, self.rates(side), moves)

    def rates(self, side: Side) -> Rates:
        """The optimizer's numbers for a side at this nimg; with lazy updates, those of Karras et al. 2020, appendix B.
        Steps of SGD are proportional to gradients, so that its numbers need no change."""
        optim = self.config.optim
        ratio = 1.0 if optim.name == "sgd" else lazy_ratio(self.system.optimizer_steps(side))
        lr = learning_rate(self.config, side, self.current.resolution, self.nimg)
        beta2 = number(optim, "beta2", self.current.resolution, self.nimg)
        return Rates(lr * ratio, optim.beta1**ratio, beta2**ratio)

    def use_rates(self) -> None:
        """Give the optimizers their numbers for the step that begins at this nimg."""
        for side in SIDES:
            self.optimizers[side].use(self.rates(side))

    def check_ranks(self, what: str) -> None:
        """Raise RunError if the ranks hold different parameters or buffers. A collective call."""
        dist.check_same([t for net in self.system.net.values() for t in (*net.parameters(), *net.buffers())], what)

    def train_only(self, side: Side | None) -> None:
        """Enable gradients of the weights of one side, except frozen ones, and disable those of the other; None enables
        all."""
        for name, net in self.system.net.items():
            net.requires_grad_(side in (None, name))
        for p in self.system.frozen().values() if side == "D" else ():
            p.requires_grad_(False)

    def halve(self, where: str) -> str:
        """Halve the micro-batch after a rank ran out of memory; return a warning. Raises RunError as MicroBatches."""
        note = self.micro_batches.halve(where, self.nimg)
        self.running.micro_batches[self.phase_key] = self.micro_batches.size
        return note

    @property
    def phase_key(self) -> str:
        """The key of the micro-batch that fits into memory: the phase and its configured micro-batch."""
        return f"{self.current.index}_{self.current.micro_batch}"

    # ----------------------------------------------------------------------------------------- for checkpoints

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, {"part/name": tensor}. A collective call."""
        nets = {name: net.state_dict() for name, net in self._nets().items()}
        averages = {name: part for average in self.averages for name, part in average.parts().items()}
        return checkpoint.flatten(
            nets
            | averages
            | dict(self.system.tensors())
            | {f"opt_{side}": optimizer.gather() for side, optimizer in self.optimizers.items()}
        )

    def _nets(self) -> dict[str, Any]:
        return {"G": self.G, "D": self.D, "G_ema": self.G_ema}

    def load(self, tensors: dict[str, torch.Tensor], since: Mapping[str, int] | None = None) -> None:
        """Load what `tensors` returned in a phase with networks of the same form.

        Averages of widths that were not kept before begin at this nimg.

        Args:
            since: {PowerAverage.name: nimg at its start}; the start of the phase for those that are not in it.

        Raises:
            UsageError: the networks have another form, or an average did not begin within the phase.
        """
        nets = self._nets()
        parts = {part: checkpoint.part_of(tensors, part) for part in [*nets, *(f"opt_{side}" for side in SIDES)]}
        try:
            for name, net in nets.items():
                tensor_file.check_tensors(parts[name], net.state_dict(), f"the checkpoint's {name}")
            for side in SIDES:
                parameters = dict(nets[side].named_parameters())
                name = self.config.optim.name
                named = f"the checkpoint's state of {name} of {side}"
                moments.check_optimizer(parts[f"opt_{side}"], parameters, named, name)
            kept = self._kept_averages(tensors)
            further = {part: (own, checkpoint.part_of(tensors, part)) for part, own in self.system.tensors().items()}
            for part, (own, found) in further.items():
                if found:  # otherwise it begins here
                    tensor_file.check_tensors(found, own, f"the checkpoint's {part}")
        except ValueError as error:
            raise UsageError(
                f"{error}, as the configuration has it: take the configuration that the run was started with, or "
                f"restore another checkpoint in {self.config.run}"
            ) from None
        for name, net in nets.items():
            net.load_state_dict(parts[name])
        for side, optimizer in self.optimizers.items():
            optimizer.restore(parts[f"opt_{side}"])
        for own, found in further.values():
            for name in found:
                own[name].copy_(found[name])
        self._load_averages(kept, since or {})

    def _kept_averages(self, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """{PowerAverage.name: its parts} in a checkpoint. Raises ValueError if they are of another form."""
        kept = {}
        for average in self.averages:
            parts = {name: checkpoint.part_of(tensors, name) for name in average.parts()}
            if any(parts.values()):
                for name, expected in average.parts().items():
                    tensor_file.check_tensors(parts[name], expected, f"the checkpoint's {name}")
                kept[average.name] = parts
        return kept

    def _load_averages(
        self, kept: Mapping[str, Mapping[str, Mapping[str, torch.Tensor]]], since: Mapping[str, int]
    ) -> None:
        for average in self.averages:
            if parts := kept.get(average.name):
                began = since.get(average.name, self.current.start)
                named = f"the checkpoint's {average.name}: nimg at its start"
                average.load(parts, whole_number(began, self.current.start, self.nimg, named, REMEDY))
                continue
            average.restart(self.G, self.nimg)
            if self.nimg > self.current.start:
                log.warning(
                    f"ema.profiles: the average of width {average.width:g} begins here, as the checkpoint holds none; "
                    "until the next phase it covers what follows, and is not combined with older ones"
                )

    def statistics(self) -> dict[str, float]:
        """The numbers of the running state that are logged."""
        skipped = {"skipped": self.running.skipped} if self.running.skipped else {}
        return self.system.statistics() | {"loss_scale": self.running.loss_scale} | skipped

    def load_running(self, training: Mapping[str, Any], system: Mapping[str, Any]) -> None:
        """Take over a checkpoint's state of the training loop and of the system; what is missing keeps its initial
        value."""
        initial = {"loss_scale": self.running.loss_scale}
        self.running = read_state(RunningState, initial | dict(training), "the state of training")
        self.system.load_state(system)
