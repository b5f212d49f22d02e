"""Replaying the operations of an update instead of starting them one by one (CUDA graphs).

Where operations follow from the kind of a step alone (tests/test_steady_steps.py), a GPU can be given all of them at
once. `Replay.run` runs a part of a step as it is for a few times, then captures its operations, and from then on only
replays them. A replay reads and writes the same memory as the capture did, so what changes from step to step must be in
memory that stays the same: `hold` copies it there, and random streams on the device are seeded anew. What the part did
in Python (its result, gradients, the memory of the step) is restored after each replay.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from stylegan_pg.errors import UsageError
from stylegan_pg.rng import derive, generator
from stylegan_pg.systems.base import Step
from stylegan_pg.systems.draws import mapped

log = logging.getLogger(__name__)

WARMUP = 3  # times that a part runs before it is captured: kernels are chosen, and Adam makes its moments
T = TypeVar("T")


class Graphs(Protocol):
    """A way to capture operations."""

    def begin(self) -> None:
        """Start with new memory, when nothing that was captured is needed any more."""
        ...

    def capture(self, function: Callable[[], T], streams: Iterable[torch.Generator]) -> tuple[Callable[[], None], T]:
        """Run a function, whose operations use these random streams, and return what replays them, and its result."""
        ...


class CudaGraphs:
    """CUDA's graphs. Those of one phase share a pool of memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.begin()

    def begin(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], T], streams: Iterable[torch.Generator]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        for stream in streams:
            graph.register_generator_state(stream)
        torch.cuda.synchronize(self.device)
        # Other threads copy batches to the device at the same time. If a capture fails, the outer
        # context returns to the present stream.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            result = function()
        graph.replay()  # a capture computes nothing
        return graph.replay, result


def graphs_of(choice: str, device: torch.device) -> Graphs | None:
    """How updates are captured on a device, by train.graphs.

    Raises:
        UsageError: train.graphs=on, where there is no CUDA device.
    """
    if choice == "on" and device.type != "cuda":
        raise UsageError("train.graphs=on needs a CUDA device: take train.graphs=auto, which uses one if there is one")
    return CudaGraphs(device) if choice != "off" and device.type == "cuda" else None


class Part(NamedTuple):
    """A captured part of a step, and what it did in Python."""

    replay: Callable[[], None]
    result: Any
    grads: list[tuple[torch.nn.Parameter, torch.Tensor]]
    memory: dict[Any, Any]  # that it added to the step's


class Replay:
    """The captured parts of the steps of one phase. Without `graphs`, every part runs as it is."""

    def __init__(self, graphs: Graphs | None = None):
        self.graphs = graphs
        if graphs is not None:
            graphs.begin()
        self.parts: dict[Hashable, Part | int] = {}  # or how often it ran
        self.held: dict[Hashable, torch.Tensor] = {}
        self.streams: dict[tuple[str, tuple[int, ...]], torch.Generator] = {}
        self.asked: dict[Hashable, list[tuple[str, tuple[int, ...]]]] = {}  # the streams of each part
        self.running: Hashable = None
        self.capturing = self.paused = False
        self.noted: set[str] = set()

    def hold(self, key: Hashable, tree: Any) -> Any:
        """Nested tensors with the same values, in memory that stays the same for a key."""
        if self.graphs is None:
            return tree
        number = iter(range(1 << 30))

        def held(t: torch.Tensor) -> torch.Tensor:
            place = (key, next(number), t.shape, t.stride(), t.dtype)
            if place in self.held:
                return self.held[place].copy_(t)
            self.held[place] = t.clone()
            return self.held[place]

        return mapped(tree, held)

    def stream(self, step: Step, purpose: str, *key: int) -> torch.Generator:
        """A random stream on the device, seeded by (seed, purpose, nimg, key), for the part that runs."""
        if self.graphs is None or self.paused:
            return generator(step.seed, purpose, step.nimg, *key, device=step.device)
        name = (purpose, key)
        stream = self.streams.setdefault(name, torch.Generator(step.device))
        if not self.capturing:  # otherwise it was seeded before
            self._seed(step, name)
            self.asked.setdefault(self.running, []).append(name)
        return stream

    def _seed(self, step: Step, name: tuple[str, tuple[int, ...]]) -> None:
        purpose, key = name
        self.streams[name].manual_seed(derive(step.seed, purpose, step.nimg, *key))

    def run(self, key: Hashable, step: Step, function: Callable[[], T], parameters: Iterable[torch.nn.Parameter]) -> T:
        """The result of `function`, which is a part of a step: computed, captured or replayed.

        Args:
            key: everything that decides on its operations, and all numbers that they contain.
            parameters: those whose gradients it may set or use.
        """
        part = self.parts.get(key, 0)
        if self.graphs is None or self.paused:
            return function()
        if isinstance(part, Part):
            for name in self.asked.get(key, []):
                self._seed(step, name)
            part.replay()
            for p, grad in part.grads:
                p.grad = grad
            step.memory.update(part.memory)
            return part.result
        self.parts[key] = part + 1
        parameters = list(parameters)
        grads = [(p, p.grad) for p in parameters]
        with self._observed(key, step, capturing=part >= WARMUP):
            if part < WARMUP:
                return function()
            try:
                return self._captured(key, step, function, parameters)
            except RuntimeError as error:
                for p, grad in grads:  # which the function may have cleared
                    p.grad = grad
                self.refuse(f"{type(error).__name__}: {str(error).splitlines()[0]}")
        with self._observed(key, step, capturing=False):
            return function()

    def pause(self, key: str) -> None:
        """Replay and capture nothing in this step, because the number of a key of the configuration changes with it; ""
        if there is none."""
        self.paused = bool(key)
        if key:
            self.note(f"steps run as they are while {key} changes")

    def note(self, reason: str) -> None:
        """Say, once, what is not replayed for a while."""
        if self.graphs is not None and reason not in self.noted:
            log.info(f"note: train.graphs: {reason}")
            self.noted.add(reason)

    @property
    def captured(self) -> int:
        """How many parts are replayed."""
        return sum(isinstance(part, Part) for part in self.parts.values())

    def refuse(self, reason: str) -> None:
        """Replay nothing from now on, and say why, once."""
        if self.graphs is not None:
            log.warning(f"train.graphs: steps of this phase are not replayed: {reason}")
            self.graphs, self.parts, self.held = None, {}, {}

    def _captured(
        self, key: Hashable, step: Step, function: Callable[[], T], parameters: list[torch.nn.Parameter]
    ) -> T:
        assert self.graphs is not None
        before = dict(step.memory)
        streams = [self.streams[name] for name in dict.fromkeys(self.asked.get(key, []))]
        replay, result = self.graphs.capture(function, streams)
        grads = [(p, p.grad) for p in parameters if p.grad is not None]
        memory = {name: value for name, value in step.memory.items() if before.get(name) is not value}
        if not self.captured:
            log.info("train.graphs: steps are captured, and replayed from now on")
        self.parts[key] = Part(replay, result, grads, memory)
        return result

    @contextlib.contextmanager
    def _observed(self, key: Hashable, step: Step, *, capturing: bool) -> Iterator[None]:
        """Note the streams that a part asks for; before a capture, seed those that it asked for the last time."""
        if capturing:
            for name in self.asked.get(key, []):
                self._seed(step, name)
        else:
            self.asked[key] = []
        self.running, self.capturing = key, capturing
        try:
            yield
        finally:
            self.running, self.capturing = None, False
