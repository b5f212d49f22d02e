"""What a system of networks and losses is to the engine that trains it.

A system names its networks, says which optimizer steps make up a training step (`updates`), and what follows from sums
over the global batch (`after_step`). The engine (training/engine.py) deals the batch out to ranks and micro-batches,
runs the losses, sums gradients and moves the weights; nothing in a system knows of ranks.

There are exactly two sides, G and D, each one module with one optimizer. A system of several generators or
discriminators puts them into one module (torch.nn.ModuleDict), and heads such as classifiers live in D.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from stylegan_pg.config import Config
from stylegan_pg.data.conditions import Conditions
from stylegan_pg.data.datasets.index import DatasetIndex
from stylegan_pg.networks import NetworkShape
from stylegan_pg.rng import generator
from stylegan_pg.systems.draws import Draws, Request, Streams, mapped, rows_of

Side = Literal["G", "D"]
Values = Mapping[str, torch.Tensor]  # "loss" [n], differentiable, and further values [n] that are only reported
Sums = Mapping[str, tuple[float, int]]  # name -> (sum over the global batch, number of images in it)


class Numbers:
    """Numbers on the device that change from step to step, in memory that stays the same."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[torch.Tensor, Callable[[Step], float]]] = {}

    def renew(self, step: Step) -> None:
        """Give them the values that they have at a step."""
        for t, get in self.known.values():
            t.fill_(get(step))

    def of(self, name: str, get: Callable[[Step], float], step: Step) -> torch.Tensor:
        if name not in self.known:
            self.known[name] = torch.full([], get(step), dtype=step.dtype, device=step.device), get
        return self.known[name][0]


@dataclass
class Step:
    """What all losses of one training step share; everything random in it follows from (seed, nimg)."""

    seed: int
    nimg: int  # real images shown to D before this step
    number: int  # index of the step within its phase
    batch: int  # images of the global batch
    alpha: float  # weight in [0, 1] of the newest blocks, see Phase.alpha
    resolution: int
    rank: int
    device: torch.device
    dtype: torch.dtype
    net: Mapping[str, Any]  # the networks by name: "G", "D"
    share: Sequence[int]  # places in the global batch of this rank's images
    real: torch.Tensor  # [len(share), C, H, W] in [-1, 1], or what System.real makes of the fields
    draws: Draws  # see Context.draw
    stream: Callable[..., torch.Generator]  # stream(step, purpose, *key): on the device, see Context.rng
    numbers: Numbers  # see Context.number
    condition: torch.Tensor | None = None  # [len(share), c_dim], one-hot classes or vectors, or None
    fields: Mapping[str, Any] = field(default_factory=dict)  # the further fields of the batch, see Context.field
    memory: dict[Any, Any] = field(default_factory=dict)  # what losses keep for later losses of this step


@dataclass
class Context:
    """What a loss is given: one micro-batch of a step."""

    step: Step
    share: Sequence[int]  # places in the global batch of the loss of this rank's images
    part: list[int]  # places of the micro-batch's images in that share
    index: int  # number of the micro-batch
    count: int  # images of the global batch of the loss
    add: Callable[[str, torch.Tensor], None]  # adds a tensor to a sum over the global batch that the loss has announced

    @property
    def G(self) -> Any:
        return self.step.net["G"]

    @property
    def D(self) -> Any:
        return self.step.net["D"]

    @property
    def real(self) -> torch.Tensor:
        """Real images [n, C, H, W] in [-1, 1]."""
        return rows_of(self.step.real, self.part)

    @property
    def condition(self) -> torch.Tensor | None:
        """Conditions [n, ...] of the real images, or None."""
        return None if self.step.condition is None else rows_of(self.step.condition, self.part)

    def field(self, name: str) -> Any:
        """The values of a further field of the batch for this micro-batch's images: pictures as `real`, masks and
        classes as whole numbers (uint8 [n, 1, H, W], int64 [n]), vectors [n, size], arrays [n, ...], texts a list."""
        values = self.step.fields[name]
        return [values[i] for i in self.part] if isinstance(values, list) else rows_of(values, self.part)

    @property
    def rows(self) -> list[int]:
        """Places of the micro-batch's images in the global batch of the loss."""
        return [self.share[i] for i in self.part]

    def draw(self, key: Any, make: Callable[[Streams], Any]) -> Any:
        """Random inputs of this micro-batch's images, on the device.

        Args:
            key: names them; what has the same key is drawn once a step.
            make: draws them for the global batch, from streams(purpose, *further numbers), as nested tuples, lists and
                dictionaries of tensors that have a row for each image. It is also called for later steps, so it may use
                (in a closure) the system and constants, but not this context.
        """
        values = self.step.draws.get(key, Request(make, self.share))
        return mapped(values, lambda t: rows_of(t, self.part))

    def rng(self, purpose: str, *key: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A random stream on the host, or on the step's device, that is a function of (seed, purpose, nimg, key)."""
        if torch.device(device) == self.step.device:
            return self.step.stream(self.step, purpose, *key)
        return generator(self.step.seed, purpose, self.step.nimg, *key, device=device)

    def number(self, name: str, get: Callable[[Step], float]) -> torch.Tensor:
        """A number that changes from step to step as a tensor of shape [] on the device.

        Args:
            name: names it. get: gives it for a step, also for later ones.
        """
        return self.step.numbers.of(name, get, self.step)

    @property
    def alpha(self) -> float | torch.Tensor:
        """The fade's alpha, as networks take it: a tensor of shape [] within a fade, 1 outside."""
        return self.number("alpha", lambda step: step.alpha) if self.step.alpha < 1 else 1.0

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed once a step; `key` names it."""
        if key not in self.step.memory:
            self.step.memory[key] = make()
        return self.step.memory[key]

    def to_device(self, t: torch.Tensor) -> torch.Tensor:
        """On the networks' device, floating-point numbers in their dtype."""
        return t.to(self.step.device, self.step.dtype if t.is_floating_point() else t.dtype)


@dataclass(frozen=True)
class Loss:
    """One sum of per-image values whose gradients an update takes.

    The gradient is that of `weight / count` times the sum over the global batch, or of the plain mean where the weight
    is None.
    """

    name: str  # in messages
    values: Callable[[Context], Values]
    count: int  # images that it is computed of
    group: int = 1  # images that are dealt out together, see schedule.deal; count must be a multiple
    of_batch: bool = True  # they are the batch's images; otherwise only `rows` of a context mean something
    weight: float | None = None
    reports: tuple[str, ...] = ()  # names of the values, besides "loss", whose sums are wanted
    sums: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # name -> zeros: tensors to be summed up, see Context
    twice: bool = False  # differentiates a gradient, which torch.compile cannot do
    counts: bool | None = None  # its passes change running statistics and other buffers; None: unless it is `twice`

    @property
    def changes_buffers(self) -> bool:
        return not self.twice if self.counts is None else self.counts

    @property
    def factor(self) -> float:
        """What the sum over the global batch is multiplied by."""
        return (1.0 if self.weight is None else self.weight) / self.count


@dataclass(frozen=True)
class Update:
    """One optimizer step of one side."""

    trains: Side
    losses: Sequence[Loss]
    limit: float = 0.0  # of every weight of that side after the step, 0: none (Arjovsky et al. 2017, algorithm 1)

    @property
    def changes_buffers(self) -> bool:
        return any(loss.changes_buffers for loss in self.losses)

    @property
    def name(self) -> str:
        return " + ".join(loss.name for loss in self.losses)


class System:
    """Networks, and how a training step changes them."""

    G: Any  # of classes whose attributes torch.nn.Module does not declare
    D: Any

    @property
    def net(self) -> dict[str, Any]:
        return {"G": self.G, "D": self.D}

    def use(self, config: Config) -> None:
        """Take a configuration, before the first phase."""
        raise NotImplementedError

    def look_at(self, index: DatasetIndex) -> None:
        """Learn what the networks and losses depend on of the dataset, such as a number of classes; after `use`, before
        the first phase.

        Raises:
            UsageError: it lacks something; the message says what, and how to pack it.
        """

    def real(self, fields: Mapping[str, Any]) -> torch.Tensor:
        """What D is shown of a batch as real: the pictures [n, C, H, W], unless a system derives something else from
        the values of the fields, which are as Context.field describes them."""
        return fields["image"]

    def fields(self) -> Sequence[str]:
        """The fields of a batch that losses read besides the picture and its condition (data/loader/parts.py lists the
        names)."""
        return ()

    def inputs(self) -> Sequence[str]:
        """Those of `fields` that G takes, for a generator that changes pictures rather than making them of latents."""
        return ()

    def images(self, G: Any, z: torch.Tensor, c: torch.Tensor | None, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Images [n, C, H, W] of about [-1, 1] that G makes of `inputs`, for sample grids.

        Args:
            G: a generator of the system, such as G_ema.
            z: latents [n, z_dim]. c: conditions [n, c_dim] or None.
            inputs: the values of the fields that the method `inputs` names, as Context.field describes them.
        """
        raise NotImplementedError

    def build(self, form: NetworkShape, conditions: Conditions | None) -> None:
        """Make G and D, with fresh weights, for a phase. `conditions` are those of the real images, None for an
        unconditional run."""
        raise NotImplementedError

    def references(self) -> int:
        """Number of real pictures that the networks keep, to normalise others by them; 0: none."""
        return 0

    def refer(self, images: torch.Tensor, c: torch.Tensor | None) -> None:
        """Give the networks, which `build` has just made, these pictures: [references, C, H, W] in [-1, 1], and their
        conditions [references, c_dim] or None. They are the same on all ranks."""

    def updates(self, step: Step) -> Iterable[Update]:
        """The optimizer steps of a training step, in order. It is also asked about the next step while this one is
        computed, to draw its inputs, and therefore changes nothing."""
        raise NotImplementedError

    def after_step(self, step: Step, sums: Sums, tensors: Mapping[str, torch.Tensor]) -> None:
        """Change what follows from sums over the global batch: running means, the probability of augmentation, w_avg.
        `tensors` holds only the sums of updates that were made."""

    def draws_depend_on(self) -> Any:
        """What the draws of a step (Context.draw) depend on besides (seed, nimg), such as a probability that changes
        during training."""
        return None

    def constants(self, step: Step) -> Hashable:
        """The numbers that the losses of a step contain besides tensors; a captured step is replayed only where these
        are equal. None: the steps of this system cannot be replayed."""
        return None

    def moving(self, step: Step) -> str:
        """The key of a number of the configuration that changes with this step and cannot be on the device, so that the
        step is not replayed; "" if there is none."""
        return ""

    def optimizer_steps(self, side: Side) -> list[int]:
        """k for each update of a side that is made at every k-th step besides its main one (schedule.lazy_ratio)."""
        return []

    def lacks(self, names: set[str]) -> None:
        """Learn that the weights which the run starts from did not hold these parameters of D."""

    def start_augmenting(self, p: float) -> bool:
        """Take over a probability of augmentation, in [0, 1], from the run that the weights come from; False if nothing
        of this run follows from it."""
        return False

    def compiled(self) -> list[nn.Module]:
        """The modules whose forward passes torch.compile may take."""
        return [self.G, self.D]

    def not_compiled(self) -> list[str]:
        """Names of losses that torch.compile cannot take."""
        return []

    def trial(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        """A forward and backward pass of `count` images through what `compiled` names."""
        raise NotImplementedError

    def frozen(self) -> dict[str, nn.Parameter]:
        """Parameters of D, by name, that are not trained."""
        return {}

    def statistics(self) -> dict[str, float]:
        """Numbers of the system's state that are logged with each line of statistics."""
        return {}

    def state(self) -> dict[str, Any]:
        """What training changes besides weights and buffers and what does not follow from nimg, as plain JSON values: a
        checkpoint keeps it. systems/state.py has the means for a typed one."""
        return {}

    def check_state(self, state: Mapping[str, Any], named: str) -> None:
        """
        Raises:
            UsageError: beginning with `named`, if `state`, which comes from a file, cannot be loaded.
        """

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; parts that are missing keep their initial values."""

    def tensors(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """{part: {name: tensor}}, tensors of the present phase that training changes in place besides those of the
        networks: a checkpoint keeps them."""
        return {}

    def snapshot_description(self) -> dict[str, Any]:
        """{"network": name, "kwargs": arguments} that build G_ema again from a snapshot."""
        raise NotImplementedError
