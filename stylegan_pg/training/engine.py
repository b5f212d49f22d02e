"""The engine: one training step of any system.

The result of a step is a function of the state and of (seed, nimg). For each update of the system, the engine runs its
losses micro-batch by micro-batch, sums the gradients over the ranks, and moves the weights of that side, unless a loss
or a gradient is not finite. If a rank runs out of memory, all ranks halve their micro-batches and compute the update
again, and those after it.

The host starts the operations of all updates one after another and reads what they gave once, at the end of the step.
Until then the device alone knows whether an update was made.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from stylegan_pg.config.schedule import ema_beta, ema_half_life
from stylegan_pg.data.loader.loader import Batch
from stylegan_pg.distributed import process_group as dist
from stylegan_pg.monitoring.step_clock import IdleDevice
from stylegan_pg.ops import pool
from stylegan_pg.optim import ema
from stylegan_pg.optim.optimizer_step import OUT_OF_MEMORY, Verdict, out_of_memory
from stylegan_pg.systems.base import Context, Loss, Numbers, Step, Update
from stylegan_pg.systems.draws import Draws, Kind
from stylegan_pg.training.compilation import eager
from stylegan_pg.training.inputs import on_device
from stylegan_pg.training.replay import Graphs, Replay
from stylegan_pg.training.stats import StepStats
from stylegan_pg.training.train_state import TrainState

CLEAN_STEPS = 2000  # number of steps without an overflow after which the loss scale is doubled


@dataclass
class Outcome:
    """What a training step did."""

    stats: dict[str, tuple[float, int]] = field(default_factory=dict)  # name -> (sum, images), over all ranks
    stopping: bool = False  # whether any rank wants to stop after this step
    faults: list[str] = field(default_factory=list)  # updates that were left out, with the reasons
    overflows: list[str] = field(default_factory=list)  # updates that were left out because the loss scale was too high
    notes: list[str] = field(default_factory=list)  # warnings, such as a halved micro-batch
    moved: bool = False  # whether any update was made
    began_bad: bool = False  # whether a fault came before that, so that the state at the step's begin is its cause


class Made(NamedTuple):
    """An update whose operations were started: whether the weights moved is known when the host reads the verdict."""

    update: Update
    verdict: Verdict
    stats: StepStats
    memory: dict[Any, Any]  # of the step before this update


class Engine:
    """Trains a system, step by step."""

    def __init__(self, state: TrainState, graphs: Graphs | None = None):
        """`graphs`: how updates are captured, to be replayed; None: they are not."""
        self.state = state
        self.outcome = Outcome()
        self.graphs = graphs
        self.idle = IdleDevice(state.device)
        self.entered: Any = None

    def step(self, batch: Batch, *, stop: Callable[[], bool] = lambda: False) -> Outcome:
        """Train on this rank's share of a global batch of real images, and advance nimg by the global batch.

        The host starts all operations of the step before it reads what they gave. `stop` is called when the work is
        started and returns whether this rank wants to stop. A collective call.

        Raises:
            RunError: out of memory with the smallest possible micro-batch; PeersLost: another rank is gone.
        """
        state, self.outcome = self.state, Outcome()
        state.parallel.use_scale(state.running.loss_scale)
        step = self.begin(batch)
        updates, made = self.updates(step), list[Made]()
        while True:
            made += self.start(step, updates[len(made) :])
            self.prepare(step)
            stats, values, faults = self.read(made, stop())
            if OUT_OF_MEMORY not in faults:
                break
            short = faults.index(OUT_OF_MEMORY)  # the later ones were held, on all ranks
            step.memory.clear()
            step.memory.update(made[short].memory)
            made = made[:short]
            self.halve(updates[short])
        self.settle(step, made, faults, stats, values)
        return self.outcome

    def updates(self, step: Step) -> list[Update]:
        """The updates of a step, whose draws begin with this."""
        updates = list(self.state.system.updates(step))
        kind, draws = _kind(updates), step.draws
        self.replay.pause(self.state.system.moving(step))
        draws.begin(kind, step.seed, step.nimg)
        draws.values = self.replay.hold(("draws", kind), draws.values)
        step.numbers.renew(step)
        constants = self.state.system.constants(step)
        if constants is None:
            self.replay.refuse("the system does not say which numbers its losses contain")
        parts = tuple(map(tuple, self.state.micro_batches.parts))
        self.constants = (kind, constants, self.state.parallel.scale is None, parts)
        self.places = {id(update): place for place, update in enumerate(updates)}  # several may have the same losses
        return updates

    def start(self, step: Step, updates: Sequence[Update]) -> list[Made]:
        """Start the operations of updates, without waiting for any of them."""
        made, halted, self.short = list[Made](), None, False
        for update in updates:
            made.append(self.update(update, step, halted))
            short = made[-1].verdict.short
            halted = short if halted is None else halted + short
        return made

    def prepare(self, step: Step) -> None:
        """Draw the random inputs of the next step, if it is of this phase, while the device computes this one."""
        after = dataclasses.replace(step, nimg=step.nimg + step.batch, number=step.number + 1)
        if after.nimg < self.state.current.end:
            step.draws.prepare(_kind(self.state.system.updates(after)), after.seed, after.nimg)

    def read(self, made: Sequence[Made], flag: bool) -> tuple[StepStats, list[float], list[str]]:
        """The statistics of updates, what `StepStats.vector` gives for them and the flag, and for each update why it
        was held, or "". Only here does the host wait for the device."""
        stats = StepStats()
        for one in made:
            stats.join(one.stats)
        vector = stats.vector(self.state.device, float(flag))
        numbers = iter(torch.cat([*(one.verdict.values for one in made), vector]).tolist())
        faults = [one.verdict.fault(list(itertools.islice(numbers, len(one.verdict.values)))) for one in made]
        return stats, list(numbers), faults

    def settle(
        self, step: Step, made: Sequence[Made], faults: Sequence[str], stats: StepStats, values: Sequence[float]
    ) -> None:
        """Draw the consequences of what the host has read, which are the same on all ranks."""
        state, outcome, before = self.state, self.outcome, self.state.system.draws_depend_on()
        for one, fault in zip(made, faults, strict=True):
            if fault:
                self.leave_out(one.update, fault)
            else:
                outcome.moved = True
        (outcome.stats, bad), outcome.stopping = stats.totals(values[:-1]), values[-1] > 0
        if bad and outcome.faults:
            outcome.faults.append(f"not finite: {', '.join(bad)}")
        moved = [one.stats.tensors for one, fault in zip(made, faults, strict=True) if not fault]
        tensors = {name: dist.all_reduce(t) for each in moved for name, t in each.items()}
        state.system.after_step(step, outcome.stats, tensors)
        if state.system.draws_depend_on() != before:
            step.draws.discard()
        self.average(step)
        self.rescale()
        state.nimg += step.batch

    def average(self, step: Step) -> None:
        """Move G_ema and the averages of ema.profiles towards G."""
        state, config = self.state, self.state.config

        def weight_at(step: Step) -> float:
            half_life = ema_half_life(config, step.resolution, step.nimg)
            return 1 - ema_beta(step.batch, step.nimg, half_life, config.ema.rampup)

        weight = step.numbers.of("weight of G in G_ema", weight_at, step)
        averages = [(average, self.weight_of(average, step)) for average in state.averages]

        def move() -> None:
            ema.update(state.G_ema, state.G, weight)
            for average, weight_of_it in averages:
                average.update(state.G, weight_of_it)

        self.replay.run("average", step, move, [])

    def weight_of(self, average: ema.PowerAverage, step: Step) -> torch.Tensor:
        """The weight of G in an average after this step, as a number on the device."""
        return step.numbers.of(
            f"weight of G in {average.name}", lambda step: average.weight(step.batch, step.nimg + step.batch), step
        )

    def begin(self, batch: Batch) -> Step:
        """Collect what the losses of this step share."""
        state, phase = self.state, self.state.current
        if self.entered is not state.optimizers:  # which each entry into a phase makes
            self.enter()
        state.use_rates()
        fields = on_device(batch, state)
        fields["image"] = state.system.real(fields)
        conditions = state.conditions
        condition = None if conditions is None else conditions.of(fields[conditions.field]).to(state.dtype)
        fields, condition = self.replay.hold("batch", (fields, condition))
        return Step(
            seed=state.config.seed,
            nimg=state.nimg,
            number=phase.step(state.nimg),
            batch=phase.batch,
            alpha=state.alpha,
            resolution=phase.resolution,
            rank=dist.rank(),
            device=state.device,
            dtype=state.dtype,
            net=state.system.net,
            share=state.micro_batches.share,
            real=fields.pop("image"),
            draws=self.draws,
            stream=self.replay.stream,
            numbers=self.numbers,
            condition=condition,
            fields=fields,
        )

    def enter(self) -> None:
        """Begin a phase with its networks."""
        state, self.entered = self.state, self.state.optimizers
        self.draws, self.numbers = Draws(state.device, state.dtype), Numbers()
        self.replay = Replay(self.graphs)
        if self.graphs and (state.config.train.engine != "accelerate" or state.config.train.compile):
            self.replay.refuse("train.engine=deepspeed and train.compile=true run as they are")

    # ---------------------------------------------------------------------------------------------- an update

    def update(self, update: Update, step: Step, halted: torch.Tensor | None) -> Made:
        """Start one optimizer step, which the device does not make if the loss or a gradient is not finite, or if
        `halted` is not 0. What is between the sums over the ranks may be replayed."""
        state, optimizer = self.state, self.state.optimizers[update.trains]
        losses = ((loss.name, loss.factor) for loss in update.losses)
        key = (self.places[id(update)], update.trains, update.name, update.limit, *losses, self.constants)
        parameters = list(optimizer.named.values())
        memory = dict(step.memory)
        if halted is not None:  # before the first update, the host has just waited for the device
            self.idle.look()
        optimizer.overlaps = self.replay.graphs is None  # sums over the ranks are not captured, but made between parts
        state.train_only(update.trains)
        total, short, stats = self.replay.run(("passes", *key), step, lambda: self.all_passes(update, step), parameters)
        self.idle.look()
        reports = self.replay.hold(("reports", update.trains, update.name), optimizer.exchange(total, short, halted))
        sums = self.replay.hold(("buffers", update.trains, update.name), state.buffers.exchange(update.changes_buffers))
        key = ("step", optimizer.host_numbers, *key)
        verdict = self.replay.run(key, step, lambda: self.optimizer_step(update, reports, sums), parameters)
        state.train_only(None)
        self.short = self.short or short
        return Made(update, verdict, stats, memory)

    def all_passes(self, update: Update, step: Step) -> tuple[torch.Tensor, bool, StepStats]:
        """Add up the gradients of an update -> (the sum of the losses over this rank's images, whether this rank ran
        out of memory and others must hear of it, statistics)."""
        state, optimizer = self.state, self.state.optimizers[update.trains]
        while True:
            self.stats = StepStats()
            for loss in update.losses:
                self.stats.expect(loss.count, *loss.reports)
                self.stats.expect_tensors(loss.sums)
            state.buffers.begin()
            optimizer.begin(update.name, sum(len(state.micro_batches.of(loss)[1]) for loss in update.losses))
            if self.short:  # it misses what an update before should have left, and will be made again
                return torch.zeros([], device=state.device), True, self.stats
            total, short = self.gradients(update, step)
            if self.replay.graphs is not None:
                optimizer.fill()  # so that no gradient is made outside of captured memory
            if not short or dist.world() > 1:
                return total, short, self.stats
            state.buffers.restore()
            self.halve(update)

    def optimizer_step(self, update: Update, reports: torch.Tensor, sums: Sequence[torch.Tensor]) -> Verdict:
        """The optimizer's step, and what follows from it."""
        optimizer = self.state.optimizers[update.trains]
        verdict = optimizer.step(reports)
        self.state.buffers.finish(verdict.held, sums)
        if update.limit:
            optimizer.clip(update.limit, verdict.held)
        return verdict

    def gradients(self, update: Update, step: Step) -> tuple[torch.Tensor, bool]:
        """Add up the gradients of all losses of an update -> (the sum of the losses over this rank's images, whether
        it ran out of memory before it had made all passes)."""
        total, short = None, False
        try:
            for loss in update.losses:
                total = self.passes(loss, update, step, total)
        except RuntimeError as error:  # handled below, where the tensors of the passes are no longer referenced
            if not out_of_memory(error):
                raise
            short = True
        if short and self.state.device.type == "cuda":
            torch.cuda.empty_cache()
        return torch.zeros([], device=self.state.device) if total is None else total, short

    def passes(self, loss: Loss, update: Update, step: Step, total: torch.Tensor | None) -> torch.Tensor | None:
        """The forward and backward passes of a loss; adds its sum over this rank's images to `total`."""
        share, parts = self.state.micro_batches.of(loss)
        buffers = self.state.buffers
        for k, part in enumerate(parts):
            buffers.restore()
            x = Context(step, share, part, k, loss.count, self.stats.add_tensor)
            with eager(loss.twice and self.state.config.train.compile):
                values = loss.values(x)
                self.stats.add({name: v for name, v in values.items() if name != "loss"})
                mine = values["loss"].sum()
                total = mine.detach() if total is None else total + mine.detach()
                self.state.optimizers[update.trains].backward(mine, loss.factor)
            if loss.changes_buffers:
                buffers.add(len(part), loss.count)
        return total

    def halve(self, update: Update) -> None:
        """Halve the micro-batch after an update for which a rank had too little memory; but first, where steps are
        replayed, do without that, as captured steps keep much memory."""
        pool.clear()
        if self.graphs is not None:
            self.graphs = None
            self.replay.refuse(f"a rank ran out of memory in {update.trains}, {update.name}")
            return
        self.outcome.notes.append(self.state.halve(f"{update.trains}, {update.name}"))

    def leave_out(self, update: Update, fault: str) -> None:
        """Note that an update was not made. Losses are checked before they are scaled, so they are never overflows."""
        what = f"{update.trains}, {update.name}"
        if fault != "the loss" and self.state.running.loss_scale > 1:
            self.outcome.overflows.append(f"{what}: {fault}")
            return
        where = fault if fault == "the loss" else f"the gradient of {fault}"
        self.outcome.faults.append(f"{what}: {where} is not finite")
        self.outcome.began_bad = self.outcome.began_bad or not self.outcome.moved

    def rescale(self) -> None:
        """Halve the loss scale after an overflow, which does not count as a fault; double it after CLEAN_STEPS without
        one."""
        state, now, scale = self.state, self.state.running, self.state.running.loss_scale
        if self.outcome.overflows:
            now.loss_scale, now.clean_steps = scale / 2, 0
        elif state.model.low_precision == "fp16" and not self.outcome.faults:
            now.clean_steps += 1
            if now.clean_steps >= CLEAN_STEPS:
                now.loss_scale, now.clean_steps = min(2 * scale, max(state.FP16_SCALE, scale)), 0


def _kind(updates: Iterable[Update]) -> Kind:
    """What steps have in common whose losses draw the same."""
    return tuple((update.trains, loss.name, loss.count) for update in updates for loss in update.losses)
